"""Many environments of one task that step in lockstep, simulated by threads.

MuJoCo's own thread pool, mujoco.rollout, does not return the solver's warm start. Without it, a walker's states diverge
from the single environment's within an episode.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from numbers import Integral
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool, Float, Float32, Float64

from ringrl.cores import available_cores
from ringrl.envs.environment import observation_and_action_space, random_stream
from ringrl.envs.foreign import ForeignVectorEnv, is_foreign
from ringrl.envs.registry import domain_of, load_simulation
from ringrl.envs.simulation import StackedData
from ringrl.errors import UserError

_Observations = Float32[np.ndarray, "environments observation"]
_Flags = Bool[np.ndarray, " environments"]


class ExoRLVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """An ExoRL task in `num_envs` copies. Environment i equals `ExoRLEnv` with the same seed.

    States and observations are equal bit for bit, rewards up to the last digit of float64. Episodes do not depend on
    the number of environments or threads. An instance is not thread-safe.

    Actions and observations are float32 (num_envs, ...), rewards float64 (num_envs,). `info["physics"]` is the float64
    physics states (num_envs, P), and `info["_physics"]` (num_envs,) marks the new ones. Episodes are truncated after
    `domain.episode_length` steps and never terminate. No environment is reset automatically.

    If a simulation becomes unstable, its observations, rewards and physics are NaN until its next reset. Only then,
    `info["unstable"]` (num_envs,) exists and marks it. The other environments are unaffected.

    Args:
        task: full task name, "walker_walk".
        num_envs: number of environments.
        seed: environment i has the seed `seed + i`, or entry i of a sequence. None: from the operating system.
        threads: threads that simulate, the caller's included. None: one per core that this process may use.

    Raises:
        UserError: unknown task, fewer than one environment or thread, another number of seeds than of environments,
            or a seed outside 0 .. 2**32 - 1.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012

    def __init__(
        self, task: str, num_envs: int, seed: int | Sequence[int | None] | None = None, threads: int | None = None
    ) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self.task = task
        self.domain = domain_of(task)
        threads = available_cores() if threads is None else threads
        for name, number in (("num_envs", num_envs), ("threads", threads)):
            if number < 1:
                raise UserError(f"{task}: {name} is {number}, at least 1 is needed")
        self.num_envs = num_envs
        self._randoms = [random_stream(number) for number in self._seeds(seed)]
        self._simulation = load_simulation(task)
        self._datas = [copy(self._simulation.data) for _ in range(num_envs)]
        self._steps = np.full(num_envs, self.domain.episode_length)
        self._unstable: _Flags = np.zeros(num_envs, bool)
        self._helpers = min(threads, num_envs) - 1  # the caller's thread works too
        self._connect()
        self.single_observation_space, self.single_action_space = observation_and_action_space(self.domain)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def __repr__(self) -> str:
        sizes = f"observation {self.observation_space.shape}, action {self.action_space.shape}"
        return f"ExoRLVectorEnv({self.task}, {sizes}, {self.domain.episode_length} steps)"

    def _connect(self) -> None:
        """Start the threads, and make the views of the states (see `Simulation`)."""
        self._stacked = StackedData(self._datas)
        self._warnings = [data.warning.number[None] for data in self._datas]
        if self._helpers and not self.closed:
            self._pool = ThreadPoolExecutor(self._helpers, thread_name_prefix=f"ringrl-{self.task}")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_stacked", "_warnings", "_pool")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _pool=None)
        self._connect()

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[_Observations, dict[str, Any]]:
        """Start an episode in every environment, or in those where `options["reset_mask"]` (num_envs,) is true.

        A seed begins new streams of starts, as in the constructor. An entry None continues the environment's stream.

        Raises:
            UserError: as the constructor, or a mask that is not one bool per environment.
            gymnasium.error.ClosedEnvironmentError: after `close`.
        """
        self._check_open()
        mask = (options or {}).get("reset_mask")
        chosen = np.ones(self.num_envs, bool) if mask is None else np.array(mask)
        if chosen.shape != (self.num_envs,) or chosen.dtype != bool:
            given = f"shape {chosen.shape} and type {chosen.dtype}, expected ({self.num_envs},) and bool"
            raise UserError(f"{self.task}: options['reset_mask'] has {given}")
        streams = [None if number is None else random_stream(number) for number in self._seeds(seed)]
        for index in np.flatnonzero(chosen):
            self._randoms[index] = streams[index] or self._randoms[index]
            self._simulation.reset(self._randoms[index])
            self._simulation.mujoco.mj_copyData(self._datas[index], self._simulation.model, self._simulation.data)
        self._steps[chosen], self._unstable[chosen] = 0, False
        self._stacked.renew()
        return self._observe(chosen)

    def step(
        self, actions: Float[np.ndarray, "environments action"]
    ) -> tuple[_Observations, Float64[np.ndarray, " environments"], _Flags, _Flags, dict[str, Any]]:
        """Hold an action, clipped to [-1, 1], in each environment for one control timestep.

        Raises:
            UserError: the actions have another shape than the action space, or are not finite.
            gymnasium.error.ResetNeeded: an environment's episode has not been started, or has ended.
            gymnasium.error.ClosedEnvironmentError: after `close`.
        """
        self._check_open()
        if (self._steps >= self.domain.episode_length).any():
            raise gymnasium.error.ResetNeeded(f"{self.task}: call reset() before the first step of an episode")
        actions = self._checked(actions)
        simulation = self._simulation
        self._advance(simulation.controls(actions))
        self._steps += 1
        self._stacked.renew()
        self._unstable = np.any(np.concatenate(self._warnings), axis=1)  # a warning stays until the reset
        observations, info = self._observe(np.ones(self.num_envs, bool))
        rewards = simulation.reward(self.task, simulation.read_sensors(self._stacked), actions)
        rewards[self._unstable] = np.nan
        terminated, truncated = np.zeros(self.num_envs, bool), self._steps == self.domain.episode_length
        return observations, rewards, terminated, truncated, info

    def close_extras(self, **kwargs: Any) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def _advance(self, controls: Float64[np.ndarray, "environments action"]) -> None:
        """Advance all stable environments. An idle thread takes the next one, so that a slow one delays no other."""
        pending = iter(np.flatnonzero(~self._unstable).tolist())  # shared by the threads: next() on it is atomic

        def work() -> None:
            for index in pending:
                self._simulation.advance(self._datas[index], controls[index])  # MuJoCo releases the GIL

        futures = [self._pool.submit(work) for _ in range(self._helpers)] if self._pool else []
        try:
            work()
        finally:
            for future in futures:
                if not future.cancel():  # a helper that has not started has nothing left to do
                    future.result()

    def _observe(self, fresh: _Flags) -> tuple[_Observations, dict[str, Any]]:
        observations = self._simulation.read_observation(self._stacked)
        info = {"physics": self._simulation.read_physics(self._stacked), "_physics": fresh}
        if self._unstable.any():
            observations[self._unstable], info["physics"][self._unstable] = np.nan, np.nan
            info["unstable"] = self._unstable.copy()
        return observations, info

    def _checked(self, actions: Float[np.ndarray, "environments action"]) -> Float[np.ndarray, "environments action"]:
        actions = np.asarray(actions)
        if actions.shape != self.action_space.shape:
            raise UserError(f"{self.task}: the actions have shape {actions.shape}, expected {self.action_space.shape}")
        finite = np.isfinite(actions).all(axis=1)
        if not finite.all():
            index = int(finite.argmin())
            where = f"step {self._steps[index]} of environment {index}"
            raise UserError(f"{self.task}: the action of {where} is not finite: {actions[index]}")
        return np.clip(actions, -1.0, 1.0)

    def _seeds(self, seed: int | Sequence[int | None] | None) -> list[Any]:
        """Return one seed or None per environment."""
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, Integral):
            return [int(seed) + index for index in range(self.num_envs)]
        if not isinstance(seed, list | tuple | np.ndarray):
            raise UserError(f"{self.task}: the seed is {seed!r}, it must be an integer or one per environment")
        if len(seed) != self.num_envs:
            raise UserError(f"{self.task}: {len(seed)} seeds for {self.num_envs} environments; give one each")
        return list(seed)

    def _check_open(self) -> None:
        if self.closed:
            raise gymnasium.error.ClosedEnvironmentError(f"{self.task}: the environments are closed")


def make_vec(
    task: str, num_envs: int, seed: int | Sequence[int | None] | None = None, threads: int | None = None
) -> ExoRLVectorEnv | ForeignVectorEnv:
    """Make environments that step in lockstep; see `ExoRLVectorEnv` and `ForeignVectorEnv`."""
    kind = ForeignVectorEnv if is_foreign(task) else ExoRLVectorEnv
    return kind(task, num_envs, seed, threads)
