"""An Optuna sampler for plans: one categorical a site, guided by a prior, a model and the study itself."""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.elites import elites
from mixerzoo_search.prior import Prior

Indices = tuple[int, ...]  # one choice a site

_ATTEMPTS = 32  # proposals that may turn out to be known before the space is walked instead
_WALK = 4096  # plans that are looked at for one that meets the budget, when walking
_CROSSOVER = 0.3  # share of the evidence-led proposals that mix two elites
_GUIDED = 0.7  # share of a mutation's choices that follow the prior; the others are uniform


class PlanSampler(BaseSampler):
    """Suggest whole plans; never one that the study already has, unless there is no other.

    Works in any study whose parameters are flat categoricals of strings, one a site (`glu_mlp@0.5`, `keep`),
    with one objective or several, with or without constraints. Other parameters are sampled at random.

    A plan comes from the prior with probability n0 / (n0 + finished trials), otherwise from the evidence: a
    good finished plan with one to three sites changed, or two good ones mixed. With a model and a budget, a
    plan that is predicted over the budget is repaired by the changes that cost the least predicted loss per
    millisecond, so that no evaluation is spent on it.

    Deterministic for a seed and resumable: a trial's random numbers depend on the seed and its number only.

    Args:
        model: predicts loss and latency; also stands in for the prior where there is none.
        prior: which candidate is promising at which site.
        budget_ms: latency budget that `model` is asked about; without it nothing is repaired.
        seed: of everything random.
        n0: finished trials at which prior and evidence have equal weight.
        tolerance: a plan is repaired when it is predicted over (1 + tolerance) * budget_ms.
    """

    def __init__(
        self,
        *,
        model: AdditiveModel | None = None,
        prior: Prior | None = None,
        budget_ms: float | None = None,
        seed: int = 0,
        n0: float = 10.0,
        tolerance: float = 0.0,
    ) -> None:
        self._model = model
        self._prior = prior or (None if model is None else prior_of(model))
        self._budget_ms = budget_ms
        self._seed = seed
        self._n0 = n0
        self._tolerance = tolerance
        self._lock = threading.Lock()
        self._pending: dict[
            tuple[int, int], dict[str, Any]
        ] = {}  # (study, trial) -> plan on its way to the study

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the categoricals that every finished trial has."""
        trials = study.get_trials(deepcopy=False)
        space = intersection_search_space(trials, include_pruned=True)
        return {name: d for name, d in space.items() if isinstance(d, CategoricalDistribution)}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return a plan for the categoricals, and random values for anything else."""
        sites = {name: d for name, d in search_space.items() if isinstance(d, CategoricalDistribution)}
        values = {
            name: self._random(study, trial, name, d) for name, d in search_space.items() if name not in sites
        }
        return values | self._plan(study, trial, sites)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return a value for a parameter that no finished trial has.

        In a study without finished trials that is every site: if the model or the prior knows them, the values
        of one trial still form one plan.
        """
        if isinstance(param_distribution, CategoricalDistribution):
            known = self._known_space()
            if param_name in known:
                key = (study._study_id, trial.number)
                plan = self._pending.get(key) or self._plan(study, trial, known)
                if plan[param_name] in param_distribution.choices:
                    return plan[param_name]
        return self._random(study, trial, param_name, param_distribution)

    def _known_space(self) -> dict[str, CategoricalDistribution]:
        if self._model is not None:
            rows = zip(self._model.sites, self._model.candidates, strict=True)
            return {site: CategoricalDistribution([str(choice) for choice in row]) for site, row in rows}
        if self._prior is not None:
            return {site: CategoricalDistribution(list(row)) for site, row in self._prior.weights.items()}
        return {}

    def _random(self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        seed = np.random.SeedSequence([self._seed, trial.number, zlib.crc32(name.encode())])
        sampler = RandomSampler(seed=int(seed.generate_state(1)[0]))
        return sampler.sample_independent(study, trial, name, distribution)

    def _plan(
        self, study: Study, trial: FrozenTrial, sites: Mapping[str, CategoricalDistribution]
    ) -> dict[str, Any]:
        """Return a choice for each of `sites`; remembered, so that a parallel trial does not get it too."""
        if not sites:
            return {}
        with self._lock:
            trials = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
            finished = {(study._study_id, t.number) for t in trials if t.state.is_finished()}
            self._pending = {key: plan for key, plan in self._pending.items() if key not in finished}
            known = [_chosen(t) for t in trials]
            known += [plan for (owner, _), plan in self._pending.items() if owner == study._study_id]
            proposer = _Proposer(
                sites=sites,
                model=self._model,
                prior=self._prior,
                limit_ms=math.inf if self._budget_ms is None else self._budget_ms * (1.0 + self._tolerance),
                rng=np.random.default_rng([self._seed, trial.number]),
                known=known,
            )
            plan = proposer.decode(proposer.propose(trials, study.directions, self._n0))
            self._pending[study._study_id, trial.number] = plan
            return plan


def prior_of(model: AdditiveModel) -> Prior:
    """Return the prior that the scores of an additive model make."""
    return Prior.from_damage(
        {
            (site, candidate): max(loss, 0.0)
            for site, row, losses in zip(model.sites, model.candidates, model.loss, strict=True)
            for candidate, loss in zip(row, losses, strict=True)
        }
    )


def _chosen(trial: FrozenTrial) -> dict[str, Any]:
    """Return the trial's parameters, with those that it was enqueued with and has not asked for yet."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


