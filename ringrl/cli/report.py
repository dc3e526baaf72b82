"""ringrl report: a page from results."""

from pathlib import Path

from rich.console import Console

from ringrl.errors import UserError


def report(results: tuple[Path, ...] = (), /, *, output: Path = Path("report")) -> None:
    """Make a page from results: return against context length with intervals, charts and tables for a paper.

    Args:
        results: results files (.jsonl or .jsonl.gz), or folders that contain them.
        output: folder of the page, figures/ and tables/.
    """
    if not results:
        raise UserError("no results are given; name files or folders, for example: ringrl report runs")
    from ringrl.report import terminal_table, write_report

    page = write_report(results, output)
    Console().print(terminal_table(results))
    print(page)
