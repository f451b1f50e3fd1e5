from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mixerzoo.plan import Candidate
from mixerzoo_search.report import (
    PriorTable,
    Profile,
    Rank,
    Report,
    SiteRow,
    numbers,
    write_profile,
    write_report,
)
from mixerzoo_search.report.frontier_view import (
    listed_frontier,
    log_losses,
    loss_range,
    ordered_sites,
    site_labels,
)
from mixerzoo_search.report.palette import colours_of, heat, ink_on, mixer_colours, source_styles

Make = Callable[..., Report]
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Reader(HTMLParser):
    """Checks that tags are balanced and gathers what a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def read(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


def test_a_report_says_first_what_matters(report: Make, tmp_path: Path) -> None:
    made = report()
    write_report(tmp_path, made)
    page = read(tmp_path / "report.html")
    best, tested = made.best, made.tested
    assert best is not None
    assert tested is not None
    for words in (
        "budget met",
        numbers.ms(best.latency_ms),
        numbers.percent(tested.accuracy),
        "points (95 %: −1.1 to +0.3), 360 images",
        numbers.percent(tested.agreement),
        "MAPE 1.2 %, Spearman 0.99",
        "Loss: Spearman 0.93",
        "input dependence",
        "mixerzoo search --budget-ms 5.0",
        "3 min 53 s in all",
        "2.13.0",
        "★ best",
    ):
        assert words in page.words
    assert page.words.index("budget met") < page.words.index("Latency and faithfulness")
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width == 1920
        assert len(picture.getcolors(1 << 24) or []) > 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.png"]


def test_fonts_that_are_not_installed_are_not_asked_for(
    report: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_report(tmp_path, report(blocks=2, evaluations=6))
    assert not [record for record in caplog.records if record.name.startswith("matplotlib")]


def test_a_report_opens_without_a_network(report: Make, tmp_path: Path) -> None:
    write_report(tmp_path, report(blocks=2, evaluations=6))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Reader(text)
    assert page.sources == []
    assert "link" not in page.tags
    assert "cdn.plot.ly/plotly" not in re.sub(r"<script>/\*.*?</script>", "", text, flags=re.DOTALL)
    assert text.count("plotly.js v") == 1


def test_names_cannot_break_the_page(report: Make, tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    made = report(blocks=1, evaluations=4, title=evil, command=evil, environment={evil: evil})
    rows = [dataclasses.replace(row, short_name=evil) for row in made.evaluations]
    write_report(tmp_path, dataclasses.replace(made, evaluations=rows, best=rows[0]))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert evil not in text
    assert evil in Reader(text).words


@pytest.mark.parametrize("accuracy", [True, False])
def test_what_is_not_known_is_left_out(report: Make, tmp_path: Path, accuracy: bool) -> None:
    made = report(blocks=2, evaluations=5)
    if not accuracy:
        rows = [
            dataclasses.replace(row, accuracy=None, agreement=None, predicted_ms=None, predicted_loss=None)
            for row in made.evaluations
        ]
        teacher = dataclasses.replace(made.teacher, accuracy=None)
        assert made.tested is not None
        tested = dataclasses.replace(made.tested, accuracy=None, accuracy_interval=None)
        made = dataclasses.replace(made, evaluations=rows, best=rows[0], teacher=teacher, tested=tested)
    bare = dataclasses.replace(
        made, exact_line=(), latency_model={}, score_model={"spearman": math.nan}, wall_s={}, environment={}
    )
    write_report(tmp_path, bare)
    words = read(tmp_path / "report.html").words
    assert "nan" not in words
    assert "None" not in words


def test_a_search_that_found_nothing_still_reports(report: Make, tmp_path: Path) -> None:
    write_report(tmp_path, report(blocks=2, evaluations=0))
    assert "budget not met" in read(tmp_path / "report.html").words


def test_a_missed_budget_is_said(report: Make, tmp_path: Path) -> None:
    write_report(tmp_path, report(blocks=2, evaluations=5, budget_ms=0.01))
    made = report(blocks=2, evaluations=5)
    assert made.best is not None
    missed = dataclasses.replace(made, best=dataclasses.replace(made.best, feasible=False))
    write_report(tmp_path, missed)
    assert "budget not met" in read(tmp_path / "report.html").words


def test_extreme_sizes(report: Make, tmp_path: Path) -> None:
    write_report(tmp_path / "many", report(blocks=24, evaluations=60))
    write_report(tmp_path / "one", report(blocks=1, evaluations=1))
    assert read(tmp_path / "many" / "report.html").words.count("attention") >= 1
    unnamed = report(blocks=1, evaluations=3, sites=())
    write_report(tmp_path / "no_sites", unnamed)


def test_a_profile(profile: Profile, tmp_path: Path) -> None:
    write_profile(tmp_path / "p.html", tmp_path / "p.png", profile)
    page = read(tmp_path / "p.html")
    assert "blocks.7.attn" in page.words
    assert "in 8 attention sites" in page.words
    assert page.sources == []
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width == 1920
    odd = [SiteRow(name="x", kind="other", statistics={"entropy": math.nan}), SiteRow(name="y", kind="mlp")]
    write_profile(tmp_path / "q.html", tmp_path / "q.png", dataclasses.replace(profile, sites=odd))
    assert "nan" not in read(tmp_path / "q.html").words


def test_a_report_says_how_well_the_prior_knew(
    report: Make, prior: Callable[..., PriorTable], tmp_path: Path
) -> None:
    made = report(blocks=2, evaluations=4)
    write_report(tmp_path, dataclasses.replace(made, prior=prior(list(made.sites))))
    words = read(tmp_path / "report.html").words
    for text in (
        "How well the prior knew",
        "0.86 before any score, 0.93 with",
        "static 6 0.71 −0.83",
        "pool 2 – –",
    ):
        assert text in words
    write_report(tmp_path, made)
    assert "How well the prior knew" not in read(tmp_path / "report.html").words


def test_a_profile_shows_the_prior_beside_the_truth(
    profile: Profile, prior: Callable[..., PriorTable], tmp_path: Path
) -> None:
    def drawn(**changes: object) -> tuple[str, int]:
        write_profile(tmp_path / "p.html", tmp_path / "p.png", dataclasses.replace(profile, **changes))  # type: ignore[arg-type]
        page = read(tmp_path / "p.html")
        assert page.sources == []
        assert "nan" not in page.words
        with Image.open(tmp_path / "p.png") as picture:
            assert picture.width == 1920
            return page.words, picture.height

    sites = list(profile.sites)
    _, plain = drawn()
    words, tall = drawn(prior=prior(sites))
    assert tall > plain
    for text in (
        "Candidates",
        "before steps",
        "mlp_slice@0.25",
        "Predicted and measured damage",
        "static 6 0.71",
    ):
        assert text in words
    words, height = drawn(prior=prior(sites, scored=False))  # a library, or a search that has scored nothing
    assert height == plain
    assert "Candidates" in words
    assert "Predicted and measured damage" not in words
    words, _ = drawn(prior=prior([]))
    assert "Candidates" not in words
    words, _ = drawn(teacher=dataclasses.replace(profile.teacher, params=None))
    assert "16 sites" in words
    assert "parameters" not in words


def test_one_score_can_be_drawn(profile: Profile, prior: Callable[..., PriorTable], tmp_path: Path) -> None:
    table = prior(list(profile.sites))
    only = [row for row in table.rows if row.score is not None][:1]
    few = dataclasses.replace(
        table, rows=only, overall=Rank(scores=1, before_scores=math.nan, left_out=math.nan)
    )
    write_profile(tmp_path / "p.html", tmp_path / "p.png", dataclasses.replace(profile, prior=few))
    nothing = [dataclasses.replace(row, score=0.0) for row in only]  # which a logarithmic axis cannot show
    few = dataclasses.replace(few, rows=nothing)
    write_profile(tmp_path / "p.html", tmp_path / "p.png", dataclasses.replace(profile, prior=few))


def test_the_listed_frontier_always_has_the_best(report: Make) -> None:
    made = report(blocks=6, evaluations=200)
    assert made.best is not None
    for most in (3, 5, 8):
        rows = listed_frontier(made, most)
        assert len(rows) <= most
        assert made.best in rows
        assert [row.latency_ms for row in rows] == sorted(row.latency_ms for row in rows)


def test_a_winner_that_was_timed_again_is_listed_once(report: Make) -> None:
    made = report(blocks=6, evaluations=40)
    front = made.frontier()
    best = dataclasses.replace(front[len(front) // 2], latency_ms=1.001 * front[len(front) // 2].latency_ms)
    rows = listed_frontier(dataclasses.replace(made, best=best), 100)
    assert len(rows) == len(front)
    assert sum((row.plan, row.source) == (best.plan, best.source) for row in rows) == 1
    assert best in rows


def test_the_header_has_the_winner_on_test_images_and_the_list_as_it_was_compared(
    report: Make, tmp_path: Path
) -> None:
    made = report(blocks=4, evaluations=20)
    assert made.best is not None
    assert made.tested is not None
    tested = dataclasses.replace(made.tested, loss=0.1234, agreement=0.8765, accuracy=0.7654)
    write_report(tmp_path, dataclasses.replace(made, tested=tested))
    words = read(tmp_path / "report.html").words
    for text in ("0.123", "87.6", "76.5"):
        assert text in words
    assert made.best.accuracy is not None
    assert f"{100 * made.best.accuracy:.1f}" in words


def test_losses_on_axes(report: Make) -> None:
    made = report()
    rows = [dataclasses.replace(made.evaluations[0], loss=loss) for loss in (0.0, 1e-9, 0.5, 1.0)]
    wide = dataclasses.replace(made, evaluations=rows, best=rows[2])
    assert log_losses(wide)
    bottom, top = loss_range(wide, log=True)
    assert 1e-5 < bottom < 1e-4
    assert top > 1.0
    narrow = dataclasses.replace(made, evaluations=rows[2:], best=rows[2])
    assert not log_losses(narrow)
    assert loss_range(narrow, log=False)[0] < 0
    negative = [dataclasses.replace(made.evaluations[0], loss=-0.1)]
    assert loss_range(dataclasses.replace(made, evaluations=negative, best=None), log=False)[0] < -0.1


def test_site_columns() -> None:
    sites = [SiteRow(name=f"blocks.{at}.{part}", kind=kind) for at in (3, 4) for part, kind in
             (("mlp", "mlp"), ("attn", "attention"))]  # fmt: skip
    assert [site.kind for site in ordered_sites(sites)] == ["attention", "attention", "mlp", "mlp"]
    assert site_labels(ordered_sites(sites)) == ["3", "4", "3", "4"]
    staged = [SiteRow(name=f"stages.0.blocks.{at}.attn", kind="attention") for at in range(3)]
    assert site_labels(staged) == ["0", "1", "2"]


def test_the_mixers_on_the_frontier_have_colours_of_their_own(report: Make) -> None:
    plain = report()
    many = {f"m{at:02}": "M" for at in range(16)} | dict(plain.mixers)
    colours = colours_of(report(mixers=many))
    used = {Candidate.parse(choice).mixer for row in plain.frontier() for choice in row.plan.values()}
    assert len({colours[mixer] for mixer in used}) == len(used) > 3
    assert set(many) <= set(colours)


def test_colours() -> None:
    colours = mixer_colours(["keep", "static", "none", "glu_mlp", "static"])
    assert len(set(colours.values())) == len(colours) == 4
    assert len(set(mixer_colours([f"m{at}" for at in range(16)]).values())) == 18
    assert list(source_styles(["other", "sampler", "exact"])) == ["exact", "sampler", "other"]
    assert ink_on("#ffffff") != ink_on("#000000")
    assert heat(-1) == heat(0) != heat(1) == heat(2)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (numbers.ms(4.871), "4.87 ms"),
        (numbers.ms(93.61), "93.6 ms"),
        (numbers.ms(123.4), "123 ms"),
        (numbers.ms(0.0512), "0.051 ms"),
        (numbers.ms(None), "–"),
        (numbers.percent(0.9714), "97.1 %"),
        (numbers.percent(None), "–"),
        (numbers.short(0.012345), "0.0123"),
        (numbers.short(12345.0), "12,345"),
        (numbers.count(22_056_576), "22.1 M"),
        (numbers.count(919_818), "920 k"),
        (numbers.count(12), "12"),
        (numbers.seconds(0.4), "0.40 s"),
        (numbers.seconds(42.4), "42 s"),
        (numbers.seconds(185), "3 min 05 s"),
        (numbers.seconds(7800), "2 h 10 min"),
    ],
)
def test_numbers_read_well(shown: str, expected: str) -> None:
    assert shown == expected


def test_the_package_is_light() -> None:
    code = "import sys, mixerzoo_search, mixerzoo_search.report, mixerzoo_search.additive, mixerzoo_search.exact\n"
    code += "heavy = {'plotly', 'matplotlib', 'optuna', 'mlflow', 'scipy', 'torch'} & set(sys.modules)\n"
    code += "sys.exit(', '.join(heavy) or 0)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
