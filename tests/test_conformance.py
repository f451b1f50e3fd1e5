"""Every conformance check can fail, says why in one line, and lets a good mixer pass."""

import pytest
import torch
from broken_mixers import BROKEN, GOOD, PRUNABLE, spec_of
from torch import nn

from mixerzoo import Caps, MixerzooError, MlpView, hookimpl
from mixerzoo.registry import temporary_plugin
from mixerzoo.testing import (
    ATTENTION_SITE,
    CHECKS,
    MLP_SITE,
    ConformanceError,
    checks_for,
    default_sites,
    parametrize_with_checks,
    random_view,
    run_checks,
)

BY_NAME = {check.name: check for check in CHECKS}
CASES = [
    pytest.param(check, spec, id=f"{check}: {wrong}")
    for check in BROKEN
    for wrong, spec in BROKEN[check].items()
]


class NarrowMlp(nn.Sequential):
    """A good mixer for an mlp site."""

    def __init__(self, dim: int, hidden: int | None, width: float) -> None:
        inner = round((hidden or 4 * dim) * width)
        super().__init__(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))


def inherit_mlp(mixer: NarrowMlp, view: MlpView) -> None:
    best = view.importance.topk(mixer[0].out_features).indices
    mixer[0].weight.copy_(view.in_weight[best])
    mixer[0].bias.copy_(view.in_bias[best])
    mixer[2].weight.copy_(view.out_weight[:, best])
    mixer[2].bias.copy_(view.out_bias)


GOOD_MLP = spec_of(
    NarrowMlp,
    kinds={"mlp"},
    caps=Caps(any_length=True, exportable=True, per_token=True),
    inherit=inherit_mlp,
    readout="2",
)
# At both kinds of site, with nothing to train.
IDENTITY = spec_of(
    lambda: nn.Identity(),
    kinds={"attention", "mlp"},
    caps=Caps(any_length=True, per_token=True),
    widths=(1.0,),
)
SILENT = spec_of(lambda: Silent(), caps=Caps(any_length=True, per_token=True, exportable=True))


class Silent(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


@pytest.mark.parametrize(
    "spec",
    [GOOD, GOOD_MLP, IDENTITY, SILENT, PRUNABLE],
    ids=["attention", "mlp", "both", "silent", "prunable"],
)
def test_a_good_mixer_passes(spec):
    results = run_checks(spec)
    assert [r.message for r in results if r.failed] == []
    assert {r.name for r in results if r.passed} == {check.name for check in checks_for(spec)}
    assert [r.name for r in results] == [check.name for check in CHECKS]


def test_every_check_has_a_broken_mixer():
    assert set(BROKEN) == set(BY_NAME)
    assert all(BROKEN.values())


@pytest.mark.parametrize(("check", "spec"), CASES)
def test_the_check_fails_on_its_broken_mixer(check, spec):
    assert BY_NAME[check] in checks_for(spec)
    with pytest.raises(ConformanceError) as caught:
        BY_NAME[check](spec)
    message = str(caught.value)
    assert message.startswith("mixer 'subject' at width ")
    assert "(attention site): expected " in message
    assert ", found " in message
    assert "\n" not in message


def test_lstm_with_its_packed_weights_passes():
    # nn.LSTM keeps a second list of its weights, which copies and functional calls tend to miss.
    class Recurrent(nn.Module):
        def __init__(self, dim, width):
            super().__init__()
            inner = round(dim * width)
            self.lstm = nn.LSTM(dim, inner, batch_first=True, bidirectional=True)
            self.out = nn.Linear(2 * inner, dim)

        def forward(self, x):
            return self.out(self.lstm(x)[0])

    spec = spec_of(Recurrent, caps=Caps(any_length=True), readout="out")
    assert [r.message for r in run_checks(spec) if r.failed] == []


def test_a_grid_may_be_refused_in_so_many_words():
    def build(dim, grid):
        if grid[0] != grid[1]:
            raise MixerzooError("this mixer needs a square grid")
        return nn.Linear(dim, dim)

    BY_NAME["oblong_grid"](spec_of(build))


def test_checks_that_do_not_apply_are_skipped_with_a_reason():
    spec = spec_of(NarrowMlp, kinds={"mlp"}, caps=Caps(per_token=True))
    skipped = {r.name: r.message for r in run_checks(spec) if r.skipped}
    assert skipped["masks"] == "masks is not claimed"
    assert skipped["inherit"] == "no inherit is given"
    assert skipped["tokens_mix"] == "per_token is claimed"
    assert not skipped.keys() & {check.name for check in checks_for(spec)}


def test_a_failure_is_a_result_not_an_exception():
    results = {r.name: r for r in run_checks(BROKEN["shape"]["build raises"])}
    assert results["shape"].failed
    assert "division by zero" in results["shape"].message


def test_checks_leave_the_callers_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    BY_NAME["gradcheck"](GOOD)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("site", [ATTENTION_SITE, MLP_SITE], ids=["attention", "mlp"])
def test_random_view_fits_the_site(site):
    view, again, other = random_view(site, 3), random_view(site, 3), random_view(site, 4)
    assert torch.equal(view.out_weight, again.out_weight)
    assert not torch.equal(view.out_weight, other.out_weight)
    if site.kind == "mlp":
        assert view.in_weight.shape == (site.hidden, site.dim)
        assert view.importance.min() >= 0
    else:
        assert view.mean_attention.shape == (site.heads, site.tokens, site.tokens)
        assert torch.allclose(view.mean_attention.sum(-1), torch.ones(site.heads, site.tokens))


def test_every_check_says_what_it_demands():
    assert all(check.summary.endswith(".") for check in CHECKS)
    assert len(BY_NAME) == len(CHECKS)


def test_default_sites_follow_the_kinds():
    assert default_sites(GOOD) == (ATTENTION_SITE,)
    assert default_sites(IDENTITY) == (ATTENTION_SITE, MLP_SITE)


class Plugin:
    @hookimpl
    def register_mixers(self, register):
        register(GOOD)


def test_parametrize_with_checks_makes_one_case_a_check():
    with temporary_plugin(Plugin()):
        mark = parametrize_with_checks("subject").mark
    argument, cases = mark.args
    assert argument == "check"
    assert [case.id for case in cases] == [f"subject-{check.name}" for check in checks_for(GOOD)]
    cases[0].values[0]()


def test_parametrize_with_checks_refuses_an_unknown_mixer_with_a_hint():
    with (
        temporary_plugin(Plugin()),
        pytest.raises(MixerzooError, match=r"'subjekt': did you mean 'subject'\?"),
    ):
        parametrize_with_checks("subjekt")
