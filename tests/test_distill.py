"""Distilling one candidate: every stage is no worse than the one before, and a broken mixer costs only itself."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from mixerzoo import MixerSpec
from mixerzoo.capture import capture
from mixerzoo.distill import Recipe, distill, take_steps
from mixerzoo.errors import MixerzooError
from mixerzoo.objectives import OBJECTIVES, token_cosine
from mixerzoo.pairs import batches, evaluate, held_out_objective, held_out_rows
from mixerzoo.readout import CHECKED, SOLVED_EVERY, FeatureTap, RunningReadout, solve_readout
from mixerzoo.registry import get_registry
from mixerzoo.ridge import solve
from mixerzoo.targets import Targets

IMAGES = 40


@pytest.fixture(scope="module")
def teacher():
    return tiny.tiny_teacher()


@pytest.fixture(scope="module")
def captured(teacher):
    return capture(teacher, tiny.tiny_batches(IMAGES), IMAGES)


@pytest.fixture
def at(teacher, captured):
    """The first attention site and what was captured there."""
    return teacher.sites[0], captured.sites[teacher.sites[0].name]


def spec_of(build, **fields):
    return MixerSpec(
        **{"name": "subject", "build": build, "summary": "a test subject", "widths": (1.0,)} | fields
    )


class Affine(nn.Module):
    """Two layers, so that there is something to learn before the readout."""

    def __init__(self, dim):
        super().__init__()
        self.first = nn.Linear(dim, dim)
        self.readout = nn.Linear(dim, dim)

    def forward(self, x):
        return self.readout(torch.tanh(self.first(x)))


class NoBias(Affine):
    def __init__(self, dim):
        super().__init__(dim)
        self.readout = nn.Linear(dim, dim, bias=False)


AFFINE = spec_of(Affine, readout="readout")


def direct_nmse(mixer, captured):
    _, rows = held_out_rows(len(captured.x))
    with torch.no_grad():
        y = captured.y[rows].double()
        error = (mixer(captured.x[rows].float()).double() - y).square().sum()
    return float(error / (y - y.mean((0, 1))).square().sum())


def rebuilt(spec, site, result):
    mixer = spec.make(site, 1.0)
    mixer.load_state_dict(result.state)
    return mixer.eval()


# Whatever a mixer does wrong


class Raises(Affine):
    def forward(self, x):
        raise RuntimeError("forward\nfails")


class Nan(Affine):
    def forward(self, x):
        return super().forward(x) * float("nan")


class Endless(Affine):
    def forward(self, x):
        return super().forward(x) / 0


class Tuple(Affine):
    def forward(self, x):
        return super().forward(x), None


class Pooled(Affine):
    def forward(self, x):
        return super().forward(x).mean(1, keepdim=True)  # would broadcast


class OneChannel(Affine):
    def forward(self, x):
        return super().forward(x)[..., :1]  # would broadcast


class Shorter(Affine):
    def forward(self, x):
        return super().forward(x)[:, 1:]


class TrainsBadly(Affine):
    def forward(self, x):
        if self.training:
            raise ValueError("only in eval mode")
        return super().forward(x)


def raising(*_):
    raise KeyError("inherit")


def build_fails(dim):
    raise ArithmeticError("17 is prime")


BROKEN = {
    "raises": (spec_of(Raises), "RuntimeError: forward fails"),
    "nan": (spec_of(Nan), "its held-out error is nan"),
    "inf": (spec_of(Endless), "its held-out error is (inf|nan)"),
    "tuple": (spec_of(Tuple), "AttributeError|TypeError"),
    "pooled": (spec_of(Pooled), r"it maps \(8, 17, 24\) to \(8, 1, 24\), not"),
    "one channel": (spec_of(OneChannel), r"it maps \(8, 17, 24\) to \(8, 17, 1\), not"),
    "shorter": (spec_of(Shorter), r"it maps \(8, 17, 24\) to \(8, 16, 24\), not"),
    "build": (spec_of(build_fails), "ArithmeticError|cannot be built .*17 is prime"),
    "inherit": (spec_of(Affine, inherit=raising), "KeyError: 'inherit'"),
    "readout missing": (spec_of(Affine, readout="nothing"), "AttributeError.*nothing"),
    "readout not linear": (
        spec_of(lambda dim: nn.Sequential(Affine(dim)), readout="0"),
        "is a Affine, not a",
    ),
    "readout of another size": (
        spec_of(lambda dim: nn.Sequential(nn.Linear(dim, 7), nn.Linear(7, dim)), readout="0"),
        "RuntimeError",
    ),
    "train": (spec_of(TrainsBadly), "ValueError: only in eval mode"),
}


@pytest.mark.parametrize(("spec", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_mixer_is_a_failed_candidate(at, spec, reason):
    import re

    site, kept = at
    x, weight = kept.x.clone(), kept.view.v_weight.clone()
    result = distill(spec, 1.0, site, kept, Recipe(steps=2))
    assert re.search(reason, result.failed), result.failed
    assert "\n" not in result.failed
    assert result.nmse == math.inf
    assert result.state == {}
    assert torch.equal(kept.x, x)
    assert torch.equal(kept.view.v_weight, weight)


def test_it_costs_no_other_candidate_anything(at):
    site, kept = at
    before = distill(AFFINE, 1.0, site, kept, Recipe(steps=3))
    for spec, _ in BROKEN.values():
        distill(spec, 1.0, site, kept, Recipe(steps=3))
    after = distill(AFFINE, 1.0, site, kept, Recipe(steps=3))
    assert after.nmse == before.nmse
    assert torch.is_grad_enabled()


def test_an_interrupt_is_not_a_broken_mixer(at):
    class Interrupted(Affine):
        def forward(self, x):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(spec_of(Interrupted), 1.0, *at, Recipe())


# The stages


def test_the_error_is_the_direct_one(at):
    site, kept = at
    mixer = AFFINE.make(site, 1.0).eval()
    assert evaluate(mixer, kept) == pytest.approx(direct_nmse(mixer, kept), rel=1e-5)


def test_a_constant_is_one_and_the_teacher_is_zero(teacher, at):
    site, kept = at
    train, rows = held_out_rows(IMAGES)
    assert (train, rows) == (slice(0, 32), slice(32, 40))

    class Constant(nn.Module):
        def forward(self, x):
            return kept.y[rows].float().mean((0, 1)).expand_as(x)

    assert evaluate(Constant(), kept) == pytest.approx(1, rel=1e-5)
    assert evaluate(teacher.model.get_submodule(site.name), kept) < 1e-3


def builtin(kind):
    return [spec.name for spec in get_registry().mixers if kind in spec.kinds]


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in ("attention", "mlp") for name in builtin(kind)]
)
def test_no_stage_is_worse_than_the_one_before(teacher, captured, kind, name):
    spec = get_registry().mixers.get(name)
    site = next(site for site in teacher.sites if site.kind == kind)
    kept = captured.sites[site.name]
    width = min(spec.widths)
    solved = distill(spec, width, site, kept, Recipe())
    assert not solved.failed
    assert solved.nmse <= solved.nmse_start
    if spec.readout is not None:
        assert solved.nmse == min(solved.nmse_start, solved.nmse_solved)
    assert solved.steps == 0
    trained = distill(spec, width, site, kept, Recipe(steps=5, lr=3e-3))
    assert not trained.failed
    assert trained.nmse_start == solved.nmse_start
    assert trained.nmse <= solved.nmse
    mixer = spec.make(site, width)
    mixer.load_state_dict(trained.state)
    assert direct_nmse(mixer.eval(), kept) == pytest.approx(trained.nmse, rel=1e-4)
    assert trained.params == sum(p.numel() for p in mixer.parameters())


def test_the_closed_form_gains_much(at):
    result = distill(AFFINE, 1.0, *at, Recipe())
    assert result.nmse < 0.8 * result.nmse_start
    assert result.nmse == result.nmse_solved


def test_a_worse_closed_form_is_not_taken(at, monkeypatch):
    from mixerzoo import readout as module

    def ruin(*grams, **options):
        found = solve(*grams, **options)
        return replace(found, weight=found.weight * 0 + 100, nmse=1e6)

    monkeypatch.setattr(module, "solve", ruin)
    result = distill(AFFINE, 1.0, *at, Recipe())
    assert result.nmse == result.nmse_start
    assert result.nmse_solved > result.nmse_start
    assert direct_nmse(rebuilt(AFFINE, at[0], result), at[1]) == pytest.approx(result.nmse, rel=1e-5)


def test_a_readout_without_bias_is_solved_without_one(at):
    _, kept = at
    shifted = replace(kept, y=kept.y + 3)
    mixer = NoBias(24).eval()
    before, solved = solve_readout(mixer, "readout", Targets(shifted))
    assert solved < before
    found = direct_nmse(mixer, shifted)
    train, _ = held_out_rows(IMAGES)
    with torch.no_grad():
        features = torch.tanh(mixer.first(shifted.x[train].float())).reshape(-1, 24).double()
        y = shifted.y[train].double().reshape(-1, 24)
        mixer.readout.weight.copy_(torch.linalg.lstsq(features, y).solution.T)
    assert found <= 1.001 * direct_nmse(mixer, shifted)


def test_a_mixer_that_changes_what_its_readout_says_is_found_out(at):
    class After(Affine):
        def forward(self, x):
            return super().forward(x).relu()

    result = distill(spec_of(After, readout="readout"), 1.0, *at, Recipe())
    assert "its output is not that of its readout 'readout'" in result.failed


def test_a_mixer_without_parameters(at):
    result = distill(spec_of(lambda: nn.Identity()), 1.0, *at, Recipe(steps=5))
    assert result.failed == ""
    assert (result.params, result.steps, result.state) == (0, 0, {})
    assert result.nmse == result.nmse_start
    assert math.isnan(result.nmse_solved)


def test_a_mixer_that_is_all_readout_takes_no_step(at):
    class Only(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.readout = nn.Linear(dim, dim)

        def forward(self, x):
            return self.readout(x)

    result = distill(spec_of(Only, readout="readout"), 1.0, *at, Recipe(steps=5))
    assert result.steps == 0
    assert result.nmse == result.nmse_solved


def test_inheritance_is_given_the_view(at):
    site, kept = at
    seen = []

    def inherit(mixer, view):
        seen.append(view)
        assert not torch.is_grad_enabled()
        mixer.readout.weight.copy_(view.out_weight)

    result = distill(spec_of(Affine, inherit=inherit), 1.0, site, kept, Recipe())
    assert seen == [kept.view]
    assert torch.equal(result.state["readout.weight"], kept.view.out_weight)


# Determinism


def test_a_seed_settles_everything(at):
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        runs.append(distill(AFFINE, 1.0, *at, Recipe(steps=6)))
    one, two = runs
    assert one.nmse == two.nmse
    assert all(torch.equal(one.state[name], two.state[name]) for name in one.state)
    other = distill(AFFINE, 1.0, *at, Recipe(steps=6, seed=1))
    assert not torch.equal(other.state["first.weight"], one.state["first.weight"])


def test_the_caller_s_random_numbers_are_left_alone(at):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    distill(AFFINE, 1.0, *at, Recipe(steps=2))
    assert torch.equal(torch.rand(3), expected)


def test_width_and_site_start_differently(teacher, captured):
    spec = spec_of(Affine, widths=(0.5, 1.0))
    starts = [
        distill(spec, width, site, captured.sites[site.name], Recipe()).state["first.weight"]
        for width, site in ((0.5, teacher.sites[0]), (1.0, teacher.sites[0]), (1.0, teacher.sites[2]))
    ]
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[2])


# Steps


@pytest.mark.parametrize("steps", range(1, 12))
def test_any_number_of_steps_will_do(at, steps):
    result = distill(AFFINE, 1.0, *at, Recipe(steps=steps))
    assert result.failed == ""
    assert 0 < result.steps <= steps


def test_steps_help(at):
    solved = distill(AFFINE, 1.0, *at, Recipe())
    trained = distill(AFFINE, 1.0, *at, Recipe(steps=40, lr=1e-2))
    assert trained.nmse < 0.98 * solved.nmse
    assert 0 < trained.steps <= 40


def test_the_readout_follows_the_steps(at):
    _, kept = at
    torch.manual_seed(0)
    mixer = Affine(24)
    running = RunningReadout(mixer.readout)
    _, held_out = held_out_rows(IMAGES)
    with FeatureTap(mixer.readout) as tap:
        for x, y in batches(kept, slice(0, held_out.start)):
            for _ in range(SOLVED_EVERY):
                mixer(x)
                running.update(tap.features(), y)
    followed = evaluate(mixer, kept)
    _, solved = solve_readout(mixer, "readout", Targets(kept))
    assert followed == pytest.approx(solved, rel=0.1)


def test_a_readout_is_not_solved_on_a_few_rows():
    layer = nn.Linear(50, 4)
    before = layer.weight.clone()
    running = RunningReadout(layer)
    for _ in range(3 * SOLVED_EVERY):
        running.update(torch.randn(5, 50), torch.randn(1, 5, 4))
    assert torch.equal(layer.weight, before)


def test_steps_can_be_for_the_cosine_along_the_tokens(at):
    _, kept = at
    errors = {}
    for objective in OBJECTIVES:
        torch.manual_seed(0)
        mixer = Affine(24).eval()
        recipe = Recipe(steps=30, lr=1e-2, objective=objective)
        nmse, _ = take_steps(mixer, Targets(kept), recipe, evaluate(mixer, kept), readout=None)
        assert evaluate(mixer, kept) == pytest.approx(nmse, rel=1e-4)
        errors[objective] = nmse, held_out_objective(mixer, kept, token_cosine)
    assert errors["cosine"][1] < errors["nmse"][1]
    assert errors["nmse"][0] < errors["cosine"][0]


def test_the_cosine_does_not_see_the_size_of_a_channel():
    y = torch.randn(2, 7, 3)
    assert token_cosine(y * torch.tensor([0.1, 1.0, 5.0]), y).item() == pytest.approx(0, abs=1e-6)
    assert token_cosine(-y, y).item() == pytest.approx(2)
    assert token_cosine(y[:, torch.randperm(7)], y).item() > 0.1  # but their places


def test_a_readout_is_solved_without_running_it(at):
    class Counts(Affine):
        def __init__(self, dim):
            super().__init__(dim)
            self.readout.register_forward_hook(lambda *_: calls.append(1))

    calls = []
    solve_readout(Counts(24), "readout", Targets(at[1]))
    assert len(calls) == 2  # once to see that it gives the output, and once for the comparison


def test_what_candidates_share_does_not_depend_on_who_came_before(at):
    targets = Targets(at[1])
    for _ in range(2):
        together = distill(AFFINE, 1.0, *at, Recipe(), targets=targets)
        alone = distill(AFFINE, 1.0, *at, Recipe())
        assert together.nmse == alone.nmse
        assert all(torch.equal(together.state[name], alone.state[name]) for name in alone.state)


def test_a_longer_recipe_goes_on_from_a_shorter_one(at):
    site, kept = at
    calls = []
    spec = spec_of(Affine, readout="readout", inherit=lambda mixer, view: calls.append(view))
    short = distill(spec, 1.0, site, kept, Recipe())
    on = distill(spec, 1.0, site, kept, Recipe(), start=short.state)
    assert len(calls) == 1  # neither inherited nor solved again
    assert math.isnan(on.nmse_solved)
    assert on.nmse == on.nmse_start == pytest.approx(short.nmse, rel=1e-6)
    longer = distill(spec, 1.0, site, kept, Recipe(steps=10, lr=1e-2), start=short.state)
    assert longer.nmse_start == on.nmse
    assert longer.nmse <= short.nmse


def warm_and_own(captured, site, name, wide, narrow):
    """A narrow candidate after one step, from a wider one and from its own closed form, and that form."""
    spec = get_registry().mixers.get(name)
    wider = distill(spec, wide, site, captured, Recipe(steps=20))
    closed = distill(spec, narrow, site, captured, Recipe())
    warm, own = (
        distill(
            spec,
            narrow,
            site,
            captured,
            Recipe(steps=1, lr=1e-9, wider=wide if state else 0.0),
            start=closed.state,
            wider=state,
        )
        for state in (wider.state, None)
    )
    assert [one.failed for one in (wider, closed, warm, own)] == [""] * 4
    return warm, own, closed


@pytest.mark.parametrize(("name", "wide", "narrow"), [("glu_mlp", 1.0, 0.5), ("gmlp", 2.0, 1.0)])
def test_steps_may_begin_from_a_wider_candidate(at, name, wide, narrow):
    site, captured = at
    warm, own, closed = warm_and_own(captured, site, name, wide, narrow)
    assert warm.nmse < own.nmse <= closed.nmse
    assert warm.params == closed.params
    assert direct_nmse(rebuilt_at(name, site, narrow, warm), captured) == pytest.approx(warm.nmse, rel=1e-4)


def rebuilt_at(name, site, width, result):
    mixer = get_registry().mixers.get(name).make(site, width)
    mixer.load_state_dict(result.state)
    return mixer.eval()


@pytest.mark.parametrize("name", ["multihead_lstm", "static", "fewer_heads"])
def test_the_better_start_is_taken(at, name):
    warm, own, closed = warm_and_own(at[1], at[0], name, 1.0, 0.5)
    assert warm.nmse <= own.nmse * (1 + 1e-6)
    assert warm.params == closed.params


@pytest.mark.parametrize("name", ["linear_attention", "retention"])  # other units, and none
def test_a_wider_candidate_that_cannot_be_narrowed_changes_nothing(at, name):
    site, captured = at
    warm, own, _ = warm_and_own(captured, site, name, 1.0, 0.5)
    assert warm.nmse == pytest.approx(own.nmse, rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, math.nan])
def test_a_wider_candidate_that_is_no_better_changes_nothing(at, scale):
    site, captured = at
    spec = get_registry().mixers.get("glu_mlp")
    closed = distill(spec, 0.5, site, captured, Recipe())
    spoilt = {
        name: scale * torch.randn_like(tensor) for name, tensor in spec.make(site, 1.0).state_dict().items()
    }
    recipe = Recipe(steps=1, lr=1e-9, wider=1.0)
    found = distill(spec, 0.5, site, captured, recipe, start=closed.state, wider=spoilt)
    assert not found.failed
    assert found.nmse == pytest.approx(closed.nmse, rel=1e-6)


def test_a_start_that_does_not_fit_is_a_failure(at):
    result = distill(AFFINE, 1.0, *at, Recipe(), start={"other": torch.ones(1)})
    assert "RuntimeError" in result.failed


@pytest.mark.parametrize("way", ["loss", "gradient"])
def test_nan_in_the_steps_keeps_the_best(at, way):
    class Explodes(Affine):
        def __init__(self, dim):
            super().__init__(dim)
            self.calls = 0

        def forward(self, x):
            if not self.training:
                return super().forward(x)
            self.calls += 1
            if self.calls < 12:
                return super().forward(x)
            if way == "loss":
                return super().forward(x) * float("nan")
            out = super().forward(x)
            # sqrt at 0: the value is finite, its gradient is not
            return out + (self.first.weight.sum() * 0).sqrt()

    site, kept = at
    spec = spec_of(Explodes)
    result = distill(spec, 1.0, site, kept, Recipe(steps=50, lr=3e-3))
    assert result.failed == ""
    assert result.steps < 50
    assert result.nmse < result.nmse_start
    assert direct_nmse(rebuilt(spec, site, result), kept) == pytest.approx(result.nmse, rel=1e-5)


def test_steps_that_make_it_worse_stop_early_and_are_undone(at):
    site, kept = at
    solved = distill(AFFINE, 1.0, site, kept, Recipe())
    spec = spec_of(Affine)
    result = distill(spec, 1.0, site, kept, Recipe(steps=50, lr=50.0), start=solved.state)
    assert result.steps < 50
    assert result.nmse == pytest.approx(solved.nmse, rel=1e-6)
    assert all(torch.equal(result.state[name], solved.state[name]) for name in solved.state)


def test_the_mixer_is_left_in_eval_mode_at_its_best(at):
    _, kept = at
    mixer = Affine(24).eval()
    start = evaluate(mixer, kept)
    best, steps = take_steps(mixer, Targets(kept), Recipe(steps=10, lr=1e-2), start, readout="readout")
    assert not mixer.training
    assert steps == 10
    assert best < start
    assert evaluate(mixer, kept) == pytest.approx(best, rel=1e-4)


def test_a_readout_that_is_not_called_is_an_error(at):
    mixer = Affine(24)
    mixer.unused = nn.Linear(24, 24)
    with pytest.raises(MixerzooError, match="the readout was not called"):
        solve_readout(mixer, "unused", Targets(at[1]))


def test_a_readout_that_is_called_now_and_then_is_an_error(at):
    class Sometimes(Affine):
        def forward(self, x):
            return super().forward(x) if len(x) <= CHECKED else x

    with pytest.raises(MixerzooError, match="the readout was not called"):
        solve_readout(Sometimes(24), "readout", Targets(at[1]))
