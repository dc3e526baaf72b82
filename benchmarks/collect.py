"""Returns and cost of the methods of `ringrl data collect`, for the table in docs/collect.md.

    python benchmarks/collect.py [--methods scripted td3] [--episodes 60] [--json FILE] [task ...]

Collects every task with every method and prints the returns of the episodes, the minutes, and the processor minutes
(which are more reliable on a shared machine).
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import one_line_errors, positive

from ringrl.collect import collect
from ringrl.data.exorl import Archive
from ringrl.envs import domain_of

TASKS = (
    "walker_walk",
    "walker_stand",
    "cheetah_run",
    "cartpole_swingup",
    "jaco_reach_top_left",
    "point_mass_maze_reach_top_right",
    "quadruped_walk",
)


def processor_seconds() -> float:
    """Return the processor seconds of this process and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(task: str, method: str, episodes: int | None, seed: int) -> dict[str, object]:
    """Return the returns and the cost of one collection, which is deleted."""
    domain = domain_of(task)
    column = domain.recorded_tasks(task).index(task)
    began, used = time.perf_counter(), processor_seconds()
    with tempfile.TemporaryDirectory() as folder:
        collected = collect(task, Path(folder) / "collected", episodes=episodes, seed=seed, method=method)
        minutes = (time.perf_counter() - began) / 60
        processor_minutes = (processor_seconds() - used) / 60
        with Archive(collected, domain) as archive:
            read = map(archive.read, archive.members)
            returns = [float(episode["reward"][:, column].sum(dtype=np.float64)) for episode in read]
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "returns": returns,
        "minutes": minutes,
        "processor_minutes": processor_minutes,
    }


def measure_all(options: argparse.Namespace) -> None:
    """Print a row per task and method."""
    print("| task | method | episodes | min | median | max | last tenth | minutes | processor minutes |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    measured = []
    for task in options.tasks:
        for method in options.methods:
            row = measure(task, method, options.episodes, options.seed)
            measured.append(row)
            returns = np.array(row["returns"])
            last = returns[-max(1, len(returns) // 10) :].mean()
            print(
                f"| {task} | {method} | {len(returns)} | {returns.min():.0f} | {np.median(returns):.0f} | "
                f"{returns.max():.0f} | {last:.0f} | {row['minutes']:.1f} | {row['processor_minutes']:.1f} |",
                flush=True,
            )
            if options.json:
                options.json.write_text(json.dumps(measured))


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=TASKS, help="full task names")
    parser.add_argument("--methods", nargs="+", default=["scripted", "td3"], help="scripted, td3")
    parser.add_argument("--episodes", type=positive, help="number of episodes; default: of 200,000 transitions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write every return to this file")
    options = parser.parse_args(arguments)
    measure_all(options)


if __name__ == "__main__":
    main()
