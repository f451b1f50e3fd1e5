"""What one would take in place of a built-in mixer: public implementations of the same function, one file a library.

A peer takes the weights of a mixer and does the core by that library; around it, it has what the mixer has.
"""

from __future__ import annotations

from pathlib import Path

from mixer_parts.peers import of_fla, of_mambapy, of_timm, of_torch, of_transformers
from mixer_parts.peers.peer import Agreement, Missing, Peer, agreement

__all__ = ["Agreement", "Missing", "Peer", "agreement", "all_peers"]


def all_peers(fla: Path | None = None) -> list[Peer]:
    """Return every peer; `fla` is where the sources of flash-linear-attention are, if not installed."""
    return [
        *of_torch.PEERS,
        *of_timm.PEERS,
        *of_mambapy.PEERS,
        *of_transformers.PEERS,
        *of_fla.peers(fla),
    ]
