"""Part `solver`: the exact frontier of large spaces, and whether HiGHS agrees."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from sections import Section, verdict
from sections import table as print_table

from mixerzoo.plan import KEEP_CANDIDATE, Candidate
from mixerzoo_search import exact
from mixerzoo_search.additive import AdditiveModel

SITES, CANDIDATES, BUDGETS = 48, 60, 50
SECONDS = 5.0
CHECKED = 4  # budgets at which HiGHS is asked too
AGREE = 1e-5  # relative: HiGHS has tolerances

Draw = Callable[
    [np.random.Generator], tuple[np.ndarray, np.ndarray]
]  # -> loss, ms saved; (sites, candidates - 1)


def _free(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    shape = SITES, CANDIDATES - 1
    return rng.lognormal(0, 2, shape), rng.uniform(-0.2, 1, shape)


def _traded(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What is faster does more damage, at every site: nothing is dominated."""
    loss, saved = _free(rng)
    return np.sort(loss), np.sort(np.abs(saved))


def _alike(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """As in a transformer: the same latencies at all sites, damages that differ by a factor."""
    shape = 1, CANDIDATES - 1
    loss = np.sort(rng.lognormal(-2, 1, shape)) * rng.lognormal(0, 1, (SITES, 1))
    return loss, np.repeat(np.sort(rng.uniform(0, 1, shape)), SITES, axis=0)


def _smooth(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Damage grows with the square of what is saved, nearly the same at all sites: many plans are nearly best."""
    saved = np.repeat(np.sort(rng.uniform(0, 1, (1, CANDIDATES - 1))), SITES, axis=0)
    return saved**2 * rng.normal(1, 0.01, saved.shape), saved


SPACES: dict[str, Draw] = {"free": _free, "traded": _traded, "alike": _alike, "smooth": _smooth}


def measure(section: Section, console: Console, *, seed: int) -> bool:
    """Time the frontier of each kind of space; compare some budgets with HiGHS."""
    lines, met = [], True
    for name, draw in SPACES.items():
        model = _model(*draw(np.random.default_rng(seed)))
        fastest = model.predict_ms(model.fastest())
        budgets = np.linspace(fastest, model.base_ms, BUDGETS + 2)[1:-1].tolist()
        began = time.perf_counter()
        found = [exact.solve(model, budget) for budget in budgets]
        seconds = time.perf_counter() - began
        proven = sum(one is not None and one.optimal for one in found)
        off = 0.0
        for at in range(CHECKED):
            number = at * BUDGETS // CHECKED
            mine, budget = found[number], budgets[number]
            other = exact.by_highs(model, budget)
            assert mine is not None
            assert other is not None
            off = max(off, (mine.loss - other.loss) / abs(other.loss))
        section.rows[name] = {"seconds": seconds, "proven": proven, "above_highs": off}
        lines.append([name, f"{seconds:.2f}", f"{proven} of {BUDGETS}", f"{off:.1e}"])
        met &= seconds <= SECONDS and proven == BUDGETS and off <= AGREE
    section.save()
    title = f"{SITES} sites x {CANDIDATES} candidates, {BUDGETS} budgets"
    print_table(console, title, ["space", "seconds", "proven optimal", "loss above HiGHS"], lines)
    worst = max(row["seconds"] for row in section.rows.values())
    return verdict(console, "seconds for all budgets", worst, SECONDS) and met


def _model(loss: np.ndarray, saved: np.ndarray) -> AdditiveModel:
    names = (KEEP_CANDIDATE, *(Candidate(f"m{at}") for at in range(CANDIDATES - 1)))
    return AdditiveModel(
        sites=tuple(f"s{at}" for at in range(SITES)),
        candidates=(names,) * SITES,
        loss=tuple((0.0, *row) for row in loss.tolist()),
        latency_ms=tuple((0.0, *(-ms for ms in row)) for row in saved.tolist()),
        base_ms=2.0 * SITES,
    )
