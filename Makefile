# Set-up is kept in .venv; its stamps are made anew when what they depend on changes.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow lint docs clean

demo: .venv/.installed
	$(BIN)/mixerzoo search --budget-ms 5

test: lint
	$(BIN)/pytest

test-slow: .venv/.installed-dev
	$(BIN)/pytest -m slow

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.installed-dev
	$(BIN)/python tests/test_docs.py --write

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing mixerzoo into .venv (once; one to three minutes)"
	$(PIP) -e .
	@touch $@

# mamba-ssm is the numerical reference of the mamba mixer. On a CPU it is built without its kernels and never
# imported; where even that fails, the tests that read it skip and say so.
.venv/.installed-dev: .venv/.installed
	$(PIP) -e '.[dev]'
	@MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(PIP) --no-build-isolation --no-deps mamba-ssm \
		|| echo "mamba-ssm cannot be built here: its parity tests will skip"
	@touch $@
