"""Measure the mean return of uniform random actions, the source of `random_returns` in the files of envs/.

    python benchmarks/random_returns.py [--episodes 20] [--seeds 5] [--json FILE] [task ...]

Prints the mean return of all episodes of each task and its standard error over seeds.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import one_line_errors, positive

from ringrl.envs import TASKS, domain_of, make


def random_returns(task: str, episodes: int, seed: int) -> np.ndarray:
    """Returns (episodes,) of the uniform random policy in the real environment."""
    environment = make(task, seed=seed)
    generator = np.random.default_rng(seed)
    domain = domain_of(task)
    returns = np.zeros(episodes)
    for episode in range(episodes):
        environment.reset()
        for action in generator.uniform(-1, 1, (domain.episode_length, domain.action_size)).astype(np.float32):
            returns[episode] += environment.step(action)[1]
    return returns


def measure(tasks: Sequence[str], episodes: int, seeds: int) -> dict[str, list[list[float]]]:
    """Return every return by task, seed and episode, and print the means."""
    measured = {}
    print(f"{'task':<26}{'mean return':>12}{'± s.e.':>9}   ({seeds} seeds x {episodes} episodes)")
    for task in tasks:
        returns = np.stack([random_returns(task, episodes, seed) for seed in range(seeds)])
        error = returns.mean(1).std(ddof=1) / np.sqrt(seeds) if seeds > 1 else np.nan
        print(f"{task:<26}{returns.mean():>12.3f}{error:>9.3f}", flush=True)
        measured[task] = returns.tolist()
    return measured


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=TASKS, help="full task names (all)")
    parser.add_argument("--episodes", type=positive, default=20, help="episodes per seed")
    parser.add_argument("--seeds", type=positive, default=5, help="seeds 0, 1, ...")
    parser.add_argument("--json", type=Path, help="also write every return to this file")
    options = parser.parse_args(arguments)
    measured = measure(options.tasks, options.episodes, options.seeds)
    if options.json:
        options.json.write_text(json.dumps({"episodes": options.episodes, "returns": measured}))


if __name__ == "__main__":
    main()
