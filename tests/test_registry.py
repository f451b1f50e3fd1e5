"""The registry: everyone comes through the same door, and a broken plugin harms nobody but itself."""

import types
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import click
import pytest
from torch import nn

import mixerzoo
from mixerzoo import Caps, MixerSpec, MixerzooError, hookimpl
from mixerzoo.registry import Registry, Shelf, get_registry, load_registry, temporary_plugin
from mixerzoo.testing import ATTENTION_SITE


@dataclass(frozen=True)
class FakeDistribution:
    name: str
    version: str


class FakeEntryPoint(EntryPoint):
    """An entry point whose loading is a function of ours."""

    def __init__(self, name, load, distribution, version):
        super().__init__(name=name, value="fake", group="mixerzoo")
        vars(self).update(load=load, dist=FakeDistribution(distribution, version))


def entry(name, load, distribution=None, version="1.2"):
    return FakeEntryPoint(name, load, distribution or f"mixerzoo-{name}", version)


def mixer(name="good", **fields):
    return MixerSpec(
        **{"name": name, "build": lambda dim: nn.Linear(dim, dim), "summary": "a linear layer"} | fields
    )


def plugin(**functions):
    """Return a module with these functions, each marked as a hook."""
    module = types.ModuleType("a_plugin")
    for name, function in functions.items():
        function.__module__ = module.__name__
        setattr(module, name, hookimpl(function))
    return module


def offering(*specs):
    return plugin(register_mixers=lambda register: [register(spec) for spec in specs])


GOOD = entry("good", lambda: offering(mixer("good")))


@pytest.fixture(autouse=True)
def _lenient(monkeypatch):
    monkeypatch.delenv("MIXERZOO_STRICT", raising=False)


def raises(error):
    def function(*_args, **_kwargs):
        raise error

    return function


def two_mixers_one_bad(register):
    register(mixer("first"))
    register(MixerSpec(name="second", build=lambda dimm: nn.Identity(), summary=""))


def asks_for_more(register, registrar):
    pass


def undecorated():
    module = types.ModuleType("a_plugin")

    def register_mixers(register):
        register(mixer("quiet"))

    register_mixers.__module__ = module.__name__
    module.register_mixers = register_mixers
    return module


def undecorated_and_misspelt():
    module = undecorated()
    module.register_mixer = module.register_mixers
    del module.register_mixers
    return module


def offer(**fields):
    return lambda: plugin(register_mixers=lambda register: register(mixer(**{"name": "bad"} | fields)))


def imports_what_is_not_there():
    import mixerzoo_is_missing_this  # noqa: F401


BROKEN = {
    "import fails": (imports_what_is_not_there, "ModuleNotFoundError: No module named 'mixerzoo_is_missing_this'"),
    "import exits": (raises(SystemExit("no GPU")), "SystemExit: no GPU"),
    "import says much": (raises(RuntimeError("one\n  two\n\nthree")), "RuntimeError: one two three"),
    "hook raises": (lambda: plugin(register_mixers=raises(OSError("disk"))), "OSError: disk"),
    "hook asks for more": (lambda: plugin(register_mixers=asks_for_more), "{'registrar'} are declared in the hookimpl"),
    "misspelt hook": (lambda: plugin(register_mixer=lambda register: None), "unknown hook 'register_mixer'"),
    "misspelt, undecorated": (undecorated_and_misspelt, "'register_mixer': did you mean 'register_mixers'?"),
    "undecorated": (undecorated, "hook 'register_mixers' is never called: decorate it with @mixerzoo.hookimpl"),
    "unknown offer": (lambda: plugin(register_mixers=two_mixers_one_bad), "build asks for dimm; offered: dim, heads"),
    "greedy build": (offer(build=lambda **everything: nn.Identity()), "must name what it asks for"),
    "zero width": (offer(widths=(0, 1)), "widths (0, 1) must be numbers in (0, 8]"),
    "no width": (offer(widths=()), "widths () must be numbers in (0, 8]"),
    "width in words": (offer(widths=("half",)), "widths ('half',) must be numbers in (0, 8]"),
    "width twice": (offer(widths=(0.5, 0.5)), "widths (0.5, 0.5) name one twice"),
    "unknown kind": (offer(kinds={"convolution"}), "kinds ['convolution'] must be some of attention, mlp"),
    "bad name": (offer(name="My Mixer"), "mixer 'My Mixer': use a lower-case name"),
    "not a spec": (lambda: offering("shift"), "registers 'shift' as a mixer: it is not a MixerSpec"),
}  # fmt: skip


