"""A true evaluation of a plan: stitch the student together, measure its loss and its latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from mixerzoo.hosts import Replacement, Teacher, assemble, count_params
from mixerzoo.latency import REFERENCE, Rounds, Stopwatch
from mixerzoo.plan import Candidate, Plan
from mixerzoo.score import Judge
from mixerzoo.student import make_replacement
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.candidates import CandidateLibrary

TRIAL = Rounds(least=7, most=21, precision=0.02)
AGAIN = Rounds(least=15, most=120, precision=0.01, quiet=15)  # a trial that is surprising or unsure
FINAL = Rounds(least=7, most=60, precision=0.015, quiet=7, spells=5)  # what may be the winner
SURPRISE = 0.1  # relative difference of measured and predicted latency that calls for a longer measurement
UNSURE = 0.05  # relative error that does, too
CACHED_MODULES = 64


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """What is known of a plan after a true evaluation.

    Attributes:
        plan: the plan.
        loss: against the teacher, on the study images.
        agreement: share of the teacher's answers, in [0, 1].
        accuracy: share of right answers, or None.
        latency_ms: measured, on the scale of the teacher's latency at the start of the run.
        predicted_ms: by the additive model.
        predicted_loss: likewise.
        params: parameters of the student.
        source: `exact`, `sampler`, `refit` or `finetuned`.
    """

    plan: Plan
    loss: float
    agreement: float
    accuracy: float | None
    latency_ms: float
    predicted_ms: float
    predicted_loss: float
    params: int
    source: str

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return asdict(self) | {"plan": self.plan.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PlanResult:
        """Rebuild a result."""
        return cls(**{**data, "plan": Plan.from_json(data["plan"])})


class Evaluator:
    """Evaluates plans of one teacher with the candidates of its library."""

    def __init__(
        self,
        library: CandidateLibrary,
        judge: Judge,
        stopwatch: Stopwatch,
        *,
        base_ms: float,
    ) -> None:
        self.library = library
        self.teacher: Teacher = library.teacher
        self.judge = judge
        self.stopwatch = stopwatch
        self.base_ms = base_ms
        self._cached: Callable[[str, Candidate], Replacement] = lru_cache(CACHED_MODULES)(self.module)

    def modules(self, plan: Plan, *, fresh: bool = False) -> dict[str, Replacement]:
        """Return the plan's replacements; `fresh` ones may be changed by the caller."""
        load = self.module if fresh else self._cached
        return {site: load(site, candidate) for site, candidate in plan.choices if not candidate.is_keep}

    def module(self, site: str, candidate: Candidate) -> Replacement:
        """Return a replacement with the best weights there are."""
        entry = self.library.best(site, candidate)
        assert entry is not None, f"{candidate} at {site} is not in the library"
        return make_replacement(candidate, self.teacher.site(site), self.library.state(entry))

    def latency(self, students: Mapping[str, nn.Module], *, rounds: Rounds = TRIAL) -> dict[str, float]:
        """Return the students' latencies in ms: their ratio to the teacher times its latency in this run."""
        timings = self.stopwatch.time(students, rounds=rounds)
        return {name: self.base_ms * t.ratio for name, t in timings.items() if name != REFERENCE}

    def final_latency(self, students: Mapping[str, nn.Module]) -> dict[str, tuple[float, float]]:
        """Measure students for long; return the latency of each in ms, and the most that it can be (97.5 %)."""
        timings = self.stopwatch.time(students, rounds=FINAL)
        return {
            name: (self.base_ms * timings[name].ratio, self.base_ms * timings[name].most) for name in students
        }

    def evaluate(self, plan: Plan, model: AdditiveModel, *, source: str) -> PlanResult:
        """Stitch, judge and time the plan's student."""
        modules = self.modules(plan)
        student = assemble(self.teacher.model, modules)
        # Before its first changed stage the student is the teacher.
        first = min((self.teacher.site(name).stage for name in modules), default=0)
        judged = self.judge.evaluate(student, first=first)
        predicted_ms = model.predict_ms(plan)
        timing = self.stopwatch.time({"student": student}, rounds=TRIAL)["student"]
        surprising = abs(self.base_ms * timing.ratio / predicted_ms - 1) > SURPRISE
        if surprising or timing.error > UNSURE:
            timing = self.stopwatch.time({"student": student}, rounds=AGAIN)["student"]
        return PlanResult(
            plan=plan,
            loss=judged.loss,
            agreement=judged.agreement,
            accuracy=judged.accuracy,
            latency_ms=self.base_ms * timing.ratio,
            predicted_ms=predicted_ms,
            predicted_loss=model.predict_loss(plan),
            params=count_params(student),
            source=source,
        )
