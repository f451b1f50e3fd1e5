"""Slimmer by hand: as many heads in all attention and the same MLP width everywhere, the most important ones.

Nothing is solved. For every number of heads, MLPs are as wide as the budget allows; the best by validation loss is
taken.
"""

from __future__ import annotations

from functools import cache, partial

from torch import nn

from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import assemble
from mixerzoo.spec import Site
from peer_students.problem import Cannot, Made, Problem, fit_best
from peer_students.slim import fewer_heads, inherited, mlp_levels, narrow_mlp


def make(problem: Problem) -> Made:
    """Keep as many heads and hidden units as the budget allows."""
    ground = problem.ground
    teacher, views = ground.teacher, ground.captured.sites
    levels = mlp_levels(teacher.sites)

    @cache
    def attention(site: Site, heads: int) -> nn.Module:
        return fewer_heads(site, views[site.name].view, heads)

    def build(heads: int, level: int) -> nn.Module:
        modules: dict[str, nn.Module] = {}
        for site in teacher.sites:
            if site.kind == "attention" and heads < site.heads:
                modules[site.name] = attention(site, heads)
            elif site.kind == "mlp" and (candidate := narrow_mlp(site, 1 - level / levels)) is not None:
                modules[site.name] = inherited(candidate, site, views[site.name].view)
        return assemble(teacher.model, modules)

    whole = max(site.heads for site in teacher.sites)
    try:
        builds = {f"{heads} of {whole} heads": partial(build, heads) for heads in range(whole, 0, -1)}
        variant, found = fit_best(builds, levels, ground, problem.budget)
    except MixerzooError as error:
        raise Cannot(str(error)) from None
    about = {"heads": variant, "mlp": round(1 - found.level / levels, 4), "tries": found.tries}
    return Made(student=found.model, about=about)