@pytest.mark.parametrize(("load", "error"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_plugin_is_listed_and_harms_nobody(load, error):
    registry = load_registry([entry("bad", load, version="0.9"), GOOD])
    (broken,) = registry.broken
    assert str(broken.origin) == "mixerzoo-bad 0.9"
    assert error in broken.error
    assert "\n" not in broken.error
    # All of a plugin or nothing of it: also the mixers it registered before it failed are gone.
    assert [spec.name for spec in registry.mixers] == ["good"]
    assert registry.versions() == {"mixerzoo-good": "1.2"}


@pytest.mark.parametrize(("load", "error"), BROKEN.values(), ids=BROKEN.keys())
def test_strict_makes_a_broken_plugin_an_error(load, error, monkeypatch):
    monkeypatch.setenv("MIXERZOO_STRICT", "1")
    with pytest.raises((Exception, SystemExit)) as caught:
        load_registry([entry("bad", load)])
    said = error.split("Error: ")[-1].removeprefix("SystemExit: ")
    assert said in " ".join(str(caught.value).split())


def test_strict_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("MIXERZOO_STRICT", "0")
    assert load_registry([entry("bad", raises(OSError("disk")))]).broken


def test_the_error_says_where_in_the_plugin_it_happened():
    registry = load_registry([entry("bad", imports_what_is_not_there)])
    assert __file__ in registry.broken[0].error
    assert "frozen" not in registry.broken[0].error


def test_two_plugins_with_one_name_are_both_named():
    first = entry("one", lambda: offering(mixer("shift")), "mixerzoo-one", "1.0")
    second = entry("two", lambda: offering(mixer("shift")), "mixerzoo-two", "2.0")
    registry = load_registry([second, first])
    assert str(registry.mixers.origin("shift")) == "mixerzoo-one 1.0"
    assert registry.broken[0].error == (
        "MixerzooError: mixer 'shift' of mixerzoo-two 2.0 is already registered by mixerzoo-one 1.0; "
        "rename one or uninstall one"
    )


def test_a_clash_with_a_built_in_is_blamed_on_the_newcomer():
    builtin = entry("mixers", lambda: offering(mixer("shift")), "mixerzoo", "0.1")
    other = entry("a", lambda: offering(mixer("shift")), "another", "1.0")
    registry = load_registry([other, builtin])
    assert str(registry.mixers.origin("shift")) == "mixerzoo 0.1"
    assert str(registry.broken[0].origin) == "another 1.0"


def test_an_imported_helper_is_not_taken_for_a_hook():
    module = offering(mixer())
    module.register_helper = raises(OSError("not ours"))  # defined in this test, not in the plugin
    assert not load_registry([entry("helped", lambda: module)]).broken


@pytest.mark.parametrize(
    ("hook", "shelf"),
    [("register_hosts", "hosts"), ("register_datasets", "datasets"), ("register_runtimes", "runtimes")],
)
def test_what_a_hook_registers_is_found_by_name(hook, shelf):
    thing = types.SimpleNamespace(name="thing")
    registry = load_registry([entry("some", lambda: plugin(**{hook: lambda register: register(thing)}))])
    assert registry.broken == []
    assert getattr(registry, shelf).get("thing") is thing
    assert list(getattr(registry, shelf)) == [thing]


def group_with(*names):
    cli = click.Group("mixerzoo")
    for name in names:
        cli.add_command(click.Command(name))
    return cli


def test_register_commands_adds_to_the_command_line():
    registry = load_registry(
        [entry("some", lambda: plugin(register_commands=lambda cli: cli.command("hello")(print)))]
    )
    cli = group_with("search")
    registry.add_commands(cli, strict=False)
    assert sorted(cli.commands) == ["hello", "search"]
    assert registry.broken == []


def half_way(cli):
    cli.command("hello")(print)
    raise OSError("disk")


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (half_way, "OSError: disk"),
        (lambda cli: cli.command("search")(print), "command 'search' exists already"),
    ],
    ids=["raises", "takes a name"],
)
def test_a_plugin_that_fails_in_register_commands_leaves_no_trace(function, error):
    registry = load_registry([entry("some", lambda: plugin(register_commands=function))])
    cli = group_with("search")
    before = dict(cli.commands)
    registry.add_commands(cli, strict=False)
    assert cli.commands == before
    assert error in registry.broken[0].error
    with pytest.raises((OSError, MixerzooError)):
        registry.add_commands(cli, strict=True)


