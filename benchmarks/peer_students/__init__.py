"""What a user would pick instead of mixerzoo, one file each: the fastest way to a student within a latency budget."""

from __future__ import annotations

from functools import partial

from peer_students import blocks, one_mixer, pruned, searched, slimmer, tome
from peer_students.problem import Cannot, Exam, Ground, Made, Meter, Missing, Peer, Problem

OURS = "mixerzoo"
PEERS: dict[str, Peer] = {
    OURS: searched.make,
    "tome": tome.make,
    "drop_blocks": blocks.make,
    "slimmer": slimmer.make,
    "torch_pruning": pruned.make,
    **{f"one_mixer:{name}": partial(one_mixer.make, mixer=name) for name in one_mixer.CORE},
}

__all__ = ["OURS", "PEERS", "Cannot", "Exam", "Ground", "Made", "Meter", "Missing", "Peer", "Problem"]
