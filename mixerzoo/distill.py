"""Distil one candidate at one site, teacher-forced: inherit, solve the readout, then gradient steps on the rest."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import torch
from torch import nn

from mixerzoo.capture import SiteCapture
from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import count_params
from mixerzoo.objectives import OBJECTIVES
from mixerzoo.pairs import BATCH, evaluate, held_out_objective, held_out_rows
from mixerzoo.plan import Candidate
from mixerzoo.readout import FeatureTap, RunningReadout, lower, solve_readout
from mixerzoo.shrink import shrink, units_of
from mixerzoo.spec import MixerSpec, Site
from mixerzoo.targets import Targets

PATIENCE = 3  # checks without a better held-out error before the steps stop: it falls when the rate does
CHECKS = 5  # checks of the held-out error in a full run of steps


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a candidate is distilled; part of its library key.

    Attributes:
        steps: gradient steps after the closed form; 0 for none.
        lr: peak of the one-cycle schedule of AdamW.
        seed: of the initialisation and the order of the batches.
        objective: what the steps make smaller, a name in `OBJECTIVES`.
        wider: width of the stepped candidate of the same mixer that the steps may begin from; 0 for none.
    """

    steps: int = 0
    lr: float = 2e-3
    seed: int = 0
    objective: str = "nmse"
    wider: float = 0.0

    def to_json(self) -> dict[str, float | str]:
        """Return the recipe as JSON-ready data, without what does not apply."""
        return {name: value for name, value in asdict(self).items() if value or name != "wider"}


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """A distilled candidate, or the reason why there is none.

    Attributes:
        state: state dict of the mixer; empty if it failed.
        nmse: held-out error; inf if it failed.
        nmse_start: as inherited or initialised.
        nmse_solved: after the closed form; NaN without a readout.
        steps: gradient steps taken.
        params: parameters of the mixer.
        seconds: wall time.
        failed: reason, or empty.
    """

    state: dict[str, torch.Tensor]
    nmse: float
    nmse_start: float
    nmse_solved: float
    steps: int
    params: int
    seconds: float
    failed: str = ""


def distill(
    spec: MixerSpec,
    width: float,
    site: Site,
    captured: SiteCapture,
    recipe: Recipe,
    *,
    start: dict[str, torch.Tensor] | None = None,
    wider: dict[str, torch.Tensor] | None = None,
    targets: Targets | None = None,
) -> Distilled:
    """Distil `spec` at `width` for `site`; never raises for what a mixer does wrong, but records it.

    Args:
        spec: the mixer.
        width: its width.
        site: where it shall stand.
        captured: the teacher's inputs and outputs there.
        recipe: how far to go.
        start: state of the same candidate after a shorter recipe; skips inheritance and closed form.
        wider: state of the candidate of width `recipe.wider` after its steps. Where its most important units, with a
            readout solved for them, have the lower held-out error, the steps begin there.
        targets: what the readouts of all candidates of the site are solved for, unless this is the only one.
    """
    targets = targets or Targets(captured)
    began = time.perf_counter()
    nmse_start = nmse_solved = math.nan
    steps = params = 0
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(spec, width, site, recipe.seed))
            mixer = spec.make(site, width)
            params = count_params(mixer)
            if start is not None:
                mixer.load_state_dict(start)
            elif spec.inherit is not None:
                with torch.no_grad():
                    spec.inherit(mixer, captured.view)
            mixer.eval()
            if spec.readout is not None and start is None:
                nmse_start, nmse_solved = solve_readout(mixer, spec.readout, targets)
                nmse = lower(nmse_start, nmse_solved)
            else:
                nmse = nmse_start = evaluate(mixer, captured)
            if wider is not None and spec.units is not None:
                nmse = _narrowed(mixer, nmse, spec, site, Candidate(spec.name, recipe.wider), wider, targets)
            if recipe.steps and params:
                nmse, steps = take_steps(mixer, targets, recipe, nmse, readout=spec.readout)
        if not math.isfinite(nmse):
            raise MixerzooError(f"its held-out error is {nmse}")
        state = {name: tensor.detach().contiguous() for name, tensor in mixer.state_dict().items()}
    except Exception as error:  # a plugin's mixer may raise anything; it costs no other candidate
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Distilled(
            state={},
            nmse=math.inf,
            nmse_start=nmse_start,
            nmse_solved=nmse_solved,
            steps=steps,
            params=params,
            seconds=time.perf_counter() - began,
            failed=reason,
        )
    return Distilled(
        state=state,
        nmse=nmse,
        nmse_start=nmse_start,
        nmse_solved=nmse_solved,
        steps=steps,
        params=params,
        seconds=time.perf_counter() - began,
    )


