"""benchmarks/peers.py: each side keeps to its budget, token merging is what the paper says, rows are made once."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_search
import torch
from click.testing import CliRunner

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import dinov2  # noqa: E402
import peers  # noqa: E402
from peer_students import PEERS, Cannot, Exam, Ground, Meter, Problem, blocks, places, pruned, slim, tome  # noqa: E402
from peer_students.places import Place  # noqa: E402
from peer_students.problem import Made, fit  # noqa: E402
from peer_students.rows import bars  # noqa: E402

sys.path.remove(str(BENCHMARKS))

from mixerzoo.data import open_npz  # noqa: E402
from mixerzoo.finetune import Recipe, train  # noqa: E402
from mixerzoo.hosts import count_params  # noqa: E402
from mixerzoo.latency import REFERENCE, Conditions, Stopwatch, Timing  # noqa: E402
from mixerzoo.pruning.targets import flops  # noqa: E402

PREFIX = 2


def counted(self, students, *, rounds=None, on_round=lambda done: None):
    """Stand in for Stopwatch.time: latency goes by operations, with a little for all else."""
    del rounds
    whole = 2e5 + flops(self.teacher.model, self.example)
    found = {REFERENCE: Timing(median=1.0, low=1.0, high=1.0, ratio=1.0, error=0.0)}
    for name, model in students.items():
        ratio = (2e5 + flops(model, self.example)) / whole
        found[name] = Timing(median=ratio, low=ratio, high=ratio, ratio=ratio, error=0.0)
    on_round(1)
    return found


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(Stopwatch, "time", counted)
    source = str(tiny_search.write_npz(tmp_path / "pictures.npz"))
    teacher = tiny.tiny_teacher(reg_tokens=PREFIX - 1, init_values=0.5)
    return Place(teacher=teacher, data=open_npz(source), model="tiny", source=source)


@pytest.fixture
def ground(place, tmp_path):
    splits = place.data.splits
    return Ground(
        teacher=place.teacher,
        data=place.data,
        indices=splits.calibration[:24],
        validation=Exam(place.teacher, place.data, splits.validation),
        test=Exam(place.teacher, place.data, splits.test),
        meter=Meter(Stopwatch(place.teacher, Conditions(threads=1))),
        model=place.model,
        source=place.source,
        checkpoint=None,
        folder=tmp_path / "made",
    )


def naive_merge(x, sizes, keys, r, prefix):
    """One image, token by token: tokens (N, D), sizes, keys (N, K), to the tokens and sizes that are left."""
    patches = range(prefix, len(x))
    first, second = list(patches)[::2], list(patches)[1::2]
    edges = []
    for a in first:
        alike = [float(torch.cosine_similarity(keys[a], keys[b], dim=0)) for b in second]
        edges.append((max(alike), a, second[alike.index(max(alike))]))
    chosen = sorted(edges, reverse=True)[:r]
    groups = {b: [b] for b in second}
    for _, a, b in chosen:
        groups[b].append(a)
    gone = {a for _, a, _ in chosen}
    left = [[n] for n in range(prefix)] + [[a] for a in first if a not in gone] + [groups[b] for b in second]
    tokens = [sum(sizes[n] * x[n] for n in group) / sum(sizes[n] for n in group) for group in left]
    return torch.stack(tokens), [sum(sizes[n] for n in group) for group in left], left


@pytest.mark.parametrize("r", [0, 1, 4, 6])
@pytest.mark.parametrize("count", [14, 15])
def test_merge_is_that_of_the_paper(r, count):
    generator = torch.Generator().manual_seed(r + count)
    x, keys = (torch.randn(3, count, width, generator=generator) for width in (5, 4))
    sizes = torch.randint(1, 5, (3, count, 1), generator=generator).float()
    sizes[:, :PREFIX] = 1
    tokens, grown = tome.merge(x, sizes, tome.match(keys, r, PREFIX), PREFIX)
    assert tokens.shape == (3, count - r, 5)
    for image in range(3):
        wanted, wanted_sizes, _ = naive_merge(x[image], sizes[image, :, 0].tolist(), keys[image], r, PREFIX)
        torch.testing.assert_close(tokens[image], wanted)
        assert grown[image, :, 0].tolist() == wanted_sizes
    assert torch.equal(tokens[:, :PREFIX], x[:, :PREFIX])  # class and register tokens
    torch.testing.assert_close((tokens * grown).sum(1), (x * sizes).sum(1))


def test_attention_is_proportional_to_sizes(ground):
    """A token of size 3 counts as three tokens that are the same."""
    attention = ground.teacher.model.blocks[0].attn
    x = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(0))
    sizes = torch.ones(2, 6, 1)
    sizes[:, -1] = 3
    mixed, _ = tome.attend(attention, x, sizes)
    repeated = attention(torch.cat([x, x[:, -1:], x[:, -1:]], dim=1))
    torch.testing.assert_close(mixed, repeated[:, :6], rtol=1e-4, atol=1e-5)


def test_merging_schedule():
    assert tome.schedule(0, 3, 16) == (0, 0, 0)
    assert tome.schedule(7, 3, 16) == (2, 2, 3)
    assert tome.schedule(99, 4, 16) == (8, 4, 0, 0)  # of the four that are left
    assert tome.schedule(12, 4, 64, decreasing=True) == (6, 4, 2, 0)
    assert tome.schedule(3, 1, 16, decreasing=True) == (3,)


@torch.inference_mode()
def test_without_merges_it_is_the_teacher(ground):
    images = tiny.tiny_images(5)
    student = tome.merging(ground.teacher, 0)
    torch.testing.assert_close(student(images), ground.teacher.model(images))


@torch.inference_mode()
def test_stages_are_the_model_and_show_all_places(ground):
    images, student = tiny.tiny_images(5), tome.merging(ground.teacher, 9)
    assert student.merged == (4, 5)
    hidden = images
    for stage in student.stages()[:-1]:
        hidden = stage(hidden)
        assert hidden.shape == (5, 16 + PREFIX, 24)
        distinct = [len(image.unique(dim=0)) for image in hidden]
    assert set(distinct) == {16 + PREFIX - 9}
    whole = images
    for stage in student.stages():
        whole = stage(whole)
    torch.testing.assert_close(whole, student(images))


@torch.inference_mode()
def test_merged_places_are_those_of_the_reference(ground):
    """After one block, every place shows the token that it was merged into."""
    images, student = tiny.tiny_images(1), tome.merging(ground.teacher, 8)
    block = ground.teacher.model.blocks[0]
    embed, first, *_ = student.stages()
    x = embed(images)
    _, keys = tome.attend(block.attn, block.norm1(x), None)
    _, _, left = naive_merge(x[0], [1.0] * x.shape[1], keys[0], 4, PREFIX)
    hidden = first(x)[0]
    for group in left:
        assert all(torch.equal(hidden[place], hidden[group[0]]) for place in group)


def test_token_merging_can_be_fine_tuned(ground):
    student = tome.merging(ground.teacher, 14)
    teacher = replace(ground.teacher, host=tome.MergingHost(ground.teacher.host))
    exam = ground.validation

    def evaluate(model):
        return exam.evaluate(model).loss

    tuned = train(teacher, student, ground.batches, Recipe(steps=20, lr=2e-4), evaluate=evaluate)
    assert tuned.steps == 20
    assert isinstance(tuned.student, tome.TokenMerging)
    assert tuned.loss < evaluate(student)


@pytest.mark.parametrize(
    ("peer", "budget"), [("tome", 0.8), ("drop_blocks", 0.8), ("slimmer", 0.6), ("one_mixer:static", 0.7)]
)
def test_students_meet_the_budget_and_no_more(peer, budget, ground):
    made = PEERS[peer](Problem(ground=ground, budget=budget, seed=0, minutes=0.01))
    share = ground.meter.tried(made.student)
    assert budget * (0.5 if peer == "drop_blocks" else 0.85) < share <= budget
    assert 0 <= ground.test.evaluate(made.student).loss < float("inf")
    with torch.inference_mode():
        assert not torch.equal(made.student(ground.batches[0]), ground.teacher.model(ground.batches[0]))


@pytest.mark.parametrize("peer", ["tome", "drop_blocks", "slimmer", "one_mixer:static"])
def test_what_is_out_of_reach_is_said(peer, ground):
    with pytest.raises(Cannot, match="of the teacher's latency"):
        PEERS[peer](Problem(ground=ground, budget=0.01, seed=0, minutes=0.01))


def test_the_block_that_is_missed_least_goes_first(ground):
    losses = [ground.few.evaluate(blocks.without(ground.teacher, [block])).loss for block in range(2)]
    assert blocks.next_block(ground, (), 2) == losses.index(min(losses))
    assert blocks.next_block(ground, (0,), 2) == 1


@torch.inference_mode()
def test_slim_modules_are_the_teachers(ground):
    """All heads kept are the teacher's attention; fewer are fewer weights."""
    site = next(site for site in ground.teacher.sites if site.kind == "attention")
    view, module = ground.captured.sites[site.name].view, ground.teacher.model.get_submodule(site.name)
    x = torch.randn(2, site.tokens, site.dim, generator=torch.Generator().manual_seed(0))
    for whole in (slim.as_slim(ground.teacher, site), slim.fewer_heads(site, view, site.heads)):
        torch.testing.assert_close(whole(x), module(x), rtol=1e-4, atol=1e-4)
    assert count_params(slim.fewer_heads(site, view, 1)) < count_params(module) / 2


