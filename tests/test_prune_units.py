"""Units of a module: their norms, the penalty on them, and the module without some of them."""

import copy
import math

import pytest
import torch
from broken_mixers import PRUNABLE, inner_units, spec_of
from torch import nn

from mixerzoo import MixerzooError
from mixerzoo.plan import Candidate
from mixerzoo.registry import get_registry
from mixerzoo.shrink import checked, cut, hoyer_square, largest, norms, shrink, silence, units_of
from mixerzoo.testing import ATTENTION_SITE
from mixerzoo.units import Share, Units, places, sized


def lstm(width=1.0):
    spec = get_registry().mixers.get("multihead_lstm")
    torch.manual_seed(0)
    return spec, spec.make(ATTENTION_SITE, width).double().eval()


def test_places_of_units_in_a_layout():
    (gates,) = places(4, 3, units=1)
    assert gates.tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    first, second = places(2, 2, 3, units=2, rows=1)
    assert first.tolist() == [[0, 6], [1, 7], [2, 8]]
    assert second.tolist() == [[3, 9], [4, 10], [5, 11]]
    assert places(2, units=0)[0].tolist() == [[0], [1]]


def test_the_group_of_an_lstm_unit_is_fars():
    """Its rows of all four gates, of the input and the recurrence, and its columns of the recurrence."""
    spec, mixer = lstm()
    units = units_of(spec, mixer)["units"]
    assert (len(units.rows), units.size) == (3 * 2, 4)
    one = mixer.lstm[1]
    S, unit = 4, 2
    rows = [gate * S + unit for gate in range(4)]
    square = one.weight_ih_l0_reverse[rows].square().sum() + one.weight_hh_l0_reverse[rows].square().sum()
    square = square + one.weight_hh_l0_reverse[:, unit].square().sum()
    assert norms(mixer, units)[3, unit].item() == pytest.approx(math.sqrt(square.item()))


def test_hoyer_square_counts_the_units_in_use_and_has_a_gradient_at_zero():
    sizes = torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 0.0, 0.0]])
    assert hoyer_square(sizes).tolist() == pytest.approx([4, 1], rel=1e-4)
    assert hoyer_square(10 * sizes).tolist() == pytest.approx([4, 1], rel=1e-4)
    spec, mixer = lstm()
    units = units_of(spec, mixer)["units"]
    silence(mixer, units, torch.arange(3).expand(6, 3))
    hoyer_square(norms(mixer, units)).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in mixer.parameters())


