"""When does an episode's action need the context? The error of a run's actions by the step of the episode.

    python benchmarks/loss_by_step.py RUN [--data STORE] [--batches 16] [--json FILE]

RUN is the folder of a training run. Contexts are drawn as in training, from steps that no training comes to; the model
sees all that went before each step, as in training. Prints the mean squared error of its actions, per trajectory of
the context and range of steps. Where the error falls after the first steps, an episode says itself what it is about,
and the trajectories before it teach little.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
from command_line import positive, told_in_one_line
from jaxtyping import Float

from ringrl.data.sampler import ContextSampler
from ringrl.errors import UserError
from ringrl.evaluation.prompt import FIRST_DRAW, open_dataset
from ringrl.training import load_policy

EDGES = (0, 1, 2, 5, 10, 20, 50, 100)  # steps of an episode; the last range goes to its end


def errors(run: Path, data: Path | None, batches: int) -> Float[np.ndarray, "contexts trajectories steps"]:
    """The squared error of every action, averaged over its components."""
    trained = load_policy(run)
    config = trained.info.config
    if config.model.kind != "transformer":
        raise UserError(f"{run}: has no context ({config.model.kind}); give the run of a transformer")
    store = open_dataset(trained.info, run, data)
    size = config.optimiser.batch_size
    sampler = ContextSampler(store, config.task, config.context, trained.info.normalisation, size, config.seed)
    if len(np.unique(store.lengths)) > 1:
        raise UserError(f"{store.path}: its episodes differ in length, and have no steps in common")
    actions, found = jax.jit(trained.policy.actions), []
    for number in range(batches):
        batch = sampler.batch(FIRST_DRAW + number)
        error = np.square(np.asarray(actions(batch)) - batch.action).mean(-1)
        found.append(error.reshape(size, config.context.trajectories, -1))
    return np.concatenate(found)


def table(found: Float[np.ndarray, "contexts trajectories steps"]) -> tuple[list[str], list[list[float]]]:
    """Names of the ranges, and per trajectory the mean of each."""
    edges = [*(edge for edge in EDGES if edge < found.shape[-1]), found.shape[-1]]
    names = [str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in pairwise(edges)]
    return names, [[float(one[:, a:b].mean()) for a, b in pairwise(edges)] for one in found.swapaxes(0, 1)]


@told_in_one_line
def main(arguments: Sequence[str] | None = None) -> None:
    """Print and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, help="where the run's store lies, if it has moved")
    parser.add_argument("--batches", type=positive, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    names, rows = table(errors(options.run, options.data, options.batches))
    print(f"| trajectory | {' | '.join(names)} |")
    print("|" + "---|" * (len(names) + 1))
    for number, row in enumerate(rows, 1):
        print(f"| {number} | {' | '.join(f'{value:.3f}' for value in row)} |")
    if options.json:
        options.json.write_text(json.dumps({"steps": names, "errors": rows}, indent=1))


if __name__ == "__main__":
    main()
