"""The pages: one HTML file each, that opens without a network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from mixerzoo.plan import KEEP, KEEP_LETTER, Candidate
from mixerzoo.significance import change_text
from mixerzoo_search.report import numbers
from mixerzoo_search.report.content import STATISTICS, PriorTable, Profile, Report, SiteRow, Teacher, Tested
from mixerzoo_search.report.damage import damage_chart, damage_grid, rank_grid, rank_text, scored
from mixerzoo_search.report.frontier_view import (
    LISTED_PLANS,
    listed_frontier,
    log_losses,
    ordered_sites,
    site_labels,
)
from mixerzoo_search.report.palette import KIND_COLOURS, colours_of, heat, ink_on
from mixerzoo_search.report.style import CSS


def report_page(report: Report) -> str:
    """Return the report of a search as one HTML document."""
    from mixerzoo_search.report.charts import agreement_chart, frontier_chart, to_div

    latency = [(r.predicted_ms, r.latency_ms, r) for r in report.evaluations if r.predicted_ms is not None]
    loss = [(r.predicted_loss, r.loss, r) for r in report.evaluations if r.predicted_loss is not None]
    fit, score = report.latency_model, report.score_model
    latency_title = f"Latency: MAPE {numbers.percent(fit.get('mape'))}, Spearman {_rank(fit.get('spearman'))}"
    sections = [
        _report_header(report),
        _card(
            "Latency and faithfulness",
            "Every student that was measured; lower and further left is better. Hollow: over the budget. "
            "Dotted: what the additive model believed to be possible. Point at one to see its plan. "
            "Here and below, students are compared on study images; the figures above are of test images.",
            to_div(frontier_chart(report), "frontier"),
        ),
        _choices(report),
        '<div class="pair">'
        + _card(
            latency_title,
            f"Predicted by summing sites, then measured. Largest error {numbers.percent(fit.get('max_error'))} "
            f"on {numbers.short(fit.get('plans', 0))} plans.",
            to_div(agreement_chart(latency, quantity="latency", unit=" (ms)"), "latency_fit"),
        )
        + _card(
            f"Loss: Spearman {_rank(score.get('spearman'))}",
            "Predicted by summing scores (predicted ones, where none was measured), then measured on "
            f"{numbers.short(score.get('plans', 0))} plans. Only the order matters here.",
            to_div(agreement_chart(loss, quantity="loss", unit="", log=log_losses(report)), "loss_fit"),
        )
        + "</div>",
        _prior(report.prior),
        '<div class="pair">'
        + _cost(report.wall_s, report.finetuning)
        + _about(report.environment, report.command)
        + "</div>",
    ]
    return _document(report.title, sections, plotly=True)


def profile_page(profile: Profile) -> str:
    """Return the profile of a teacher as one HTML document."""
    total = profile.teacher.latency_ms
    shares = []
    for kind in dict.fromkeys(site.kind for site in profile.sites):
        spent = sum(site.latency_ms or 0.0 for site in profile.sites if site.kind == kind)
        sites = sum(site.kind == kind for site in profile.sites)
        share = numbers.percent(spent / total if total else None)
        shares.append(_figure(f"in {sites} {escape(kind)} sites", numbers.ms(spent), f"{share} of the whole"))
    header = (
        f"<header><h1>{escape(profile.teacher.name)}</h1>"
        f"<p>{len(profile.sites)} sites{_params(profile.teacher.params)}</p></header>"
        '<dl class="figures">' + _figure("latency", numbers.ms(total), "median, one batch") + "".join(shares)
    )
    if profile.teacher.accuracy is not None:
        header += _figure("accuracy", numbers.percent(profile.teacher.accuracy), "")
    header += "</dl>"
    table = _card(
        "Sites",
        "What the attention of each site does, and what the site costs. Colours compare the sites within a column.",
        _profile_table(profile),
    )
    sections = [header, table, *_damages(profile.prior), _about(profile.environment, profile.command)]
    plotly = profile.prior is not None and bool(scored(profile.prior))
    return _document(f"{profile.teacher.name}: profile", sections, plotly=plotly)


def _prior(prior: PriorTable | None) -> str:
    """Return how well the prior ranked the candidates, as a card."""
    if prior is None or not prior.rows:
        return ""
    text = f"{rank_text(prior.overall)} Mixer by mixer, over the sites and widths at which it was scored:"
    return _card("How well the prior knew", text, rank_grid(prior))


def _damages(prior: PriorTable | None) -> list[str]:
    """Return everything that the prior says, and what was measured, as cards."""
    if prior is None or not prior.rows:
        return []
    text = (
        "Damage is the loss of the teacher with that one site replaced. Predicted: before any score, contribution² · "
        "NMSE, in units of its own. Fitted: with the scores of the others and the statistics above."
    )
    cards = [_card("Candidates", text, damage_grid(prior.rows))]
    if scored(prior):
        from mixerzoo_search.report.charts import to_div

        chart = _card(
            "Predicted and measured damage",
            f"{rank_text(prior.overall)} Point at one to see what it is.",
            to_div(damage_chart(prior), "damage"),
        )
        cards = ['<div class="pair">' + chart + _prior(prior) + "</div>", *cards]
    return cards


def _params(count: int | None) -> str:
    return "" if count is None else f", {numbers.count(count)} parameters"


def _document(title: str, sections: Iterable[str], *, plotly: bool) -> str:
    script = ""
    if plotly:
        from plotly.offline import get_plotlyjs

        script = f"<script>{get_plotlyjs()}</script>"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style>{script}</head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _card(title: str, text: str, body: str) -> str:
    return f'<section class="card"><h2>{escape(title)}</h2><p>{escape(text)}</p>{body}</section>'


def _figure(name: str, value: str, note: str) -> str:
    return f'<div class="figure"><dt>{name}</dt><dd>{value}</dd><dd class="note">{note}</dd></div>'


def _rank(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.2f}"


def _report_header(report: Report) -> str:
    teacher, best = report.teacher, report.best
    verdict, style = ("budget met", "met") if report.met else ("budget not met", "missed")
    head = (
        f'<header><h1>{escape(report.title)}</h1><span class="verdict {style}">{verdict}</span>'
        f"<p>{escape(teacher.name)}, budget {numbers.ms(report.budget_ms)}, "
        f"{len(report.evaluations)} students measured"
        + (f", best plan {escape(best.short_name)}" if best is not None else "")
        + "</p></header>"
    )
    if best is None:
        return head
    figures = [
        _figure(
            "latency",
            _change(numbers.ms(teacher.latency_ms).removesuffix(" ms"), numbers.ms(best.latency_ms)),
            f"{teacher.latency_ms / best.latency_ms:.2f}x as fast, budget {numbers.ms(report.budget_ms)}",
        )
    ]
    figures += _on_test_images(teacher, report.tested)
    figures.append(
        _figure(
            "parameters",
            _change(numbers.count(teacher.params), numbers.count(best.params)),
            f"{sum(choice != KEEP for choice in best.plan.values())} of {len(best.plan)} sites replaced",
        )
    )
    return head + f'<dl class="figures">{"".join(figures)}</dl>'


def _on_test_images(teacher: Teacher, tested: Tested | None) -> list[str]:
    """Return the winner's accuracy, where there are labels, and how near it is to the teacher."""
    if tested is None:
        return []
    figures = []
    if teacher.accuracy is not None and tested.accuracy is not None:
        change = f"{100 * (tested.accuracy - teacher.accuracy):+.1f} points"
        if tested.accuracy_interval is not None:
            change += f" (95 %: {change_text(*tested.accuracy_interval)}), {tested.images:,} images"
        figures.append(
            _figure(
                "accuracy",
                _change(
                    numbers.percent(teacher.accuracy).removesuffix(" %"), numbers.percent(tested.accuracy)
                ),
                change.replace("-", "−"),
            )
        )
    agreement, loss = numbers.percent(tested.agreement), f"loss {numbers.short(tested.loss)}"
    return [*figures, _figure("agreement with the teacher", agreement, loss)]


