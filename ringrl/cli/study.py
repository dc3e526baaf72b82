"""ringrl ablate and demo: many runs, and the page that compares them."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from ringrl.cli.words import check_launcher, command_line
from ringrl.config import SlurmConfig

PLAIN_JOB = SlurmConfig()


def ablate(
    plan: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PLAN")],
    dry_run: bool = False,
    workers: int = 1,
    retry: bool = False,
    untimed: bool = False,
    launcher: Literal["none", "slurm"] = "none",
    slurm: SlurmConfig = PLAIN_JOB,
) -> None:
    """Train and evaluate all cells of a plan: tasks x context lengths x seeds, and baselines.

    First it says what that costs. The same command goes on where it was stopped and repeats nothing.

    Args:
        plan: YAML file, for example configs/study_example.yaml.
        dry_run: say what it costs, and stop.
        workers: cells at a time, each in a process with its share of the cores (with --launcher: jobs at a time).
        retry: run cells again that failed; an interrupted one goes on in any case.
        untimed: do not time a few steps of every kind of cell first; how long it will take is then not known.
        launcher: slurm: a job for every cell, instead of running it here.
        slurm: what each job asks for; a cell is one process.
    """
    from ringrl.study.ablation import Run, estimate
    from ringrl.study.ablation import ablate as run_plan
    from ringrl.study.plan import read_plan

    check_launcher(launcher, slurm)
    chosen = read_plan(plan)
    how = Run(workers, retry, not untimed, slurm if launcher == "slurm" else None)
    if dry_run:
        estimate(chosen, Console(), how)
        return
    run_plan(chosen, Console(stderr=True), command_line(), how)
    print(f"{chosen.output}; next: ringrl report {chosen.output}")


def demo(output: Path = Path("demo")) -> None:
    """Collect, train, evaluate, ablate and report for one task, in a few minutes on two cores.

    Args:
        output: folder of everything that the demo makes; an interrupted demo goes on where it stopped.
    """
    from ringrl.study.demo import run_demo
    from ringrl.study.report import table

    page = run_demo(output, Console(stderr=True), command_line())
    Console().print(table([output / "runs"]))
    print(page.absolute().as_uri())
