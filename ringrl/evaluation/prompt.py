"""Prompts: trajectories of the dataset in a policy's context before its first episode."""

from pathlib import Path
from typing import Any

import numpy as np

from ringrl.context import Context
from ringrl.data import EpisodeStore
from ringrl.data.sampling.held_out import held_out
from ringrl.data.sampling.sampler import ContextPlan, ContextSampler
from ringrl.errors import UserError
from ringrl.training.checkpoints import RunInfo
from ringrl.training.run_folder import dataset_fingerprint

FIRST_DRAW = 2**64  # the sampler's step for the first draw; no training reaches this step


def open_dataset(info: RunInfo, run: Path, data: Path | None) -> EpisodeStore:
    """Open the dataset that a run was trained on, at `data` or else at the path in the run's configuration.

    Raises:
      UserError: the dataset cannot be read, or is another one.
    """
    path = info.config.data if data is None else data
    if data is None and not path.is_file():
        raise UserError(f"{path}: the dataset of {run} is missing; give its path with --data")
    store = EpisodeStore(path)
    found = dataset_fingerprint(store)
    if found != info.data_fingerprint:
        raise UserError(
            f"{path}: is not the dataset that {run} was trained on (fingerprint {found[:12]}, expected "
            f"{info.data_fingerprint[:12]}); give the right one with --data"
        )
    return store


def draw_prompt(
    info: RunInfo,
    store: EpisodeStore,
    task: str,
    trajectories: int,
    seed: int,
    target_return: float | None,
    *,
    has_rewards: bool = True,
    is_shuffled: bool = False,
) -> tuple[Context, dict[str, Any]]:
    """Draw a prompt, selected and ordered as in training. A run trained on segments has prompts of segments.

    Returns the prompt as a context (1, T, ...) in the order of time, and the fields of an `EvaluationRecord` that
    describe it. Trajectory indices are clipped below the number of trajectories in a training context.

    If the target of every trajectory in a training context is the best return, the target in the prompt is
    `target_return`, as in the live episodes that follow. Otherwise each trajectory's target is its own return.

    `has_rewards` and `is_shuffled` are the controls of `Protocol`. Without rewards, every return-to-go is the
    target of the live episodes, and no trajectory completes.

    Raises:
      UserError: the dataset has fewer trajectories.
    """
    config = info.config
    drawn = config.context.model_copy(update={"trajectories": trajectories, "other_tasks": ()})
    if drawn.sampling == "fixed":  # the same trajectories at every step
        drawn = drawn.model_copy(update={"sampling": "uniform"})
    excluded = held_out(store, config)
    try:
        sampler = ContextSampler(store, task, drawn, info.normalisation, 1, config.seed, excluded=excluded)
    except UserError as error:
        raise UserError(f"--prompt-trajectories: {error}") from error
    plan = sampler.plan(FIRST_DRAW + seed)
    if is_shuffled:
        plan = _shuffled(plan, np.random.default_rng([seed, trajectories]))
    (episodes,) = plan.episodes
    returns = store.returns(task)[episodes].astype(np.float64)
    if config.context.target == "best" and target_return is not None:
        targets = np.full_like(plan.targets, target_return)
        plan = plan._replace(targets=targets, completes=returns[None] >= targets)
    steps = int(plan.starts[0, -1])
    context = sampler.read(plan, slice(None), np.arange(steps))
    if not has_rewards:
        none = np.zeros_like(context.reward)
        context = context._replace(
            reward=none,
            completion=none,
            return_to_go=info.normalisation.return_to_go(none + (target_return or 0.0)),
            previous=context.previous._replace(reward=none, completion=none),
        )
    context = context._replace(trajectory=np.minimum(context.trajectory, config.context.trajectories - 1))
    fields = {"prompt_episodes": tuple(episodes.tolist()), "prompt_returns": tuple(returns.tolist())}
    return context, fields | {"prompt_trajectories": trajectories, "prompt_seed": seed}


def _shuffled(plan: ContextPlan, generator: np.random.Generator) -> ContextPlan:
    """Return the plan of one context with its trajectories in another order."""
    count = plan.episodes.shape[1]
    order = np.arange(count)
    while (order == np.arange(count)).all():
        order = generator.permutation(count)
    lengths = np.diff(plan.starts, axis=1)[:, order]
    columns = ("episodes", "targets", "completes", "first_timesteps")
    moved = {name: getattr(plan, name)[:, order] for name in columns}
    return plan._replace(**moved, starts=np.concatenate([[[0]], np.cumsum(lengths, axis=1)], axis=1))
