"""Prompts: trajectories of the dataset that a policy remembers before its first episode."""

import dataclasses
from pathlib import Path

import numpy as np

from ringrl.context import Context
from ringrl.data import EpisodeStore
from ringrl.data.contexts import read_contexts
from ringrl.data.sampler import ContextSampler
from ringrl.data.selection import eligible_episodes
from ringrl.errors import UserError
from ringrl.training.checkpoints import RunInfo
from ringrl.training.run_folder import dataset_fingerprint

FIRST_DRAW = 2**64  # prompts are drawn as the contexts of steps that no training comes to


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Dataset trajectories as one context.

    Attributes:
        context: (1, T, ...) in the order of time.
        episodes: their numbers in the store, in the order of the context.
        returns: what each returned in the task.
    """

    context: Context
    episodes: tuple[int, ...]
    returns: tuple[float, ...]


def open_dataset(info: RunInfo, run: Path, data: Path | None) -> EpisodeStore:
    """The dataset that a run was trained on.

    Args:
      info: of the run.
      run: its folder, for messages.
      data: where the dataset lies now; None: where it lay then.

    Raises:
      UserError: it cannot be read, or is another one.
    """
    path = info.config.data if data is None else data
    if data is None and not path.is_file():
        raise UserError(f"{path}: the dataset of {run} is no longer there; say where it is with --data")
    store = EpisodeStore(path)
    found = dataset_fingerprint(store)
    if found != info.data_fingerprint:
        raise UserError(
            f"{path}: is not the dataset that {run} was trained on (fingerprint {found[:12]}, expected "
            f"{info.data_fingerprint[:12]}); give the right one with --data"
        )
    return store


def trained_returns(info: RunInfo, store: EpisodeStore, task: str) -> np.ndarray:
    """Returns in a task of the episodes that the run was trained on."""
    context = info.config.context
    own = info.config.task
    chosen = eligible_episodes(store, own, info.config.seed, context.max_transitions, context.best_fraction)
    return store.returns(task)[chosen]


def draw_prompt(
    info: RunInfo, store: EpisodeStore, task: str, trajectories: int, seed: int, target_return: float | None
) -> Prompt:
    """Draw trajectories and put them together as the run's training contexts were: the same selection and order.

    Where training contexts ask every trajectory for the best one's return, these ask for `target_return`, as the live
    episodes that follow: so the prompt and they are one context, of which a live episode is to be the best. Where each
    was asked for its own return, so is each here.

    Raises:
      UserError: more trajectories than there are.
    """
    config = info.config
    drawn = config.context.model_copy(update={"trajectories": trajectories, "other_tasks": ()})
    if drawn.sampling == "fixed":  # which is: the same at every step
        drawn = drawn.model_copy(update={"sampling": "uniform"})
    try:
        sampler = ContextSampler(store, task, drawn, info.normalisation, 1, config.seed, selected_by=config.task)
    except UserError as error:
        raise UserError(f"--prompt-trajectories: {error}") from error
    plan = sampler.plan(FIRST_DRAW + seed)
    (episodes,) = plan.episodes
    returns = store.returns(task)[episodes].astype(np.float64)
    if config.context.target == "best" and target_return is not None:
        targets = np.full_like(plan.targets, target_return)
        plan = plan._replace(targets=targets, completes=returns[None] >= targets)
    steps = int(plan.starts[0, -1])
    context = read_contexts(store, info.normalisation, plan, np.arange(steps))
    return Prompt(context, tuple(episodes.tolist()), tuple(returns.tolist()))
