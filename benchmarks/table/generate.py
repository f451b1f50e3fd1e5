"""Make `table.npz`: distil the candidates, evaluate the loss of every plan, time every plan beside the teacher.

Every part is kept in a folder as it goes, so that the same command goes on after a kill.
"""

from __future__ import annotations

import io
import json
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent.parent))

from search_parts.space import CpuStopwatch, Losses, Space

from mixerzoo.files import read_json, write_bytes, write_json
from mixerzoo.latency import (
    REFERENCE,
    Conditions,
    Rounds,
    Stopwatch,
    environment,
    measure_table,
    threads,
)
from mixerzoo.plan import KEEP, Candidate
from mixerzoo_search.fit_quality import mape, spearman
from mixerzoo_search.prior_table import mixing_of
from table import FILE, Table

ATTENTION = (KEEP, "static@1", "linear_attention@0.5", "static@0.25", "linear@1", "none@1")
MLP = (KEEP, "mlp_slice@0.25", "mlp_slice@0.125", "mlp_slice@0.0625", "mlp_slice@0.03125", "none@1")
SITES = {
    "blocks.5.attn": ATTENTION,
    "blocks.6.attn": ATTENTION,
    "blocks.7.attn": ATTENTION,
    "blocks.7.mlp": MLP,
}
IMAGES = 64
TOGETHER = 24  # students that are timed in the same rounds
ROUNDS = Rounds(least=3, most=3, settle_ms=0)  # in one pass over all plans
SAVE_S = 20.0  # between two savings of losses
FIT_PLANS = 12  # random plans that the correction of latency is fitted on, as in a search


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path(".data/table"), show_default=True)
@click.option(
    "--passes", default=1, show_default=True, help="Over all plans, of timing them; more can be added later."
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=FILE, help="[default: table.npz beside this script]"
)
def main(work: Path, passes: int, out: Path) -> None:
    """Make the table, or go on making it."""
    with threads(1):
        space = Space(SITES, work, images=IMAGES)
        losses = _losses(space, work)
        watch = CpuStopwatch(space.teacher, Conditions(threads=1))
        change = _changes(space, watch, work)
        ratios = _ratios(space, watch, work, losses.shape, passes)
        about, arrays = _pack(space, losses, ratios, change)
        content = io.BytesIO()
        np.savez_compressed(content, about=np.array(json.dumps(about)), **arrays)
        write_bytes(out, content.getvalue())
        click.echo(f"{out}: {losses.size} plans, {len(content.getvalue()) / 1e3:.0f} kB")
        click.echo(json.dumps(about["quality"], indent=2))


def _losses(space: Space, work: Path) -> NDArray[np.float64]:
    """Return the loss of every plan, one axis a site."""
    path = work / "losses.npy"
    made = Losses(space)
    losses = np.load(path) if path.exists() else np.full(made.shape, np.nan)
    saved = began = time.monotonic()
    at_first = int(np.isnan(losses).sum())

    def save(left: int) -> None:
        nonlocal saved
        if left and time.monotonic() - saved < SAVE_S:
            return
        _write_array(path, losses)
        saved = time.monotonic()
        pace = (saved - began) / max(at_first - left, 1)
        click.echo(
            f"losses: {losses.size - left} of {losses.size}, {pace * left / 60:.1f} min left", err=True
        )

    if at_first:
        made.fill(losses, save)
        save(0)
    return np.asarray(losses)


def _changes(space: Space, watch: Stopwatch, work: Path) -> dict[str, Any]:
    """Return what each candidate changes, as share of the teacher's latency, and that latency in ms."""
    path = work / "changes.json"
    if not path.exists():
        rows = {site: [Candidate.parse(c) for c in row if c != KEEP] for site, row in space.names.items()}
        table = measure_table(watch, rows)
        share = {
            site: {c: ms / table.base_ms for c, ms in row.items()} for site, row in table.change_ms.items()
        }
        write_json(path, {"teacher_ms": table.base_ms, "share": share})
    found: dict[str, Any] = read_json(path)
    return found


