"""Budgets as people say them, and arguments that are refused before anything is done."""

import json
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixerzoo.capture import MEMORY_LIMIT_GB
from mixerzoo.cli import main
from mixerzoo.errors import MixerzooError
from mixerzoo.objectives import OBJECTIVES
from mixerzoo_search.settings import Budget, Settings

positive = st.floats(min_value=1e-6, max_value=1e9, allow_nan=False)


@given(positive, st.sampled_from(["", "ms", " ms"]), st.sampled_from(["", " ", "\t"]))
def test_milliseconds_are_read_as_written(value, unit, space):
    budget = Budget.parse(f"{space}{value!r}{unit}{space}")
    assert budget == Budget(ms=value)
    assert budget.in_ms(123.0) == value


@given(st.floats(min_value=1e-3, max_value=99.99), st.floats(min_value=1e-3, max_value=1e6))
def test_a_share_is_one_of_the_teachers_latency(percent, teacher_ms):
    budget = Budget.parse(f"{percent!r}%")
    assert budget.ms is None
    assert budget.in_ms(teacher_ms) == pytest.approx(percent / 100 * teacher_ms)
    assert 0 < budget.in_ms(teacher_ms) < teacher_ms


@given(st.one_of(positive.map(lambda v: f"{v}ms"), st.floats(0.01, 99.9).map(lambda v: f"{v}%")))
def test_a_label_is_read_back_as_nearly_the_same(text):
    budget = Budget.parse(text)
    again = Budget.parse(budget.label)
    assert again.in_ms(10.0) == pytest.approx(budget.in_ms(10.0), rel=1e-4)
    assert "/" not in budget.label
    assert " " not in budget.label


@given(st.text(max_size=12))
def test_any_text_is_a_budget_or_refused(text):
    said = ""
    try:
        budget = Budget.parse(text)
    except MixerzooError as error:
        said = str(error)
    if said:
        assert text in said
        assert "such as" in said
    else:
        assert (budget.ms is None) != (budget.share is None)
        assert 0 < budget.in_ms(1.0) < float("inf")


@pytest.mark.parametrize(
    "text", ["", "%", "ms", "0", "0%", "-5", "-5%", "nan", "inf", "nan%", "5 %%", "5sec", "100%"]
)
def test_what_is_no_budget(text):
    with pytest.raises(MixerzooError):
        Budget.parse(text)


def settings(**changes):
    return Settings(**({"model": "m", "data": "d", "budget": Budget(share=0.6)} | changes))


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"trials": 0}, "--trials 0"),
        ({"images": 19}, "--images 19"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"threads": 0}, "--threads 0"),
        ({"distill_steps": -1}, "--distill-steps -1"),
        ({"seed": -1}, "--seed -1"),
        ({"minutes": 0.0}, "--minutes 0"),
        ({"minutes": float("nan")}, "--minutes nan"),
        ({"finetune_minutes": -0.5}, "--finetune-minutes -0.5"),
        ({"finetune_minutes": float("nan")}, "--finetune-minutes nan"),
        ({"finetune_minutes": float("inf")}, "--finetune-minutes inf"),
        ({"distill_minutes": 0.0}, "--distill-minutes 0"),
        ({"distill_minutes": -1.0}, "--distill-minutes -1"),
        ({"distill_minutes": float("nan")}, "--distill-minutes nan"),
        ({"distill_minutes": float("inf")}, "--distill-minutes inf"),
        ({"memory_limit": -0.5}, "--memory-limit -0.5"),
        ({"memory_limit": float("nan")}, "--memory-limit nan"),
        ({"memory_limit": float("inf")}, "--memory-limit inf"),
    ],
)
def test_arguments_out_of_range_are_named(changes, flag):
    with pytest.raises(MixerzooError) as raised:
        settings(**changes)
    assert str(raised.value).startswith(f"{flag}: give ")


def test_the_least_that_is_allowed():
    settings(trials=1, images=20, batch_size=1, threads=1, distill_steps=0, finetune_minutes=0, seed=0)
    settings(memory_limit=0.0, distill_minutes=1e-3)


def test_the_memory_limit_is_that_of_a_capture():
    assert settings().memory_limit == MEMORY_LIMIT_GB
    for name in ("search", "profile"):
        (option,) = (
            p for p in main.get_command(click.Context(main), name).params if p.name == "memory_limit"
        )
        assert option.default == MEMORY_LIMIT_GB


def test_the_objective_is_one_of_those_that_there_are():
    for name in OBJECTIVES:
        assert settings(objective=name).objective == name
    with pytest.raises(MixerzooError, match="--objective mse: give one of nmse, cosine"):
        settings(objective="mse")


def test_the_identity_says_what_makes_a_search_what_it_is():
    base = settings()
    assert base.identity() == settings(trials=100, minutes=3.0, memory_limit=0.1).identity()
    for name, value in {
        "model": "other",
        "objective": "cosine",
        "data": "other",
        "budget": Budget(ms=5.0),
        "checkpoint": Path("weights"),
        "mixers": ("none",),
        "widths": (0.5,),
        "images": 100,
        "distill_steps": 1,
        "distill_minutes": 1.0,
        "finetune_minutes": 2.0,
        "batch_size": 2,
        "threads": 1,
        "device": "cuda",
        "dtype": "bfloat16",
        "runtime": "inductor",
        "seed": 1,
        "study_seed": 2,
        "prior": "uniform",
    }.items():
        changed = settings(**{name: value}).identity()
        assert {key for key in changed if changed[key] != base.identity()[key]} == {name}


def test_settings_are_what_their_identity_says():
    some = settings(mixers=("a",), widths=(0.5,), checkpoint=Path("x"), budget=Budget(ms=5.0), study_seed=3)
    known = json.loads(json.dumps(some.identity())) | {"plugins": {}, "space": {}}
    assert Settings.from_identity(known) == some
    assert Settings.from_identity(known, trials=7, minutes=2.0).trials == 7
    del known["study_seed"]  # of a run that is older
    assert Settings.from_identity(known).study_seed is None
    with pytest.raises(LookupError):
        Settings.from_identity({"recipe": "far"})


def test_the_identity_is_json():
    identity = settings(mixers=("a", "b"), widths=(0.5,), checkpoint=Path("x/y")).identity()
    assert json.loads(json.dumps(identity)) == identity