def test_an_unknown_name_gets_a_suggestion():
    registry = load_registry([GOOD])
    with pytest.raises(MixerzooError, match=r"unknown mixer 'godo': did you mean 'good'\?"):
        registry.mixers.get("godo")
    with pytest.raises(MixerzooError, match="unknown mixer 'zzz': known: good"):
        registry.mixers.origin("zzz")
    with pytest.raises(MixerzooError, match="unknown host 'timm': known: none"):
        registry.hosts.get("timm")


def test_a_shelf_goes_back_to_its_snapshot():
    registry = load_registry([GOOD])
    before = registry.mixers.snapshot()
    registry.mixers.add(mixer("more"), registry.mixers.origin("good"))
    assert len(registry.mixers) == 2
    registry.mixers.restore(before)
    assert "more" not in registry.mixers
    assert "good" in registry.mixers


class Temporary:
    @hookimpl
    def register_mixers(self, register):
        register(mixer("for_a_while"))


class Misspelt:
    def register_mixer(self, register):
        register(mixer("for_a_while"))


def test_a_temporary_plugin_is_gone_afterwards():
    with temporary_plugin(Temporary(), name="notebook") as registry:
        assert str(registry.mixers.origin("for_a_while")) == "notebook 0"
        assert "notebook" in registry.versions()
    assert "for_a_while" not in get_registry().mixers
    assert "notebook" not in get_registry().versions()


def test_a_temporary_plugin_is_loaded_strictly():
    with pytest.raises(MixerzooError, match="unknown hook 'register_mixer'"), temporary_plugin(Misspelt()):
        pass


def test_the_registry_is_loaded_once():
    assert get_registry() is get_registry()
    assert isinstance(get_registry(), Registry)
    assert isinstance(get_registry().mixers, Shelf)


def test_the_installed_plugins_load():
    registry = get_registry()
    assert registry.broken == []
    assert registry.versions()["mixerzoo"] == mixerzoo.__version__


def test_build_receives_what_it_asks_for_and_no_more():
    seen = {}

    def build(dim, grid, width, hidden):
        seen.update(dim=dim, grid=grid, width=width, hidden=hidden)
        return nn.Identity()

    site = mixerzoo.Site(
        name="a", kind="attention", index=0, stage=0, dim=8, heads=2, tokens=7, prefix=1, grid=(2, 3)
    )
    spec = mixer(build=build, widths=[0.5, 1.0])
    assert spec.asks == ("dim", "grid", "width", "hidden")
    spec.make(site, 0.5)
    assert seen == {"dim": 8, "grid": (2, 3), "width": 0.5, "hidden": None}
    assert mixerzoo.Site.from_json(site.to_json()) == site


def test_what_build_raises_is_quoted_with_the_site():
    spec = mixer(build=lambda dim: nn.Linear(dim, dim // 0))
    with pytest.raises(
        MixerzooError, match=r"'good' at width 1 cannot be built for site 'blocks.0.attn': .*zero"
    ):
        spec.make(ATTENTION_SITE, 1.0)
    refusing = mixer(build=lambda grid: raises(MixerzooError("needs a square grid"))())
    with pytest.raises(MixerzooError, match=r"^needs a square grid$"):
        refusing.make(ATTENTION_SITE, 1.0)


def test_a_mixer_claims_nothing_unless_it_says_so():
    assert not any(vars(Caps()).values())
    assert mixer().letter == "G"


@pytest.mark.parametrize("letter", ["g", "GG", "G1", "Gab"])
def test_a_letter_is_a_capital_and_at_most_one_small_one(letter):
    assert mixer(letter="Go").letter == "Go"
    with pytest.raises(MixerzooError, match=f"letter '{letter}' must be a capital"):
        mixer(letter=letter)