def _change(before: str, after: str) -> str:
    return f"<s>{before} →</s> {after}"


def _choices(report: Report) -> str:
    """Return the plans of the frontier and, in the same columns, the statistics of the sites."""
    sites = ordered_sites(report.sites)
    if not sites:
        return ""
    rows = listed_frontier(report)
    candidates = [[Candidate.parse(row.plan.get(site.name, KEEP)) for site in sites] for row in rows]
    used = {candidate.mixer for row in candidates for candidate in row}
    colours = colours_of(report)
    letters = dict(report.mixers) | {KEEP: KEEP_LETTER}
    accuracy = any(row.accuracy is not None for row in rows)
    lines = [_grid_head(sites, ["latency", "loss", "accuracy" if accuracy else "agreement"])]
    columns = 4 + len(sites) + len({site.kind for site in sites}) - 1
    over = False
    for row, choices in zip(rows, candidates, strict=True):
        if row.latency_ms > report.budget_ms and not over and row is not rows[0]:
            over = True
            lines.append(
                f'<tr class="over"><td colspan="{columns}"><div><span>over the budget of '
                f"{numbers.ms(report.budget_ms)}</span></div></td></tr>"
            )
        best = row is report.best or row == report.best
        figures = [numbers.ms(row.latency_ms), numbers.short(row.loss)]
        figures.append(numbers.percent(row.accuracy if accuracy else row.agreement))
        cells = [
            (site, _choice_cell(site, choice, letters, colours))
            for site, choice in zip(sites, choices, strict=True)
        ]
        lines.append(
            f'<tr class="{"best" if best else ""}" title="{escape(row.short_name)}">'
            f'<th class="row">{"★ best" if best else escape(row.source)}</th>'
            + "".join(f'<td class="n">{figure}</td>' for figure in figures)
            + _spaced(cells)
            + "</tr>"
        )
    lines.append('<tr class="break"><td></td></tr>')
    for key, (label, meaning) in STATISTICS.items():
        values = {site.name: site.statistics[key] for site in sites if _usable(site, key)}
        if not values:
            continue
        cells = [(site, _heat_cell(site, label, values)) for site in sites]
        lines.append(
            f'<tr title="{escape(meaning)}"><th class="row" colspan="4">{escape(label)}'
            f"<small>{escape(meaning)}</small></th>{_spaced(cells)}</tr>"
        )
    legend = "".join(
        f'<li><b style="background:{colours[mixer]};color:{ink_on(colours[mixer])}">'
        f"{escape(letters.get(mixer, mixer[0].upper()))}</b>{escape(mixer)}"
        f"{' (the teacher’s own)' if mixer == KEEP else ''}</li>"
        for mixer in colours
        if mixer in used
    )
    density = "dense" if len(sites) > 32 else "few" if len(sites) <= 8 else ""
    more = len(report.frontier())
    shown = "the frontier" if more <= LISTED_PLANS else f"{LISTED_PLANS} of the {more} plans on the frontier"
    return _card(
        "What stands where",
        f"The choices of {shown}, fastest first: letter of the mixer, width below. Underneath, what the "
        "teacher does at the same sites.",
        f'<div class="scroll"><table class="grid {density}">{"".join(lines)}</table></div>'
        f'<ul class="legend">{legend}</ul>',
    )