def test_a_smaller_module_has_the_largest_units_of_every_row():
    spec, mixer = lstm()
    with torch.no_grad():  # one strong unit in each direction, another one in each
        strong = torch.tensor([[0], [1], [2], [3], [0], [1]])
        silence(mixer, units_of(spec, mixer)["units"], strong)
    candidate, small = shrink(spec, ATTENTION_SITE, Candidate("multihead_lstm", 1.0), mixer, {"units": 1})
    assert str(candidate) == "multihead_lstm@1[units=1]"
    assert small.lstm[0].hidden_size == 1
    x = torch.randn(2, 17, 12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(small(x), mixer(x))


def test_a_pruned_module_can_be_pruned_again():
    spec, mixer = lstm()
    candidate, small = shrink(spec, ATTENTION_SITE, Candidate("multihead_lstm", 1.0), mixer, {"units": 3})
    candidate, small = shrink(spec, ATTENTION_SITE, candidate, small, {"units": 2})
    assert candidate.sizes == (("units", 2),)
    assert small.lstm[2].hidden_size == 2


def test_two_kinds_of_units_at_once():
    spec = get_registry().mixers.get("glu_mlp")
    torch.manual_seed(0)
    mixer = spec.make(ATTENTION_SITE, 1.0)
    candidate, small = shrink(
        spec, ATTENTION_SITE, Candidate("glu_mlp", 1.0), mixer, {"heads": 2, "features": 3}
    )
    assert str(candidate) == "glu_mlp@1[features=3,heads=2]"
    assert small.mixing.shape[0] == 2
    assert small.value_gate.out_features == 2 * 2 * 3


def test_what_lies_in_slices_is_cut_row_by_row():
    state = {"weight": torch.arange(12.0).view(2, 3, 2)}
    share = [
        Share(parameter="weight", dim=1, places=torch.arange(3)[:, None], only=(0, row)) for row in range(2)
    ]
    units = Units(rows=((share[0],), (share[1],)))
    small = cut(state, units, torch.tensor([[0, 2], [1, 2]]))["weight"]
    assert small.tolist() == [[[0, 1], [4, 5]], [[8, 9], [10, 11]]]


def test_largest_keeps_the_order():
    assert largest(torch.tensor([[1.0, 5.0, 4.0, 9.0]]), 2).tolist() == [[1, 3]]


def test_units_are_rounded_to_what_is_allowed():
    units = Units(rows=((Share(parameter="w", dim=0, places=torch.arange(20)[:, None]),),), multiple=8)
    assert [units.allowed(count) for count in (0, 3, 8, 9, 17, 20)] == [8, 8, 8, 16, 20, 20]


@pytest.mark.parametrize("size", [0, 5])
def test_a_size_must_be_there(size):
    with pytest.raises(ValueError, match=f"units={size} is not between 1 and 4"):
        sized({"units": size}, "units", 4)
    with pytest.raises(MixerzooError, match="cannot be built for site"):
        get_registry().mixers.get("multihead_lstm").make(ATTENTION_SITE, 1.0, {"units": size})


def test_unknown_units_are_refused_by_name():
    spec = get_registry().mixers.get("multihead_lstm")
    with pytest.raises(MixerzooError, match="has no units 'heads'"):
        spec.make(ATTENTION_SITE, 1.0, {"heads": 2})
    with pytest.raises(MixerzooError, match="'pool' has no units"):
        get_registry().mixers.get("pool").make(ATTENTION_SITE, 1.0, {"heads": 2})
    with pytest.raises(MixerzooError, match="no units 'heads' to prune"):
        shrink(*lstm_arguments(), {"heads": 1})


def lstm_arguments():
    spec, mixer = lstm()
    return spec, ATTENTION_SITE, Candidate("multihead_lstm"), mixer


def test_units_and_sizes_go_together():
    with pytest.raises(MixerzooError, match="units and a build that asks for sizes go together"):
        spec_of(lambda dim, sizes: nn.Linear(dim, dim))
    with pytest.raises(MixerzooError, match="units and a build that asks for sizes go together"):
        spec_of(lambda dim: nn.Linear(dim, dim), units=inner_units)


def test_places_beyond_a_parameter_are_refused():
    mixer = PRUNABLE.make(ATTENTION_SITE, 1.0)
    share = Share(parameter="readout.weight", dim=0, places=torch.tensor([[99]]))
    with pytest.raises(MixerzooError, match=r"'readout\.weight': a place beyond dimension 0, of 12"):
        checked({"inner": Units(rows=((share,),))}, mixer, "mixer 'subject'")


def test_the_sizes_of_a_candidate_are_read_and_written():
    for text in ("glu_mlp@0.5[features=3,heads=2]", "mlp_slice@1[hidden=48]", "mlp_slice@1", "keep"):
        assert str(Candidate.parse(text)) == text
    assert Candidate.parse("glu_mlp@0.5[heads=2,features=3]").sizes == (("features", 3), ("heads", 2))
    assert Candidate.parse("a@1[b=2]") != Candidate.parse("a@1")


@pytest.mark.parametrize(
    "text",
    [
        "a[b=2]",
        "a@1[]",
        "a@1[b]",
        "a@1[b=0]",
        "a@1[b=2,b=3]",
        "a@1[b=2",
        "a@1[b=2]x",
        "a@1[B=2]",
        "keep[b=2]",
    ],
)
def test_what_is_no_candidate_is_refused(text):
    with pytest.raises(MixerzooError, match="write mixer@width"):
        Candidate.parse(text)


def test_a_copy_is_cut_and_the_mixer_is_left_alone():
    spec, mixer = lstm()
    before = copy.deepcopy(mixer.state_dict())
    shrink(spec, ATTENTION_SITE, Candidate("multihead_lstm"), mixer, {"units": 2})
    assert all(torch.equal(before[name], tensor) for name, tensor in mixer.state_dict().items())


@pytest.mark.parametrize(
    ("name", "kind"), [("gmlp", "units"), ("shallow_ffn_heads", "hidden"), ("fewer_heads", "heads")]
)
def test_what_can_be_exported_whole_can_be_exported_pruned(name, kind):
    spec = get_registry().mixers.get(name)
    torch.manual_seed(0)
    mixer = spec.make(ATTENTION_SITE, 1.0).eval()
    _, small = shrink(spec, ATTENTION_SITE, Candidate(name), mixer, {kind: 2})
    x = torch.randn(2, 17, 12)
    program = torch.export.export(small, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    other = torch.randn(5, 17, 12)
    assert torch.allclose(program(other), small(other), atol=1e-5)
