"""What the report of a search and the profile of a teacher show: plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# Attention statistic -> its label and what its values mean.
STATISTICS: Mapping[str, tuple[str, str]] = {
    "entropy": ("entropy", "0: looks at one token, 1: at all alike"),
    "tokens_90": ("tokens for 90 %", "share of the tokens that hold 90 % of the attention"),
    "gini": ("Gini", "0: all tokens alike, 1: one token"),
    "sink": ("sink mass", "attention that the most attended token gets"),
    "locality": ("locality", "1: looks nearby, 0: far away"),
    "input_dependence": ("input dependence", "0: the same map for every image"),
    "effective_rank": ("effective rank", "share of the directions that the map uses"),
    "contribution": ("contribution", "size against the residual stream"),
}


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The teacher's figures: `latency_ms`, `accuracy` as a fraction (None without labels), `params` (None: unknown)."""

    name: str
    latency_ms: float
    accuracy: float | None
    params: int | None


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """One student that was measured.

    Attributes:
        plan: site -> candidate, as written in a plan.
        short_name: nickname of the plan.
        loss: against the teacher.
        agreement: share of samples on which it says what the teacher says, None where that has no meaning.
        accuracy: as a fraction; None without labels.
        latency_ms: measured.
        predicted_ms: by the additive model, None if it made no prediction.
        predicted_loss: by the additive model, None if it made no prediction.
        params: number of parameters.
        source: what proposed or made it: `exact`, `sampler`, `refit`, `finetuned`, ...
        feasible: whether it meets the budget.
        on_frontier: whether no other student is both faster and more faithful.
    """

    plan: Mapping[str, str]
    short_name: str
    loss: float
    agreement: float | None
    accuracy: float | None
    latency_ms: float
    predicted_ms: float | None
    predicted_loss: float | None
    params: int
    source: str
    feasible: bool
    on_frontier: bool


@dataclass(frozen=True, kw_only=True)
class SiteRow:
    """One site: its statistics (see mixerzoo.statistics) and, in a profile, its latency in ms."""

    name: str
    kind: str
    statistics: Mapping[str, float] = field(default_factory=dict)
    candidates: Sequence[str] = ()
    latency_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class DamageRow:
    """One candidate at one site, as the prior sees it.

    Attributes:
        site: name of the site.
        kind: its kind.
        candidate: as written in a plan.
        mixing: how the mixer decides which token sees which: `none`, `token`, `static` or `content`.
        nmse: held-out block-local error; None before it is distilled.
        predicted: damage as predicted without any score, in units of its own.
        fitted: damage as predicted with the scores of the others; None before there are scores.
        score: damage that was measured; None if it was not.
        before_steps: likewise, before it took gradient steps; None if it took none.
        key: of its weights in the library; empty where there are none.
        features: what the prediction goes by.
    """

    site: str
    kind: str
    candidate: str
    mixing: str
    nmse: float | None
    predicted: float
    fitted: float | None = None
    score: float | None = None
    before_steps: float | None = None
    key: str = ""
    features: Mapping[str, float] = field(default_factory=dict)

    @property
    def mixer(self) -> str:
        """Name of the mixer."""
        return self.candidate.partition("@")[0]


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Spearman of predicted and measured damage: `before_scores`, and `left_out` one by one; NaN under 3 `scores`."""

    scores: int
    before_scores: float
    left_out: float


@dataclass(frozen=True, kw_only=True)
class PriorTable:
    """Every candidate as the prior sees it, and how well it ranks them: all together, and those of each mixer."""

    rows: Sequence[DamageRow]
    overall: Rank
    mixers: Mapping[str, Rank] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Tested:
    """The winner on test images, as the teacher's accuracy is; a row's is on images that students are compared on.

    Attributes:
        images: how many.
        loss: against the teacher.
        agreement: with the teacher.
        accuracy: as a fraction; None without labels.
        accuracy_interval: 95 % interval of the accuracy less the teacher's; None without labels.
    """

    images: int
    loss: float
    agreement: float
    accuracy: float | None
    accuracy_interval: Sequence[float] | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the report of a search shows; plain data.

    Attributes:
        title: heading.
        teacher: the teacher.
        budget_ms: latency budget.
        evaluations: every student that was measured.
        best: the winner, None if nothing was evaluated.
        exact_line: (ms, predicted loss) of the additive model's exact frontier.
        sites: in forward order.
        mixers: mixer -> its letter in short names.
        tested: the winner's figures on test images; None without a winner.
        latency_model: `mape` and `max_error` as fractions, `spearman`, `plans`.
        score_model: `spearman`, `plans`.
        prior: what the prior predicted, and what was measured.
        finetuning: what came of distilling the best plans as a whole, in a line.
        wall_s: phase -> seconds; `total` is shown apart.
        environment: what it ran on.
        command: the command line that made it.
    """

    title: str
    teacher: Teacher
    budget_ms: float
    evaluations: Sequence[EvaluationRow]
    best: EvaluationRow | None
    exact_line: Sequence[tuple[float, float]] = ()
    sites: Sequence[SiteRow] = ()
    mixers: Mapping[str, str] = field(default_factory=dict)
    tested: Tested | None = None
    latency_model: Mapping[str, float] = field(default_factory=dict)
    score_model: Mapping[str, float] = field(default_factory=dict)
    prior: PriorTable | None = None
    finetuning: str = ""
    wall_s: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, object] = field(default_factory=dict)
    command: str = ""

    @property
    def met(self) -> bool:
        """Whether the winner meets the budget."""
        return self.best is not None and self.best.feasible

    def frontier(self) -> list[EvaluationRow]:
        """Return the students on the frontier, fastest first."""
        return sorted((row for row in self.evaluations if row.on_frontier), key=lambda row: row.latency_ms)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What `mixerzoo profile` shows: the teacher, each of its sites and, where it is known, what the prior says."""

    teacher: Teacher
    sites: Sequence[SiteRow]
    prior: PriorTable | None = None
    environment: Mapping[str, object] = field(default_factory=dict)
    command: str = ""
