"""What runs a model when it is timed: PyTorch as it is, torch.compile, ONNX Runtime.

`prepare` is called with the number of threads that the runs will have, `torch.get_num_threads()`: compiled code and
sessions settle it then. Whatever is slow (compiling, exporting) happens there, and never in a run. What a runtime
computes is compared with PyTorch once, since the latency of something else is worth nothing.
"""

from __future__ import annotations

import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from mixerzoo.errors import MixerzooError
from mixerzoo.export.onnx import PACKAGES as ONNX_PACKAGES
from mixerzoo.export.onnx import export_onnx, onnx_packages, open_session
from mixerzoo.export.quiet import quietly, reason
from mixerzoo.spec import RuntimeSpec

Run = Callable[[], object]

# Largest difference from PyTorch, relative to the largest output, that is rounding. Compiled code keeps float32
# inside of fused operations where PyTorch rounds after each, hence the others.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Students share the code of their modules: PyTorch's limits would send all but the first few back to eager.
ANY_NUMBER = {"recompile_limit": 10_000, "accumulated_recompile_limit": 100_000}


def prepare_eager(model: nn.Module, example: torch.Tensor) -> Run:
    """Run the model as PyTorch runs it, without gradients."""
    return _without_gradients(lambda: model(example), example)


def prepare_inductor(model: nn.Module, example: torch.Tensor) -> Run:
    """Compile the model for the example's shape.

    Raises:
        MixerzooError: where it cannot be compiled, or computes something else.
    """
    expected = _output(prepare_eager(model, example))
    with _preparing("inductor", "compiled"), torch._dynamo.config.patch(ANY_NUMBER):
        compiled = torch.compile(_with_its_own_code(model, example), dynamic=False)
        run = _without_gradients(compiled, example)
        found = _output(run)
    _demand_agreement("inductor", expected, found)
    return run


def prepare_onnxruntime(model: nn.Module, example: torch.Tensor) -> Run:
    """Export the model for the example's shape, and open a session on it; its file is gone afterwards.

    Raises:
        MixerzooError: where a package is missing, for another dtype or device than float32 on a CPU, and where the
            model cannot be exported, or computes something else.
    """
    if example.dtype != torch.float32 or example.device.type != "cpu":
        dtype = str(example.dtype).removeprefix("torch.")
        raise MixerzooError(
            f"runtime 'onnxruntime' runs float32 on the CPU, not {dtype} on {example.device}; "
            "use --dtype float32 --device cpu, or --runtime inductor"
        )
    ort = onnx_packages("runtime 'onnxruntime'")
    expected = _output(prepare_eager(model, example))
    with tempfile.TemporaryDirectory(prefix="mixerzoo-") as folder, _preparing("onnxruntime", "exported"):
        path = Path(folder) / "model.onnx"
        export_onnx(model, example, path)
        session = open_session(ort, path, torch.get_num_threads())
    inputs = {session.get_inputs()[0].name: example.numpy()}

    def run() -> object:
        return torch.from_numpy(session.run(None, inputs)[0])

    _demand_agreement("onnxruntime", expected, _output(run))
    return run


EAGER = RuntimeSpec(name="eager", prepare=prepare_eager, summary="PyTorch as it is")
INDUCTOR = RuntimeSpec(
    name="inductor", prepare=prepare_inductor, summary="torch.compile; needs a C++ compiler"
)
ONNXRUNTIME = RuntimeSpec(
    name="onnxruntime",
    prepare=prepare_onnxruntime,
    summary="ONNX Runtime on a CPU; needs the extra onnx, and mixers that can be exported",
    needs_export=True,
    packages=ONNX_PACKAGES,
)
BUILTIN_RUNTIMES = (EAGER, INDUCTOR, ONNXRUNTIME)


def _without_gradients(call: Run, example: torch.Tensor) -> Run:
    def run() -> object:
        with torch.inference_mode():
            out = call()
        if example.device.type != "cpu":  # it returns before it is done
            torch.accelerator.synchronize(example.device)
        return out

    return run


def _with_its_own_code(model: nn.Module, example: torch.Tensor) -> Run:
    """Return a function that runs the model and shares its code object with no other.

    Compiled graphs hang on code objects: with a common one, every run would look for its graph among those of all
    models, and none would go before the function does.
    """

    def forward() -> object:
        return model(example)

    return types.FunctionType(forward.__code__.replace(), globals(), "forward", closure=forward.__closure__)


@contextmanager
def _preparing(runtime: str, done: str) -> Iterator[None]:
    """Turn whatever goes wrong inside the block into one line; the model itself ran before."""
    try:
        with quietly():
            yield
    except Exception as error:
        raise MixerzooError(
            f"runtime '{runtime}': the model cannot be {done} ({reason(error)}); {_way_out(error)}"
        ) from error


def _way_out(error: BaseException) -> str:
    if any(sign in str(error) for sign in ("InvalidCxxCompiler", "CppCompileError")):
        return "install a C++ compiler (g++ or clang++; CXX names another), or use --runtime eager"
    return "--runtime eager takes it"


def _output(run: Run) -> torch.Tensor:
    out = run()
    assert isinstance(out, torch.Tensor)
    return out


def _demand_agreement(runtime: str, expected: torch.Tensor, found: torch.Tensor) -> None:
    """Raise MixerzooError if a runtime computes something else than PyTorch.

    Where PyTorch's own output is not finite there is nothing to compare with; nobody will choose such a model.
    """
    if not expected.isfinite().all():
        return
    tolerance = TOLERANCE[expected.dtype]
    expected, found = expected.float(), found.float()
    difference = float("inf")
    if found.shape == expected.shape:
        difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not difference <= tolerance:
        raise MixerzooError(
            f"runtime '{runtime}' computes something else than PyTorch: the outputs differ by {difference:.2g} of "
            f"the largest, where {tolerance:g} can be rounding; use --runtime eager"
        )