class _Proposer:
    """Makes one plan; choices are positions among a site's choices."""

    def __init__(
        self,
        *,
        sites: Mapping[str, CategoricalDistribution],
        model: AdditiveModel | None,
        prior: Prior | None,
        limit_ms: float,
        rng: np.random.Generator,
        known: Sequence[Mapping[str, Any]],
    ) -> None:
        self.names = tuple(sites)
        self.choices = tuple(tuple(sites[name].choices) for name in self.names)
        self.sizes = tuple(len(row) for row in self.choices)
        self.rng = rng
        self.limit_ms = limit_ms
        self.position = tuple(
            {_identity(choice): at for at, choice in enumerate(row)} for row in self.choices
        )
        self.known = {plan for plan in map(self.encode, known) if plan is not None}
        self.uniform = tuple(np.full(size, 1.0 / size) for size in self.sizes)
        self.guide = self.uniform
        if prior is not None:
            self.guide = tuple(
                prior.probabilities(name, [str(choice) for choice in row])
                for name, row in zip(self.names, self.choices, strict=True)
            )
        self.base_ms, self.loss, self.ms = self._tables(model)

    def _tables(
        self, model: AdditiveModel | None
    ) -> tuple[float, tuple[NDArray[np.float64], ...], tuple[NDArray[np.float64], ...]]:
        """Return the model's tables in the study's order; no budget can be checked if it lacks a choice."""
        if model is not None:
            table = {
                (site, str(candidate)): (loss, ms * model.slope)
                for site, row, losses, latencies in zip(
                    model.sites, model.candidates, model.loss, model.latency_ms, strict=True
                )
                for candidate, loss, ms in zip(row, losses, latencies, strict=True)
            }
            rows = [
                [table.get((name, str(choice))) for choice in row]
                for name, row in zip(self.names, self.choices, strict=True)
            ]
            if all(entry is not None for row in rows for entry in row):
                base = model.intercept_ms + model.slope * model.base_ms
                pairs = [np.array(row, dtype=float) for row in rows]
                return base, tuple(pair[:, 0] for pair in pairs), tuple(pair[:, 1] for pair in pairs)
        self.limit_ms = math.inf
        nothing = tuple(np.zeros(size) for size in self.sizes)
        return 0.0, nothing, nothing

    def encode(self, plan: Mapping[str, Any]) -> Indices | None:
        """Return the positions of a plan's choices, None if it is not a whole plan of this space."""
        found = []
        for name, position in zip(self.names, self.position, strict=True):
            at = position.get(_identity(plan[name])) if name in plan else None
            if at is None:
                return None
            found.append(at)
        return tuple(found)

    def decode(self, plan: Indices) -> dict[str, Any]:
        """Return name -> choice."""
        return {name: row[at] for name, row, at in zip(self.names, self.choices, plan, strict=True)}

    def predicted_ms(self, plan: Indices) -> float:
        """Return the latency in ms; 0 without a model."""
        return self.base_ms + float(sum(row[at] for row, at in zip(self.ms, plan, strict=True)))

    def propose(
        self, trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection], n0: float
    ) -> Indices:
        """Return a plan that is not known, within the limit if there is one."""
        evidence = [t for t in trials if t.state == TrialState.COMPLETE and self.encode(t.params) is not None]
        parents = [plan for t in elites(evidence, directions) if (plan := self.encode(t.params)) is not None]
        trust_prior = n0 / (n0 + len(evidence)) if parents else 1.0
        for attempt in range(_ATTEMPTS):
            # Parents whose surroundings are known already are left with larger and larger steps.
            steps = 3 + attempt // 8
            from_prior = self.rng.random() < trust_prior
            plan = self._repaired(self._draw() if from_prior else self._offspring(parents, steps))
            if plan not in self.known:
                return plan
        return self._walk()

    def _draw(self) -> Indices:
        """Return a plan from the prior."""
        return tuple(int(self.rng.choice(row.size, p=row)) for row in self.guide)

    def _offspring(self, parents: Sequence[Indices], most: int) -> Indices:
        """Return two parents mixed, or one with one to `most` sites changed."""
        parent = parents[int(self.rng.integers(len(parents)))]
        if len(parents) > 1 and self.rng.random() < _CROSSOVER:
            other = parents[int(self.rng.integers(len(parents)))]
            take = self.rng.random(len(parent)) < 0.5
            child = tuple(b if t else a for a, b, t in zip(parent, other, take, strict=True))
            if child not in self.known:
                return child
            parent = child
        return self._mutated(parent, int(self.rng.integers(1, most + 1)))

    def _mutated(self, plan: Indices, changes: int) -> Indices:
        open_sites = np.array([size > 1 for size in self.sizes], dtype=float)
        if not open_sites.any():
            return plan
        # A site that holds what the prior thinks little of is changed sooner.
        doubt = np.array([1.0 - row[at] for row, at in zip(self.guide, plan, strict=True)]) * open_sites
        doubt = doubt / doubt.sum() if doubt.sum() > 0 else open_sites / open_sites.sum()
        chance = _GUIDED * doubt + (1 - _GUIDED) * open_sites / open_sites.sum()
        count = min(changes, int(open_sites.sum()))
        child = list(plan)
        for site in self.rng.choice(len(plan), size=count, replace=False, p=chance):
            row = (self.guide if self.rng.random() < _GUIDED else self.uniform)[site].copy()
            row[plan[site]] = 0.0
            if row.sum() <= 0:
                row = self.uniform[site].copy()
                row[plan[site]] = 0.0
            child[site] = int(self.rng.choice(row.size, p=row / row.sum()))
        return tuple(child)

    def _repaired(self, plan: Indices) -> Indices:
        """Return the plan with changes, each the cheapest in loss per millisecond, until it meets the limit."""
        current = list(plan)
        while self.predicted_ms(tuple(current)) > self.limit_ms:
            moves = [
                (
                    (self.loss[site][to] - self.loss[site][at]) / (self.ms[site][at] - self.ms[site][to]),
                    site,
                    to,
                )
                for site, at in enumerate(current)
                for to in range(self.sizes[site])
                if self.ms[site][to] < self.ms[site][at] - 1e-12
            ]
            if not moves:
                break  # as fast as it gets
            # One of the best three, so that neighbouring plans are not all repaired into the same one.
            _, site, to = sorted(moves)[min(int(self.rng.geometric(0.7)) - 1, 2, len(moves) - 1)]
            current[site] = to
        return tuple(current)

    def _walk(self) -> Indices:
        """Return a plan that is not known by counting through the space from a random place.

        The first that meets the limit, else the fastest of those looked at; a known one only if all are known.
        """
        total = math.prod(self.sizes)
        start = int(self.rng.random() * total) % total
        best: tuple[float, Indices] | None = None
        for step in range(min(total, max(_WALK, len(self.known) + 1))):
            number, plan = (start + step) % total, []
            for size in self.sizes:
                number, at = divmod(number, size)
                plan.append(at)
            candidate = tuple(plan)
            if candidate in self.known:
                continue
            ms = self.predicted_ms(candidate)
            if ms <= self.limit_ms:
                return candidate
            if best is None or ms < best[0]:
                best = ms, candidate
        return self._repaired(self._draw()) if best is None else best[1]


def _identity(choice: Any) -> tuple[str, Any]:
    """Return a key under which True, 1 and 1.0 differ."""
    return type(choice).__name__, choice
