"""Rolling policies out in dm_control: n episodes, one after another, in one growing context.

A batch of environments runs in lockstep.
"""

from collections.abc import Callable
from functools import partial

import gymnasium
import jax
import numpy as np
from jaxtyping import Float64

from ringrl.context import Context, Outcome
from ringrl.data.normalisation import Normalisation
from ringrl.errors import UserError
from ringrl.evaluation.actors import Actor


def rollout(
    actor: Actor,
    environments: gymnasium.vector.VectorEnv,
    normalisation: Normalisation,
    *,
    episodes: int,
    target_return: float,
    trajectories: int | None = None,
    seed: int | None = None,
    on_episode: Callable[[np.ndarray], None] = lambda returns: None,
) -> Float64[np.ndarray, "environments episodes"]:
    """Returns of `episodes` in-context episodes in each environment.

    Every episode asks for the same `target_return` (chain of hindsight): its return-to-go starts there and falls by
    the rewards earned. The completion token is 1 on an episode's last step if its return reached the target.

    Args:
      actor: forgets at the start, then sees every step of every episode.
      environments: B environments in lockstep that truncate together; one shared episode length.
      normalisation: the statistics the policy was trained with.
      episodes: episodes per context.
      target_return: in units of the task's return.
      trajectories: clip the trajectory index below this (the number the policy was trained with).
      seed: environment i starts from seed + i; None goes on with the environments' own streams.
      on_episode: called with the returns (B,) of each episode as it ends.

    Raises:
      UserError: an observation or reward that is not finite.
    """
    length = normalisation.episode_length
    actor.start(environments.num_envs, episodes * length)
    returns = np.zeros((environments.num_envs, episodes))
    before = _nothing(environments)
    for episode in range(episodes):
        observation, _ = environments.reset(seed=seed if episode == 0 else None)
        index = episode if trajectories is None else min(episode, trajectories - 1)
        for timestep in range(length):
            step = _step(
                observation=normalisation.observation(observation),
                return_to_go=normalisation.return_to_go(target_return - returns[:, episode]),
                timestep=timestep,
                trajectory=index,
                position=episode * length + timestep,
                previous=before,
            )
            action = actor.act(step)
            observation, reward, _, truncated, _ = environments.step(action)
            if not (np.isfinite(observation).all() and np.isfinite(reward).all()):
                raise UserError(f"environment: observation or reward not finite (episode {episode}, step {timestep})")
            returns[:, episode] += reward
            if truncated.any() != (timestep == length - 1):
                raise UserError(f"environment: episodes end after {timestep + 1} steps, the data's after {length}")
            reached = (timestep == length - 1) & (returns[:, episode] >= target_return)
            earned = normalisation.reward(reward[:, None].astype(np.float32))
            before = Outcome(action[:, None], earned, reached[:, None].astype(np.float32))
            actor.observe(step._replace(**before._asdict()))
        on_episode(returns[:, episode])
    return returns


def _nothing(environments: gymnasium.vector.VectorEnv) -> Outcome:
    """What came before the first step."""
    size = environments.num_envs, 1
    action = np.zeros((*size, *(environments.single_action_space.shape or ())), np.float32)
    return Outcome(action, np.zeros(size, np.float32), np.zeros(size, np.float32))


def _step(
    observation: np.ndarray,
    return_to_go: np.ndarray,
    timestep: int,
    trajectory: int,
    position: int,
    previous: Outcome,
) -> Context:
    """One timestep (B, 1, ...) as far as it is known before acting."""
    constant = partial(np.full, (len(observation), 1))
    unknown = jax.tree.map(np.zeros_like, previous)
    return Context(
        observation=observation[:, None],
        return_to_go=return_to_go[:, None],
        timestep=constant(timestep, dtype=np.int32),
        trajectory=constant(trajectory, dtype=np.int32),
        position=constant(position, dtype=np.int32),
        weight=constant(1, dtype=np.float32),
        previous=previous,
        **unknown._asdict(),
    )
