"""Every runtime computes what PyTorch does, with the threads that were asked for, or says in one line why not."""

import gc
import os
import shutil
import sys
import weakref

import pytest
import tiny
import tiny_search
import torch
from torch import nn

from mixerzoo import Caps, MixerSpec, MixerzooError, hookimpl, runtimes
from mixerzoo.hosts import assemble, fingerprint
from mixerzoo.latency import Conditions, Rounds, Stopwatch, by_shape, environment, threads
from mixerzoo.latency.reuse import know
from mixerzoo.latency.store import LatencyFile
from mixerzoo.plan import Candidate
from mixerzoo.progress import Reporter
from mixerzoo.registry import get_registry, temporary_plugin
from mixerzoo.student import make_replacement
from mixerzoo_search import search

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler"
)
FEW = ("static", "linear_attention", "mlp_slice")
BOTH = (pytest.param("inductor", marks=needs_compiler), "onnxruntime")


@pytest.fixture(autouse=True)
def _packages(request):
    """Skip what needs ONNX where it is not installed."""
    if "onnxruntime" in request.node.name:
        for name in runtimes.ONNX_PACKAGES:
            pytest.importorskip(name, reason="needs the extra onnx")


def stopwatch_of(runtime, teacher=None, **conditions):
    teacher = teacher or tiny.tiny_teacher()
    return Stopwatch(teacher, Conditions(**{"threads": 1, "runtime": runtime} | conditions))


def small_model():
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval()


def student_of(teacher):
    """A student with fresh weights at every attention site."""
    sites = [site for site in teacher.sites if site.kind == "attention"]
    modules = {site.name: make_replacement(Candidate("linear_attention"), site) for site in sites}
    return assemble(teacher.model, modules)


# To compile a whole teacher takes a while.
@pytest.mark.parametrize(
    "runtime", [pytest.param("inductor", marks=[needs_compiler, pytest.mark.slow]), "onnxruntime"]
)
def test_computes_the_same_and_is_timed(runtime):
    teacher = tiny.tiny_teacher()
    stopwatch = stopwatch_of(runtime, teacher, batch_size=2)
    student = student_of(teacher)
    with torch.no_grad():
        expected = student(stopwatch.example)
    torch.testing.assert_close(stopwatch.prepare(student)(), expected, rtol=1e-4, atol=1e-4)
    found = stopwatch.time({"student": student}, rounds=Rounds(least=2, most=2))
    assert found.keys() == {"teacher", "student"}
    assert all(timing.median > 0 for timing in found.values())
    assert fingerprint(teacher.model) == teacher.fingerprint


