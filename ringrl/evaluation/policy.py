"""A trained policy, loaded from the folder of its run, and a player that acts with it in your own loop."""

import dataclasses
import hashlib
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32
from numpy.typing import ArrayLike

from ringrl.config import MeshConfig
from ringrl.context import Context
from ringrl.envs import DOMAINS
from ringrl.errors import UserError
from ringrl.evaluation.actors import CompiledPolicy
from ringrl.evaluation.protocol import Protocol, check_environment, make_actor
from ringrl.evaluation.rollout import LiveContext
from ringrl.evaluation.target import target_and_prompt
from ringrl.model import Policy, make_agent
from ringrl.model.parallel import ONE_DEVICE, Parallel, make_ring_mesh
from ringrl.training.checkpoints import CheckpointKind, Checkpoints, RunInfo, best_step, read_info
from ringrl.training.distributed import check_platform

_ENDLESS = 2**30  # steps for which a memory may grow


@dataclasses.dataclass(frozen=True, repr=False)
class TrainedPolicy:
    """A policy with its trained parameters."""

    policy: Policy
    run: Path  # its folder
    info: RunInfo
    step: int
    parameter_hash: str  # sha256 of the parameters
    steps_taken: int  # optimiser steps of training, including those after the best checkpoint
    parallel: Parallel = ONE_DEVICE  # divides its contexts

    def player(self, **settings: Any) -> "Player":
        """Return a `Player`, which acts step by step in your own loop. Settings are those of `Player`."""
        return Player(self, **settings)

    def __repr__(self) -> str:
        """Return one line: method, context length, task, step and size."""
        size = sum(x.size for x in jax.tree.leaves(nnx.state(self.policy, nnx.Param)))
        return f"TrainedPolicy({self.info.title}, step {self.step}, {size:,} parameters)"


