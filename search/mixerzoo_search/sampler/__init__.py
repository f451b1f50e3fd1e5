"""An Optuna sampler for plans: one categorical a site, guided by a prior, a model, and what the study has shown."""

from __future__ import annotations

from mixerzoo_search.sampler.plan_sampler import PlanSampler, prior_of

__all__ = ["PlanSampler", "prior_of"]
