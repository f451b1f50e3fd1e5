"""benchmarks/mixers.py: every peer computes what the mixer does, and one that does not gets no ratio."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from mixer_parts import growth, picture  # noqa: E402
from mixer_parts.peers import Missing, Peer, agreement, all_peers  # noqa: E402
from mixer_parts.peers.peer import Around  # noqa: E402
from mixer_parts.shapes import Shape, Skipped, build  # noqa: E402

# Under another name: tests/mixers is called `mixers` too.
_spec = importlib.util.spec_from_file_location("benchmark_of_mixers", BENCHMARKS / "mixers.py")
mixers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(mixers)
sys.path.remove(str(BENCHMARKS))

from mixerzoo.registry import get_registry  # noqa: E402

SHAPE = Shape(batch=2, tokens=37, dim=32, heads=2, prefix=1, grid=(6, 6))
OTHER = Shape(batch=1, tokens=128, dim=24, heads=3, grid=(8, 16))
PEERS = all_peers()


def spec(name):
    return get_registry().mixers.get(name)


@pytest.mark.filterwarnings("default")  # the peers' libraries may warn of what they like
@pytest.mark.parametrize("shape", [SHAPE, OTHER], ids=str)
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: f"{peer.mixer}-{peer.label}-{peer.causal}")
def test_peer_agrees(peer, shape):
    shape = peer.at(shape)
    mixer = build(spec(peer.mixer), shape)
    try:
        module = peer.make(mixer)
    except (Missing, Skipped) as reason:
        pytest.skip(str(reason))
    found = agreement(mixer, module, shape.example())
    assert found, found


def test_every_peer_has_a_name_of_its_own():
    names = [(peer.mixer, peer.label, peer.causal) for peer in PEERS]
    assert len(set(names)) == len(names)


def scaled(factor):
    """A peer that is wrong by a factor."""
    return Peer(mixer="pool", label=f"{factor}", make=lambda mixer: Around(mixer, lambda m, x: factor * m(x)))


def test_wrong_peer_gets_no_ratio():
    right, wrong = mixers.beside_peers(spec("pool"), [scaled(1.0), scaled(1.01)], SHAPE, rounds=1)
    assert right["agrees"]
    assert right["forward"]["ratio"] > 0
    assert right["training"]["ratio"] > 0
    assert not wrong["agrees"]
    assert wrong["difference"] == pytest.approx(0.01, rel=1e-3)
    assert "forward" not in wrong
    assert "training" not in wrong


def test_peer_with_wrong_gradients_does_not_agree():
    mixer = build(spec("pool"), SHAPE)
    peer = Around(mixer, lambda m, x: m(x.detach()) + 0 * x)
    found = agreement(mixer, peer, SHAPE.example())
    assert found.values == 0
    assert not found


def test_peer_without_its_library_is_reported():
    def make(mixer):
        raise Missing("nowhere to be had")

    (row,) = mixers.beside_peers(spec("pool"), [Peer(mixer="pool", label="none", make=make)], SHAPE, rounds=1)
    assert row["missing"] == "nowhere to be had"
    assert "agrees" not in row


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_exit_code_and_json_say_whether_peers_agree(factor, tmp_path, monkeypatch):
    monkeypatch.setattr(mixers, "all_peers", lambda fla: [scaled(factor)])
    path = tmp_path / "figures.json"
    command = ["--quick", "--mixers", "pool", "--parts", "peers", "--json", str(path)]
    with pytest.raises(SystemExit) as ended:
        mixers.main.main(command, standalone_mode=False)
    assert ended.value.code == (factor != 1.0)
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert figures["agree"] == (factor == 1.0)
    assert figures["environment"]["threads"] > 0


def test_what_is_too_big_or_refused_is_skipped_with_the_reason():
    with pytest.raises(Skipped, match="too many weights"):
        build(spec("static"), growth.shape_of(128))
    with pytest.raises(Skipped, match="cannot be split over 5 heads"):
        build(spec("static"), Shape(batch=1, tokens=4, dim=32, heads=5))


def test_peak_memory_counts_what_lives_at_once():
    x = torch.zeros(1000)

    def one_after_the_other():
        for _ in range(3):
            (x + 1).sum()

    for run, expected in ((lambda: [x + 1, x + 2], 8000), (one_after_the_other, 4000)):
        assert expected <= growth.peak_bytes(run) < expected + 100  # scalars take a few bytes


def test_linear_costs_are_told_from_others():
    linear = ("N D^2", "N D^2 + N D K", "N D log N", "0", "N D^2 + min(N^2 D, N log N D F)")
    assert all(map(growth.is_linear, linear))
    steeper = ("N D^2 + N^2 D", "N^2 D^2 / 128", "N^1.5 D", "N sqrt(N) D", "")
    assert not any(map(growth.is_linear, steeper))
    assert growth.slope({1024: 1.0, 4096: 4.0}, 1024, 4096) == pytest.approx(1)
    assert growth.slope({1024: 1.0}, 1024, 4096) is None


def test_growth_and_its_picture(tmp_path):
    rows = growth.grow([spec("pool"), spec("static")], quick=True, rounds=1)
    assert [row["mixer"] for row in rows] == ["attention", "pool", "static"]
    assert all(len(row["ms"]) == 3 and not row["skipped"] for row in rows)
    del rows[2]["ms"][256]  # a line that ends early
    path = tmp_path / "zoo.png"
    picture.draw(rows, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_labels_are_moved_apart():
    heights = picture.spread([0.5, 0.5, 0.98, 0.97], 0.1)
    assert heights[2] - heights[3] == pytest.approx(0.1)
    assert heights[1] - heights[0] == pytest.approx(0.1)
    assert max(heights) <= 0.971
