"""A student with a group of layers replaced, trained for a fixed number of steps with everything else frozen.

Each mixer is distilled alone and refitted with those before it, in closed form; then all are trained together. The
steps make small: output loss + (1 - cosine of the hidden state behind the group), on what the student itself
computes (group-wise replacement, arXiv 2605.18865).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from mixerzoo.capture import Capture
from mixerzoo.distill import Recipe, distill
from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import Replacement, Stage, Teacher, assemble, run_stages
from mixerzoo.pairs import held_out_rows
from mixerzoo.plan import Candidate
from mixerzoo.refit import refit
from mixerzoo.registry import get_registry
from mixerzoo.score import output_loss
from mixerzoo.spec import Site
from mixerzoo.student import make_replacement

BATCH = 16
LR = 2e-4  # larger ones first undo the closed form, and had not made up for it after 40 steps
CHECKS = 4  # of the loss on held-out images
EVALUATED = 32  # images at a time where no gradient is needed


class GroupStudents:
    """Makes the students of one teacher, all from the same images.

    Args:
        teacher: the teacher.
        captured: what it does at the sites to replace.
        batches: the images that were captured, (B, C, H, W) each, prepared; the last fifth is held out.
        seed: of initialisations and of the order of the images.
    """

    def __init__(
        self, teacher: Teacher, captured: Capture, batches: Sequence[torch.Tensor], *, seed: int
    ) -> None:
        self.teacher = teacher
        self.captured = captured
        self.batches = list(batches)
        self.seed = seed
        self._states: dict[tuple[str, Candidate], dict[str, torch.Tensor]] = {}

    def solved(self, candidate: Candidate, sites: Sequence[Site]) -> nn.Module:
        """Return the student in closed form: no gradient step yet.

        Raises:
            MixerzooError: if the candidate fails at one of the sites, with its reason.
        """
        modules: dict[str, Replacement] = {
            site.name: make_replacement(candidate, site, self._distilled(candidate, site)) for site in sites
        }
        if len(sites) > 1:  # alone, it sees what it was distilled on
            names = dict.fromkeys(modules, candidate.mixer)
            refit(self.teacher, modules, names, self.batches, kept=False)
        return assemble(self.teacher.model, modules)

    def train(
        self,
        student: nn.Module,
        sites: Sequence[Site],
        *,
        steps: int,
        on_step: Callable[[int], None] = lambda done: None,
    ) -> int:
        """Train the mixers at `sites` together, in place; return the steps taken.

        They end where their loss on held-out images was lowest, of where they began and a few checks on the way.
        All groups see the same images in the same order. Steps end early only where the loss is not finite.
        """
        mixers = nn.ModuleList(student.get_submodule(f"{site.name}.mixer") for site in sites)
        if not steps or next(mixers.parameters(), None) is None:
            return 0
        goal = _Goal.of(self.teacher, sites, self.batches)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return _take_steps(goal, self.teacher.host.stages(student), mixers, steps, on_step)

    def _distilled(self, candidate: Candidate, site: Site) -> Mapping[str, torch.Tensor]:
        key = site.name, candidate
        if key not in self._states:
            spec = get_registry().mixers.get(candidate.mixer)
            captured = self.captured.sites[site.name]
            made = distill(spec, candidate.width, site, captured, Recipe(seed=self.seed))
            if made.failed:
                raise MixerzooError(f"{candidate} at {site.name}: {made.failed}")
            self._states[key] = made.state
        return self._states[key]


@dataclass(frozen=True, kw_only=True)
class _Goal:
    """What a group is given, and what is wanted of it, over n images.

    Attributes:
        first: stage of the first site.
        last: stage of the last one.
        given: the teacher's hidden state before the first stage (n, ...).
        wanted: its hidden state behind the last one (n, ...).
        output: its output (n, C).
        classifier: whether that is logits.
    """

    first: int
    last: int
    given: torch.Tensor
    wanted: torch.Tensor
    output: torch.Tensor
    classifier: bool

    @classmethod
    @torch.no_grad()
    def of(cls, teacher: Teacher, sites: Sequence[Site], batches: Sequence[torch.Tensor]) -> _Goal:
        """Run the teacher once over the images."""
        first, last = min(site.stage for site in sites), max(site.stage for site in sites)
        stages = teacher.host.stages(teacher.model)
        parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for batch in batches:
            given = run_stages(stages[:first], batch)
            wanted = run_stages(stages[: last + 1], given, first=first)
            parts.append((given, wanted, run_stages(stages, wanted, first=last + 1)))
        given, wanted, output = (torch.cat(part) for part in zip(*parts, strict=True))
        return cls(
            first=first,
            last=last,
            given=given,
            wanted=wanted,
            output=output,
            classifier=teacher.classifier,
        )

    def loss(self, stages: Sequence[Stage], rows: torch.Tensor | slice) -> torch.Tensor:
        """Return the loss (B,) of the student with these stages."""
        hidden = run_stages(stages[: self.last + 1], self.given[rows], first=self.first)
        far = 1 - F.cosine_similarity(hidden.flatten(1), self.wanted[rows].flatten(1), dim=-1)
        output = run_stages(stages, hidden, first=self.last + 1)
        return far + output_loss(output, self.output[rows], classifier=self.classifier)

    @torch.no_grad()
    def mean_loss(self, stages: Sequence[Stage], rows: slice) -> float:
        """Return the mean loss over these images."""
        starts = range(rows.start, rows.stop, EVALUATED)
        losses = [self.loss(stages, slice(at, min(at + EVALUATED, rows.stop))) for at in starts]
        return float(torch.cat(losses).mean())


def _take_steps(
    goal: _Goal, stages: Sequence[Stage], mixers: nn.Module, steps: int, on_step: Callable[[int], None]
) -> int:
    train, held_out = held_out_rows(len(goal.given))
    parameters = [parameter.requires_grad_(True) for parameter in mixers.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=LR,
        total_steps=steps,
        pct_start=0.2 if steps > 5 else 0.1,  # it divides by zero where the rise takes just one step
    )
    best, best_state = goal.mean_loss(stages, held_out), _copy(mixers)
    done, every = 0, max(1, steps // CHECKS)
    try:
        while done < steps:
            loss = goal.loss(stages, torch.randint(train.stop, (BATCH,))).mean()
            if not torch.isfinite(loss):
                break
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            on_step(done)
            if done % every == 0 or done == steps:
                now = goal.mean_loss(stages, held_out)
                if now < best:  # not where it is NaN
                    best, best_state = now, _copy(mixers)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
    mixers.load_state_dict(best_state)
    return done


def _copy(mixers: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in mixers.state_dict().items()}