def test_bisection_finds_the_largest_that_meets():
    class Exact:
        def tried(self, model):
            return 1 - model / 100

        confirmed = tried

    for budget, level in ((0.6, 40), (0.999, 1), (1.0, 0)):
        found = fit(lambda level: level, 90, Exact(), budget)
        assert found.share <= budget
        assert found.level - level <= 1  # as near as one percent is near enough
        assert found.tries < 12
    with pytest.raises(Cannot, match="11% of the teacher's"):
        fit(lambda level: level, 90, Exact(), 0.1)


def test_torch_pruning_prunes_heads_and_mlps(ground):
    pytest.importorskip("torch_pruning")
    made = PEERS["torch_pruning"](Problem(ground=ground, budget=0.7, seed=0, minutes=0.01))
    assert ground.meter.tried(made.student) <= 0.7
    whole = pruned.opened(ground.teacher)
    torch.testing.assert_close(whole(ground.batches[0]), ground.teacher.model(ground.batches[0]))
    grads = pruned.gradients(ground, whole)
    for heads, left in ((True, (2, 16)), (False, (3, 12))):
        student = pruned.pruned(whole, grads, 0.4, ground.batches[0][:1], heads=heads)
        for block in student.blocks:
            assert (block.attn.num_heads, block.attn.proj.in_features) == left
            assert block.mlp.fc1.out_features == 57
            assert block.mlp.fc2.out_features == 24
        assert student(ground.batches[0]).shape == (len(ground.batches[0]), 10)


