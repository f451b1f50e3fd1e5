from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mixerzoo_search.pareto import non_dominated
from mixerzoo_search.report import (
    DamageRow,
    EvaluationRow,
    PriorTable,
    Profile,
    Rank,
    Report,
    SiteRow,
    Teacher,
    Tested,
)

MIXERS = {
    "glu_mlp": "G", "linear": "L", "linear_attention": "K", "mamba": "M", "mlp_slice": "W",
    "multihead_lstm": "R", "none": "N", "pool": "P", "shallow_ffn": "F", "static": "S",
}  # fmt: skip
ATTENTION = (
    "keep", "static@1", "static@0.5", "glu_mlp@1", "glu_mlp@0.5", "linear_attention@1", "pool@1", "linear@1", "none"
)  # fmt: skip
MLP = ("keep", "mlp_slice@0.75", "mlp_slice@0.5", "mlp_slice@0.25", "none")


def make_sites(blocks: int, rng: np.random.Generator) -> list[SiteRow]:
    names = ("entropy", "tokens_90", "gini", "sink", "locality", "input_dependence", "effective_rank")
    sites = []
    for block in range(blocks):
        statistics = {name: float(rng.beta(2, 3)) for name in names}
        sites.append(
            SiteRow(
                name=f"blocks.{block}.attn",
                kind="attention",
                statistics=statistics | {"contribution": float(rng.lognormal(-0.5, 0.5))},
                candidates=ATTENTION,
                latency_ms=float(rng.normal(0.5, 0.02)),
            )
        )
        sites.append(
            SiteRow(
                name=f"blocks.{block}.mlp",
                kind="mlp",
                statistics={"contribution": float(rng.lognormal(-0.5, 0.5))},
                candidates=MLP,
                latency_ms=float(rng.normal(0.3, 0.02)),
            )
        )
    return sites


def make_report(blocks: int = 8, evaluations: int = 90, seed: int = 0, **changes: object) -> Report:
    rng = np.random.default_rng(seed)
    sites = make_sites(blocks, rng)
    cheap = {"keep": 0.0, "none": 1.0}
    base = 0.975 * blocks
    budget = round(0.64 * base, 1)
    rows: list[EvaluationRow] = []
    for at in range(evaluations):
        depth = rng.uniform(0.15, 0.95)
        plan, saved, damage = {}, 0.0, 0.0
        for site in sites:
            choices = [c for c in site.candidates if c != "keep"]
            choice = str(rng.choice(choices)) if rng.random() < depth else "keep"
            plan[site.name] = choice
            saved += 0.0 if choice == "keep" else cheap.get(choice, 0.62) * (site.latency_ms or 0)
            damage += (
                0.0 if choice == "keep" else float(rng.lognormal(-4.2, 0.6)) * (4 if choice == "none" else 1)
            )
        source = ("exact", "sampler", "sampler", "sampler", "refit", "finetuned")[at % 6]
        predicted_ms, predicted = base - saved, damage
        damage = predicted**1.25 * float(rng.lognormal(0.1, 0.15)) * (0.5 if source == "finetuned" else 1.0)
        latency = predicted_ms * float(rng.normal(1.01, 0.012))
        rows.append(
            EvaluationRow(
                plan=plan,
                short_name="A2-S3-G1-N2/A4-W4",
                loss=damage,
                agreement=float(np.clip(1 - 0.25 * damage, 0, 1)),
                accuracy=float(np.clip(0.972 - 0.22 * damage, 0, 1)),
                latency_ms=latency,
                predicted_ms=predicted_ms,
                predicted_loss=predicted,
                params=int(920_000 * (1 - 0.4 * depth)),
                source=source,
                feasible=latency <= budget,
                on_frontier=False,
            )
        )
    front = set(non_dominated([(row.latency_ms, row.loss) for row in rows]))
    rows = [EvaluationRow(**{**vars(row), "on_frontier": at in front}) for at, row in enumerate(rows)]
    feasible = [row for row in rows if row.feasible]
    best = (
        min(feasible, key=lambda row: row.loss)
        if feasible
        else min(rows, key=lambda r: r.latency_ms, default=None)
    )
    fields: dict[str, object] = {
        "title": f"digits ViT within {budget} ms",
        "teacher": Teacher(name="digits_vit", latency_ms=base, accuracy=0.972, params=920_000),
        "budget_ms": budget,
        "evaluations": rows,
        "best": best,
        "exact_line": [(base * x, 0.9 * (1 - x) ** 2.2 + 0.003) for x in np.linspace(0.42, 0.97, 30).tolist()],
        "sites": sites,
        "mixers": MIXERS,
        "tested": None
        if best is None
        else Tested(
            images=360, loss=1.1 * best.loss, agreement=0.981, accuracy=0.969, accuracy_interval=(-0.011, 0.003)
        ),
        "latency_model": {"mape": 0.012, "max_error": 0.041, "spearman": 0.993, "plans": 24},
        "score_model": {"spearman": 0.93, "plans": 24},
        "wall_s": {
            "capture": 6.2, "distill": 48.0, "latency": 21.0, "score": 33.5, "exact": 0.4, "study": 88.0,
            "finetune": 35.0, "total": 233.0,
        },
        "environment": {
            "device": "cpu, 2 threads", "dtype": "float32", "batch_size": 1, "runtime": "eager", "torch": "2.13.0",
            "processor": "AMD EPYC 7763 64-Core Processor", "python": "3.11.7", "seed": 0,
            "plugins": {"mixerzoo": "0.1.0"},
        },
        "command": f"mixerzoo search --budget-ms {budget} --trials 60 --seed 0",
    }  # fmt: skip
    return Report(**(fields | changes))  # type: ignore[arg-type]


def make_prior(sites: list[SiteRow], *, scored: bool = True) -> PriorTable:
    """Return a table over the candidates of some sites; `none` is never scored."""
    rng = np.random.default_rng(0)
    rows = []
    for site in sites:
        for choice in site.candidates[1:]:
            truth = float(rng.lognormal(-5, 2))
            known = scored and choice != "none"
            rows.append(
                DamageRow(
                    site=site.name,
                    kind=site.kind,
                    candidate=choice,
                    mixing="none" if choice == "none" else "static",
                    nmse=float(rng.uniform(0.05, 1)),
                    predicted=truth * float(rng.lognormal()),
                    fitted=truth * float(rng.lognormal(0, 0.3)) if scored else None,
                    score=truth if known else None,
                    before_steps=2 * truth if known and choice == "static@1" else None,
                )
            )
    count = sum(row.score is not None for row in rows)
    mixers = {
        "static": Rank(scores=6, before_scores=0.71, left_out=-0.83),
        "pool": Rank(scores=2, before_scores=np.nan, left_out=np.nan),
    }
    return PriorTable(
        rows=rows,
        overall=Rank(
            scores=count, before_scores=0.86 if scored else np.nan, left_out=0.93 if scored else np.nan
        ),
        mixers=mixers if scored else {},
    )


@pytest.fixture
def prior() -> Callable[..., PriorTable]:
    return make_prior


@pytest.fixture
def report() -> Callable[..., Report]:
    return make_report


@pytest.fixture
def profile() -> Profile:
    rng = np.random.default_rng(0)
    return Profile(
        teacher=Teacher(name="digits_vit", latency_ms=7.8, accuracy=0.972, params=920_000),
        sites=make_sites(8, rng),
        environment={"device": "cpu, 2 threads", "batch_size": 1},
        command="mixerzoo profile",
    )
