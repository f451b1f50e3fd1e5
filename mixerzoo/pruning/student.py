"""A student's prunable units over all of its sites: the penalty on them, their one order, and the smaller student.

The teacher's own modules that a student keeps are pruned too: a site of which units go away becomes a mixer that the
module is an instance of, `mlp_slice` or `fewer_heads`, with the module's weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import Replacement, Teacher, count_params
from mixerzoo.plan import Candidate, Plan
from mixerzoo.registry import get_registry
from mixerzoo.shrink import Choose, checked, hoyer_square, largest, norms, shrink, units_of
from mixerzoo.spec import AttentionView, MlpView, Site, View
from mixerzoo.student import Student
from mixerzoo.units import Units

KEPT_AS = {"mlp": Candidate("mlp_slice"), "attention": Candidate("fewer_heads")}
SAME = 1e-3  # of an output, relative to its largest value: a module that is another one than its mixer stays whole
Sizes = Mapping[str, Mapping[str, int]]  # site -> kind -> units of a row


@dataclass(frozen=True, kw_only=True)
class Prunable:
    """A site of a student of which units can be pruned.

    Attributes:
        site: the site.
        candidate: what stands there now or, where the teacher's module was kept, what stands there once it is pruned.
        kept: whether the teacher's module was kept.
        units: by kind.
    """

    site: Site
    candidate: Candidate
    kept: bool
    units: Mapping[str, Units]

    def module(self, model: nn.Module) -> nn.Module:
        """Return the module in a model whose parameters the units name."""
        return model.get_submodule(self.site.name if self.kept else f"{self.site.name}.mixer")


def prunables(teacher: Teacher, student: Student) -> list[Prunable]:
    """Return the sites that can be pruned, in site order.

    Raises:
        MixerzooError: if there is none.
    """
    found = [p for site in teacher.sites if (p := _prunable(teacher, student, site)) is not None]
    if not found:
        mixers = sorted({choice.mixer for _, choice in student.plan.choices})
        raise MixerzooError(
            f"no site of this student can be pruned: {', '.join(mixers)} name no units; "
            "prune one with other mixers, or with modules of the teacher's own"
        )
    return found


def _prunable(teacher: Teacher, student: Student, site: Site) -> Prunable | None:
    candidate = student.plan[site.name]
    module = student.model.get_submodule(site.name)
    if not candidate.is_keep:
        spec = get_registry().mixers.get(candidate.mixer)
        units = units_of(spec, module.get_submodule("mixer"))
        return Prunable(site=site, candidate=candidate, kept=False, units=units) if units else None
    of_host = getattr(teacher.host, "units", None)
    units = {} if of_host is None else checked(of_host(module, site), module, f"site '{site.name}'")
    candidate = KEPT_AS[site.kind]
    if not units or candidate.mixer not in get_registry().mixers:
        return None
    try:
        mixer = as_mixer(teacher, module, site)
    except MixerzooError:  # such as an activation that the mixer does not know
        return None
    x = torch.randn(1, site.tokens, site.dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = mixer(x), module(x)
    same = float((one - other).abs().max()) <= SAME * float(other.abs().max())
    there = units_of(get_registry().mixers.get(candidate.mixer), mixer)
    units = {kind: own for kind, own in units.items() if kind in there and there[kind].size == own.size}
    return Prunable(site=site, candidate=candidate, kept=True, units=units) if same and units else None


@torch.no_grad()
def as_mixer(teacher: Teacher, module: nn.Module, site: Site) -> nn.Module:
    """Return the mixer, whole, that a kept module is an instance of, with its weights."""
    spec = get_registry().mixers.get(KEPT_AS[site.kind].mixer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = spec.make(site, KEPT_AS[site.kind].width)
    weights = teacher.host.weights(module, site)
    view: View
    if site.kind == "mlp":
        view = MlpView(**weights, importance=torch.ones(site.hidden or 0), statistics={})
    else:
        # They only say which heads are alike: here none are, so that each is taken as it is.
        maps = torch.arange(float(site.heads))[:, None, None].expand(-1, site.tokens, site.tokens)
        view = AttentionView(**weights, mean_attention=maps, statistics={})
    assert spec.inherit is not None
    spec.inherit(mixer, view)
    return mixer.eval()


def penalty_of(sites: Sequence[Prunable]) -> Callable[[nn.Module], Tensor]:
    """Return the function of a student that says which share of its units is in use: the Hoyer-Square, in (0, 1].

    Each row of units counts on its own, as in FAR, and by how many it has.
    """
    whole = sum(len(units.rows) * units.size for prunable in sites for units in prunable.units.values())

    def penalty(model: nn.Module) -> Tensor:
        used = [
            hoyer_square(norms(prunable.module(model), units)).sum()
            for prunable in sites
            for units in prunable.units.values()
        ]
        return torch.stack(used).sum() / whole

    return penalty


@dataclass(frozen=True, kw_only=True)
class Slots:
    """The units of one kind at one site, strongest first.

    All rows keep as many units, so what is pruned together is the j-th strongest of every row: a slot.

    Attributes:
        site: name of the site.
        kind: of the units.
        units: the units.
        scores: (U,) falling: root mean square over the rows of their j-th largest norm, relative to that of all norms.
    """

    site: str
    kind: str
    units: Units
    scores: Tensor


@torch.no_grad()
def slots(model: nn.Module, sites: Sequence[Prunable]) -> list[Slots]:
    """Return the slots of a student.

    Norms are relative to those of their own kind and site, as the penalty takes them: layers may differ in scale.
    """
    found = []
    for prunable in sites:
        for kind, units in prunable.units.items():
            sizes = norms(prunable.module(model), units).double()
            sizes = sizes / sizes.square().mean().sqrt().clamp(min=1e-30)
            ranked = sizes.sort(dim=1, descending=True).values
            scores = ranked.square().mean(dim=0).sqrt()
            found.append(Slots(site=prunable.site.name, kind=kind, units=units, scores=scores))
    return found


class Order:
    """All slots of a student in one order, weakest first: `sizes(n)` is what is left without the first n."""

    def __init__(self, parts: Sequence[Slots]) -> None:
        self.slots = parts
        self._scores = torch.cat([part.scores for part in parts]).sort().values

    @property
    def most(self) -> int:
        """Number of slots."""
        return len(self._scores)

    def threshold(self, pruned: int) -> float:
        """Return the score that the first `pruned` slots are not above; it takes equal ones together."""
        return float(self._scores[pruned - 1]) if pruned else 0.0

    def sizes(self, pruned: int) -> dict[str, dict[str, int]]:
        """Return the sizes of the kinds that lose units, after one threshold for all; some of each are left."""
        limit = self.threshold(pruned)
        found: dict[str, dict[str, int]] = {}
        for part in self.slots:
            # As many as the threshold leaves, or the next number that is allowed.
            count = part.units.allowed(int((part.scores > limit).sum()) if pruned else part.units.size)
            if count < part.units.size:
                found.setdefault(part.site, {})[part.kind] = count
        return found


def smaller(
    teacher: Teacher,
    student: Student,
    sites: Sequence[Prunable],
    sizes: Sizes,
    *,
    choose: Choose = largest,
) -> Student:
    """Return the student with so many units at some sites, really smaller; its weights are its own.

    A module of the teacher's own that would become larger stays whole.

    Args:
        teacher: the teacher.
        student: left as it is.
        sites: its prunable sites.
        sizes: what is left.
        choose: see `shrink`.
    """
    model = copy.deepcopy(student.model)
    choices = dict(student.plan.choices)
    shelf = get_registry().mixers
    for prunable in sites:
        site = prunable.site
        counts = sizes.get(site.name)
        if not counts:
            continue
        module = prunable.module(model)
        mixer = as_mixer(teacher, module, site) if prunable.kept else module
        spec = shelf.get(prunable.candidate.mixer)
        candidate, mixer = shrink(spec, site, prunable.candidate, mixer, counts, choose=choose)
        if prunable.kept and count_params(mixer) >= count_params(module):
            continue  # it sees the token itself, too: a head less of many makes it larger
        choices[site.name] = candidate
        model.set_submodule(site.name, Replacement(mixer, site, masks=spec.caps.masks))
    plan = replace(student.plan, choices=tuple((site, choices[site]) for site, _ in student.plan.choices))
    return Student(plan=plan, model=model.eval().requires_grad_(False))


def all_kept(teacher: Teacher) -> Student:
    """Return the student that keeps every module of its teacher: what a teacher is pruned as."""
    return Student(plan=Plan.of({}, teacher.sites), model=copy.deepcopy(teacher.model))