def _grid_head(sites: Sequence[SiteRow], figures: Sequence[str]) -> str:
    kinds = dict.fromkeys(site.kind for site in sites)
    groups = '<th class="gap"></th>'.join(
        f'<th class="kind" colspan="{sum(site.kind == kind for site in sites)}">{escape(kind)}</th>'
        for kind in kinds
    )
    names = [
        (site, f'<th title="{escape(site.name)}">{escape(label)}</th>')
        for site, label in zip(sites, site_labels(sites), strict=True)
    ]
    heads = "".join(f'<th style="text-align:right">{escape(name)}</th>' for name in figures)
    return (
        f'<tr><th colspan="{1 + len(figures)}"></th>{groups}</tr><tr><th></th>{heads}'
        f"{_spaced(names, 'th')}</tr>"
    )


def _spaced(cells: Sequence[tuple[SiteRow, str]], tag: str = "td") -> str:
    """Return the cells with a gap between the kinds of site."""
    out: list[str] = []
    kind: str | None = None
    for site, cell in cells:
        if kind is not None and site.kind != kind:
            out.append(f'<{tag} class="gap"></{tag}>')
        kind = site.kind
        out.append(cell)
    return "".join(out)


def _choice_cell(
    site: SiteRow, choice: Candidate, letters: Mapping[str, str], colours: Mapping[str, str]
) -> str:
    colour = colours[choice.mixer]
    title = f"{escape(site.name)}: {escape(str(choice))}"
    if choice.is_keep:
        return f'<td title="{title}" style="background:{colour};color:#8a939e">{KEEP_LETTER}</td>'
    letter = escape(letters.get(choice.mixer, choice.mixer[0].upper()))
    width = "" if choice.mixer == "none" else f"<i>{_bare(f'{choice.width:.3g}')}</i>"
    return (
        f'<td title="{title}" style="background:{colour};color:{ink_on(colour)}"><b>{letter}</b>{width}</td>'
    )


