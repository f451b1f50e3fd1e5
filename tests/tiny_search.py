"""What a search needs to take seconds: a host that knows the tiny teacher by name, its data, and latency by rule.

Run as a script it is the command line with that host in it: tests that kill a search need a process of their own.
"""

import sys
from pathlib import Path

import numpy as np
import tiny

from mixerzoo import hookimpl
from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import Replacement, count_params
from mixerzoo.hosts.timm_vit import TimmVitHost
from mixerzoo.latency import REFERENCE, Stopwatch, Timing
from mixerzoo.registry import temporary_plugin

MIXERS = ("static", "pool", "linear", "none", "mlp_slice")
# Enough for every phase to have something to do.
FAST = {"trials": 10, "images": 40, "distill_steps": 4, "finetune_minutes": 0.004, "threads": 1}
OUTSIDE_MS, ATTENTION_MS, MLP_MS = 0.5, 1.0, 0.8
CLASSES = 10


class TinyHost(TimmVitHost):
    """Loads `tiny` and, without a head, `tiny_embedding`; everything else is timm's."""

    name = "tiny"

    def model_names(self):
        return ("tiny", "tiny_embedding")

    def load(self, name, checkpoint):
        if checkpoint is not None:
            raise MixerzooError("the tiny model has its own weights")
        return tiny.tiny_vit(num_classes=CLASSES if name == "tiny" else 0)

    def accepts(self, model):
        return False

    def architecture(self, model):
        return {"model": "tiny", "num_classes": model.num_classes}

    def create(self, architecture):
        return tiny.tiny_vit(num_classes=architecture["num_classes"])


class TinyPlugin:
    @hookimpl
    def register_hosts(self, register):
        register(TinyHost())


def pictures(count=80, *, seed=0):
    """Return smooth random images (count, 16, 16), uint8."""
    images = tiny.tiny_images(count, seed=seed)[:, 0].numpy()
    return np.clip(128 + 50 * images, 0, 255).astype(np.uint8)


def write_npz(path, *, count=80, labels=True):
    """Write pictures as an .npz file, with labels (which are random) or without."""
    arrays = {"x": pictures(count)}
    if labels:
        arrays["y"] = np.arange(count) % CLASSES
    np.savez(path, **arrays)
    return path


def ruled_ms(model):
    """Return a latency that follows from a student's modules alone."""
    ms = OUTSIDE_MS
    for block in model.blocks:
        for module, own in ((block.attn, ATTENTION_MS), (block.mlp, MLP_MS)):
            if isinstance(module, Replacement):
                ms += own * (0.05 + 0.9 * min(1.0, count_params(module) / 6000))
            else:
                ms += own
    return ms


def ruled_time(self, students, *, rounds=0, on_round=lambda done: None):
    """Stand in for Stopwatch.time: every student runs once, and takes what the rule says."""
    del rounds
    base = ruled_ms(self.teacher.model)
    found = {REFERENCE: Timing(median=base, low=base, high=base, ratio=1.0)}
    for name, model in students.items():
        self.prepare(model)()
        ms = ruled_ms(model)
        found[name] = Timing(median=ms, low=ms, high=ms, ratio=ms / base)
    on_round(1)
    return found


def main(arguments, *, ruled=True):
    """Run the command line with the tiny host."""
    from mixerzoo.cli import main as cli

    if ruled:
        Stopwatch.time = ruled_time
    with temporary_plugin(TinyPlugin(), name="tiny"):
        cli(arguments)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv[1:])