@pytest.fixture
def start(place, tmp_path, monkeypatch):
    """Run the script on the tiny teacher; returns its result and what is in the JSON."""
    monkeypatch.setattr(peers, "open_place", lambda *_: place)

    def run(*words):
        file = tmp_path / "peers.json"
        common = ["--quick", "--json", str(file), "--cache", str(tmp_path / "cache"), "--threads", "1"]
        result = CliRunner().invoke(peers.main, [*common, "--minutes", "0.003", *words])
        return result, json.loads(file.read_text()) if file.exists() else {}

    return run


def test_rows_are_made_once(start, monkeypatch):
    made = []
    for peer in ("tome", "slimmer", "drop_blocks"):

        def make(problem, peer=peer, whole=PEERS[peer]):
            made.append(peer)
            if made == ["tome", "slimmer"]:
                raise KeyboardInterrupt
            return whole(problem)

        monkeypatch.setitem(PEERS, peer, make)
    words = ("--peers", "tome,slimmer,drop_blocks", "--budgets", "70%")
    assert start(*words)[0].exit_code == 1
    assert [row["peer"] for row in start("--peers", "tome", "--budgets", "70%")[1]["rows"]] == ["tome"]
    result, content = start(*words)
    assert result.exit_code == 0, result.output
    assert made == ["tome", "slimmer", "slimmer", "drop_blocks"]
    assert [row["peer"] for row in content["rows"]] == ["tome", "slimmer", "drop_blocks"]
    for row in content["rows"]:
        assert row["share"] <= 0.7
        assert row["met"]
        assert row["finetuned"]["held_out"] > 0  # how many steps there are time for, nobody knows
        accuracy = content["teachers"]["digits_vit"]["accuracy"]
        lost = 100 * (accuracy - row["after"]["accuracy"])
        assert row["points_lost"]["after"] == pytest.approx(lost, abs=1e-3)
        assert f"{row['peer']}" in result.stdout
    assert {"device", "threads", "versions"} <= set(content["environment"])
    start(*words, "--peers", "tome", "--again")
    assert made[-1] == "tome"
    assert len(made) == 5
    result, _ = start(*words, "--images", "30")
    assert result.exit_code == 2
    assert "images 64, not 30" in result.stderr


def test_the_others_may_take_as_long_as_the_search(start, monkeypatch):
    def searched(problem):
        model = problem.ground.teacher.model
        return Made(student=model, tuned=model, about={"wall_s": {"total": 100.0}})

    def briefly(*args, whole=peers.train, **options):
        given.append(args[3].seconds)
        return whole(*args[:3], replace(args[3], seconds=0.2), **options)

    given = []
    monkeypatch.setitem(PEERS, "mixerzoo", searched)
    monkeypatch.setattr(peers, "train", briefly)
    words = ("--budgets", "70%", "--same-time", "--peers")
    result, content = start(*words, "tome")
    assert result.exit_code == 2
    assert "no search for 70% with seed 0 yet; name mixerzoo first" in result.stderr
    assert not content.get("rows")
    rows = start(*words, "mixerzoo,tome")[1]["rows"]
    assert [row["peer"] for row in rows] == ["mixerzoo", "tome"]
    assert given == [pytest.approx(100 - rows[1]["make_s"], abs=0.1)]
    result, _ = start("--budgets", "70%", "--peers", "tome")
    assert "same_time True, not False" in result.stderr