def _ratios(
    space: Space, watch: Stopwatch, work: Path, shape: tuple[int, ...], passes: int
) -> NDArray[np.float64]:
    """Return (passes, plans): the ratio of each plan's latency to the teacher's, a median of a few rounds each."""
    path, size = work / "ratios.npy", int(np.prod(shape))
    ratios = np.load(path) if path.exists() else np.zeros((0, size))
    if len(ratios) < passes:
        ratios = np.concatenate([ratios, np.full((passes - len(ratios), size), np.nan)])
    began, before = time.monotonic(), int(np.isnan(ratios).sum())
    for number, row in enumerate(ratios[:passes]):
        order = np.random.default_rng([0, number]).permutation(size)
        todo = order[np.isnan(row[order])]
        for first in range(0, len(todo), TOGETHER):
            part = todo[first : first + TOGETHER].tolist()
            timings = watch.time(
                {str(at): space.student(_plan(space, shape, at)) for at in part}, rounds=ROUNDS
            )
            for name, timing in timings.items():
                if name != REFERENCE:
                    row[int(name)] = timing.ratio
            if first % (TOGETHER * 20) == 0 or first + TOGETHER >= len(todo):
                _write_array(path, ratios)
                left = int(np.isnan(ratios).sum())
                pace = (time.monotonic() - began) / max(before - left, 1)
                click.echo(
                    f"latencies: {ratios.size - left} of {ratios.size}, {pace * left / 60:.1f} min left",
                    err=True,
                )
    return np.asarray(ratios)


def _write_array(path: Path, array: NDArray[np.float64]) -> None:
    content = io.BytesIO()
    np.save(content, array)
    write_bytes(path, content.getvalue())


def _plan(space: Space, shape: tuple[int, ...], at: int) -> dict[str, str]:
    choices = np.unravel_index(at, shape)
    return {site: row[int(choice)] for (site, row), choice in zip(space.names.items(), choices, strict=True)}


def smoothed(ratios: NDArray[np.float64], shape: tuple[int, ...]) -> tuple[NDArray[np.float64], float, float]:
    """Return each plan's ratio by the effects of sites and pairs of sites; the noise of a ratio; the error of these.

    A student runs one site after the other: effects of three sites on each other are noise. A Huber regression, so that
    a disturbed measurement counts little. Effects of pairs are shrunk (ridge) as far as the marginal likelihood wants.

    Args:
        ratios: (plans,) measured; NaN for those that were not.
        shape: candidates a site.
    """
    sites, pairs = design_matrix(shape)
    every = np.hstack([sites, pairs])
    timed = np.isfinite(ratios)
    sites, pairs, design, ratios = sites[timed], pairs[timed], every[timed], ratios[timed]
    weight, spread = np.ones(len(ratios)), 0.0
    for _ in range(12):
        root = np.sqrt(weight)
        spread = _pair_spread(sites * root[:, None], pairs * root[:, None], ratios * root)
        penalty = np.r_[np.zeros(sites.shape[1]), np.full(pairs.shape[1], 1.0 / spread)]
        inverse = np.linalg.inv((design * weight[:, None]).T @ design + np.diag(penalty))
        effects = inverse @ design.T @ (weight * ratios)
        off = ratios - design @ effects
        noise = 1.4826 * float(np.median(np.abs(off)))
        weight = np.minimum(1.0, 1.5 * noise / np.maximum(np.abs(off), 1e-12))
    variance = np.einsum("ij,jk,ik->i", every, inverse, every)
    return every @ effects, noise, noise * float(np.sqrt(np.median(variance)))


def _pair_spread(
    sites: NDArray[np.float64], pairs: NDArray[np.float64], ratios: NDArray[np.float64]
) -> float:
    """Return the variance of effects of pairs, over that of the noise, by marginal likelihood."""
    base, _ = np.linalg.qr(sites)
    rest = ratios - base @ (base.T @ ratios)
    left, size, _ = np.linalg.svd(pairs - base @ (base.T @ pairs), full_matrices=False)
    along = left.T @ rest
    beyond = float(rest @ rest - along @ along)
    count = len(ratios) - base.shape[1]

    def misfit(spread: float) -> float:
        scale = 1 + spread * size**2
        total = beyond + float((along**2 / scale).sum())
        return float(count * np.log(total) + np.log(scale).sum())

    return min(np.geomspace(1e-6, 1e2, 60).tolist(), key=misfit)


