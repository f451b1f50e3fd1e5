"""Successive halving: the better half goes on, the time is what was given, and a search finishes by it."""

import json
import math
from types import SimpleNamespace

import pytest
import tiny
import tiny_search
import torch

from mixerzoo.plan import Candidate, Plan
from mixerzoo.progress import Reporter
from mixerzoo_search import finish, search
from mixerzoo_search.evaluate import PlanResult
from mixerzoo_search.finetuning.halving import halve, rounds, sentence, summary


@pytest.mark.parametrize(
    ("plans", "sizes"), [(0, []), (1, [1]), (2, [2, 1]), (3, [3, 2, 1]), (5, [5, 3, 2, 1])]
)
def test_rounds_share_the_time(plans, sizes):
    found = rounds(plans, 60.0)
    assert [one.plans for one in found] == sizes
    assert [one.number for one in found] == list(range(1, len(sizes) + 1))
    assert all(one.plans * one.seconds == pytest.approx(60 / len(sizes)) for one in found)
    assert all(one.of == plans for one in found)


@pytest.mark.parametrize(
    ("shortest", "sizes"), [(5.0, [4, 2, 1]), (5.1, [2, 1]), (15.0, [2, 1]), (16.0, [1]), (100.0, [1])]
)
def test_fewer_plans_begin_where_turns_would_be_too_short(shortest, sizes):
    found = rounds(4, 60.0, shortest)
    assert [one.plans for one in found] == sizes
    assert all(one.of == sizes[0] for one in found)
    assert sum(one.plans * one.seconds for one in found) == pytest.approx(60)
    assert found[0].seconds >= shortest or sizes == [1]
    assert rounds(0, 60.0, shortest) == []


def play(before, after, begin=None):
    """Play with plans whose loss is `before` at first and `after[plan][n]` after round n; return all that was seen."""
    turns, stored = [], []

    def tune(entry, this, turn):
        plan, _ = entry
        turns.append((turn, this.number, plan))
        return plan, after[plan][this.number - 1]

    last, played = halve(
        {plan: (plan, loss) for plan, loss in before.items()},
        rounds(len(before) if begin is None else begin, 30.0),
        loss=lambda entry: entry[1],
        tune=tune,
        on_round=lambda played: stored.append(len(played)),
    )
    assert [turn for turn, _, _ in turns] == list(range(len(turns)))
    assert stored == list(range(1, len(played) + 1))
    return {plan: loss for plan, (_, loss) in last.items()}, played, turns


def test_a_plan_that_is_best_after_steps_wins_whatever_it_was_before():
    before = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    after = {"a": [0.9], "b": [0.8], "c": [0.4, 0.3], "d": [0.5, 0.2, 0.1]}
    last, played, turns = play(before, after)
    assert last == {"a": 0.9, "b": 0.8, "c": 0.3, "d": 0.1}
    assert [plan for _, number, plan in turns if number == 2] == ["c", "d"]
    assert [one.kept for one in played] == [("c", "d"), ("d",), ("d",)]
    assert [one.spearman for one in played] == [pytest.approx(-0.8), pytest.approx(-1.0), None]
    found = summary(played)
    assert (found["plans"], found["spearman"]) == (4, pytest.approx(-0.8))
    assert found["seconds"] == pytest.approx(30)
    assert found["rounds"][0]["plans"]["b"] == {"before": 2.0, "after": 0.8, "kept": False}
    assert sentence(found).startswith("4 plans distilled as a whole in 3 rounds")
    assert "Spearman -0.80" in sentence(found)


def test_only_the_best_begin_where_the_first_round_has_no_place_for_all():
    before = {"a": math.nan, "b": 2.0, "c": 3.0, "d": 1.0}
    last, played, turns = play(before, {"b": [0.5, 0.4], "d": [0.6]}, begin=2)
    assert [plan for _, _, plan in turns] == ["d", "b", "b"]
    assert (last["b"], last["c"], last["d"]) == (0.4, 3.0, 0.6)
    assert summary(played)["plans"] == 2
    assert sentence(summary(played)).startswith("2 plans distilled as a whole in 2 rounds")


def test_a_loss_that_is_not_finite_comes_last():
    last, played, _ = play({"a": math.nan, "b": 1.0}, {"a": [math.nan], "b": [0.95, 0.9]})
    assert played[0].kept == ("b",)
    assert json.dumps(summary(played), allow_nan=False)
    assert last["b"] == 0.9


def test_a_round_that_helps_no_plan_is_the_last():
    before = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    last, played, turns = play(before, {plan: [loss] for plan, loss in before.items()})
    assert last == before
    assert len(turns) == 4
    found = summary(played)
    assert found["seconds"] == pytest.approx(10)
    assert sentence(found) == "4 plans distilled as a whole in 1 round, which helped none"
    one_is_helped = {"a": [1.0, 1.0], "b": [2.0], "c": [1.5, 1.5], "d": [4.0]}
    last, played, turns = play(before, one_is_helped)
    assert [number for _, number, _ in turns] == [1, 1, 1, 1, 2, 2]
    assert last["c"] == 1.5
    assert sentence(summary(played)).endswith("; the last helped none")


