"""The report: a self-contained page, its figures and its tables, made from evaluation results."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import rich.table
from markupsafe import Markup

from ringrl.data.store.format import RETURN_LEVELS
from ringrl.errors import UserError
from ringrl.evaluation.formatting import decimal, number
from ringrl.evaluation.records import Results, read_records
from ringrl.study.figures import curve_chart, episode_chart
from ringrl.study.report_cells import Grid, gather
from ringrl.study.report_cost import cost_charts
from ringrl.study.report_draw import Chart, chart_files, panel_svg
from ringrl.study.report_method import Fact, facts, provenance
from ringrl.study.report_published import by_task, words
from ringrl.study.report_settings import settings_warning
from ringrl.study.report_sheet import returns_sheet
from ringrl.study.report_spread import contest_chart, contests, profile_chart
from ringrl.study.report_starts import starts_warning
from ringrl.study.report_summary import summary
from ringrl.study.report_svg import PALETTE, for_page
from ringrl.study.report_training import training_charts, training_runs
from ringrl.study.report_videos import Reel, reels
from ringrl.study.tables import Row, data_rows, rows, to_csv, to_rich

PAGE = "index.html"
FIGURES, TABLES = "figures", "tables"  # folders beside the page

Files = Mapping[str, bytes | Path]  # place in the report -> content, or the file to copy


def write_report(results: Sequence[Path], destination: Path) -> Path:
    """Write the page into the folder `destination`, with figures/, tables/ and videos/; returns the page's path.

    Each file is written beside its place and renamed, the page last: a report that fails leaves the old one. Other
    files in the folder are not touched.

    Args:
        results: results files, or folders that are searched for *.jsonl.
        destination: folder of the report, made when it is missing.

    Raises:
        UserError: there are no results, they cannot be read or put together, or the folder cannot be written.
    """
    read, grid = read_grid(results)
    table, across, found = rows(grid), by_task(grid), contests(grid)
    runs = training_runs(read, grid)
    drawn = [
        curve_chart(grid), *cost_charts(grid), episode_chart(grid), profile_chart(grid), contest_chart(grid, found),
        *training_charts(runs, grid),
    ]  # fmt: skip
    charts = [chart for chart in drawn if chart is not None]
    shown = reels(read, grid)
    files: dict[str, bytes | Path] = {video.target: video.source for reel in shown for video in reel.videos}
    tables = {"returns.csv": to_csv(table).encode(), "returns.tex": returns_sheet(table).latex().encode()}
    files |= {f"{TABLES}/{name}": content for name, content in {**tables, **across.files()}.items()}
    for chart in charts:
        files |= {f"{FIGURES}/{name}": content for name, content in chart_files(chart).items()}
    page = render(
        "report.html",
        summary=summary(grid),
        warnings=[said for said in (starts_warning(grid), settings_warning(grid)) if said],
        tasks=grid.tasks,
        date=max(record.created for record in grid.records),
        charts={chart.name: placed for chart, placed in zip(charts, place(charts), strict=True)},
        across=across,
        published=words(grid),
        rows=table,
        failed=any(row.failed for row in table),
        quantiles=RETURN_LEVELS,
        data=data_rows(grid),
        reels=shown,
        missing=_missing(charts, shown),
        facts=facts(read, grid),
    )
    return write_files({**files, PAGE: page.encode()}, destination)


def summary_rows(results: Sequence[Path]) -> list[Row]:
    """The numbers of the report, one row per task, method and context length.

    Raises:
        UserError: as `write_report`.
    """
    return rows(read_grid(results)[1])


def table(results: Sequence[Path]) -> rich.table.Table:
    """The same for the terminal.

    Raises:
        UserError: as `write_report`.
    """
    return to_rich(summary_rows(results))


def read_grid(results: Sequence[Path]) -> tuple[Results, Grid]:
    """The records of results files and folders, and their cells.

    Raises:
        UserError: as `write_report`.
    """
    read = read_records(results)
    if not read.records:
        places = ", ".join(str(path) for path in results) or "nowhere"
        raise UserError(f"no results in {places}; run `ringrl evaluate` first, or give the folder of its results")
    return read, gather(read.records)


def render(template: str, **values: Any) -> str:
    """A page from its template, with the palette and the ways to write numbers."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ringrl.study"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"decimal": decimal, "number": number}
    return environment.get_template(template).render(palette=PALETTE, figures=FIGURES, tables=TABLES, **values)


def place(charts: Sequence[Chart]) -> list[dict[str, Any]]:
    """Charts as the templates want them; what was made from the same as an earlier one points there."""
    seen: list[tuple[Chart, list[Fact]]] = []
    placed = []
    for chart in charts:
        made = provenance(chart.records)
        earlier = next((other for other, facts in seen if facts == made), None)
        panels = [
            (panel, Markup(for_page(panel_svg(panel), f"{chart.name}{index}")))
            for index, panel in enumerate(chart.panels)
        ]
        placed.append({"chart": chart, "panels": panels, "made": made, "as_earlier": earlier})
        seen.append((chart, made))
    return placed


def write_files(files: Files, destination: Path) -> Path:
    """Write the files of a report, the page last; returns the page's path.

    All are whole on disk before the first takes its place; they are renamed in order.

    Raises:
        UserError: the folder cannot be written, or a file cannot be copied.
    """
    try:
        destination.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=destination) as folder:
            for name, content in files.items():
                path = Path(folder) / name
                path.parent.mkdir(exist_ok=True)
                if isinstance(content, bytes):
                    path.write_bytes(content)
                else:
                    shutil.copyfile(content, path)
            for name in files:
                (destination / name).parent.mkdir(exist_ok=True)
                (Path(folder) / name).replace(destination / name)
    except OSError as error:
        raise UserError(f"{destination}: cannot write the report ({error.strerror}); give another folder") from error
    return destination / PAGE


def _missing(charts: Sequence[Chart], shown: Sequence[Reel]) -> list[str]:
    """What the page could show and does not, and why."""
    names = {chart.name for chart in charts}
    reasons = {
        "return_by_tokens": "Returns against what training took: they need two results of a task that tell it, one of "
        "them of a method with a context (`ringrl evaluate` writes it).",
        "performance_profiles": "Performance profiles and probabilities of improvement: they need two training seeds, "
        "and a method with a context.",
        "learning_curves": "Learning curves and throughput: no run's folder with its metrics.jsonl was found.",
    }
    found = [reason for name, reason in reasons.items() if name not in names]
    return found if shown else [*found, "Videos: there are none; `ringrl evaluate --video` makes them."]
