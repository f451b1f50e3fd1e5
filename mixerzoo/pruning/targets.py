"""How far to prune: the one threshold at which a student, really made smaller, is no more than a share of its teacher.

Sizes are found by bisection. Latency is measured at each of them, on modules that are smaller; parameters and floating
point operations are counted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mixerzoo.errors import BudgetOutOfReachError, MixerzooError
from mixerzoo.hosts import Teacher, count_params
from mixerzoo.latency import Rounds, Stopwatch
from mixerzoo.pruning.student import Order, Sizes

By = Literal["latency", "params", "flops"]
BY: tuple[By, ...] = ("latency", "params", "flops")
CLOSE = 0.01  # of the target: as near below it is near enough
TRIES = Rounds(least=7, most=21, precision=0.015)
CONFIRM = Rounds(least=15, most=45, precision=0.01)
ATTEMPTS = 8
MARGIN = 0.1  # of what is left to search, that a step leaves on either side
FURTHER = 50  # a part of all slots that is pruned more where a target was missed when it was measured again


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a student takes, as a share of its teacher.

    Attributes:
        value: the share.
        error: half the width of its 95 % confidence interval, relative to it; 0 where it is counted.
    """

    value: float
    error: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Reached:
    """Where a target was reached.

    Attributes:
        sizes: what is left.
        pruned: slots below the threshold.
        threshold: their largest score.
        share: measured once more, for longer, where it is measured.
        tries: students that were measured.
    """

    sizes: Sizes
    pruned: int
    threshold: float
    share: Share
    tries: int


class Gauge:
    """Says how much of its teacher's latency, parameters or operations a student takes."""

    def __init__(self, by: By, teacher: Teacher, stopwatch: Stopwatch) -> None:
        self.by, self.teacher, self.stopwatch = by, teacher, stopwatch
        self._whole = 0 if by == "latency" else self._count(teacher.model)

    def __call__(self, model: nn.Module, *, rounds: Rounds = TRIES) -> Share:
        """Return the student's share."""
        if self.by == "latency":
            timing = self.stopwatch.time({"student": model}, rounds=rounds)["student"]
            return Share(value=timing.ratio, error=timing.error)
        return Share(value=self._count(model) / self._whole)

    def _count(self, model: nn.Module) -> int:
        return count_params(model) if self.by == "params" else flops(model, self.stopwatch.example)


def flops(model: nn.Module, example: torch.Tensor) -> int:
    """Return the floating point operations of a model's matrix products and convolutions on an example."""
    # Without numbers, kernels of our own and fused ones are not taken, and everything is counted.
    meta = copy.deepcopy(model).to("meta")
    counted = [0]
    for module in meta.modules():
        if isinstance(module, nn.LSTM):  # whose loop over tokens would be counted product by product
            module.forward = partial(_count_lstm, module, counted)  # type: ignore[assignment]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta(example.float().to("meta"))
    return int(counter.get_total_flops()) + counted[0]


def _count_lstm(lstm: nn.LSTM, counted: list[int], x: torch.Tensor) -> tuple[torch.Tensor, None]:
    """Stand in for a layer on x (B, N, K): add its products, and return what has the shape of its output."""
    weights = sum(p.numel() for name, p in lstm.named_parameters() if name.startswith("weight"))
    counted[0] += 2 * weights * x.shape[0] * x.shape[1]
    return x.new_empty(*x.shape[:2], lstm.hidden_size * (2 if lstm.bidirectional else 1)), None


class Thresholds:
    """Finds how far to prune for one target after the other; what was measured for one serves the next.

    Args:
        order: of the student's slots.
        build: sizes to the student that is left.
        gauge: measures it.
    """

    def __init__(self, order: Order, build: Callable[[Sizes], nn.Module], gauge: Gauge) -> None:
        self.order, self.build, self.gauge = order, build, gauge
        self.tries = 0
        self._shares: dict[int, Share] = {}  # by pruned slots
        self._by_sizes: dict[str, Share] = {}

    def share(self, pruned: int) -> Share:
        """Return the share without the first `pruned` slots."""
        if pruned not in self._shares:
            sizes = self.order.sizes(pruned)
            if str(sizes) not in self._by_sizes:
                self._by_sizes[str(sizes)] = self.gauge(self.build(sizes))
                self.tries += 1
            self._shares[pruned] = self._by_sizes[str(sizes)]
        return self._shares[pruned]

    def demand_reachable(self, target: float) -> None:
        """Refuse a target that pruning cannot reach, or need not.

        Raises:
            BudgetOutOfReachError: if with as few units as there may be the student takes more than that.
            MixerzooError: if it takes no more without pruning.
        """
        whole, least = self.share(0).value, self.share(self.order.most).value
        if whole <= target:
            raise MixerzooError(
                f"target {target:.4g} of the teacher's {self.gauge.by}: the student takes {whole:.1%} of it as it is; "
                "give a lower target"
            )
        if least > target:
            raise BudgetOutOfReachError(
                f"target {target:.4g} of the teacher's {self.gauge.by} is out of reach: with the fewest units that "
                f"each site may have, the student takes {least:.1%}; give at least {math.ceil(102 * least)}%"
            )

    def reach(self, target: float, *, on_try: Callable[[int], None] = lambda tries: None) -> Reached:
        """Return the least pruning at which the student takes no more than `target` of its teacher, in (0, 1).

        Raises:
            BudgetOutOfReachError: if it cannot be reached, or was not when it was measured again.
            MixerzooError: if the student takes no more without pruning.
        """
        self.demand_reachable(target)
        before = self.tries
        low = max(pruned for pruned, share in self._shares.items() if share.value > target)
        high = min(pruned for pruned, share in self._shares.items() if share.value <= target)
        low = low if low < high else 0  # noise may have turned two of them round
        while high - low > 1 and target - self.share(high).value > CLOSE * target:
            middle = self._between(low, high, target)
            if self.share(middle).value > target:
                low = middle
            else:
                high = middle
            on_try(self.tries - before)
        return self._confirmed(high, target, before)

    def _between(self, low: int, high: int, target: float) -> int:
        """Return where the target would be on a straight line, or nearer to the middle."""
        above, below = self.share(low).value, self.share(high).value
        part = min(1 - MARGIN, max(MARGIN, (above - target) / (above - below)))
        return min(high - 1, max(low + 1, low + round(part * (high - low))))

    def _confirmed(self, pruned: int, target: float, before: int) -> Reached:
        """Measure for longer, and prune a little more where that says that the target was missed."""
        order = self.order
        for attempt in range(ATTEMPTS):
            sizes = order.sizes(pruned)
            share = self.gauge(self.build(sizes), rounds=CONFIRM)
            self.tries += 1
            if share.value <= target or pruned == order.most or attempt == ATTEMPTS - 1:
                break
            pruned = min(order.most, pruned + max(1, order.most // FURTHER))
        if share.value > target:
            raise BudgetOutOfReachError(
                f"target {target:.4g} of the teacher's {self.gauge.by}: measured again, the student took "
                f"{share.value:.1%}; measure on a quieter machine, or give a higher target"
            )
        return Reached(
            sizes=sizes,
            pruned=pruned,
            threshold=order.threshold(pruned),
            share=share,
            tries=self.tries - before,
        )
