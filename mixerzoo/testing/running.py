"""Which checks apply to a mixer, and running them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixerzoo.errors import MixerzooError
from mixerzoo.registry import get_registry
from mixerzoo.spec import MixerSpec
from mixerzoo.testing.always import (
    check_batch_independent,
    check_bfloat16,
    check_deepcopy,
    check_deterministic,
    check_gradcheck,
    check_gradients,
    check_input_unchanged,
    check_noncontiguous,
    check_oblong_grid,
    check_per_token,
    check_seeded,
    check_shape,
    check_state_dict,
    check_tokens_mix,
    check_width_grows,
)
from mixerzoo.testing.claims import (
    check_any_length,
    check_causal,
    check_export,
    check_inherit,
    check_masks,
    check_readout,
    check_units,
)
from mixerzoo.testing.demands import AllWidths, ConformanceError
from mixerzoo.testing.material import default_sites

if TYPE_CHECKING:
    import pytest


@dataclass(frozen=True)
class Check:
    """One check, and when it applies.

    Attributes:
        name: short, as it is shown.
        function: raises ConformanceError unless the mixer passes at the site.
        needs: what a mixer must claim (a field of Caps) or give (a field of MixerSpec) for it to apply.
        unless: the claim that takes its place.
    """

    name: str
    function: AllWidths
    needs: str = ""
    unless: str = ""

    @property
    def summary(self) -> str:
        """One line: what is demanded."""
        return (self.function.__doc__ or "").partition("\n")[0]

    def reason_to_skip(self, spec: MixerSpec) -> str:
        """Return why the check does not apply to `spec`; empty if it does."""
        if self.unless and getattr(spec.caps, self.unless):
            return f"{self.unless} is claimed"
        if hasattr(spec.caps, self.needs):
            return "" if getattr(spec.caps, self.needs) else f"{self.needs} is not claimed"
        if self.needs and not getattr(spec, self.needs):
            return f"no {self.needs} is given"
        return ""

    def __call__(self, spec: MixerSpec) -> None:
        """Run the check on the default sites.

        Raises:
            ConformanceError: if the mixer does not pass.
        """
        for site in default_sites(spec):
            self.function(spec, site)


CHECKS: tuple[Check, ...] = (
    Check("shape", check_shape),
    Check("oblong_grid", check_oblong_grid),
    Check("deterministic", check_deterministic),
    Check("seeded", check_seeded),
    Check("input_unchanged", check_input_unchanged),
    Check("batch_independent", check_batch_independent),
    Check("tokens_mix", check_tokens_mix, unless="per_token"),
    Check("per_token", check_per_token, needs="per_token"),
    Check("gradients", check_gradients),
    Check("gradcheck", check_gradcheck),
    Check("width_grows", check_width_grows),
    Check("state_dict", check_state_dict),
    Check("deepcopy", check_deepcopy),
    Check("bfloat16", check_bfloat16),
    Check("noncontiguous", check_noncontiguous),
    Check("any_length", check_any_length, needs="any_length"),
    Check("causal", check_causal, needs="causal"),
    Check("masks", check_masks, needs="masks"),
    Check("export", check_export, needs="exportable"),
    Check("inherit", check_inherit, needs="inherit"),
    Check("readout", check_readout, needs="readout"),
    Check("units", check_units, needs="units"),
)


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check.

    Attributes:
        name: of the check.
        passed: whether it was run and passed.
        skipped: whether it does not apply; `message` says why.
        message: one line; empty for a pass.
        seconds: how long it took.
    """

    name: str
    passed: bool
    skipped: bool
    message: str
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether it was run and did not pass."""
        return not (self.passed or self.skipped)


def checks_for(spec: MixerSpec) -> tuple[Check, ...]:
    """Return the checks that apply to a mixer: those for all, and those for what it claims."""
    return tuple(check for check in CHECKS if not check.reason_to_skip(spec))


def run_checks(spec: MixerSpec) -> list[CheckResult]:
    """Run every check on a mixer and return one result each, never raising for a mixer that fails."""
    results = []
    for check in CHECKS:
        reason = check.reason_to_skip(spec)
        if reason:
            results.append(CheckResult(check.name, False, True, reason, 0.0))
            continue
        started = time.perf_counter()
        try:
            check(spec)
            message = ""
        except ConformanceError as error:
            message = str(error)
        results.append(CheckResult(check.name, not message, False, message, time.perf_counter() - started))
    return results


def parametrize_with_checks(*names: str) -> pytest.MarkDecorator:
    """Parametrise a test with every check that applies to the named mixers; it calls its argument `check`.

    Raises:
        MixerzooError: if no installed plugin offers a mixer of that name.
    """
    import pytest

    cases = [
        pytest.param(lambda check=check, spec=spec: check(spec), id=f"{spec.name}-{check.name}")
        for spec in map(_registered, names)
        for check in checks_for(spec)
    ]
    return pytest.mark.parametrize("check", cases)


def _registered(name: str) -> MixerSpec:
    registry = get_registry()
    try:
        return registry.mixers.get(name)
    except MixerzooError as error:
        # The usual reason for a plugin's own mixer to be missing is that the plugin did not load.
        broken = "; ".join(f"plugin {plugin.origin} is broken: {plugin.error}" for plugin in registry.broken)
        raise MixerzooError(f"{error} {broken}".strip()) from None