class Player:
    """A trained policy that acts step by step in your own loop and remembers all earlier steps.

    Observations and rewards are in the environment's units. Actions are in [-1, 1], as the environments of
    `ringrl.envs.make` take them, with a number for each choice if actions are discrete. The player computes
    return-to-go, completion and positions itself. The episodes of a batch may end at different steps. The memory grows
    until `clear`.

        player = load_policy("runs/at").player()
        observation, _ = environment.reset()
        while True:
            observation, reward, terminated, truncated, _ = environment.step(player.act(observation))
            player.observe(reward, terminated, truncated)
            if terminated or truncated:
                observation, _ = environment.reset()

    Args:
        trained: the policy.
        target: return to aim for: "best", a number, "0.9x" (of the best) or "q0.75" (a quantile
            of the returns of its training data).
        prompt: number of dataset trajectories that the policy sees before its first episode, or a context (1, T, ...).
        prompt_seed: seed of the random draw of the prompt.
        batch: number of environments.
        task: task to act in. None: the task of the run.
        data: path of the run's dataset if it was moved. It is read for a prompt, a quantile, or another task's target.

    Raises:
        UserError: as `ringrl.evaluation.policy_evaluation` for its task, target and prompt; fewer than one environment;
            a prompt of another type.
    """

    def __init__(
        self,
        trained: TrainedPolicy,
        *,
        target: str | float = "best",
        prompt: int | Context | None = None,
        prompt_seed: int = 0,
        batch: int = 1,
        task: str | None = None,
        data: Path | None = None,
    ) -> None:
        info, config = trained.info, trained.info.config
        if task is None:
            task = config.task
        else:
            check_environment(trained.run, info, task)
        if not isinstance(prompt, int | np.integer | Context | None) or isinstance(prompt, bool):
            raise UserError(f"prompt: expected a number of trajectories or a context, got {prompt!r}")
        count = 0 if prompt is None or isinstance(prompt, Context) else int(prompt)
        protocol = Protocol(batch, target=target, prompt_trajectories=count, prompt_seed=prompt_seed)
        goal, _, drawn, _ = target_and_prompt(trained, protocol, task, data)
        shown = prompt if isinstance(prompt, Context) else drawn
        sizes, trajectories = (batch, info.action_size), config.context.trajectories
        self._new_context = partial(LiveContext, *sizes, info.normalisation, goal, trajectories, shown)
        self._actor = make_actor(CompiledPolicy(trained.policy, trained.parallel), config)
        self._batch, self._observation_size = batch, info.observation_size
        self._length = info.normalisation.episode_length if info.domain in DOMAINS else None  # None: may differ
        self._is_segmented = config.model.family.has_context and config.context.segment_steps is not None
        self.clear()

    def clear(self) -> None:
        """Forget everything but the prompt, and start an episode."""
        self._live = self._new_context()
        self._actor.start(self._batch, _ENDLESS, self._live.prompt)
        self._pending: np.ndarray | None = None  # the last action, whose reward is unknown

    def act(self, observation: ArrayLike) -> Float32[np.ndarray, "*batch action"]:
        """Return the action for an observation (batch, observation), or (observation,) for a batch of one.

        Raise UserError for another shape, an unknown reward of the last action, or, in ExoRL's domains, an episode that
        is longer than the data's.
        """
        shape = self._batch, self._observation_size
        try:
            given = np.asarray(observation, np.float32)
        except (TypeError, ValueError) as error:  # a Dict, or a Tuple of unlike parts
            made = "ringrl.envs.make flattens Dict and Tuple spaces"
            raise UserError(f"observation: is no array of numbers {shape}; {made}") from error
        if given.shape != shape and (self._batch > 1 or given.shape != shape[1:]):
            raise UserError(f"observation: has shape {given.shape}, expected {shape}")
        if not np.isfinite(given).all():
            raise UserError("observation: is not finite; end the episode with reset_episode()")
        if self._pending is not None:
            raise UserError("act: the reward of the last action is unknown; call observe(reward) first")
        length = self._length
        if length is not None and (self._live.timestep >= length).any():
            raise UserError(
                f"act: episodes of the training data have {length} steps; call reset_episode(), or pass truncated=True "
                "to observe"
            )
        self._pending = np.array(self._actor.act(self._live.step(given.reshape(shape))), np.float32)
        return self._pending.reshape((*given.shape[:-1], -1)).copy()

    def observe(self, reward: ArrayLike, terminated: ArrayLike = False, truncated: ArrayLike = False) -> None:
        """Remember the reward of the last action. An end, by termination or truncation, starts the next episode.

        Each argument has a number per environment. A single number stands for a batch of one, and one end for all.

        Raises:
            UserError: no action waits for its reward, an argument has another shape, a reward is not finite, or some
                episodes of a policy of segments end before others.
        """
        if self._pending is None:
            raise UserError("observe: there is no action without a reward; call act(observation) first")
        rewards = np.asarray(reward, np.float64)
        if rewards.shape != (self._batch,) and (self._batch > 1 or rewards.shape):
            raise UserError(f"reward: has shape {rewards.shape}, expected {(self._batch,)}")
        if not np.isfinite(rewards).all():
            raise UserError(f"reward: {rewards.tolist()} is not finite")
        for name, end in (("terminated", terminated), ("truncated", truncated)):
            if np.shape(end) not in ((), (self._batch,)):
                raise UserError(f"{name}: has shape {np.shape(end)}, expected {(self._batch,)}")
        ends = np.array(np.broadcast_to(np.logical_or(terminated, truncated), self._batch))
        if self._is_segmented and ends.any() != ends.all():
            raise UserError("observe: with segments, all episodes of a batch must end together; use one player each")
        is_last = ends if self._length is None else ends | (self._live.timestep + 1 == self._length)
        self._actor.observe(self._live.observe(self._pending, rewards.reshape(self._batch), is_last))
        self._live.begin_next(ends)
        self._pending = None

    def reset_episode(self) -> None:
        """Start the next episode in all environments, and keep the memory of earlier ones.

        Environments whose episode has no step yet stay as they are.

        Raise UserError if the last action's reward is unknown.
        """
        if self._pending is not None:
            raise UserError("reset_episode: the reward of the last action is unknown; call observe(reward) or clear()")
        self._live.begin_next(self._live.timestep > 0)


def load_policy(
    run: str | Path, step: int | None = None, mesh: MeshConfig | None = None, kind: CheckpointKind = "last"
) -> TrainedPolicy:
    """Return the policy of a run's newest, best or given checkpoint, whose contexts are divided over `mesh`.

    `kind` is used if no step is given. `best_step` defines the best.

    Raise UserError as `read_info`, `make_ring_mesh` and `check_platform` do, or if the arrays are damaged, or if the
    best is requested and no checkpoint has a finite loss.
    """
    run = Path(run)
    given, (step, info) = step, read_info(run, step)
    steps_taken = step
    if given is None and kind == "best":
        if (best := best_step(run)) is None:
            raise UserError(f"{run}: no checkpoint has a finite loss, so none is the best; evaluate the last")
        step, info = read_info(run, best)
    check_platform()
    parallel = ONE_DEVICE if mesh is None else make_ring_mesh(info.config, mesh)
    agent = make_agent(partial(info.make_policy, parallel), info.config, parallel)
    with closing(Checkpoints(run)) as checkpoints:
        state = checkpoints.restore(step, agent.init())
    digest = hashlib.sha256()
    for path, array in jax.tree_util.tree_leaves_with_path(state.params):
        digest.update(jax.tree_util.keystr(path).encode() + jnp.asarray(array).tobytes())
    return TrainedPolicy(agent.policy(state.params), run, info, step, digest.hexdigest(), steps_taken, parallel)
