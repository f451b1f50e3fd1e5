"""Small C kernels for what PyTorch has no fast way to say on a CPU: recurrences whose state fits the cache.

They are compiled once, with the compiler that is found on the machine, into the user's cache, and only for that
machine's processor. Where there is none (or with MIXERZOO_KERNELS=0), the mixers do the same in PyTorch, to the same
values: the parameters know nothing of it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
# Sums may be taken in another order (so that they become vectors); NaN and infinity stay what they are.
FLAGS = (
    "-O3",
    "-march=native",
    "-std=gnu11",
    "-shared",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-ffp-contract=fast",
)
# With OpenMP where the compiler has it, else on one thread.
OPTIONS = (("-fopenmp",), ("-fopenmp-simd",))
TIMEOUT_S = 120


@cache
def kernel(name: str) -> ctypes.CDLL | None:
    """Return the library compiled from `name`.c, or None where it cannot be had (the reason is logged)."""
    if os.environ.get("MIXERZOO_KERNELS", "1") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None or os.name != "posix":
        logger.info("no C compiler: %s runs in PyTorch", name)
        return None
    try:
        return ctypes.CDLL(str(_compiled(name, compiler)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home
        logger.info("the kernel %s cannot be compiled, it runs in PyTorch: %s", name, error)
        return None


def _compiled(name: str, compiler: str) -> Path:
    """Return the path of the compiled kernel, compiling it if it is not in the cache."""
    source = HERE / f"{name}.c"
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, timeout=TIMEOUT_S
    ).stdout
    parts = [
        source.read_bytes(),
        (HERE / "vector.h").read_bytes(),
        version,
        _processor(),
        repr(FLAGS).encode(),
    ]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixerzoo" / "kernels"
    library = folder / f"{name}-{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Whole or not at all: several processes may come here at once.
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work) / library.name
        for option in OPTIONS:
            command = [compiler, *FLAGS, *option, str(source), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
            if not done.returncode:
                made.replace(library)
                return library
    raise OSError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")


def _processor() -> bytes:
    """Return what tells one kind of processor from another: a cache may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return repr(platform.uname()[4:]).encode()
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join(sorted(kept)).encode()


def usable(name: str, *tensors: Tensor) -> bool:
    """Say whether the kernel can take these tensors: float32 on a CPU, outside of torch.compile and torch.export."""
    if torch.compiler.is_compiling():
        return False
    if any(t.device.type != "cpu" or t.dtype != torch.float or type(t) not in PLAIN for t in tensors):
        return False
    return kernel(name) is not None


# Not tensors that only stand for others (functorch, fake tensors), which have no memory to point at.
PLAIN = (Tensor, torch.nn.Parameter)


def call(name: str, function: str, *arguments: Tensor | int) -> None:
    """Call a function of a kernel with contiguous tensors and integers, and the number of threads PyTorch uses.

    Raises:
        MemoryError: if the kernel could not get the memory it needs.
    """
    library = kernel(name)
    assert library is not None
    passed = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_long(a) for a in arguments]
    if getattr(library, function)(*passed, ctypes.c_int(torch.get_num_threads())):
        raise MemoryError(f"{function}: not enough memory")
