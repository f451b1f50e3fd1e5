"""The report of a search and the profile of a teacher, each as a page that opens offline and as a picture."""

from __future__ import annotations

from pathlib import Path

from mixerzoo_search.report.content import (
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

__all__ = [
    "DamageRow",
    "EvaluationRow",
    "PriorTable",
    "Profile",
    "Rank",
    "Report",
    "SiteRow",
    "Teacher",
    "Tested",
    "write_profile",
    "write_report",
]


def write_report(run_dir: Path, report: Report) -> None:
    """Write `report.html` (one file, opens offline) and `report.png` into a run directory."""
    from mixerzoo.files import write_bytes, write_text
    from mixerzoo_search.report.page import report_page
    from mixerzoo_search.report.pictures import report_picture

    write_text(run_dir / "report.html", report_page(report))
    write_bytes(run_dir / "report.png", report_picture(report))


def write_profile(path_html: Path, path_png: Path, profile: Profile) -> None:
    """Write the attention statistics and the latency of every site as a page and as a picture."""
    from mixerzoo.files import write_bytes, write_text
    from mixerzoo_search.report.page import profile_page
    from mixerzoo_search.report.pictures import profile_picture

    write_text(path_html, profile_page(profile))
    write_bytes(path_png, profile_picture(profile))