def _bare(number: str) -> str:
    """Return a number without its leading zero: cells are narrow."""
    return number[1:] if number.startswith("0.") else number


def _usable(site: SiteRow, key: str) -> bool:
    return math.isfinite(site.statistics.get(key, math.nan))


def _heat_cell(site: SiteRow, label: str, values: Mapping[str, float]) -> str:
    if site.name not in values:
        return "<td></td>"
    value, low, high = values[site.name], min(values.values()), max(values.values())
    colour = heat((value - low) / (high - low) if high > low else 0.3)
    shown = f"{value:.2f}" if abs(value) < 9.995 else f"{value:.0f}"
    return (
        f'<td class="heat" title="{escape(site.name)}: {escape(label)} {value:.4g}" '
        f'style="background:{colour};color:{ink_on(colour)}">{_bare(shown)}</td>'
    )


def _profile_table(profile: Profile) -> str:
    keys = [key for key in STATISTICS if any(_usable(site, key) for site in profile.sites)]
    columns = {
        key: {site.name: site.statistics[key] for site in profile.sites if _usable(site, key)} for key in keys
    }
    slowest = max((site.latency_ms or 0.0 for site in profile.sites), default=0.0) or 1.0
    heads = "".join(
        f'<th title="{escape(STATISTICS[key][1])}">{escape(STATISTICS[key][0])}</th>' for key in keys
    )
    lines = [f"<tr><th></th>{heads}<th>latency</th></tr>"]
    for site in profile.sites:
        cells = "".join(_heat_cell(site, STATISTICS[key][0], columns[key]) for key in keys)
        width = 70 * (site.latency_ms or 0.0) / slowest
        colour = KIND_COLOURS.get(site.kind, "#8a939e")
        bar = f'<i style="width:{width:.1f}%;background:{colour}"></i>{numbers.ms(site.latency_ms)}'
        lines.append(
            f'<tr><th class="row">{escape(site.name)}</th>{cells}<td class="bar"><div>{bar}</div></td></tr>'
        )
    return f'<div class="scroll"><table class="grid profile">{"".join(lines)}</table></div>'


def _cost(wall_s: Mapping[str, float], finetuning: str) -> str:
    phases = {name: value for name, value in wall_s.items() if name != "total" and math.isfinite(value)}
    longest = max(phases.values(), default=0.0) or 1.0
    bars = "".join(
        f'<span>{escape(name)}</span><div><i style="width:{100 * value / longest:.1f}%"></i></div>'
        f"<span>{numbers.seconds(value)}</span>"
        for name, value in phases.items()
    )
    total = wall_s.get("total", sum(phases.values()))
    said = f"{numbers.seconds(total)} in all." + (f" {finetuning}." if finetuning else "")
    return _card("What it took", said, f'<div class="bars">{bars}</div>')


def _about(environment: Mapping[str, object], command: str) -> str:
    rows = "".join(
        f"<dt>{escape(str(key).replace('_', ' '))}</dt><dd>{escape(_plain(value))}</dd>"
        for key, value in environment.items()
    )
    shown = f"<pre>{escape(command)}</pre>" if command else ""
    return _card(
        "Where it was measured",
        "Latencies hold here, and here only.",
        f'<dl class="about">{rows}</dl>{shown}',
    )


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return "–" if value is None else str(value)
