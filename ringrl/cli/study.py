"""ringrl ablate and demo: many runs, and the page that compares them."""

from pathlib import Path

import tyro
from rich.console import Console

from ringrl.cli.words import command_line


def ablate(plan: tyro.conf.Positional[Path]) -> None:
    """Train and evaluate all cells of a plan: context lengths x seeds, and baselines. Finished cells are skipped.

    Args:
        plan: YAML file, for example ringrl/configs/demo.yaml.
    """
    from ringrl.study.ablate import ablate as run_plan
    from ringrl.study.ablate import read_plan

    chosen = read_plan(plan)
    run_plan(chosen, Console(stderr=True), command_line())
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
