"""ringrl report: a page from results, or of the differences between two sets of them."""

from pathlib import Path

from rich.console import Console

from ringrl.errors import UserError


def report(
    results: tuple[Path, ...] = (),
    /,
    *,
    output: Path = Path("report"),
    compare: tuple[Path, Path] | None = None,
) -> None:
    """Make a page from results: return against context length with intervals, figures and tables for a paper.

    Args:
        results: results files (.jsonl), or folders that hold them.
        output: folder of the page, figures/, tables/ and videos/.
        compare: two results files or folders, instead of `results`: what B returns more than A, and what differs.
    """
    if compare is None and not results:
        raise UserError("no results are named; say where they are, for example: ringrl report runs")
    if compare is not None and results:
        raise UserError(f"{results[0]}: is given besides --compare, which takes its two alone; leave one of them out")
    if compare is not None:
        from ringrl.study.report_compare import write_comparison

        page, shown = write_comparison([compare[0]], [compare[1]], output)
    else:
        from ringrl.study.report import table, write_report

        page, shown = write_report(results, output), table(results)
    Console().print(shown)
    print(page)
