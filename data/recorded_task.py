"""For which task the reward of an archive was recorded."""

from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float32, Float64

from ringrl.envs import Domain, make

SAME_REWARD = 1e-5  # recorded in float32 by another MuJoCo: equal to about 3e-8 where the task is the same


def matching_tasks(
    rewards: Mapping[str, Float32[np.ndarray, " time"]], recorded: Float32[np.ndarray, "time columns"]
) -> tuple[str, ...]:
    """The tasks whose rewards for an episode are those recorded in the first column."""
    return tuple(task for task, reward in rewards.items() if np.abs(reward - recorded[:, 0]).max() <= SAME_REWARD)


def recorded_task(
    domain: Domain,
    matches: Iterable[tuple[str, ...]],
    *,
    has_reward: bool,
    starts: Float64[np.ndarray, "episodes physics"],
) -> str | None:
    """The one task that fits every episode; None if there is none, if all are recorded, or if the data cannot tell.

    Args:
        domain: the domain of the archive.
        matches: `matching_tasks` of every episode.
        has_reward: whether any episode was rewarded at all.
        starts: the first physics state of every episode.
    """
    candidates = [] if domain.records_all_tasks or not has_reward else list(domain.tasks)
    for match in matches:
        candidates = [task for task in candidates if task in match]
    if len(candidates) > 1:
        return _nearest_start(candidates, starts)
    return candidates[0] if candidates else None


def _nearest_start(tasks: list[str], starts: Float64[np.ndarray, "episodes physics"]) -> str | None:
    """Among tasks of equal reward, the one whose episodes begin where these do.

    Cartpole's balance and swingup share their reward and differ only in the start. None if no start is clearly nearer.
    """
    distances: Mapping[str, float] = {task: _distance_to_start(task, starts) for task in tasks}
    nearest, second = sorted(tasks, key=distances.__getitem__)[:2]
    return nearest if distances[nearest] < 0.5 * distances[second] else None


def _distance_to_start(task: str, starts: Float64[np.ndarray, "episodes physics"]) -> float:
    env = make(task, seed=0)
    own = np.stack([env.reset()[1]["physics"] for _ in range(8)])
    return float(np.linalg.norm(own.mean(axis=0) - starts.mean(axis=0)))
