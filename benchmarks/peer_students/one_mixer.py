"""No search: one mixer at all attention sites, in closed form and refitted in sequence, MLPs narrowed alike."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial

from torch import nn

from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import Replacement, Teacher, assemble, count_params
from mixerzoo.library.entries import Source
from mixerzoo.library.folder import Library
from mixerzoo.plan import Candidate
from mixerzoo.refit import refit
from mixerzoo.registry import get_registry
from mixerzoo.student import make_replacement
from mixerzoo_search.candidates import CandidateLibrary
from mixerzoo_search.making import make_all
from peer_students.problem import Cannot, Made, Problem, fit
from peer_students.slim import mlp_levels, narrow_mlp

CORE = ("static", "glu_mlp", "linear_attention", "multihead_lstm", "shallow_ffn")
MOST_BYTES = 2**30  # of weights, at all sites together


def make(problem: Problem, *, mixer: str) -> Made:
    """Take the mixer at the width nearest to 1, or the next narrower one where MLPs cannot make up for it."""
    ground = problem.ground
    levels = mlp_levels(ground.teacher.sites)
    reasons = []
    for width in _widths(mixer):
        candidate = Candidate(mixer, width)
        try:
            _demand_light(ground.teacher, candidate)
            build = partial(_fresh, ground.teacher, candidate, levels)
            found = fit(build, levels, ground.meter, problem.budget)
        except (Cannot, MixerzooError) as reason:
            reasons.append(f"{candidate}: {reason}")
            continue
        plan = _plan(ground.teacher, candidate, 1 - found.level / levels)
        student, about = _solved(problem, plan)
        share = round(1 - found.level / levels, 4)
        return Made(
            student=student,
            about={
                "mixer": str(candidate),
                "mlp": share,
                "share": found.share,
                "tries": found.tries,
                **about,
            },
        )
    raise Cannot("; ".join(reasons))


def _widths(mixer: str) -> list[float]:
    widths = get_registry().mixers.get(mixer).widths
    nearest = min(widths, key=lambda width: abs(width - 1))
    return sorted((width for width in widths if width <= nearest), reverse=True)


def _demand_light(teacher: Teacher, candidate: Candidate) -> None:
    spec = get_registry().mixers.get(candidate.mixer)
    sites = [site for site in teacher.sites if site.kind == "attention"]
    weights = 4 * sum(count_params(spec.outline(site, candidate.width)) for site in sites)
    if weights > MOST_BYTES:
        raise Cannot(f"{weights / 2**30:.1f} GiB of weights")


def _plan(teacher: Teacher, candidate: Candidate, share: float) -> dict[str, Candidate]:
    """Return what stands where; MLPs that are kept are not in it."""
    plan = {}
    for site in teacher.sites:
        chosen = candidate if site.kind == "attention" else narrow_mlp(site, share)
        if chosen is not None:
            plan[site.name] = chosen
    return plan


def _fresh(teacher: Teacher, candidate: Candidate, levels: int, level: int) -> nn.Module:
    """Return a student of a level with any weights: latency does not depend on them."""
    plan = _plan(teacher, candidate, 1 - level / levels)
    modules = {name: make_replacement(chosen, teacher.site(name)) for name, chosen in plan.items()}
    return assemble(teacher.model, modules)


def _solved(problem: Problem, plan: Mapping[str, Candidate]) -> tuple[nn.Module, dict[str, float]]:
    """Return the student from the library, refitted in sequence if that is better, and both validation losses."""
    ground = problem.ground
    teacher, exam = ground.teacher, ground.validation
    source = Source.of(teacher, ground.data, ground.indices)
    shelf = CandidateLibrary(Library(ground.library), teacher, source, steps=0, seed=problem.seed)
    missing = [(name, chosen) for name, chosen in plan.items() if not shelf.find(name, chosen, stepped=False)]
    if missing:
        make_all(shelf, missing, ground.captured, stepped=False)
    modules: dict[str, Replacement] = {}
    for name, chosen in plan.items():
        entry = shelf.best(name, chosen)
        if entry is None:
            raise Cannot(f"{chosen} failed at {name}")
        modules[name] = make_replacement(chosen, teacher.site(name), shelf.state(entry))
    stitched = assemble(teacher.model, copy.deepcopy(modules))
    mixers = {name: chosen.mixer for name, chosen in plan.items()}
    refitted = refit(teacher, modules, mixers, ground.refit_batches())
    losses = {"stitched": exam.evaluate(stitched).loss, "refitted": exam.evaluate(refitted).loss}
    return (refitted if losses["refitted"] <= losses["stitched"] else stitched), losses
