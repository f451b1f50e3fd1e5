"""What a finished search tells people: the rows of its report, the model card, the lines on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixerzoo.plan import Plan
from mixerzoo.significance import change_text
from mixerzoo_search import report
from mixerzoo_search.context import Context
from mixerzoo_search.evaluate import PlanResult
from mixerzoo_search.finetuning.halving import sentence
from mixerzoo_search.summary import Findings, frontier_of


def make_report(context: Context, findings: Findings, summary: Mapping[str, Any]) -> report.Report:
    """Gather what the report shows."""
    teacher, best, results = context.teacher, findings.outcome.best, findings.all_results
    frontier, statistics = frontier_of(results), context.statistics
    used = {candidate.mixer for row in findings.candidates.values() for candidate in row}

    def row(result: PlanResult) -> report.EvaluationRow:
        return report.EvaluationRow(
            plan=result.plan.to_json(),
            short_name=result.plan.short_name(teacher.sites, context.letters),
            loss=result.loss,
            agreement=result.agreement,
            accuracy=result.accuracy,
            latency_ms=result.latency_ms,
            predicted_ms=result.predicted_ms,
            predicted_loss=result.predicted_loss,
            params=result.params,
            source=result.source,
            feasible=result.latency_ms <= context.budget_ms,
            on_frontier=result in frontier,
        )

    return report.Report(
        title=f"{teacher.name} on {Path(context.data.name).name}",
        teacher=report.Teacher(
            name=teacher.name,
            latency_ms=summary["teacher"]["latency_ms"],
            accuracy=summary["teacher"]["accuracy"],
            params=teacher.params,
        ),
        budget_ms=context.budget_ms,
        evaluations=[row(result) for result in results],
        best=None if best is None else row(best.result),
        exact_line=[(solution.ms, solution.loss) for solution in findings.line],
        sites=[
            report.SiteRow(
                name=site.name,
                kind=site.kind,
                statistics=statistics[site.name],
                candidates=[str(candidate) for candidate in findings.candidates[site.name]],
            )
            for site in teacher.sites
        ],
        mixers={name: letter for name, letter in context.letters.items() if name in used},
        tested=_tested(summary),
        latency_model=summary["latency_model"],
        score_model=summary["score_model"],
        prior=findings.prior,
        finetuning=sentence(summary["finetuning"]),
        wall_s=summary["wall_s"],
        environment=summary["environment"],
        command=context.run.record().get("command", ""),
    )


def _tested(summary: Mapping[str, Any]) -> report.Tested | None:
    """Return the winner's figures on test images, which the teacher's stand beside."""
    best = summary["best"]
    if best is None:
        return None
    figures = {name: best[name] for name in ("loss", "agreement", "accuracy")}
    return report.Tested(**summary["test"], **figures)


def model_card(context: Context, summary: Mapping[str, Any]) -> str:
    """Return the README.md of `best/`."""
    teacher = context.teacher
    best, base, env = summary["best"], summary["teacher"], summary["environment"]
    test, interval = summary["test"], summary["test"]["accuracy_interval"]
    short = Plan.from_json(best["plan"]).short_name(teacher.sites, context.letters)
    rows = [f"| `{site}` | `{candidate}` |" for site, candidate in best["plan"].items()]
    figures = [
        ("latency, ms", f"{base['latency_ms']:.3g}", f"{best['latency_ms']:.3g}"),
        ("parameters", f"{base['params']:,}", f"{best['params']:,}"),
        ("accuracy", _percent(base["accuracy"]), _percent(best["accuracy"])),
        ("agreement with the teacher", "", _percent(best["agreement"])),
        ("loss against the teacher", "", f"{best['loss']:.4g}"),
    ]
    return "\n".join(
        [
            f"# {teacher.name}, {short}",
            "",
            f"A student of `{teacher.name}`, found by mixerzoo for a budget of {summary['budget_ms']:.3g} ms "
            f"and distilled on `{Path(context.data.name).name}`.",
            "",
            "| | teacher | student |",
            "|---|---|---|",
            *(f"| {name} | {before} | {after} |" for name, before, after in figures),
            "",
            f"Latency: median at batch size {env['batch_size']}, {env['threads']} threads, {env['dtype']}, "
            f"{env['device']} ({env['device_name']}), runtime {env['runtime']}. Accuracy, agreement and loss on "
            f"{test['images']:,} images that nothing was chosen or trained on"
            + (f" (accuracy: {_in_points(interval)})." if interval is not None else "."),
            "",
            "```python",
            "import mixerzoo",
            "",
            'student = mixerzoo.load("best")  # this folder; images (B, C, H, W) to the teacher\'s kind of output',
            "```",
            "",
            "| site | candidate |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def closing_lines(summary: Mapping[str, Any], path: Path, tracking_uri: str) -> list[str]:
    """Return what the command line prints at the end: the figures, then where everything is."""
    base, best = summary["teacher"], summary["best"]
    if best is None:
        return [
            f"no plan met {summary['budget_ms']:.3g} ms when measured again; run the same command with more --trials",
            f"report   {path / 'report.html'}",
        ]
    share = best["latency_ms"] / base["latency_ms"]
    untouched = all(candidate == "keep" for candidate in best["plan"].values())
    lines = ["the teacher itself meets the budget: nothing was replaced"] if untouched else []
    lines += [
        f"latency    {base['latency_ms']:.2f} ms -> {best['latency_ms']:.2f} ms ({share:.0%} of the teacher; "
        f"budget {summary['budget_ms']:.2f} ms)",
    ]
    if best["accuracy"] is not None:
        lines.append(
            f"accuracy   {base['accuracy']:.2%} -> {best['accuracy']:.2%} on {summary['test']['images']:,} test images "
            f"({_in_points(summary['test']['accuracy_interval'])})"
        )
    lines += [
        f"agreement  {best['agreement']:.2%} with the teacher",
        f"parameters {base['params']:,} -> {best['params']:,}",
        f"searched   {summary['evaluations']} students in {summary['wall_s']['total']:.0f} s; "
        f"{len(summary['pareto'])} on the frontier",
        "",
        f"student    {path / 'best'}   (mixerzoo.load)",
        f"report     {path / 'report.html'}",
        f"compare    mixerzoo ui --tracking-uri {tracking_uri}",
    ]
    return lines


def _in_points(interval: Sequence[float]) -> str:
    """Return the interval of a change of accuracy in words."""
    return f"a change of {change_text(*interval)} points, with 95 % confidence"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
