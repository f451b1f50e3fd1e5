"""Every plan of a small space, evaluated: search methods can be compared exactly, in seconds, without a teacher.

    from table import load_table
    table = load_table()
    table.loss[2, 0, 4, 1], table.ms[2, 0, 4, 1]

`table.npz` is made by `generate.py`. Its arrays hold numbers only; `about` is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixerzoo.errors import MixerzooError
from mixerzoo.plan import Candidate
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.prior import Clue, Prior, predict_damage

FILE = Path(__file__).parent / "table.npz"
PRIORS = ("on", "off", "shuffled")


@dataclass(frozen=True, kw_only=True)
class Table:
    """The truth about every plan, and what a search knows before it evaluates one.

    Attributes:
        sites: names, in forward order.
        candidates: of each site, as written in a plan; `keep` first.
        loss: (C, ...) one axis a site: KL from the teacher in nats, a mean over validation images, true of the
            stitched student.
        ms: likewise, latency in ms: that of the teacher times the ratio measured beside it, smoothed (`about`).
        measured: likewise, the ratios as measured; NaN where a plan was not timed.
        about: how it was made, and under `quality` how exactly; `scores`, `change_ms`, `statistics`, `nmse` and
            `correction` are what a search knows before its first evaluation.
    """

    sites: tuple[str, ...]
    candidates: tuple[tuple[str, ...], ...]
    loss: NDArray[np.float64]
    ms: NDArray[np.float64]
    measured: NDArray[np.float64]
    about: Mapping[str, Any]

    @property
    def teacher_ms(self) -> float:
        """Latency of the teacher."""
        return float(self.about["teacher_ms"])

    def at(self, plan: Mapping[str, str]) -> tuple[int, ...]:
        """Return a plan's place in the arrays."""
        rows = zip(self.sites, self.candidates, strict=True)
        return tuple(row.index(plan[site]) for site, row in rows)

    def best(self, budget_ms: float) -> float:
        """Return the lowest loss of all plans whose latency is at most the budget."""
        return float(self.loss[self.ms <= budget_ms].min())

    def model(self) -> AdditiveModel:
        """Return the additive model as a search has it: scores and latencies one by one, the correction of latency."""
        intercept, slope = self.about["correction"]
        scores, change = self.about["scores"], self.about["change_ms"]
        rows = list(zip(self.sites, self.candidates, strict=True))
        return AdditiveModel(
            sites=self.sites,
            candidates=tuple(tuple(Candidate.parse(c) for c in row) for row in self.candidates),
            loss=tuple(tuple(0.0 if c == "keep" else scores[site][c] for c in row) for site, row in rows),
            latency_ms=tuple(
                tuple(0.0 if c == "keep" else change[site][c] for c in row) for site, row in rows
            ),
            base_ms=self.teacher_ms,
            intercept_ms=intercept,
            slope=slope,
        )

    def predictions(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the predicted loss and latency in ms of every plan, by the additive model."""
        model = self.model()
        loss = sum(np.ix_(*(np.array(row) for row in model.loss)), np.zeros(self.loss.shape))
        changes = sum(np.ix_(*(np.array(row) for row in model.latency_ms)), np.zeros(self.loss.shape))
        return loss, model.intercept_ms + model.slope * (model.base_ms + changes)

    def prior(self, kind: str, *, scored: bool, seed: int = 0) -> Prior:
        """Return a search's prior.

        Args:
            kind: `on`, `off` (uniform) or `shuffled`.
            scored: with the scores, as a search has it; without, from the statistics and errors of the sites alone.
            seed: of the shuffling.
        """
        known = self.about["scores"]
        clues = [
            Clue(
                site=site,
                candidate=Candidate.parse(c),
                statistics=self.about["statistics"][site],
                nmse=0.0 if c == "keep" else self.about["nmse"][site][c],
                kind=self.about["kinds"][site],
                mixing="content" if c == "keep" else self.about["mixing"][c],
            )
            for site, row in zip(self.sites, self.candidates, strict=True)
            for c in row
        ]
        scores = {
            clue.key: known[clue.site][str(clue.candidate)] for clue in clues if not clue.candidate.is_keep
        }
        prior = Prior.from_damage(predict_damage(clues, scores if scored else None).damage)
        return {"on": prior, "off": prior.uniform(), "shuffled": prior.shuffled(seed)}[kind]


def load_table(path: Path = FILE) -> Table:
    """Read the table.

    Raises:
        MixerzooError: if it is missing or not one.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("loss", "ratio", "measured")}
            about = json.loads(str(file["about"]))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise MixerzooError(f"table '{path}': not readable ({error}); make it with generate.py") from None
    return Table(
        sites=tuple(about["sites"]),
        candidates=tuple(tuple(row) for row in about["candidates"]),
        loss=arrays["loss"].astype(float),
        ms=arrays["ratio"].astype(float) * about["teacher_ms"],
        measured=arrays["measured"].astype(float),
        about=about,
    )
