# Everything lives in .venv, and is set up by the first command that needs it. Its stamps are made anew when
# pyproject.toml or constraints.txt changes; until then nothing is installed twice.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# One process a core; a file's tests stay together, because they share what they set up.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow lint docs clean

demo: .venv/.installed
	$(BIN)/mixerzoo search --budget-ms 5

test: lint
	$(PYTEST)

# pytest exits with 5 where no test is marked slow.
test-slow: .venv/.installed-dev
	$(PYTEST) -m slow || test $$? -eq 5

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.installed-dev
	$(BIN)/python tests/test_docs.py --write

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# pip is the last thing that `venv` makes: without it an environment is not whole.
.venv/.installed: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "mixerzoo needs Python 3.11 or later; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/pip || "$(PYTHON)" -m venv .venv
	@echo "installing mixerzoo into .venv (once; some minutes)"
	@$(PIP) -e .
	@touch $@

# mamba-ssm is the numerical reference of the mamba mixer. It is built without its kernels and never imported;
# where even that fails, the tests that read its source skip and say so.
.venv/.installed-dev: .venv/.installed
	@echo "installing the development tools into .venv (once)"
	@$(PIP) -e '.[dev]'
	@MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
		$(PIP) --no-build-isolation --no-deps mamba-ssm > .venv/mamba-ssm.log 2>&1 \
		|| echo "mamba-ssm cannot be built here (.venv/mamba-ssm.log): tests that compare with it will skip"
	@touch $@
