"""The report: a self-contained page, a table and a figure, made from evaluation results."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import jinja2
import rich.table
from markupsafe import Markup

from ringrl.errors import UserError
from ringrl.evaluation.records import Results, read_records
from ringrl.study.figures import Panel, curve_file, curve_panels, episode_panels, legend
from ringrl.study.report_cells import Grid, gather
from ringrl.study.report_method import facts
from ringrl.study.report_summary import summary
from ringrl.study.report_svg import PALETTE, for_page
from ringrl.study.tables import QUANTILES, Row, data_rows, decimal, number, rows, to_csv, to_rich

PAGE = "index.html"


def write_report(results: Sequence[Path], destination: Path) -> Path:
    """Write index.html, results.csv and curve.svg into the folder `destination`; returns the path of the page.

    Each file is written beside its place and renamed, the page last: a report that fails leaves the old one. Other
    files in the folder are not touched.

    Args:
        results: results files, or folders that are searched for *.jsonl.
        destination: folder of the report, made when it is missing.

    Raises:
        UserError: there are no results, they cannot be read or put together, or the folder cannot be written.
    """
    read, grid = _read(results)
    table = rows(grid)
    files = {"results.csv": to_csv(table), "curve.svg": curve_file(grid), PAGE: _page(read, grid, table)}
    try:
        _write(files, destination)
    except OSError as error:
        raise UserError(f"{destination}: cannot write the report ({error.strerror}); give another folder") from error
    return destination / PAGE


def summary_rows(results: Sequence[Path]) -> list[Row]:
    """The numbers of the report, one row per task, method and context length.

    Raises:
        UserError: as `write_report`.
    """
    return rows(_read(results)[1])


def table(results: Sequence[Path]) -> rich.table.Table:
    """The same for the terminal.

    Raises:
        UserError: as `write_report`.
    """
    return to_rich(summary_rows(results))


def _read(results: Sequence[Path]) -> tuple[Results, Grid]:
    read = read_records(results)
    if not read.records:
        places = ", ".join(str(path) for path in results) or "nowhere"
        raise UserError(f"no results in {places}; run `ringrl evaluate` first, or give the folder of its results")
    return read, gather(read.records)


def _page(read: Results, grid: Grid, table: Sequence[Row]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ringrl.study"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"decimal": decimal, "number": number}
    return environment.get_template("report.html").render(
        summary=summary(grid),
        tasks=grid.tasks,
        date=max(record.created for record in grid.records),
        palette=PALETTE,
        legend=legend(grid),
        curves=_for_page(curve_panels(grid), "curve"),
        within=_for_page(episode_panels(grid), "within"),
        rows=table,
        failed=any(row.failed for row in table),
        quantiles=QUANTILES,
        data=data_rows(grid),
        facts=facts(read, grid),
        agentic=any(variant.method == "at" for variant in grid.variants),
        one_seed=any(row.seeds == 1 for row in table if row.trained_on),
    )


def _for_page(panels: Sequence[Panel], name: str) -> list[tuple[Panel, Markup]]:
    return [(panel, Markup(for_page(panel.svg, f"{name}{index}"))) for index, panel in enumerate(panels)]


def _write(files: dict[str, str], destination: Path) -> None:
    """All files are whole on disk before the first takes its place; they are renamed in order."""
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".report-", dir=destination) as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        for name in files:
            (Path(folder) / name).replace(destination / name)
