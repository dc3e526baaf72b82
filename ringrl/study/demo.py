"""The demo: from data collection to the results of an ablation."""

from pathlib import Path

from rich.console import Console

from ringrl.collect import collect
from ringrl.config_files import read_yaml
from ringrl.configs import preset
from ringrl.data import import_archive
from ringrl.envs import domain_of
from ringrl.errors import UserError
from ringrl.processes import available_cores
from ringrl.study.plan import AblationPlan
from ringrl.study.runner import ablate

EPISODES = 100  # of each task
KEPT = 60  # the last ones, in which the scripted controller has found the goal


def run_demo(output: Path, console: Console, command: str | None = None) -> Path:
    """Run or resume the demo. Return its folder of results, output/runs. UserError if `output` has other files."""
    collected, store = output / "collected", output / "data.h5"
    # An unfinished collection is hidden.
    has_files = output.is_dir() and any(not path.name.startswith(".") for path in output.iterdir())
    if has_files and not collected.exists() and not store.exists():
        raise UserError(f"{output}: contains other files; give another --output")
    settings = read_yaml(preset("demo"))
    plan = AblationPlan.model_validate(settings | {"data": store, "output": output / "runs"})
    (own,) = plan.datasets
    if not store.exists():
        tasks = own, *settings["settings"]["context"]["other_tasks"]
        for seed, task in enumerate(tasks):
            console.print(f"[bold]collecting {EPISODES} episodes of {task}")
            collect(task, collected / task, episodes=EPISODES, seed=seed)
        folders, domain = [collected / task for task in tasks], domain_of(own).name
        import_archive(folders, store, domain, subset="last", max_episodes=KEPT)
    ablate(plan, console, command, workers=min(2, available_cores()))
    return plan.output
