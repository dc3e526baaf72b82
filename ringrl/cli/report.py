"""ringrl report: a page from results, or from the differences between two sets of results."""

from pathlib import Path

from rich.console import Console

from ringrl.errors import UserError


def report(
    results: tuple[Path, ...] = (), /, *, output: Path = Path("report"), compare: tuple[Path, Path] | None = None
) -> None:
    """Make a page from results: return against context length with intervals, charts and tables for a paper.

    Args:
        results: results files (.jsonl or .jsonl.gz), or folders that contain them.
        output: folder of the page, figures/, tables/ and videos/.
        compare: two results files or folders A and B, instead of `results`. The page comparison.html shows the
            difference of returns B - A and the settings that differ.
    """
    if compare is None and not results:
        raise UserError("no results are given; name files or folders, for example: ringrl report runs")
    if compare is not None and results:
        raise UserError(f"{results[0]}: cannot be combined with --compare A B; leave one of them out")
    from ringrl.report import terminal_table, write_comparison, write_report

    if compare is not None:
        page, shown = write_comparison([compare[0]], [compare[1]], output)
    else:
        page, shown = write_report(results, output), terminal_table(results)
    Console().print(shown)
    print(page)
