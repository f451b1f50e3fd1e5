"""Every hook is tested and documented; what the documentation says is what the code does."""

import inspect
import re
from pathlib import Path

import pytest

from mixerzoo import hookspecs, testing
from mixerzoo.registry import temporary_plugin
from mixerzoo.spec import OFFERS, Caps
from mixerzoo.testing import run_checks

TESTS = Path(__file__).parent
GUIDE = (TESTS.parent / "docs" / "plugins.md").read_text()
HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("register_"))
PYTHON = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


def rows(header):
    """Return the first two cells of each row of the guide's table that starts with `header`."""
    table = GUIDE[GUIDE.index(f"| {header} |") :].partition("\n\n")[0]
    return [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in table.splitlines()[2:]]


def test_these_are_the_hooks():
    assert HOOKS == [
        "register_commands",
        "register_datasets",
        "register_hosts",
        "register_mixers",
        "register_runtimes",
    ]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_tested(hook):
    others = [path.read_text() for path in TESTS.rglob("test_*.py") if path != Path(__file__)]
    assert any(re.search(rf"\b{hook}\b", text) for text in others)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_with_its_exact_signature_and_sentence(hook):
    function = getattr(hookspecs, hook)
    (signature,) = re.findall(rf"^def {hook}\(.*\) -> None:$", inspect.getsource(function), re.MULTILINE)
    assert f"@hookimpl\n{signature} ..." in GUIDE
    assert f"### {hook}\n" in GUIDE
    assert inspect.getdoc(function) in GUIDE


def test_the_table_of_offers_is_the_list_of_offers():
    assert rows("offer") == [(f"`{name}`", meaning) for name, meaning in OFFERS.items()]


def test_the_table_of_claims_is_the_list_of_claims():
    assert [name for name, _ in rows("claim")] == [f"`{name}`" for name in vars(Caps())]


def load_example(inherit):
    """Return the spec of the guide's first example, with its `inherit` if asked for."""
    namespace = {}
    exec(PYTHON[0], namespace)
    (source,) = (block for block in PYTHON if block.startswith("def inherit"))
    exec(source, namespace)
    found = []
    namespace["register_mixers"](found.append)
    (spec,) = found
    if inherit:
        object.__setattr__(spec, "inherit", namespace["inherit"])
    return spec, namespace


@pytest.mark.parametrize("inherit", [False, True])
def test_the_mixer_of_the_guide_passes_its_checks(inherit):
    spec, _ = load_example(inherit)
    results = {result.name: result for result in run_checks(spec)}
    assert [result.message for result in results.values() if result.failed] == []
    assert results["inherit"].passed == inherit
    assert results["readout"].passed


def test_the_test_file_of_the_guide_works():
    spec, namespace = load_example(inherit=False)

    class Plugin:
        register_mixers = staticmethod(namespace["register_mixers"])

    (source,) = (block for block in PYTHON if "parametrize_with_checks" in block)
    with temporary_plugin(Plugin()):
        exec(source, namespace)
    (mark,) = namespace["test_conformance"].pytestmark
    assert len(mark.args[1]) == len(testing.checks_for(spec))