def test_nothing_to_play_is_said_by_nothing():
    assert play({}, {})[:2] == ({}, [])
    assert summary([]) == {"plans": 0, "seconds": 0, "spearman": None, "rounds": []}
    assert sentence(summary([])) == ""
    _, played, _ = play({"a": 1.0}, {"a": [0.5]})
    assert sentence(summary(played)) == "one plan distilled as a whole in 1 round"


def finalist(teacher, loss, mixer="pool"):
    plan = Plan.of({teacher.sites[0].name: Candidate(mixer)} if mixer else {}, teacher.sites)
    result = PlanResult(
        plan=plan, loss=loss, agreement=0.5, accuracy=None, latency_ms=1.0, predicted_ms=1.0,
        predicted_loss=loss, params=1, source="refit",
    )  # fmt: skip
    return finish.Finalist(
        result=result, student=teacher.model, losses=torch.tensor([loss]), further=torch.empty(0)
    )


def test_a_finish_goes_by_the_rounds_and_leaves_the_teacher_alone(monkeypatch):
    teacher = tiny.tiny_teacher()
    stored, asked = {}, []
    context = SimpleNamespace(
        settings=SimpleNamespace(finetune_minutes=1.0, device="cpu"),
        reporter=Reporter(quiet=True),
        run=SimpleNamespace(store=stored.__setitem__),
        final_judge=SimpleNamespace(harmless_loss=lambda: 0.01),
        teacher_ms=1.0,
    )

    def tuned(context, finalist, this, evaluate, on_progress):
        asked.append((finalist.result.plan.replaced(), this.number, this.seconds))
        loss = 0.1 if "none@1" in str(finalist.result.plan.to_json()) else finalist.loss
        return finish.replace(finalist, losses=torch.tensor([loss]))

    monkeypatch.setattr(finish, "_finetuned", tuned)
    ready = [finalist(teacher, 0.3), finalist(teacher, 0.5, "none"), finalist(teacher, 0.0, None)]
    last, tuning = finish._in_rounds(context, ready)
    assert [f.loss for f in last] == pytest.approx([0.3, 0.1, 0.0])
    assert [(number, seconds) for _, number, seconds in asked] == [(1, 15.0), (1, 15.0), (2, 30.0)]
    assert all(replaced for replaced, _, _ in asked)
    assert stored["finetuning"] == tuning
    assert tuning["spearman"] == pytest.approx(-1)
    asked.clear()
    context.teacher_ms = 8.0  # turns of 15 s are too short
    finish._in_rounds(context, ready)
    assert [(number, seconds) for _, number, seconds in asked] == [(1, 60.0)]


def test_a_student_that_is_as_good_as_its_teacher_is_left_as_it_is(monkeypatch):
    teacher = tiny.tiny_teacher()
    context = SimpleNamespace(
        settings=SimpleNamespace(finetune_minutes=1.0, device="cpu"),
        reporter=Reporter(quiet=True),
        final_judge=SimpleNamespace(harmless_loss=lambda: 0.01),
        teacher_ms=1.0,
    )
    monkeypatch.setattr(finish, "_finetuned", lambda *_: pytest.fail("nothing to learn"))
    ready = [finalist(teacher, 0.01), finalist(teacher, 0.0, "none")]
    last, tuning = finish._in_rounds(context, ready)
    assert last == ready
    assert tuning == summary([])


def test_a_search_goes_on_between_rounds_and_takes_none_again(tmp_path, monkeypatch):
    tiny_search.write_npz(tmp_path / "data.npz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finish, "TURN", 0)  # all plans have their turn, however short
    calls, finetune = [], finish.finetune

    def counted(teacher, student, images, *, checkpoint, **options):
        calls.append(checkpoint.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return finetune(teacher, student, images, checkpoint=checkpoint, **options)

    monkeypatch.setattr(finish, "finetune", counted)
    options = tiny_search.FAST | {"mixers": tiny_search.MIXERS, "trials": 5, "finetune_minutes": 0.02}

    def go():
        return search("tiny", "data.npz", budget="60%", out="run", **options)

    with tiny_search.tiny_world():
        with pytest.raises(KeyboardInterrupt):
            go()
        before = json.loads((tmp_path / "run" / "finalists.json").read_text())
        result = go()
        assert calls[3] == calls[4]
        done = calls[:3] + calls[4:]
        assert len(set(done)) == len(done)
        tuned = result.summary["finetuning"]
        assert tuned == json.loads((tmp_path / "run" / "finetuning.json").read_text())
        assert len(done) == sum(len(one["plans"]) for one in tuned["rounds"])
        assert json.loads((tmp_path / "run" / "finalists.json").read_text()) == before
        tiny_search.check_summary(result.summary)
        assert "distilled as a whole in" in (tmp_path / "run" / "report.html").read_text()
        assert not list((tmp_path / "run").rglob("checkpoint*"))
        last = len(calls)
        go()
        assert len(calls) == last
        for folder in (tmp_path / "run" / "finalists").glob("*-round*"):
            assert torch.isfinite(torch.tensor(json.loads((folder / "result.json").read_text())["loss"]))