def test_what_cannot_be_and_what_fails_are_rows(start, monkeypatch):
    def broken(problem):
        raise ValueError("this one is broken")

    monkeypatch.setitem(PEERS, "slimmer", broken)
    result, content = start("--peers", "tome,slimmer", "--budgets", "2%")
    assert result.exit_code == 1
    assert "smallest student" in content["rows"][0]["cannot"]
    assert content["rows"][1]["failed"] == "ValueError: this one is broken"
    assert "cannot: " in result.stdout
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--peers", "tomee"), "unknown: tomee"),
        (("--budgets", "5ms"), "give shares"),
        (("--budgets", "x"), "budget 'x'"),
        (("--seeds", "a"), "give numbers"),
        (("--minutes", "0"), "--minutes takes more than 0"),
    ],
)
def test_bad_options_are_refused(start, words, said):
    result, content = start(*words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not content


def row(lost, **more):
    return {"after": {"loss": lost / 50}, "met": True, "points_lost": {"after": lost}} | more


@pytest.mark.parametrize(
    ("ours", "others", "met"),
    [
        ([row(0.9)], {"tome": [row(2.0)], "slimmer": [row(5.0)]}, [True, True]),
        ([row(1.2)], {"tome": [row(2.0)]}, [False, False]),
        ([row(0.9)], {"tome": [row(0.5, met=False)], "slimmer": [{"cannot": "no"}]}, [True]),
        ([row(0.0)], {"tome": [row(-0.2)]}, [True, True]),
        ([row(0.2)], {"tome": [row(-0.2)]}, [False, True]),
        ([row(0.1, met=False)], {"tome": [row(2.0)]}, [False, False]),
        ([row(0.6), row(1.6)], {"tome": [row(1.0), row(4.0)]}, [True, False]),
    ],
)
def test_bars(ours, others, met):
    class Made:
        def of(self, teacher, budget):
            return {"mixerzoo": list(ours), **others}

    found = bars(Made(), "digits_vit", ["60%"])
    assert [bar["met"] for bar in found] == met
    judged = [bar["loss"] for bar in found if "loss" in bar]
    assert len(judged) == len(met) - 1 or len(met) == 1
    for loss in judged:
        seen = [one["after"]["loss"] for one in ours]
        met_all = all(one["met"] for one in ours)
        assert loss["mixerzoo"] == (pytest.approx(sum(seen) / len(seen)) if met_all else None)
        assert loss["tome"] == pytest.approx(
            sum(o["after"]["loss"] for o in others["tome"]) / len(others["tome"])
        )


@pytest.mark.parametrize("name", ["dinov2-112", "dinov2-224"])
def test_teachers_come_at_their_size(name, place, monkeypatch, tmp_path):
    opened = []

    def prepare(cache, data):
        opened.append((cache, data.fingerprint, dinov2.PIXELS))
        return tmp_path / "weights", 0.9

    monkeypatch.setattr(dinov2, "prepare_teacher", prepare)
    monkeypatch.setattr(places, "open_teacher", lambda model, checkpoint: (model, checkpoint))
    found = places.open_place(name, tmp_path, Path(place.source))
    assert opened == [(tmp_path, place.data.fingerprint, int(name[-3:]))]
    assert found.teacher == (found.model, found.checkpoint) == (dinov2.MODEL, tmp_path / "weights")
    assert found.source == place.source
    assert dinov2.PIXELS == 112


@pytest.mark.slow
def test_mixerzoo_is_a_search(start, place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    teacher = tiny.tiny_teacher()
    monkeypatch.setattr(peers, "open_place", lambda *_: replace(place, teacher=teacher))
    with tiny_search.tiny_world():
        result, content = start("--peers", "mixerzoo,one_mixer:static", "--budgets", "60%")
    assert result.exit_code == 0, (result.output, content)
    ours = next(row for row in content["rows"] if row["peer"] == "mixerzoo")
    assert set(ours["about"]["plan"]) == {site.name for site in teacher.sites}
    assert ours["about"]["wall_s"]["total"] > 0
    assert len(content["bars"]["digits_vit"]) == 2
