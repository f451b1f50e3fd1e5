"""What users install: the wheel's content, a third-party plugin beside it, the editable install, light imports."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import mixerzoo

ROOT = Path(__file__).parent.parent
PACKAGES = ("mixerzoo", "mixerzoo_mixers", "mixerzoo_search")

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="builds from a git checkout")


def run(*command, cwd, **environment):
    """Run a command away from the source tree and return what it prints."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MIXERZOO_STRICT")
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def build_wheel(source, out):
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=source)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what git knows or would take: no build outputs, nothing that is ignored."""
    copy = tmp_path_factory.mktemp("source")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def plugin_wheel(source, tmp_path_factory):
    return build_wheel(source / "plugins" / "mixerzoo-shift", tmp_path_factory.mktemp("plugin_wheel"))


@pytest.fixture(scope="module")
def fresh_env(wheel, plugin_wheel, tmp_path_factory):
    """The Python of a new environment with both wheels in it; their dependencies are borrowed from this one.

    The editable install of this environment does not come along: its hook is in a .pth file, and those are read
    only in an environment's own site-packages.
    """
    folder = tmp_path_factory.mktemp("fresh") / "env"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, *install, wheel, plugin_wheel, cwd=folder)
    own = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def content(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel):
    tops = {name.partition("/")[0] for name in content(wheel)}
    assert tops == {*PACKAGES, f"mixerzoo-{mixerzoo.__version__}.dist-info"}


def test_the_wheel_is_complete(wheel, source):
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in zip(
            PACKAGES,
            (
                source / "mixerzoo",
                source / "plugins" / "mixerzoo_mixers",
                source / "search" / "mixerzoo_search",
            ),
            strict=True,
        )
        for path in folder.rglob("*")
        if path.is_file()
    }
    found = {name for name in content(wheel) if ".dist-info/" not in name}
    assert found == expected
    assert {f"{package}/py.typed" for package in PACKAGES} <= found


def test_the_wheel_ships_the_embedded_teacher(wheel):
    assert "mixerzoo/teachers/digits_vit.safetensors" in content(wheel)


def test_the_wheel_has_its_entry_points_and_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        folder = f"mixerzoo-{mixerzoo.__version__}.dist-info"
        listed = archive.read(f"{folder}/entry_points.txt").decode()
        assert archive.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "[console_scripts]\nmixerzoo = mixerzoo.cli:main" in listed
    assert (
        "[mixerzoo]\nbuiltin = mixerzoo.builtin\nmixers = mixerzoo_mixers\nsearch = mixerzoo_search.plugin"
        in listed
    )
    assert "pytest11" not in listed


def test_the_plugins_wheel_holds_the_plugin_only(plugin_wheel):
    tops = {name.partition("/")[0] for name in content(plugin_wheel)}
    assert tops == {"mixerzoo_shift", "mixerzoo_shift-0.1.0.dist-info"}


WHERE = """
import mixerzoo, mixerzoo_mixers, mixerzoo_search
print(mixerzoo.__file__, mixerzoo_mixers.__file__, mixerzoo_search.__file__)
"""


def test_the_wheels_packages_are_imported_in_a_fresh_environment(fresh_env, tmp_path):
    files = run(fresh_env, "-W", "error", "-c", WHERE, cwd=tmp_path).split()
    assert all(Path(file).is_relative_to(fresh_env.parent.parent) for file in files)
    for name in ("search", "plugins", "tests"):
        found = f"import importlib.util as u; print(u.find_spec('{name}'))"
        assert run(fresh_env, "-c", found, cwd=tmp_path) == "None\n"


REGISTRY = """
import json
from mixerzoo.registry import load_registry
from mixerzoo.testing import run_checks
registry = load_registry()
results = run_checks(registry.mixers.get("shift"))
print(json.dumps({
    "origin": str(registry.mixers.origin("shift")),
    "versions": registry.versions(),
    "broken": [str(broken) for broken in registry.broken],
    "passed": [r.name for r in results if r.passed],
    "failed": [r.message for r in results if r.failed],
}))
"""


def test_an_installed_plugin_is_found_and_passes_its_checks(fresh_env, tmp_path):
    found = json.loads(run(fresh_env, "-c", REGISTRY, cwd=tmp_path))
    assert found["origin"] == "mixerzoo-shift 0.1.0"
    assert found["versions"] == {"mixerzoo": mixerzoo.__version__, "mixerzoo-shift": "0.1.0"}
    assert found["broken"] == []
    assert found["failed"] == []
    assert {"shape", "any_length", "masks", "export", "inherit", "readout"} <= set(found["passed"])


@pytest.mark.slow
def test_a_search_takes_an_installed_plugins_mixer(fresh_env, tmp_path):
    listed = run(fresh_env, "-m", "mixerzoo", "mixers", cwd=tmp_path)
    rows = [line.split() for line in listed.splitlines()]
    assert ["mixerzoo_shift", "mixerzoo-shift", "0.1.0"] in rows
    assert any(row[:2] == ["shift", "S"] for row in rows)
    words = ("--mixers", "shift,none", "--budget", "80%", "--images", "40", "--trials", "4", "--threads", "1")
    words += ("--distill-steps", "0", "--finetune-minutes", "0", "--json")
    said = run(fresh_env, "-W", "error::UserWarning", "-m", "mixerzoo", "search", *words, cwd=tmp_path)
    summary = json.loads(said)
    assert summary["met"]
    chosen = {candidate for row in summary["pareto"] for candidate in row["plan"].values()}
    assert chosen & {"shift@0.5", "shift@1"}
    assert chosen <= {"keep", "none@1", "shift@0.5", "shift@1"}
    plugins = json.loads((tmp_path / "runs" / "digits_vit-80%" / "run.json").read_text())["identity"][
        "plugins"
    ]
    assert plugins["mixerzoo-shift"] == "0.1.0"
    loads = "import mixerzoo, sys; mixerzoo.load(sys.argv[1])"
    run(fresh_env, "-c", loads, tmp_path / "runs" / "digits_vit-80%", cwd=tmp_path)


def test_the_plugins_own_tests_pass(fresh_env, source, tmp_path):
    tests = shutil.copytree(source / "plugins" / "mixerzoo-shift" / "tests", tmp_path / "tests")
    said = run(fresh_env, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", tests, cwd=tmp_path)
    assert " passed" in said
    assert "skipped" not in said


@pytest.mark.slow
def test_a_new_plugin_passes_its_own_tests_once_it_is_installed(fresh_env, tmp_path):
    said = run(fresh_env, "-m", "mixerzoo", "new-plugin", "my-mixer", cwd=tmp_path)
    assert said.startswith("wrote mixerzoo-my-mixer;")
    plugin = tmp_path / "mixerzoo-my-mixer"
    # What is installed is removed in the end: the environment is that of all tests here.
    pip = (sys.executable, "-m", "pip", "--python", fresh_env)
    install = ("install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, *install, "--disable-pip-version-check", "--editable", plugin, cwd=tmp_path)
    try:
        tests = run(fresh_env, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", cwd=plugin)
        assert " passed" in tests
        assert "skipped" not in tests
        listed = run(fresh_env, "-m", "mixerzoo", "mixers", "my_mixer", cwd=tmp_path)
        assert "mixerzoo-my-mixer 0.1.0" in listed
        again = run(fresh_env, "-m", "mixerzoo", "check", "my_mixer", cwd=tmp_path)
        assert "FAIL" not in again
    finally:
        run(*pip, "uninstall", "--quiet", "--yes", "mixerzoo-my-mixer", cwd=tmp_path)


def test_the_editable_install_works_from_elsewhere(tmp_path):
    files = run(sys.executable, "-c", WHERE, cwd=tmp_path).split()
    inside = Path(mixerzoo.__file__).parent.parent
    assert all(Path(file).is_relative_to(inside) for file in files)


LIGHT = """
import sys
import {module}
print([name for name in {heavy!r} if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("mixerzoo", ["timm", "transformers", "mlflow", "optuna", "torchvision"]),
        ("mixerzoo.testing", ["timm", "transformers", "mlflow", "optuna", "pytest", "_pytest"]),
    ],
)
def test_imports_are_light(module, heavy, tmp_path):
    assert run(sys.executable, "-c", LIGHT.format(module=module, heavy=heavy), cwd=tmp_path) == "[]\n"
