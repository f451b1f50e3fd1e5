"""The embedded teacher with candidates at some of its sites: makes them, scores them, evaluates plans of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mixerzoo.capture import capture
from mixerzoo.data import image_batches
from mixerzoo.files import read_json, write_json
from mixerzoo.hosts import assemble, run_stages
from mixerzoo.latency import REFERENCE, Rounds, Stopwatch, Timing, measure
from mixerzoo.library.entries import Source
from mixerzoo.library.folder import Library
from mixerzoo.opening import open_data, open_teacher
from mixerzoo.plan import KEEP, Candidate
from mixerzoo.score import Judge, output_loss
from mixerzoo.student import make_replacement
from mixerzoo_search.candidates import CandidateLibrary
from mixerzoo_search.making import make_all

TEACHER, DATA = "digits_vit", "digits"
CAPTURED = 512  # images to distil on
BATCH = 48  # validation images at once
AS_LONG = Rounds()  # as a search measures students

Names = Mapping[str, Sequence[str]]  # site -> candidates as written in a plan, `keep` among them


class Space:
    """Candidates at sites, made in closed form and kept in a folder, so that nothing is made twice.

    Args:
        names: site -> candidates.
        folder: for the library and the statistics.
        images: validation images that losses are means over.
        processes: to make candidates with.
    """

    def __init__(self, names: Names, folder: Path, *, images: int, processes: int = 1) -> None:
        self.names = {site: tuple(row) for site, row in names.items()}
        whole = open_teacher(TEACHER)
        self.teacher = replace(whole, sites=tuple(site for site in whole.sites if site.name in self.names))
        self.data = open_data(DATA)
        calibration = self.data.splits.calibration[:CAPTURED]
        source = Source.of(self.teacher, self.data, calibration)
        self.library = CandidateLibrary(Library(folder / "library"), self.teacher, source, steps=0, seed=0)
        todo = [(site, Candidate.parse(c)) for site, row in self.names.items() for c in row if c != KEEP]
        missing = [pair for pair in todo if self.library.find(*pair, stepped=False) is None]
        kept = folder / "statistics.json"
        if missing or not kept.exists():
            batches = image_batches(self.data, calibration, self.teacher.image)
            captured = capture(self.teacher, batches, len(calibration))
            make_all(self.library, missing, captured, stepped=False, processes=processes)
            write_json(kept, captured.statistics)
        self.statistics: dict[str, dict[str, float]] = read_json(kept)
        self.images = tuple(self.data.splits.validation[:images])
        self.module: Callable[[str, str], nn.Module] = lru_cache(maxsize=None)(self._module)

    def _module(self, site: str, name: str) -> nn.Module:
        candidate = Candidate.parse(name)
        entry = self.library.best(site, candidate)
        if entry is None:
            raise RuntimeError(f"{name} at {site} could not be made")
        return make_replacement(candidate, self.teacher.site(site), self.library.state(entry))

    def nmse(self) -> dict[str, dict[str, float]]:
        """Return the held-out error of each candidate at each site."""
        found: dict[str, dict[str, float]] = {}
        for site, row in self.names.items():
            entries = {c: self.library.best(site, Candidate.parse(c)) for c in row if c != KEEP}
            found[site] = {c: entry.nmse for c, entry in entries.items() if entry is not None}
        return found

    def judge(self) -> Judge:
        """Return a judge on the validation images."""
        return Judge(self.teacher, image_batches(self.data, self.images, self.teacher.image), None)

    def modules(self, plan: Mapping[str, str]) -> dict[str, nn.Module]:
        """Return a plan's replacements."""
        return {site: self.module(site, c) for site, c in plan.items() if c != KEEP}

    def student(self, plan: Mapping[str, str]) -> nn.Module:
        """Return the stitched student of a plan; sites that are not named keep the teacher's module."""
        return assemble(self.teacher.model, self.modules(plan))


class CpuStopwatch(Stopwatch):
    """Times students by the CPU's time of this process: with one thread that is the time on a machine left alone."""

    def time(
        self,
        students: Mapping[str, nn.Module],
        *,
        rounds: Rounds = AS_LONG,
        on_round: Callable[[int], None] = lambda done: None,
    ) -> dict[str, Timing]:
        """Time students beside the teacher."""
        runs = {REFERENCE: self.prepare(self.teacher.model)}
        runs |= {name: self.prepare(model) for name, model in students.items()}
        return measure(runs, rounds=rounds, clock=time.process_time, on_round=on_round)


class Losses:
    """True losses of all plans, hidden states shared: plans that agree up to a stage run it once.

    Args:
        space: the candidates.
    """

    @torch.inference_mode()
    def __init__(self, space: Space) -> None:
        self.space = space
        stages = space.teacher.host.stages(space.teacher.model)
        self._stages = stages
        self._rows = tuple(space.names.items())
        stage_of = {site: space.teacher.site(site).stage for site, _ in self._rows}
        order = [stage_of[site] for site, _ in self._rows]
        if order != sorted(order):
            raise ValueError("sites must be in forward order")
        # Sites of one stage are chosen together.
        numbered = list(enumerate(self._rows))
        self._groups = [
            (stage, [at for at, _ in rows])
            for stage, rows in (
                (key, list(group)) for key, group in groupby(numbered, key=lambda row: stage_of[row[1][0]])
            )
        ]
        batches = list(image_batches(space.data, space.images, space.teacher.image))
        images = torch.cat(batches)
        self._stage = lru_cache(maxsize=None)(self._make_stage)
        self._start = [run_stages(stages[: order[0]], part) for part in images.split(BATCH)]
        self._target = torch.cat([run_stages(stages, part, first=order[0]) for part in self._start])

    @property
    def shape(self) -> tuple[int, ...]:
        """Candidates a site."""
        return tuple(len(row) for _, row in self._rows)

    def fill(self, losses: NDArray[np.float64], save: Callable[[int], None]) -> None:
        """Replace every NaN in `losses`, one axis a site; `save` is called now and then with how many are left."""
        with torch.inference_mode():
            for _ in self._walk(losses, (), 0, self._start, self._groups[0][0]):
                save(int(np.isnan(losses).sum()))

    def _walk(
        self,
        losses: NDArray[np.float64],
        chosen: tuple[int, ...],
        depth: int,
        hidden: list[torch.Tensor],
        stage: int,
    ) -> Iterator[None]:
        """Go through the choices from one group of sites on; yields after each subtree of the first but last."""
        group_stage, axes = self._groups[depth]
        hidden = [run_stages(self._stages[stage:group_stage], part) for part in hidden]
        last = depth == len(self._groups) - 1
        for choice in np.ndindex(*(self.shape[axis] for axis in axes)):
            path = chosen + choice
            if not np.isnan(losses[path]).any():
                continue
            step = self._stage(depth, choice)
            after = [step(part) for part in hidden]
            if last:
                out = torch.cat([run_stages(self._stages, part, first=group_stage + 1) for part in after])
                classifier = self.space.teacher.classifier
                losses[path] = float(output_loss(out, self._target, classifier=classifier).mean())
            else:
                yield from self._walk(losses, path, depth + 1, after, group_stage + 1)
        yield

    def _make_stage(self, depth: int, choice: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
        stage, axes = self._groups[depth]
        rows = [self._rows[axis] for axis in axes]
        plan = {site: row[at] for (site, row), at in zip(rows, choice, strict=True)}
        model = self.space.student(plan)
        found: Any = self.space.teacher.host.stages(model)[stage]
        return found  # type: ignore[no-any-return]