def _narrowed(
    mixer: nn.Module,
    nmse: float,
    spec: MixerSpec,
    site: Site,
    candidate: Candidate,
    state: dict[str, torch.Tensor],
    targets: Targets,
) -> float:
    """Give a mixer the most important units of a wider one if that lowers its held-out error; return that."""
    before = copy.deepcopy(mixer.state_dict())
    wide = spec.make(site, candidate.width)
    wide.load_state_dict(state)
    try:
        counts = {kind: units.size for kind, units in units_of(spec, mixer).items()}
        mixer.load_state_dict(shrink(spec, site, candidate, wide, counts)[1].state_dict())
        if spec.readout is None:
            found = evaluate(mixer, targets.pairs)
        else:
            found = lower(*solve_readout(mixer, spec.readout, targets))
    except (MixerzooError, RuntimeError):  # its widths differ in more than units, or it is not finite
        found = math.inf
    if found < nmse:
        return found
    mixer.load_state_dict(before)
    return nmse


def take_steps(
    mixer: nn.Module,
    targets: Targets,
    recipe: Recipe,
    nmse: float,
    *,
    readout: str | None,
    anchored: bool = False,
) -> tuple[float, int]:
    """Take AdamW steps on the objective; leave the mixer at its best held-out state. Returns its NMSE and the steps.

    The steps are for what lies before the readout, which is kept at its closed-form optimum over the last batches,
    and solved on all of them (`anchored` or not) at every check. Steps on a solved readout would first undo the
    solution.
    """
    captured = targets.pairs
    train, _ = held_out_rows(len(captured.x))
    size = targets.spread(train) / captured.y[train].numel()
    solved = set() if readout is None else set(mixer.get_submodule(readout).parameters())
    parameters = [p.requires_grad_() for p in mixer.parameters() if p not in solved]
    if not parameters:
        return nmse, 0
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=recipe.lr,
        total_steps=recipe.steps,
        pct_start=0.2 if recipe.steps > 5 else 0.1,  # it divides by zero where the rise takes just one step
    )
    objective = OBJECTIVES[recipe.objective]

    def reached(nmse: float) -> tuple[float, float]:
        """Return the held-out objective, and the NMSE."""
        return nmse if recipe.objective == "nmse" else held_out_objective(mixer, captured, objective), nmse

    best, best_state, stale, step = reached(nmse), copy.deepcopy(mixer.state_dict()), 0, 0
    every = max(1, recipe.steps // CHECKS)
    with ExitStack() as stack:
        running = None
        if readout is not None and isinstance(layer := mixer.get_submodule(readout), nn.Linear):
            running, tap = RunningReadout(layer), stack.enter_context(FeatureTap(layer))
        mixer.train()
        while step < recipe.steps and stale < PATIENCE:
            rows = torch.randint(train.stop, (BATCH,))
            y = captured.y[rows].float()
            loss = objective(mixer(captured.x[rows].float()), y, size)
            if not torch.isfinite(loss):
                break  # the best state so far is kept
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if running is not None:
                running.update(tap.features(), y)
            if step % every == 0 or step == recipe.steps:
                mixer.eval()
                if readout:
                    now = lower(*solve_readout(mixer, readout, targets, anchored=anchored))
                else:
                    now = evaluate(mixer, captured)
                found = reached(now)
                mixer.train()
                stale = 0 if found < best else stale + 1
                if found < best:
                    best, best_state = found, copy.deepcopy(mixer.state_dict())
    mixer.load_state_dict(best_state)
    mixer.eval()
    return best[1], step


def _seed(spec: MixerSpec, width: float, site: Site, seed: int) -> int:
    text = f"{spec.name}@{width:g} {site.name} {seed}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
