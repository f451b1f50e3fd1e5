"""The phases of pruning one student: trained with the penalty, cut at one threshold, refitted, distilled as a whole.

Nothing is written here but checkpoints. FAR (arXiv 2505.21535) prunes LSTM units in this way, by masks; here every
mixer that names its units, and the teacher's own modules, are pruned, and the modules are really made smaller.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixerzoo.finetune import Recipe, Tuned, train
from mixerzoo.hosts import Teacher
from mixerzoo.progress import Reporter
from mixerzoo.pruning.student import Order, Prunable, Sizes, penalty_of, prunables, slots, smaller
from mixerzoo.pruning.targets import Gauge, Thresholds
from mixerzoo.refit import Stitched, refit_students
from mixerzoo.score import Evaluation, Judge
from mixerzoo.shrink import Choose, largest
from mixerzoo.student import Student
from mixerzoo_search.image_parts import enough_to_refit

Row = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """What all phases share.

    Attributes:
        teacher: the teacher.
        student: the student to prune, left as it is; that which keeps every site is the teacher itself.
        batches: calibration images, prepared.
        validation: judges students on the images that everything is chosen on.
        test: on images that nothing is chosen on.
        gauge: says how much of its teacher a student takes.
        reporter: shows progress.
        lr: highest learning rate.
        seed: of the order of images.
    """

    teacher: Teacher
    student: Student
    batches: Sequence[torch.Tensor]
    validation: Judge
    test: Judge
    gauge: Gauge
    reporter: Reporter
    lr: float
    seed: int

    @cached_property
    def sites(self) -> list[Prunable]:
        """The sites that can be pruned."""
        return prunables(self.teacher, self.student)

    def judged(self, model: nn.Module) -> tuple[Evaluation, Evaluation]:
        """Return the figures on validation and on test images."""
        return self.validation.evaluate(model), self.test.evaluate(model)

    def penalised(
        self,
        weight: float,
        *,
        seconds: float | None,
        steps: int | None,
        checkpoint: Path | None = None,
        on_row: Row = lambda row: None,
    ) -> tuple[Student, Tuned]:
        """Return the student after training with the penalty: the state of lowest held-out loss and penalty."""
        penalty = penalty_of(self.sites)

        def evaluate(model: nn.Module) -> float:
            with torch.no_grad():
                return self.validation.evaluate(model).loss + weight * float(penalty(model))

        with self.reporter.phase("training with the penalty, percent", 100) as report:
            tuned = train(
                self.teacher,
                self.student.model,
                self.batches,
                self._recipe(seconds, steps),
                evaluate=evaluate,
                penalty=lambda model: weight * penalty(model),
                checkpoint=checkpoint,
                on_progress=lambda share: report(100 * share),
                on_row=on_row,
            )
        return Student(plan=self.student.plan, model=tuned.student), tuned

    def in_use(self, model: nn.Module) -> float:
        """Return the share of units in use, by the penalty."""
        with torch.no_grad():
            return float(penalty_of(self.sites)(model))

    def thresholds(self, student: Student) -> Thresholds:
        """Return what finds how far to prune the student."""
        order = Order(slots(student.model, self.sites))
        return Thresholds(order, lambda sizes: self.cut(student, sizes).model, self.gauge)

    def cut(self, student: Student, sizes: Sizes, *, choose: Choose = largest) -> Student:
        """Return the student with modules of these sizes."""
        return smaller(self.teacher, student, self.sites, sizes, choose=choose)

    def refitted(self, student: Student) -> Student:
        """Return the student refitted in closed form, site by site."""
        mixers = {site: choice.mixer for site, choice in student.plan.choices if not choice.is_keep}
        model = copy.deepcopy(student.model)
        few = torch.cat(list(self.batches))[: enough_to_refit(self.teacher.sites)].split(len(self.batches[0]))
        with self.reporter.phase("sequential refit", len(self.teacher.sites)) as report:
            refit_students(self.teacher, [Stitched(student=model, mixers=mixers)], few, on_site=report)
        return Student(plan=student.plan, model=model)

    def tuned(
        self,
        student: Student,
        *,
        seconds: float | None,
        steps: int | None,
        checkpoint: Path | None = None,
        on_row: Row = lambda row: None,
    ) -> tuple[Student, Tuned]:
        """Return the student after distillation as a whole: the state of lowest validation loss."""
        with self.reporter.phase("distillation as a whole, percent", 100) as report:
            tuned = train(
                self.teacher,
                student.model,
                self.batches,
                self._recipe(seconds, steps),
                evaluate=lambda model: self.validation.evaluate(model).loss,
                checkpoint=checkpoint,
                on_progress=lambda share: report(100 * share),
                on_row=on_row,
            )
        return Student(plan=student.plan, model=tuned.student), tuned

    def _recipe(self, seconds: float | None, steps: int | None) -> Recipe:
        return Recipe(seconds=seconds, steps=steps, lr=self.lr, seed=self.seed)
