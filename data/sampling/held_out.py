"""Episodes that a run holds out of training, to measure its loss on them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ringrl.config import TrainConfig
from ringrl.data.sampling.sampler import NONE, ContextDraw, ContextSampler, Episodes, eligible_episodes
from ringrl.data.store.reader import EpisodeStore
from ringrl.errors import UserError

HELD_OUT = 2  # the random stream of `held_out_episodes` under a seed


def held_out_episodes(store: EpisodeStore, tasks: Sequence[str], seed: int, fraction: float) -> Episodes:
    """Return a fraction of a store's episodes, whose returns are like those of all, in the order of collection.

    Episodes are sorted so that neighbours have similar returns in all tasks (see `_ordered`; with one task, by return).
    The seed draws one episode from each block of equal size.
    """
    count = round(fraction * store.num_episodes)
    if count == 0:
        return NONE
    ordered = _ordered([store.returns(task) for task in tasks], np.arange(store.num_episodes))
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(HELD_OUT,)))
    return np.sort([random.choice(block) for block in np.array_split(ordered, count)])


def _ordered(returns: Sequence[np.ndarray], episodes: Episodes) -> Episodes:
    """Halve the episodes at the median return of the first task, each half at that of the second, and so on in turn."""
    if len(episodes) < 2:
        return episodes
    episodes = episodes[np.argsort(returns[0][episodes], kind="stable")]
    following, half = [*returns[1:], returns[0]], len(episodes) // 2
    return np.concatenate([_ordered(following, episodes[:half]), _ordered(following, episodes[half:])])


def held_out(store: EpisodeStore, config: TrainConfig) -> Episodes:
    """Return the episodes that a run never trains on. UserError if fewer are held out, or left, than a context needs.

    `context.best_fraction` applies to these and to the other episodes separately, `context.max_transitions` to the
    others only. Runs that differ only in these settings hold out the same episodes.
    """
    if config.validation_fraction == 0:
        return NONE
    found = held_out_episodes(store, config.tasks, config.seed, config.validation_fraction)
    context = config.context
    least = context.trajectories if config.model.family.source == "contexts" else 1
    for what, excluded, cap, advice in (
        ("holds out", all_but(store, found), None, "raise"),
        ("leaves", found, context.max_transitions, "lower"),
    ):
        count = len(eligible_episodes(store, config.task, config.seed, cap, context.best_fraction, excluded))
        if count < least:
            raise UserError(
                f"validation_fraction: {config.validation_fraction:g} {what} {count} eligible episodes of "
                f"{store.path}, and one context needs {least}; {advice} it"
            )
    return found


def all_but(store: EpisodeStore, episodes: Episodes) -> Episodes:
    """Return the other episodes of a store."""
    return np.setdiff1d(np.arange(store.num_episodes), episodes)


class WrongPromptSampler(ContextSampler):
    """A `ContextSampler` whose trajectories, except the last, belong to the next of the run's tasks, with its rewards.

    They never include the episode of the last trajectory, which would reveal its actions.
    """

    def draw(self, step: int) -> ContextDraw:
        """Return the trajectories of the batch of an optimiser step."""
        right, following = super().draw(step), dict(zip(self.tasks, (*self.tasks[1:], self.task), strict=True))
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        own["config"] = self.config.model_copy(update={"other_tasks": ()})
        draws = {task: _by_trajectory(ContextSampler(**own | {"task": task}).draw(step)) for task in self.tasks}
        rows = []
        for row, columns in enumerate(zip(*_by_trajectory(right), strict=True)):
            other = draws[following[right.tasks[row]]]
            places = np.flatnonzero(other.episodes[row] != right.episodes[row, -1])[: self.config.trajectories - 1]
            rows.append([np.append(theirs[row, places], ours[-1]) for theirs, ours in zip(other, columns, strict=True)])
        joined = ContextDraw(*map(np.stack, zip(*rows, strict=True)))
        return joined._replace(starts=np.pad(np.cumsum(joined.starts, axis=1), ((0, 0), (1, 0))))


def _by_trajectory(draw: ContextDraw) -> ContextDraw:
    """Return a draw with columns (batch, trajectories): a task each, and lengths instead of starts."""
    tasks = np.broadcast_to(draw.tasks[:, None], draw.episodes.shape)
    return draw._replace(tasks=tasks, starts=np.diff(draw.starts, axis=1))
