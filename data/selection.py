"""Which episodes of a store a run may draw."""

import numpy as np
from jaxtyping import Int

from ringrl.data.store import EpisodeStore
from ringrl.errors import UserError

Episodes = Int[np.ndarray, " episodes"]

SUBSET = 1  # the subset's own stream of the seed's random numbers


def eligible_episodes(
    store: EpisodeStore, task: str, seed: int, max_transitions: int | None = None, best_fraction: float = 1.0
) -> Episodes:
    """The best fraction of `subset`, in the order of collection: the same on every machine.

    Raises:
      UserError: `max_transitions` below one episode, or a task that the store has no rewards for.
    """
    episodes = subset(store, seed, max_transitions)
    returns = store.returns(task)[episodes]
    count = max(1, round(best_fraction * len(episodes)))
    return episodes[np.sort(np.argsort(returns, kind="stable")[len(returns) - count :])]


def subset(store: EpisodeStore, seed: int, max_transitions: int | None) -> Episodes:
    """Whole episodes of at most `max_transitions` steps together, all where it is None; in the order of collection.

    They are taken in an order shuffled by the seed, up to the first that would exceed the number: with the same seed
    a larger subset holds every smaller one.

    Raises:
      UserError: fewer transitions than the longest episode has.
    """
    if max_transitions is None:
        return np.arange(store.num_episodes)
    longest = int(store.lengths.max())
    if max_transitions < longest:
        raise UserError(
            f"context.max_transitions: {max_transitions} is less than one episode of {store.path} ({longest} steps); "
            "raise it"
        )
    order = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SUBSET,))).permutation(store.num_episodes)
    count = np.searchsorted(np.cumsum(store.lengths[order]), max_transitions, side="right")
    return np.sort(order[:count])
