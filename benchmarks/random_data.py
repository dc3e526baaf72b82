"""Random data in the shape of walker's, for measurements of time and memory."""

from pathlib import Path

import numpy as np

from ringrl.context import Context, Outcome
from ringrl.data.store.format import Provenance, recorded_arrays, reward_key
from ringrl.data.store.writer import create_store
from ringrl.envs import DOMAINS
from ringrl.planning.workload import ACTION, OBSERVATION

DOMAIN, STEPS_PER_EPISODE = "walker", 1000


def write_random_store(path: Path, episodes: int) -> None:
    """Write a store of random episodes of 1000 steps."""
    domain, random = DOMAINS[DOMAIN], np.random.default_rng(0)
    rows, made = STEPS_PER_EPISODE + 1, Provenance("random numbers")
    with create_store(path, domain, domain.tasks, [STEPS_PER_EPISODE] * episodes, source=made) as writer:
        for _ in range(episodes):
            episode = {
                key: random.normal(size=(rows, column.width)).astype(column.dtype)
                for key, column in recorded_arrays(domain).items()
            }
            writer.append(episode | {reward_key(task): random.random(rows).astype("f4") for task in domain.tasks})


def random_context(contexts: int, steps: int, observation: int = OBSERVATION, action: int = ACTION) -> Context:
    """Return a batch of random contexts, arrays of shape (contexts, steps, ...), in temporal order."""
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=(contexts, steps, *shape)).astype(np.float32)  # noqa: E731
    position = np.tile(np.arange(steps, dtype=np.int32), (contexts, 1))
    nothing, actions = np.zeros((contexts, steps), np.float32), np.tanh(normal(action))
    return Context(
        observation=normal(observation), action=actions, reward=normal(), return_to_go=normal(), completion=nothing,
        timestep=position % STEPS_PER_EPISODE, trajectory=position // STEPS_PER_EPISODE, position=position,
        start=position - position % STEPS_PER_EPISODE, weight=np.ones((contexts, steps), np.float32),
        previous=Outcome(actions, normal(), nothing),
    )  # fmt: skip
