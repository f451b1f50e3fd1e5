"""The built-in mixers come through the plugin door, and the door alone decides what is there."""

from __future__ import annotations

import subprocess
import sys

from mixerzoo.registry import get_registry
from mixerzoo_mixers.naive import REFERENCES

from . import SPECS


def test_the_registry_has_them_all() -> None:
    registry = get_registry()
    for name, spec in SPECS.items():
        assert registry.mixers.get(name) is spec
        assert registry.mixers.origin(name).distribution == "mixerzoo"


def test_each_has_a_reference_a_letter_and_a_paper() -> None:
    assert set(REFERENCES) == set(SPECS)
    letters = [spec.letter for spec in SPECS.values()]
    assert len(set(letters)) == len(letters)
    assert "A" not in letters
    for spec in SPECS.values():
        assert spec.summary
        assert spec.cost
        assert spec.paper


def test_each_asks_only_for_what_its_widths_can_be_built_with() -> None:
    for spec in SPECS.values():
        assert len(spec.widths) == 1 or "width" in spec.asks
        assert not spec.caps.causal or spec.caps.per_token or "causal" in spec.asks
        assert spec.caps.any_length == ("tokens" not in spec.asks)


def test_importing_the_mixers_imports_nothing_heavy_but_torch() -> None:
    code = (
        "import sys, mixerzoo_mixers;"
        "print([m for m in ('timm', 'transformers', 'mlflow', 'optuna', 'mamba_ssm') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