@pytest.mark.parametrize("runtime", BOTH)
def test_lets_go_of_what_it_prepared(runtime, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = small_model()
    gone = weakref.ref(model)
    run = getattr(runtimes, f"prepare_{runtime}")(model, torch.randn(2, 8))
    run()
    del model, run
    gc.collect()
    assert gone() is None
    assert not list(tmp_path.glob("mixerzoo-*"))


def test_onnxruntime_gets_the_threads(monkeypatch):
    import onnxruntime

    asked = []
    real = onnxruntime.InferenceSession

    def session(path, options, **others):
        asked.append(options.intra_op_num_threads)
        return real(path, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    stopwatch_of("onnxruntime", threads=3)
    assert asked == [3]


@needs_compiler
def test_inductor_compiles_for_the_threads():
    with threads(2):
        run = runtimes.prepare_inductor(small_model(), torch.randn(2, 8))
    with torch.compiler.set_stance("fail_on_recompile"):
        with threads(2):
            run()
        with threads(1), pytest.raises(RuntimeError, match="recompile"):
            run()


@needs_compiler
def test_inductor_keeps_models_apart():
    """One code object for all would reach PyTorch's limit, and then run eager without a word."""
    many, example = 4, torch.randn(2, 4)
    few = torch._dynamo.config.patch(recompile_limit=many - 2)
    runs = [runtimes.prepare_inductor(nn.Linear(4, 4).eval(), example) for _ in range(many)]
    with few, torch.compiler.set_stance("fail_on_recompile"):
        assert len({float(run().sum()) for run in runs}) == many


class Another(nn.Module):
    """Computes something else where it is compiled or exported."""

    def forward(self, x):
        return x * 1.01 if torch.compiler.is_compiling() else x


@pytest.mark.parametrize("runtime", BOTH)
def test_something_else_is_not_timed(runtime):
    prepare = getattr(runtimes, f"prepare_{runtime}")
    with pytest.raises(MixerzooError, match=rf"runtime '{runtime}' computes something else .* by 0\.01 of"):
        prepare(Another(), torch.randn(2, 3))


class Undecided(nn.Module):
    """Cannot be exported: what it does depends on values."""

    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


def test_onnxruntime_says_why_a_model_cannot_be_exported(capfd):
    with pytest.raises(MixerzooError, match=r"the model cannot be exported .* --runtime eager") as raised:
        runtimes.prepare_onnxruntime(Undecided(), torch.randn(2, 3))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 320
    assert capfd.readouterr().out == ""


@needs_compiler
def test_inductor_takes_what_depends_on_values():
    run = runtimes.prepare_inductor(Undecided(), torch.ones(2, 3))
    assert torch.equal(run(), torch.full((2, 3), 2.0))


def test_onnxruntime_runs_float32_on_the_cpu_only():
    with pytest.raises(
        MixerzooError, match="float32 on the CPU, not bfloat16 on cpu; use --dtype float32 --device cpu"
    ):
        stopwatch_of("onnxruntime", dtype="bfloat16")


@needs_compiler
def test_inductor_takes_bfloat16():
    run = runtimes.prepare_inductor(small_model().bfloat16(), torch.randn(2, 8, dtype=torch.bfloat16))
    assert run().dtype == torch.bfloat16


@pytest.mark.parametrize("package", runtimes.ONNX_PACKAGES)
def test_a_missing_package_is_named_before_anything_is_written(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    refuse(tmp_path, f"package '{package}' .* pip install 'mixerzoo\\[onnx\\]'", runtime="onnxruntime")


@needs_compiler
def test_a_missing_compiler_is_named_before_anything_is_written(tmp_path, monkeypatch):
    from torch._inductor import config

    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        refuse(tmp_path, "install a C\\+\\+ compiler .* or use --runtime eager", runtime="inductor")


def test_a_search_of_what_cannot_be_exported_is_refused(tmp_path):
    refuse(
        tmp_path,
        "no candidate for any site: runtime 'onnxruntime' needs mixers that claim 'exportable', "
        "not gated_delta",
        runtime="onnxruntime",
        mixers=("gated_delta",),
    )


def refuse(folder, message, **changes):
    data = tiny_search.write_npz(folder / "data.npz")
    options = tiny_search.FAST | {"mixers": ("none", "static")} | changes
    with (
        temporary_plugin(tiny_search.TinyPlugin(), name="tiny"),
        pytest.raises(MixerzooError, match=message) as raised,
    ):
        search("tiny", data, budget="60%", out=folder / "run", quiet=True, **options)
    assert "\n" not in str(raised.value)
    assert not (folder / "run").exists()


def test_the_environment_has_the_versions_of_the_runtime():
    plain = environment(Conditions())["versions"]
    found = environment(Conditions(runtime="onnxruntime"))["versions"]
    assert found.keys() - plain.keys() == set(runtimes.ONNX_PACKAGES)


class Plugin:
    """A mixer that claims to be exportable, and is not."""

    @hookimpl
    def register_mixers(self, register):
        register(
            MixerSpec(
                name="undecided",
                build=lambda: Undecided(),
                summary="",
                caps=Caps(any_length=True, exportable=True),
            )
        )


@pytest.mark.slow
def test_a_search_under_onnxruntime(tmp_path):
    data = tiny_search.write_npz(tmp_path / "data.npz")
    with (
        temporary_plugin(tiny_search.TinyPlugin(), name="tiny"),
        temporary_plugin(Plugin(), name="undecided"),
    ):
        result = search(
            "tiny",
            data,
            budget="85%",
            out=tmp_path / "run",
            tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
            quiet=True,
            runtime="onnxruntime",
            **tiny_search.FAST | {"mixers": ("none", "linear", "mlp_slice", "undecided"), "trials": 4},
        )
    tiny_search.check_summary(result.summary)
    assert result.summary["met"]
    assert result.summary["environment"]["runtime"] == "onnxruntime"
    failed = (result.path / "latency.json").read_text()
    assert "runtime 'onnxruntime': the model cannot be exported" in failed
    assert "undecided@1" not in (result.path / "latency_check.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runtime", "only"),
    [("eager", None), pytest.param("inductor", FEW, marks=needs_compiler), ("onnxruntime", FEW)],
)
def test_exportable_mixers_stand_at_all_sites_under_every_runtime(runtime, only, tmp_path):
    """Each at its smallest width, in a whole student of its own; one that fails would be named with its reason.

    Compiling takes long: where a runtime does, a few stand for all (tests/mixers/test_onnx.py has every one alone).
    """

    class Once(Stopwatch):
        time = tiny_search.ruled_time  # prepares and runs every student

    teacher = tiny.tiny_teacher()
    stopwatch = Once(teacher, Conditions(threads=1, runtime=runtime))
    shelf = get_registry().mixers
    wanted = {
        shape: [
            Candidate(spec.name, min(spec.widths))
            for spec in shelf
            if spec.caps.exportable and sites[0].kind in spec.kinds and (only is None or spec.name in only)
        ]
        for shape, sites in by_shape(teacher.sites).items()
    }
    found = know(stopwatch, wanted, LatencyFile(tmp_path, stopwatch), reporter=Reporter(quiet=True))
    assert {shape: row for shape, row in found.failed.items() if row} == {}
    assert found.measured == sum(map(len, wanted.values())) >= (20 if only is None else len(FEW))
