"""ringrl ablate, report and demo: many runs, and the page that compares them."""

from pathlib import Path

from rich.console import Console

from ringrl.cli.flags import command_line
from ringrl.errors import UserError


def ablate(
    plan: Path,
    /,
    *,
    folder: Path = Path(),
    dry_run: bool = False,
    workers: int = 1,
    share: str = "0/1",
) -> None:
    """Train and evaluate all cells of a plan: tasks x methods x context lengths x seeds, and baselines.

    The cost and a rough time are printed first. Every finished cell improves the estimate of the time. The same command
    resumes an interrupted ablation, runs failed cells again, and repeats nothing else.

    Args:
        plan: YAML file, or the name of a preset, for example results.
        folder: folder of the plan's datasets and output, for example to run the plan on other datasets of the same
            names. Default: the working directory.
        dry_run: print the cost and stop.
        workers: cells at a time, each in a process with its share of the cores.
        share: I/N runs every N-th cell from the I-th, counted from 0. N commands thus divide a plan.
    """
    from ringrl.study.plan import read_plan
    from ringrl.study.runner import ablate as run_plan

    index, _, number = share.partition("/")
    if not (index.isdecimal() and number.isdecimal() and int(index) < int(number)):
        raise UserError(f"--share: {share!r} is not I/N with I from 0 to N - 1, for example 0/4")
    chosen = read_plan(plan).inside(folder)
    run_plan(chosen, Console(stderr=not dry_run), command_line(), workers, (int(index), int(number)), dry_run)
    if not dry_run:
        print(f"{chosen.output}; next: ringrl report {chosen.output}")


def report(results: tuple[Path, ...] = (), /, *, output: Path = Path("report")) -> None:
    """Make a page of charts and tables from results: return against context length, with intervals.

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


def demo(*, output: Path = Path("demo")) -> None:
    """Collect, train, evaluate and report for a maze with a hidden goal, in about four minutes on two cores.

    Args:
        output: folder of all files of the demo. The same command resumes an interrupted demo.
    """
    from ringrl.report import terminal_table, write_report
    from ringrl.study.demo import run_demo

    runs = run_demo(output, Console(stderr=True), command_line())
    page = write_report([runs], output / "report")
    Console().print(terminal_table([runs]))
    print(page.absolute().as_uri())
