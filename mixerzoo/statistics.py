"""Attention statistics of a site: how concentrated, how far-reaching, how content-dependent its mixing is.

A is one attention map (N, N), p one of its rows. Every figure is a mean over calibration images, heads and rows.

- `entropy`: -sum p log p / log N; 0 looks at one token, 1 at all alike.
- `tokens_90`: smallest number of tokens that hold 90 % of a row's mass, as a share of N.
- `gini`: Gini coefficient of a row; 0 all alike, near 1 one token (Hurley & Rickard, arXiv 0811.4706).
- `sink`: mass that the most attended token gets, averaged over rows (arXiv 2410.10781).
- `locality`: 1 - mean distance on the grid between a token and what it attends to, as a share of the longest
  possible one; NaN without a grid.
- `input_dependence`: 1 - |mean A|^2 / mean |A|^2 over images; 0: the same map for every image.
- `effective_rank`: exp(entropy of the normalised singular values of A) / N.
- `contribution`: |what the site adds| / |residual stream it is added to|; for mlp sites too.
"""

from __future__ import annotations

import math

import torch

from mixerzoo.spec import Site

ATTENTION_STATISTICS = (
    "entropy",
    "tokens_90",
    "gini",
    "sink",
    "locality",
    "input_dependence",
    "effective_rank",
    "contribution",
)
MASS = 0.9
ROW_IMAGES = 32  # logarithms and sorting are slow, and the shape of rows settles after a few images
RANKED_IMAGES = 2  # singular values are slower still


class AttentionStatistics:
    """Streams attention maps (B, H, N, N) into their mean and the statistics of this module."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.images = 0
        self.sum = torch.zeros(site.heads, site.tokens, site.tokens, dtype=torch.float64)
        self.squares = 0.0
        self._rows: list[tuple[float, float, float]] = []
        self._ranks: list[float] = []

    def update(self, maps: torch.Tensor) -> None:
        """Add the maps (B, H, N, N) of a batch; rows sum to 1."""
        B, _, N, _ = maps.shape
        self.sum += maps.sum(0)
        self.squares += float(maps.square().sum(dtype=torch.float64))
        for one in maps[: max(0, ROW_IMAGES - self.images)]:
            entropy = float(torch.special.entr(one).sum(-1).mean()) / math.log(max(N, 2))
            p = one.sort(-1).values  # ascending
            mass = p.flip(-1).cumsum(-1)
            tokens = float(((mass < MASS).sum(-1) + 1).clamp(max=N).double().mean()) / N
            rank = torch.arange(1, N + 1)
            gini = 1 - 2 * float((p * ((N - rank + 0.5) / N)).sum(-1).mean())
            self._rows.append((entropy, tokens, gini))
        for one in maps[: max(0, RANKED_IMAGES - self.images)]:
            values = torch.linalg.svdvals(one)
            spectrum = values / values.sum(-1, keepdim=True)
            self._ranks.append(float(torch.special.entr(spectrum).sum(-1).exp().mean()) / N)
        self.images += B

    @property
    def mean(self) -> torch.Tensor:
        """The mean map per head, (H, N, N) float32."""
        return (self.sum / max(self.images, 1)).float()

    def result(self) -> dict[str, float]:
        """Return all statistics but `contribution`, which is not a matter of maps."""
        mean = self.sum / max(self.images, 1)
        entropy, tokens, gini = torch.tensor(self._rows).mean(0).tolist()
        return {
            "entropy": entropy,
            "tokens_90": tokens,
            "gini": gini,
            "sink": float(mean.mean(1).max(-1).values.mean()),
            "locality": _locality(mean, self.site),
            "input_dependence": 1 - float(mean.square().sum()) / (self.squares / self.images),
            "effective_rank": sum(self._ranks) / len(self._ranks),
        }


def _locality(mean: torch.Tensor, site: Site) -> float:
    if site.grid is None:
        return math.nan
    rows, columns = site.grid
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], -1).double()
    distance = torch.cdist(places, places)
    A = mean[:, site.prefix :, site.prefix :]
    A = A / A.sum(-1, keepdim=True).clamp_min(1e-12)
    return 1 - float((A * distance).sum(-1).mean()) / max(math.hypot(rows - 1, columns - 1), 1)