def design_matrix(shape: tuple[int, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return two (plans, effects) of 0 and 1: a constant and every choice but the first, and pairs of such choices."""
    choices = np.indices(shape).reshape(len(shape), -1)
    single = [[choices[site] == at for at in range(1, size)] for site, size in enumerate(shape)]
    constant = np.ones(choices.shape[1], dtype=bool)
    sites = np.stack([constant, *(column for row in single for column in row)], 1)
    pairs = [a & b for one, other in combinations(single, 2) for a in one for b in other]
    return sites.astype(float), np.stack(pairs, 1).astype(float)


def _pack(
    space: Space, losses: NDArray[np.float64], ratios: NDArray[np.float64], change: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return what the file says of itself, and its arrays."""
    shape, teacher_ms = losses.shape, change["teacher_ms"]
    names = list(space.names.items())
    measured = np.nanmedian(ratios, axis=0) if len(ratios) else np.full(losses.size, np.nan)
    ratio, noise, error = smoothed(measured, shape)
    alone = {
        site: {
            c: tuple(to if axis == at else 0 for axis in range(len(shape))) for to, c in enumerate(row) if to
        }
        for at, (site, row) in enumerate(names)
    }
    about: dict[str, Any] = {
        "sites": list(space.names),
        "candidates": [list(row) for _, row in names],
        "teacher": space.teacher.name,
        "teacher_fingerprint": space.teacher.fingerprint,
        "images": len(space.images),
        "loss": "KL from the teacher in nats, mean over images",
        "ratio": "latency over the teacher's: medians of rounds beside it in CPU time, regressed on sites and pairs",
        "rounds": ROUNDS.least * len(ratios),
        "teacher_ms": teacher_ms,
        "scores": {site: {c: float(losses[at]) for c, at in row.items()} for site, row in alone.items()},
        "change_ms": {
            site: {c: share * teacher_ms for c, share in row.items()} for site, row in change["share"].items()
        },
        "correction": [0.0, 1.0],
        "nmse": space.nmse(),
        "statistics": {site: space.statistics[site] for site in space.names},
        "kinds": {site: space.teacher.site(site).kind for site in space.names},
        "mixing": {c: mixing_of(Candidate.parse(c)) for _, row in names for c in row if c != KEEP},
        "environment": environment(Conditions(threads=1)),
    }
    table = Table(
        sites=tuple(about["sites"]),
        candidates=tuple(space.names.values()),
        loss=losses,
        ms=(ratio * teacher_ms).reshape(shape),
        measured=measured.reshape(shape),
        about=about,
    )
    predicted_loss, raw_ms = table.predictions()
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(np.isfinite(measured)))[:FIT_PLANS]
    fitted = table.model().calibrated(
        raw_ms.ravel()[chosen].tolist(), (measured[chosen] * teacher_ms).tolist()
    )
    about["correction"] = [fitted.intercept_ms, fitted.slope]
    predicted_ms = fitted.intercept_ms + fitted.slope * raw_ms
    some = predicted_loss > 0
    about["quality"] = {
        "timed": int(np.isfinite(measured).sum()),
        "error_of_a_measurement": noise / float(np.median(ratio)),
        "error": error / float(np.median(ratio)),
        "latency_mape": mape(predicted_ms.ravel().tolist(), table.ms.ravel().tolist()),
        "latency_spearman": spearman(predicted_ms.ravel().tolist(), table.ms.ravel().tolist()),
        "loss_spearman": spearman(predicted_loss.ravel().tolist(), losses.ravel().tolist()),
        "loss_over_sum_of_scores": np.quantile(
            (losses[some] / predicted_loss[some]), [0.05, 0.5, 0.95]
        ).tolist(),
    }
    arrays = {"loss": losses, "ratio": ratio.reshape(shape), "measured": measured.reshape(shape)}
    return about, {name: array.astype(np.float32) for name, array in arrays.items()}


if __name__ == "__main__":
    main()
