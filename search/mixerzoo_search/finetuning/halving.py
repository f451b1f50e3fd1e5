"""Successive halving: the best few plans are distilled as a whole in rounds, and the weaker half is dropped after each.

Which plan is best before gradient steps need not be best after them, so that none is chosen before it had some.
Rounds share the time equally, and the plans of a round share its time: the winner gets most. Where that leaves turns
too short to change anything, only the best plans take part. A round that helps no plan is the last: where steps have
nothing to gain, the time is not spent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mixerzoo_search.fit_quality import spearman

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round.

    Attributes:
        number: 1 for the first.
        of: plans in the first round.
        plans: plans in this one.
        seconds: for each of them.
    """

    number: int
    of: int
    plans: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Played:
    """A round that is over.

    Attributes:
        round: the round.
        before: plan -> held-out loss when it began.
        after: plan -> held-out loss when it ended, in the same order.
        kept: plans that go on: the better half.
    """

    round: Round
    before: Mapping[str, float]
    after: Mapping[str, float]
    kept: Sequence[str]

    @property
    def spearman(self) -> float | None:
        """Rank correlation of the losses before and after; None for a single plan."""
        if len(self.before) < 2:
            return None
        return spearman(list(self.before.values()), list(self.after.values()))

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data; losses that are not finite become null."""
        return {
            "seconds": self.round.seconds,
            "plans": {
                plan: {"before": _finite(loss), "after": _finite(self.after[plan]), "kept": plan in self.kept}
                for plan, loss in self.before.items()
            },
            "spearman": self.spearman,
        }


def rounds(plans: int, seconds: float, shortest: float = 0.0) -> list[Round]:
    """Return the rounds for so many plans, down to a single one, that take so many seconds in all.

    Fewer plans begin where their turns would be shorter than `shortest` seconds; a single one has them all.
    """
    sizes = [plans] if plans else []
    while sizes and sizes[-1] > 1:
        sizes.append(_half(sizes[-1]))
    if plans > 1 and seconds / len(sizes) / plans < shortest:
        return rounds(_half(plans), seconds, shortest)
    return [
        Round(number=number, of=plans, plans=size, seconds=seconds / len(sizes) / size)
        for number, size in enumerate(sizes, 1)
    ]


def halve(
    entries: Mapping[str, T],
    rounds: Sequence[Round],
    *,
    loss: Callable[[T], float],
    tune: Callable[[T, Round, int], T],
    on_round: Callable[[Sequence[Played]], None] = lambda played: None,
) -> tuple[dict[str, T], list[Played]]:
    """Play all rounds, or until one helps no plan; return every plan as its last round left it, and what happened.

    Args:
        entries: plan -> what `tune` takes; the best take part, as many as the first round is for.
        rounds: the rounds.
        loss: held-out loss of an entry.
        tune: an entry, the round, and how many plans had their turn in this and earlier rounds, to the entry
            after that.
        on_round: called with all rounds so far when one is over.
    """
    last = dict(entries)
    alive = list(entries)
    if rounds and rounds[0].plans < len(alive):
        alive = sorted(alive, key=lambda plan: _rank(loss(last[plan])))[: rounds[0].plans]
    played: list[Played] = []
    turns = 0
    for this in rounds:
        before = {plan: loss(last[plan]) for plan in alive}
        for plan in alive:
            last[plan] = tune(last[plan], this, turns)
            turns += 1
        after = {plan: loss(last[plan]) for plan in alive}
        ranked = sorted(alive, key=lambda plan: _rank(after[plan]))
        alive = ranked[: _half(len(ranked))]
        played.append(Played(round=this, before=before, after=after, kept=tuple(alive)))
        on_round(played)
        if not _helped(before, after):
            break
    return last, played


def _helped(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    return any(_rank(after[plan]) < _rank(loss) for plan, loss in before.items())


def summary(played: Sequence[Played]) -> dict[str, Any]:
    """Return the rounds for `summary.json`."""
    first = played[0] if played else None
    return {
        "plans": first.round.of if first else 0,
        "seconds": sum(one.round.seconds * one.round.plans for one in played),
        "spearman": first.spearman if first else None,
        "rounds": [one.to_json() for one in played],
    }


def sentence(found: Mapping[str, Any]) -> str:
    """Return what came of the rounds in one line; empty where there were none."""
    if not found.get("plans"):
        return ""
    ranks, count = found["spearman"], len(found["rounds"])
    plans = "one plan" if found["plans"] == 1 else f"{found['plans']} plans"
    told = f"{plans} distilled as a whole in {count} round{'s' * (count > 1)}"
    in_vain = all(one["before"] == one["after"] for one in found["rounds"][-1]["plans"].values())
    if in_vain and count == 1:
        return f"{told}, which helped none"  # that ranks stayed as they were says nothing then
    if ranks is not None:
        told += f"; losses before and after the first rank with Spearman {ranks:.2f}"
    return told + "; the last helped none" * in_vain


def _half(plans: int) -> int:
    return -(-plans // 2)


def _rank(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
