"""Whether sparser groups of layers lose less: rank correlation of the drop with each attention statistic.

Groups that overlap are no independent points, so that a p-value over groups is too small. The one that verdicts go
by shuffles the statistic among the layers and averages over the same groups again: how often would layers in
another order relate as well? It still takes neighbouring layers for independent, which they are not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mixerzoo.statistics import ATTENTION_STATISTICS

Array = NDArray[np.float64]

MAIN = "gini"  # the measure of sparsity that verdicts go by: it meets all six axioms of Hurley & Rickard
DEPTH = "depth"  # no statistic of attention; what relates no better than this may be nothing but depth
LEVEL = 0.05  # of significance
LEAST_GROUPS = 5
EXACT = 50_000  # orders of the layers up to which all are tried
DRAWN = 20_000  # orders otherwise

# At which end of a statistic a layer is the sparser, or the simpler, one.
SPARSER: Mapping[str, Literal["high", "low"]] = {
    "entropy": "low",
    "tokens_90": "low",
    "gini": "high",
    "sink": "high",
    "locality": "high",
    "input_dependence": "low",
    "effective_rank": "low",
    "contribution": "low",
}


@dataclass(frozen=True, kw_only=True)
class Relation:
    """Rank correlation of the drop with one statistic.

    Attributes:
        statistic: its name, or `depth`.
        sparser: the end of it at which layers are sparser or simpler; None for depth.
        spearman: in [-1, 1]; None where drop or statistic is the same for all groups.
        p_groups: SciPy's p-value, as if groups were independent.
        p_layers: share of the orders of the layers that relate at least as closely.
        groups: points that it is over.
    """

    statistic: str
    sparser: str | None
    spearman: float | None
    p_groups: float | None
    p_layers: float | None
    groups: int

    @property
    def toward_sparser(self) -> float | None:
        """The correlation with being sparser: negative where sparser groups lost less."""
        if self.spearman is None:
            return None
        return -self.spearman if self.sparser == "low" else self.spearman

    @property
    def clear(self) -> bool:
        """Whether there are groups enough, and the order of the layers matters."""
        return self.groups >= LEAST_GROUPS and self.p_layers is not None and self.p_layers < LEVEL

    @property
    def sparser_is_easier(self) -> bool | None:
        """Whether sparser or simpler groups lost less; None where that is not clear."""
        toward = self.toward_sparser
        return None if toward is None or self.sparser is None or not self.clear else toward < 0

    def to_json(self) -> dict[str, Any]:
        """Return the relation as JSON-ready data."""
        return asdict(self) | {
            "toward_sparser": self.toward_sparser,
            "sparser_is_easier": self.sparser_is_easier,
        }


def relate(
    groups: Sequence[Sequence[int]], layers: Sequence[Mapping[str, float]], drops: Sequence[float]
) -> tuple[Relation, ...]:
    """Relate the drops of groups to every statistic that all layers have, and to depth.

    Args:
        groups: the layers of each, counted from 0.
        layers: statistics of each layer.
        drops: of each group.
    """
    values = {
        name: [float(layer.get(name, math.nan)) for layer in layers] for name in ATTENTION_STATISTICS
    } | {DEPTH: [float(at) for at in range(len(layers))]}
    found = []
    for name, value in values.items():
        if all(map(math.isfinite, value)):
            spearman, p_groups, p_layers = _spearman(groups, np.array(value), np.array(drops, dtype=float))
            found.append(
                Relation(
                    statistic=name,
                    sparser=SPARSER.get(name),
                    spearman=spearman,
                    p_groups=p_groups,
                    p_layers=p_layers,
                    groups=len(groups),
                )
            )
    return tuple(found)


def verdict(relations: Sequence[Relation]) -> str:
    """Say in one line whether sparser groups lost less."""
    main = next(relation for relation in relations if relation.statistic == MAIN)
    if main.groups < LEAST_GROUPS:
        return f"{main.groups} groups are too few to tell; smaller groups, closer to each other, are more"
    if main.spearman is None:
        return "all groups lost the same, or are as sparse: nothing to relate"
    told = f"Spearman {main.spearman:+.2f} over {main.groups} groups, p {p_text(main.p_layers)}"
    easier = main.sparser_is_easier
    if easier is None:
        return f"no clear relation ({told})"
    return f"sparser groups lost {'less' if easier else 'more'} ({told})"


def closest(relations: Sequence[Relation]) -> str:
    """Say in one line which statistic the drop goes with best, and how well it goes with depth."""
    tried = [r for r in relations if r.statistic != DEPTH and r.spearman is not None]
    depth = next((r for r in relations if r.statistic == DEPTH and r.spearman is not None), None)
    if not tried:
        return ""
    best = max(tried, key=lambda relation: abs(relation.spearman or 0.0))
    text = f"closest of {len(tried)}: {best.statistic} {best.spearman:+.2f}, p {p_text(best.p_layers)}"
    return text if depth is None else f"{text}; depth alone {depth.spearman:+.2f}"


def p_text(p: float | None) -> str:
    """Return a p-value as people read it."""
    return "-" if p is None else "< 0.001" if p < 1e-3 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _spearman(
    groups: Sequence[Sequence[int]], layers: Array, drops: Array
) -> tuple[float | None, float | None, float | None]:
    """Return the correlation of drops with the mean of `layers` over groups, and both p-values."""
    from scipy.stats import spearmanr

    share = np.zeros((len(layers), len(groups)))
    for number, group in enumerate(groups):
        share[list(group), number] = 1 / len(group)
    means = layers @ share
    if len(groups) < 3 or np.ptp(drops) == 0 or np.ptp(means) < 1e-12:  # SciPy would warn
        return None, None, None
    found = spearmanr(means, drops)
    spearman = float(np.clip(found.statistic, -1, 1))
    orders = _orders(len(layers))
    others = _rank_correlations(layers[orders] @ share, drops)
    as_close = int((np.abs(others) >= abs(spearman) - 1e-9).sum())
    all_tried = math.factorial(len(layers)) <= EXACT
    p_layers = as_close / len(orders) if all_tried else (as_close + 1) / (len(orders) + 1)
    return spearman, float(found.pvalue), p_layers


def _orders(count: int) -> NDArray[np.intp]:
    """Return orders of `count` layers (orders, layers): all of them, or a fixed draw."""
    if math.factorial(count) <= EXACT:
        return np.array(list(itertools.permutations(range(count))), dtype=np.intp)
    generator = np.random.default_rng(0)
    return np.argsort(generator.random((DRAWN, count)), axis=1)


def _rank_correlations(rows: Array, drops: Array) -> Array:
    """Return the rank correlation of each row (rows, groups) with the drops; 0 for a constant row."""
    from scipy.stats import rankdata

    # Means over the same layers in another order differ in their last digits only, and must tie.
    left, right = rankdata(rows.round(12), axis=1), rankdata(drops)
    left, right = left - left.mean(1, keepdims=True), right - right.mean()
    size = np.sqrt((left**2).sum(1) * (right**2).sum())
    correlations: Array = np.divide(left @ right, size, out=np.zeros(len(rows)), where=size > 0)
    return correlations
