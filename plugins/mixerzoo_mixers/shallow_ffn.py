"""Shallow feed-forward networks over the whole sequence, in place of attention.

Shapes: B batch, N tokens, D model width.
"""

from __future__ import annotations

from torch import Tensor, nn

from mixerzoo import Caps, MixerSpec
from mixerzoo_mixers._parts import check_tokens, zero_padding


class ShallowFfn(nn.Module):
    """A small network over the whole sequence: vec(x) -> LayerNorm -> Linear -> LeakyReLU -> LayerNorm -> Linear.

    (B, N, D) -> (B, N, D), with N*D / 256 hidden units at width 1 (the paper's XS), at least 8.
    """

    def __init__(self, dim: int, tokens: int, width: float) -> None:
        super().__init__()
        flat = tokens * dim
        hidden = max(8, round(flat / 256 * width))
        self.tokens = tokens
        self.body = nn.Sequential(
            nn.LayerNorm(flat), nn.Linear(flat, hidden), nn.LeakyReLU(), nn.LayerNorm(hidden)
        )
        self.readout = nn.Linear(hidden, flat)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B, N, D); tokens where mask (B, N) is False count as zeros, and zeros is what they get."""
        check_tokens(x, self.tokens)
        flat = zero_padding(x, mask).flatten(1)
        y: Tensor = self.readout(self.body(flat)).view(x.shape)
        return zero_padding(y, mask)


SHALLOW_FFN = MixerSpec(
    name="shallow_ffn",
    build=ShallowFfn,
    summary="a two-layer network over the flattened sequence",
    widths=(0.25, 1.0),
    caps=Caps(masks=True, exportable=True),
    readout="readout",
    cost="N^2 D^2 / 128",
    paper="Rethinking Attention (ALR), arXiv 2311.10642",
    letter="F",
)
