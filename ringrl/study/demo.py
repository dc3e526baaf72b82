"""The demo: from nothing to the page, with data collected on the spot."""

from pathlib import Path

from rich.console import Console

from ringrl.config import read_yaml
from ringrl.configs import preset
from ringrl.data import import_archive
from ringrl.data.collect import collect
from ringrl.envs import domain_of
from ringrl.errors import UserError
from ringrl.study.ablation import Run, ablate
from ringrl.study.plan import AblationPlan
from ringrl.study.report import write_report

EPISODES = 200
SEED = 0


def run_demo(output: Path, console: Console, command: str | None = None) -> Path:
    """Collect episodes, import them, train and evaluate every cell of the preset "demo", and write the page.

    Everything lies in `output`; what an interrupted demo has finished is kept and not done again.

    Returns:
      The page, output/report/index.html.

    Raises:
      UserError: the folder holds something else, or cannot be written.
    """
    settings = read_yaml(preset("demo"))
    collected, store = output / "collected", output / "data.h5"
    if not collected.exists() and not store.exists() and _holds_others(output):
        raise UserError(f"{output}: holds other files; give another --output")
    plan = AblationPlan.model_validate(settings | {"data": store, "output": output / "runs"})
    (task,) = plan.datasets
    if not collected.exists():
        console.print(f"[bold]collecting {EPISODES} episodes of {task}")
        collect(task, collected, episodes=EPISODES, seed=SEED)
    if not store.exists():
        console.print("[bold]importing and relabelling them")
        import_archive(collected, store, domain_of(task).name)
    ablate(plan, console, command, Run(timing=False))
    return write_report([plan.output], output / "report")


def _holds_others(output: Path) -> bool:
    """Whether there are files; hidden ones do not count, since that is what a collection is until it is whole."""
    try:
        return output.exists() and any(not path.name.startswith(".") for path in output.iterdir())
    except OSError as error:
        raise UserError(f"{output}: cannot be used ({error.strerror}); give another --output") from error
