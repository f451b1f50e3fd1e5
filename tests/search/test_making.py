"""Many candidates at once: the same ones from one process or several, whatever happens to one of them."""

import os

import pytest
import tiny
import torch
from torch import nn

from mixerzoo import MixerSpec, hookimpl
from mixerzoo.capture import capture
from mixerzoo.library.entries import Source
from mixerzoo.library.folder import Library
from mixerzoo.plan import Candidate
from mixerzoo.registry import temporary_plugin
from mixerzoo_search import making
from mixerzoo_search.candidates import CandidateLibrary, wider_widths
from mixerzoo_search.making import make_all

IMAGES = 20
CANDIDATES = [Candidate("static", 0.5), Candidate("linear"), Candidate("pool"), Candidate("linear_attention")]

needs_fork = pytest.mark.skipif(not making._can_fork(), reason="processes cannot be forked here")


class Sentinel(nn.Module):
    """Raises in every process but the one that made it known."""

    home = os.getpid()

    def __init__(self, dim):
        super().__init__()
        self.readout = nn.Linear(dim, dim)

    def forward(self, x):
        if os.getpid() != self.home:
            os._exit(9)  # as if it had been killed
        return self.readout(x)


class Plugin:
    @hookimpl
    def register_mixers(self, register):
        register(MixerSpec(name="sentinel", build=Sentinel, readout="readout", summary="a test subject"))


@pytest.fixture(scope="module")
def teacher():
    return tiny.tiny_teacher()


@pytest.fixture(scope="module")
def captured(teacher):
    return capture(teacher, tiny.tiny_batches(IMAGES), IMAGES)


@pytest.fixture
def eager_to_fork(monkeypatch):
    monkeypatch.setattr(making, "ALONE_S", 0.0)
    monkeypatch.setattr(making, "WORTH_S", 0.0)


@pytest.fixture
def library(teacher, tmp_path):
    def make(name):
        source = Source(model="tiny", teacher="t", data_name="d", data="d", images=IMAGES, form="f")
        return CandidateLibrary(Library(tmp_path / name), teacher, source, steps=2, seed=0)

    return make


def tasks(teacher, candidates=CANDIDATES):
    return [(site.name, c) for site in teacher.sites if site.kind == "attention" for c in candidates]


@needs_fork
@pytest.mark.parametrize("stepped", [False, True])
def test_processes_make_what_one_makes(eager_to_fork, teacher, captured, library, stepped):
    alone, shared, todo = library("alone"), library("shared"), tasks(teacher)
    make_all(alone, todo, captured, stepped=stepped, processes=1)
    seen = []
    make_all(shared, todo, captured, stepped=stepped, processes=3, on_made=seen.append)
    assert seen == sorted(set(seen))
    assert seen[-1] == len(todo)
    for task in todo:
        mine, theirs = (lib.find(*task, stepped=stepped) for lib in (alone, shared))
        assert mine.key == theirs.key
        assert mine.nmse == pytest.approx(theirs.nmse, rel=1e-4)
        weights, others = alone.state(mine), shared.state(theirs)
        assert all(torch.allclose(weights[name], others[name], atol=1e-3) for name in weights)
    assert alone.stepped == shared.stepped == (set(todo) if stepped else set())


@needs_fork
def test_a_process_that_dies_costs_nothing_else(eager_to_fork, teacher, captured, library):
    shared = library("shared")
    with temporary_plugin(Plugin(), name="sentinel"):
        todo = tasks(teacher, [CANDIDATES[0], Candidate("sentinel"), *CANDIDATES[1:]])
        make_all(shared, todo, captured, stepped=False, processes=2)
        assert all(shared.find(*task, stepped=False) is not None for task in todo)
        assert not any(shared.find(*task, stepped=False).failed for task in todo)


def test_little_work_starts_no_process(teacher, captured, library, monkeypatch):
    monkeypatch.setattr(making, "_fork", lambda *_: pytest.fail("forked"))
    shared = library("shared")
    make_all(shared, tasks(teacher), captured, stepped=False, processes=4)
    assert shared.find(*tasks(teacher)[0], stepped=False) is not None


def test_what_another_process_is_at_comes_last(teacher, captured, library):
    shared, todo, order = library("shared"), tasks(teacher), []
    make = shared.make

    def first_is_taken(site, candidate, captured, *, stepped, wait=True):
        if (site, candidate) == todo[0] and not wait:
            return None
        order.append((site, candidate))
        return make(site, candidate, captured, stepped=stepped, wait=wait)

    shared.make = first_is_taken
    make_all(shared, todo, captured, stepped=False, processes=1)
    assert order == [*todo[1:], todo[0]]


def test_the_next_wider_candidate_before_it_is_where_steps_begin():
    def pair(width, mixer="glu_mlp", site="a"):
        return site, Candidate(mixer, width)

    order = [pair(1.0), pair(0.5), pair(2.0), pair(0.25), pair(0.5, "gmlp"), pair(0.5, site="b")]
    assert wider_widths(order) == dict(zip(order, [0.0, 1.0, 0.0, 0.5, 0.0, 0.0], strict=True))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=needs_fork)])
def test_narrower_candidates_begin_from_wider_ones(eager_to_fork, teacher, captured, library, processes):
    wide, narrow = Candidate("glu_mlp", 1.0), Candidate("glu_mlp", 0.5)
    todo = [(site, c) for site, c in tasks(teacher, [narrow, wide])]
    alone, shared, other = library("alone"), library("shared"), library("other")
    for shelf in (alone, shared, other):
        make_all(shelf, todo, captured, stepped=False, processes=1)
    make_all(alone, todo, captured, stepped=True, processes=1)
    site = todo[0][0]
    for shelf in (shared, other):
        shelf.wider = wider_widths(tasks(teacher, [wide, narrow]))
    make_all(shared, todo, captured, stepped=True, processes=processes)
    other.make(site, narrow, captured, stepped=True)  # which makes the wider one first
    assert other.find(site, wide, stepped=True) is not None
    own, warm, again = (shelf.find(site, narrow, stepped=True) for shelf in (alone, shared, other))
    assert own.key != warm.key == again.key
    assert (own.recipe.get("wider"), warm.recipe["wider"]) == (None, 1.0)
    assert warm.nmse == pytest.approx(again.nmse, rel=1e-3)
    assert alone.find(site, wide, stepped=True).key == shared.find(site, wide, stepped=True).key
