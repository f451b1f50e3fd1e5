"""The additive model: the loss and the latency of a plan as sums over its sites."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mixerzoo.errors import MixerzooError
from mixerzoo.plan import KEEP_CANDIDATE, Candidate, Plan

# Of the slope of measured over additive latency: what is expected of a device before any measurement.
SLOPE_SPREAD = 0.1


@dataclass(frozen=True, kw_only=True)
class AdditiveModel:
    """Scores and latencies of candidates that were replaced one at a time, and the sums they predict.

    Attributes:
        sites: names of the sites, in forward order.
        candidates: for each site, the candidates it can hold, `keep` first.
        loss: for each site and candidate, the loss of the teacher with that one site replaced; 0 for `keep`.
        latency_ms: for each site and candidate, the change of the teacher's latency (negative: faster); 0 for
            `keep`.
        base_ms: latency of the teacher.
        intercept_ms: affine correction of latency: measured ~ intercept_ms + slope * additive.
        slope: see intercept_ms; positive.

    Raises:
        MixerzooError: for tables that do not fit together, or a value that is not finite (a candidate that
            failed; `from_scores` leaves those out).
    """

    sites: tuple[str, ...]
    candidates: tuple[tuple[Candidate, ...], ...]
    loss: tuple[tuple[float, ...], ...]
    latency_ms: tuple[tuple[float, ...], ...]
    base_ms: float
    intercept_ms: float = 0.0
    slope: float = 1.0

    def __post_init__(self) -> None:
        if not len(self.sites) == len(self.candidates) == len(self.loss) == len(self.latency_ms):
            raise MixerzooError(
                f"additive model: every table needs one row for each of {len(self.sites)} sites"
            )
        if len(set(self.sites)) != len(self.sites):
            raise MixerzooError("additive model: a site is named twice")
        if not math.isfinite(self.base_ms) or not math.isfinite(self.intercept_ms) or not self.slope > 0:
            raise MixerzooError("additive model: base_ms and intercept_ms must be finite, slope positive")
        for site, row, losses, latencies in zip(
            self.sites, self.candidates, self.loss, self.latency_ms, strict=True
        ):
            self._check_row(site, row, losses, latencies)

    @staticmethod
    def _check_row(
        site: str, row: Sequence[Candidate], losses: Sequence[float], latencies: Sequence[float]
    ) -> None:
        if not len(row) == len(losses) == len(latencies):
            raise MixerzooError(f"additive model: site '{site}' needs one loss and one latency per candidate")
        if not row or not row[0].is_keep or len(set(row)) != len(row):
            raise MixerzooError(f"additive model: site '{site}' needs distinct candidates with `keep` first")
        for candidate, loss, latency in zip(row, losses, latencies, strict=True):
            if not (math.isfinite(loss) and math.isfinite(latency)):
                raise MixerzooError(
                    f"additive model: '{candidate}' at '{site}' has loss {loss} and latency {latency} ms; "
                    "leave failed candidates out (AdditiveModel.from_scores does)"
                )
        if losses[0] != 0 or latencies[0] != 0:
            raise MixerzooError(f"additive model: `keep` at '{site}' must cost nothing")

    @classmethod
    def from_scores(
        cls, scores: Mapping[str, Mapping[Candidate, tuple[float, float]]], *, base_ms: float
    ) -> AdditiveModel:
        """Build the model from site -> candidate -> (loss, change of latency in ms).

        `keep` is added first where it is missing; candidates with a value that is not finite are left out.
        """
        rows: list[list[tuple[Candidate, float, float]]] = []
        for row in scores.values():
            usable = [
                (candidate, loss, latency)
                for candidate, (loss, latency) in row.items()
                if not candidate.is_keep and math.isfinite(loss) and math.isfinite(latency)
            ]
            rows.append([(KEEP_CANDIDATE, 0.0, 0.0), *usable])
        return cls(
            sites=tuple(scores),
            candidates=tuple(tuple(entry[0] for entry in row) for row in rows),
            loss=tuple(tuple(entry[1] for entry in row) for row in rows),
            latency_ms=tuple(tuple(entry[2] for entry in row) for row in rows),
            base_ms=base_ms,
        )

    @cached_property
    def _position(self) -> tuple[dict[Candidate, int], ...]:
        return tuple({candidate: at for at, candidate in enumerate(row)} for row in self.candidates)

    def indices(self, plan: Plan) -> tuple[int, ...]:
        """Return the position of each of the plan's choices among its site's candidates.

        Raises:
            MixerzooError: if the plan has other sites, or a candidate that the model does not know.
        """
        if tuple(site for site, _ in plan.choices) != self.sites:
            raise MixerzooError("additive model: the plan's sites are not the model's")
        for (site, candidate), known in zip(plan.choices, self._position, strict=True):
            if candidate not in known:
                raise MixerzooError(f"additive model: no score for '{candidate}' at '{site}'")
        return tuple(known[chosen] for (_, chosen), known in zip(plan.choices, self._position, strict=True))

    def plan(self, indices: Sequence[int]) -> Plan:
        """Return the plan that takes the given candidate at each site."""
        return Plan(
            tuple((site, row[at]) for site, row, at in zip(self.sites, self.candidates, indices, strict=True))
        )

    def predict_loss(self, plan: Plan) -> float:
        """Return the sum of the scores of the plan's candidates."""
        return float(sum(row[at] for row, at in zip(self.loss, self.indices(plan), strict=True)))

    def additive_ms(self, plan: Plan) -> float:
        """Return the teacher's latency plus the plan's changes of it, uncorrected, in ms."""
        changes = (row[at] for row, at in zip(self.latency_ms, self.indices(plan), strict=True))
        return self.base_ms + float(sum(changes))

    def predict_ms(self, plan: Plan) -> float:
        """Return the predicted latency in ms, corrected."""
        return self.intercept_ms + self.slope * self.additive_ms(plan)

    def fastest(self) -> Plan:
        """Return the plan of lowest predicted latency; of equally fast candidates, the one of lowest loss."""
        rows = zip(self.latency_ms, self.loss, strict=True)
        return self.plan([min(range(len(ms)), key=lambda at: (ms[at], loss[at])) for ms, loss in rows])

    def calibrated(self, additive_ms: Sequence[float], measured_ms: Sequence[float]) -> AdditiveModel:
        """Return the model with its affine correction fitted on measured students.

        Args:
            additive_ms: `additive_ms(plan)` of each student.
            measured_ms: its measured latency.

        The fit is a robust least squares (soft L1), so that one disturbed measurement does not tilt it. Both sides are
        of the same teacher, so that a slope far from 1 is believed only as far as the students show it. With under
        three students, or latencies too close to give a slope, only the offset is fitted (the median).
        """
        additive, measured = np.asarray(additive_ms, dtype=float), np.asarray(measured_ms, dtype=float)
        finite = np.isfinite(additive) & np.isfinite(measured)
        additive, measured = additive[finite], measured[finite]
        if not additive.size:
            return replace(self, intercept_ms=0.0, slope=1.0)
        offset = float(np.median(measured - additive))
        spread = float(np.ptp(additive))
        if additive.size < 3 or spread <= 1e-3 * max(abs(float(additive.mean())), 1e-12):
            return replace(self, intercept_ms=offset, slope=1.0)
        intercept, slope = _robust_line(additive, measured, offset)
        if not slope > 0.1:  # a nearly flat or falling line is noise, not a device
            return replace(self, intercept_ms=offset, slope=1.0)
        return replace(self, intercept_ms=intercept, slope=slope)


def _robust_line(
    x: np.typing.NDArray[np.float64], y: np.typing.NDArray[np.float64], offset: float
) -> tuple[float, float]:
    """Return (intercept, slope) of the soft-L1 line through the points, starting from y = x + offset."""
    from scipy.optimize import least_squares

    centre, scale = float(x.mean()), float(x.std())
    unit = (x - centre) / scale
    residuals = y - x - offset
    noise = 1.4826 * float(np.median(np.abs(residuals))) or 1e-6 * scale
    fit = least_squares(
        lambda p: p[0] + p[1] * unit - y, x0=[centre + offset, scale], loss="soft_l1", f_scale=noise
    )
    slope = float(fit.x[1]) / scale
    left = 1.4826 * float(np.median(np.abs(unit * fit.x[1] + fit.x[0] - y)))
    error = left / scale / max(x.size - 2, 1) ** 0.5
    slope = 1 + (slope - 1) * SLOPE_SPREAD**2 / (SLOPE_SPREAD**2 + error**2)
    return float(fit.x[0]) - slope * centre, slope
