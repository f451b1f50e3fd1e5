"""Conformance: what every mixer must do, and what it must do once it claims it.

Each check is a plain function of a mixer's spec and a site, and raises ConformanceError on the first thing
that is not as promised. A plugin's test file needs two lines::

    @parametrize_with_checks("shift")
    def test_conformance(check):
        check()

pytest is imported only by `parametrize_with_checks`.
"""

from mixerzoo.testing.demands import ConformanceError
from mixerzoo.testing.material import ATTENTION_SITE, GATED_SITE, MLP_SITE, default_sites, random_view
from mixerzoo.testing.running import (
    CHECKS,
    Check,
    CheckResult,
    checks_for,
    parametrize_with_checks,
    run_checks,
)

__all__ = [
    "ATTENTION_SITE",
    "CHECKS",
    "GATED_SITE",
    "MLP_SITE",
    "Check",
    "CheckResult",
    "ConformanceError",
    "checks_for",
    "default_sites",
    "parametrize_with_checks",
    "random_view",
    "run_checks",
]
