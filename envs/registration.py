"""The Gymnasium ids: `gymnasium.make("ringrl/walker_walk-v0")` once `ringrl.envs` is imported."""

import gymnasium

from ringrl.envs.domain import DOMAINS


def register_gymnasium() -> None:
    """Register every task as `ringrl/<task>-v0`; a second call changes nothing."""
    for domain in DOMAINS.values():
        for task in domain.tasks:
            name = f"ringrl/{task}-v0"
            if name not in gymnasium.registry:
                gymnasium.register(
                    name,
                    entry_point="ringrl.envs.environment:ExoRLEnv",
                    max_episode_steps=domain.episode_length,
                    kwargs={"task": task},
                )
