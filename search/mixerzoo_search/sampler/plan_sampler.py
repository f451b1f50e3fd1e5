"""The sampler as Optuna sees it: any study, any storage, any number of processes."""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study
from optuna.trial import FrozenTrial

from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.prior import Prior
from mixerzoo_search.sampler.evidence import gather
from mixerzoo_search.sampler.proposals import Proposer
from mixerzoo_search.sampler.space import Space


class PlanSampler(BaseSampler):
    """Suggest whole plans; never one that the study already has, unless there is no other.

    Works in any study whose parameters are flat categoricals of strings, one a site (`glu_mlp@0.5`, `keep`), with one
    objective or several, with or without constraints, a model or a prior. Other parameters are sampled at random.

    What the model gets wrong is learned from the finished trials by a Gaussian process, as is every objective and
    constraint without a model (`residual.py`). Of many plans, the one of the highest expected improvement is suggested,
    times the chances that it keeps the constraints, times a power of the prior that fades as trials finish. With
    several objectives one is improved under limits of the others that are drawn anew each time. A small share of the
    plans is drawn from the prior or uniformly whatever was learned; without a model the first ones are.

    With a model and a budget the first suggestion is the model's exact plan, and no plan is suggested that is predicted
    over the budget, unless latencies measured so far say that it may keep it.

    A model's scores are taken for parts of the first objective, and a second one for a latency in ms. A constraint is
    taken for measured latency less the budget if it is near the prediction of that.

    Deterministic for a seed and resumable from the storage alone: a trial's random numbers depend on the seed and its
    number only.

    Args:
        model: predicts loss and latency; also stands in for the prior where there is none.
        prior: which candidate is promising at which site.
        budget_ms: latency budget that `model` is asked about.
        seed: of everything random.
        n0: finished trials at which the prior has half of its weight.
        tolerance: a plan predicted up to (1 + tolerance) * budget_ms is taken to keep the budget.
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
        self._budget_ms = math.inf if budget_ms is None else budget_ms
        self._seed = seed
        self._n0 = n0
        self._tolerance = tolerance
        self._lock = threading.Lock()
        # (study, trial) -> plan on its way to the study
        self._pending: dict[tuple[int, int], dict[str, Any]] = {}
        # What would be found out anew for every trial: the common categoricals of a study, and the last space.
        self._common: dict[int, IntersectionSearchSpace] = {}
        self._space: Space | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the categoricals that every finished trial has."""
        with self._lock:
            common = self._common.setdefault(study._study_id, IntersectionSearchSpace(include_pruned=True))
            space = common.calculate(study)
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

    def _space_of(self, sites: Mapping[str, CategoricalDistribution]) -> Space:
        if self._space is None or not self._space.holds(sites):
            self._space = Space(sites, self._model, self._prior)
        return self._space

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
            space = self._space_of(sites)
            evidence = gather(space, trials, study.directions)
            known = [_chosen(t) for t in trials]
            known += [plan for (owner, _), plan in self._pending.items() if owner == study._study_id]
            proposer = Proposer(
                space=space,
                evidence=evidence,
                known={plan for plan in map(space.encode, known) if plan is not None},
                budget_ms=self._budget_ms,
                limit_ms=self._budget_ms * (1.0 + self._tolerance),
                trust=self._n0 / (self._n0 + len(evidence)),
                rng=np.random.default_rng([self._seed, trial.number]),
            )
            plan = space.decode(proposer.propose())
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
