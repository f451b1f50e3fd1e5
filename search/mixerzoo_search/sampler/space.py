"""The plans of a study as rows of positions, and what the model and the prior say of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution

from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.prior import Prior

Indices = tuple[int, ...]  # one choice a site
Plans = NDArray[np.int64]  # (P, S): P plans, S sites
Table = NDArray[np.float64]  # (S, C): C as many as the longest row of choices

_WALK = 4096  # plans that are looked at for one that is not known


class Space:
    """Choices are positions among a site's choices; P plans of S sites are an array (P, S).

    Attributes:
        names: of the sites.
        choices: of each site.
        sizes: (S,) numbers of choices.
        offered: (S, C) whether a site has so many choices.
        guide: (S, C) probabilities, the prior's or uniform.
        damage: (S, C) what a choice does to the loss: the model's scores; without a model, what the prior's
            probabilities say, up to a factor; None without either.
        base_ms: latency without changes.
        ms: (S, C) changes of it; zeros without a model.
        modelled: whether there is a model that knows every choice.
    """

    def __init__(
        self,
        sites: Mapping[str, CategoricalDistribution],
        model: AdditiveModel | None,
        prior: Prior | None,
    ) -> None:
        self.names = tuple(sites)
        self.choices = tuple(tuple(sites[name].choices) for name in self.names)
        self.sizes = np.array([len(row) for row in self.choices])
        self.offered = np.arange(self.sizes.max())[None] < self.sizes[:, None]
        self.position = tuple(
            {_identity(choice): at for at, choice in enumerate(row)} for row in self.choices
        )
        self._sites = np.arange(len(self.names))
        self.guide = np.where(self.offered, 1.0 / self.sizes[:, None], 0.0)
        if prior is not None:
            for at, (name, row) in enumerate(zip(self.names, self.choices, strict=True)):
                self.guide[at, : len(row)] = prior.probabilities(name, [str(choice) for choice in row])
        tables = None if model is None else self._tables(model)
        self.modelled = tables is not None
        self.base_ms = 0.0
        self.ms = np.zeros(self.offered.shape)
        self.damage: Table | None = None
        if model is not None and tables is not None:
            self.base_ms = model.intercept_ms + model.slope * model.base_ms
            self.damage, self.ms = tables[0], tables[1] * model.slope
        elif prior is not None and np.ptp(self.guide[self.offered]) > 0:
            # Of prior ~ exp(-damage / t), in units of t.
            likely = np.where(self.offered, self.guide, 1.0)
            self.damage = np.log(self.guide.max(1, keepdims=True) / np.maximum(likely, 1e-12))
            self.damage[~self.offered] = 0.0

    def holds(self, sites: Mapping[str, CategoricalDistribution]) -> bool:
        """Return whether these are the sites and choices of this space."""
        # Identities: True, 1 and 1.0 are equal.
        return self.names == tuple(sites) and all(
            len(row) == len(sites[name].choices)
            and all(_identity(a) == _identity(b) for a, b in zip(row, sites[name].choices, strict=True))
            for name, row in zip(self.names, self.choices, strict=True)
        )

    def _tables(self, model: AdditiveModel) -> tuple[Table, Table] | None:
        """Return the model's tables in the study's order; None if it lacks a choice."""
        known = {
            (site, str(candidate)): pair
            for site, row, losses, latencies in zip(
                model.sites, model.candidates, model.loss, model.latency_ms, strict=True
            )
            for candidate, *pair in zip(row, losses, latencies, strict=True)
        }
        tables = np.zeros((2, *self.offered.shape))
        for at, (name, row) in enumerate(zip(self.names, self.choices, strict=True)):
            for to, choice in enumerate(row):
                if (name, str(choice)) not in known:
                    return None
                tables[:, at, to] = known[name, str(choice)]
        return tables[0], tables[1]

    @property
    def total(self) -> int:
        """Number of plans."""
        return math.prod(int(size) for size in self.sizes)

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

    def of(self, table: Table, plans: Plans) -> NDArray[np.float64]:
        """Return (P, S): a table's entries for plans."""
        return np.asarray(table[self._sites, plans])

    def predicted_ms(self, plans: Plans) -> NDArray[np.float64]:
        """Return (P,) latencies in ms; 0 without a model."""
        return np.asarray(self.base_ms + self.of(self.ms, plans).sum(1))

    def every(self) -> Plans:
        """Return all plans."""
        return np.indices(tuple(self.sizes)).reshape(len(self.names), -1).T.astype(np.int64)

    def draw(self, rng: np.random.Generator, count: int, *, guided: bool = True) -> Plans:
        """Return random plans, each site's choice drawn from the prior or uniformly."""
        if not guided:
            return np.asarray(rng.random((count, len(self.names))) * self.sizes).astype(np.int64)
        edges = np.cumsum(self.guide, axis=1)
        dice = rng.random((count, len(self.names))) * edges[:, -1]
        beyond = (dice[:, :, None] >= edges[None]).sum(2)
        return np.asarray(np.minimum(beyond, self.sizes - 1), dtype=np.int64)

    def singles(self, plan: NDArray[np.int64]) -> Plans:
        """Return every plan that differs from one at a single site."""
        other = self.offered.copy()
        other[self._sites, plan] = False
        sites, to = np.nonzero(other)
        found = np.repeat(plan[None], len(sites), axis=0)
        found[np.arange(len(sites)), sites] = to
        return found

    def unknown_from(self, start: int, known: set[Indices]) -> Plans:
        """Return plans that are not known, counted through the space from one of them."""
        found: list[Indices] = []
        for step in range(min(self.total, max(_WALK, len(known) + 1))):
            number, plan = (start + step) % self.total, []
            for size in self.sizes:
                number, at = divmod(number, int(size))
                plan.append(at)
            if tuple(plan) not in known:
                found.append(tuple(plan))
        return np.array(found, dtype=np.int64).reshape(-1, len(self.names))


def _identity(choice: Any) -> tuple[str, Any]:
    """Return a key under which True, 1 and 1.0 differ."""
    return type(choice).__name__, choice
