"""Under what a latency holds: batch size, threads, dtype, device, runtime, and the versions of what runs."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mixerzoo.errors import MixerzooError
from mixerzoo.registry import get_registry

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Under what a latency holds."""

    batch_size: int = 1
    threads: int = 2
    dtype: str = "float32"
    device: str = "cpu"
    runtime: str = "eager"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        return DTYPES[self.dtype]


def environment(conditions: Conditions) -> dict[str, Any]:
    """Return what a measurement depends on: machine, threads, dtype, runtime, versions."""
    packages: tuple[str, ...] = ("mixerzoo", "torch", "timm", "optuna", "mlflow", "scipy", "numpy")
    packages += get_registry().runtimes.get(conditions.runtime).packages
    return {
        "device": conditions.device,
        "device_name": device_name(conditions.device),
        "threads": conditions.threads,
        "dtype": conditions.dtype,
        "batch_size": conditions.batch_size,
        "runtime": conditions.runtime,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: version_of(name) for name in packages},
    }


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_device(device: str, dtype: str) -> None:
    """Raise MixerzooError for a device or dtype that is not to be had here."""
    if dtype not in DTYPES:
        raise MixerzooError(f"dtype '{dtype}': known: {', '.join(DTYPES)}")
    try:
        torch.zeros(1, device=device).item()  # on the meta device there is nothing to be read
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0][:120]
        raise MixerzooError(f"device '{device}' is not available ({reason}); use --device cpu") from None


def default_threads() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: str) -> str:
    """Return the name of a device as its maker has it, as far as it can be known."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def version_of(package: str) -> str:
    """Return the version of an installed distribution, or nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
