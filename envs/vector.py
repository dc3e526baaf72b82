"""Many environments of one task that step in lockstep, simulated by threads.

MuJoCo's own thread pool, mujoco.rollout, does not return the solver's warm start. Without it, a walker's states diverge
from the single environment's within an episode.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import partial
from numbers import Integral
from queue import Empty, SimpleQueue
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool, Float, Float32, Float64

from ringrl.envs.environment import random_stream
from ringrl.envs.foreign import ForeignEnv, is_foreign
from ringrl.envs.registry import domain_of, load_simulation
from ringrl.envs.simulation import StackedData
from ringrl.errors import UserError, brief
from ringrl.processes import available_cores

STEP_TIMEOUT = 300.0  # seconds that a step or a reset of another package's environment may take
CLOSE_TIMEOUT = 10.0  # seconds that its closing may take
WORTH_A_THREAD = 20e-6  # seconds of an environment's step; below, threads wait longer for Python's lock than they save
TRIAL_STEPS = 3  # on one thread, to measure these seconds
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
        threads: threads that simulate, the caller's included. None: one per core that this process may use, or one
            if a step of the physics takes less than 20 microseconds per environment.

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
        self._trials_left = TRIAL_STEPS if threads is None else 0
        self._step_seconds = np.inf  # of one environment, the fastest of the trials
        threads = _checked_threads(task, num_envs, threads)
        self.num_envs = num_envs
        self._randoms = [random_stream(number) for number in _seeds(task, seed, num_envs)]
        self._simulation = load_simulation(task)
        self._datas = [copy(self._simulation.data) for _ in range(num_envs)]
        self._steps = np.full(num_envs, self.domain.episode_length)
        self._unstable: _Flags = np.zeros(num_envs, bool)
        self._helpers = min(threads, num_envs) - 1  # the caller's thread works too
        self._connect()
        self.single_observation_space, self.single_action_space = self.domain.spaces()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def __repr__(self) -> str:
        sizes = f"observation {self.observation_space.shape}, action {self.action_space.shape}"
        return f"ExoRLVectorEnv({self.task}, {sizes}, {self.domain.episode_length} steps)"

    def _connect(self) -> None:
        """Start the threads, and make the views of the states (see `Simulation`)."""
        self._stacked = StackedData(self._datas)
        self._warnings = [data.warning.number[None] for data in self._datas]
        self._controls = [data.ctrl for data in self._datas]
        if self._helpers and not self.closed:
            self._pool = ThreadPoolExecutor(self._helpers, thread_name_prefix=f"ringrl-{self.task}")

    def __getstate__(self) -> dict[str, Any]:
        views = ("_stacked", "_warnings", "_controls", "_pool")  # made again by `_connect`
        return {name: value for name, value in vars(self).items() if name not in views}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _pool=None)
        self._connect()

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[_Observations, dict[str, Any]]:
        """Start an episode in every environment, or in those where `options["reset_mask"]` (num_envs,) is true.

        A seed begins new streams of starts, as in the constructor. An entry None continues the environment's stream.
        UserError as in the constructor, or for a mask that is not one bool per environment.
        """
        self._check_open()
        mask = (options or {}).get("reset_mask")
        chosen = np.ones(self.num_envs, bool) if mask is None else np.array(mask)
        if chosen.shape != (self.num_envs,) or chosen.dtype != bool:
            given = f"shape {chosen.shape} and type {chosen.dtype}, expected ({self.num_envs},) and bool"
            raise UserError(f"{self.task}: options['reset_mask'] has {given}")
        streams = [
            None if number is None else random_stream(number) for number in _seeds(self.task, seed, self.num_envs)
        ]
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

        Errors are those of `ExoRLEnv.step`, except for unstable simulations, and ClosedEnvironmentError after `close`.
        """
        self._check_open()
        if (self._steps >= self.domain.episode_length).any():
            raise gymnasium.error.ResetNeeded(f"{self.task}: call reset() before the first step of an episode")
        actions = self._checked(actions)
        simulation = self._simulation
        controls, datas, views = simulation.controls(actions), self._datas, self._controls

        def advance(index: int) -> None:
            views[index][:] = controls[index]
            simulation.advance(datas[index])  # MuJoCo releases the GIL

        self._simulate(np.flatnonzero(~self._unstable), advance)
        self._steps += 1
        self._stacked.renew()
        self._unstable = np.any(np.concatenate(self._warnings), axis=1)  # a warning stays until the reset
        observations, info = self._observe(np.ones(self.num_envs, bool))
        rewards = simulation.reward(self.task, simulation.read_sensors(self._stacked), actions)
        rewards[self._unstable] = np.nan
        terminated, truncated = np.zeros(self.num_envs, bool), self._steps == self.domain.episode_length
        return observations, rewards, terminated, truncated, info

    def _simulate(self, indices: np.ndarray, advance: Callable[[int], None]) -> None:
        """Advance some environments, after the trial steps on one thread if their physics is cheap."""
        if not self._trials_left:
            return _share(self._pool, self._helpers, indices, advance)
        start = time.perf_counter()
        _share(None, 0, indices, advance)
        if indices.size:
            seconds = (time.perf_counter() - start) / indices.size
            self._step_seconds, self._trials_left = min(self._step_seconds, seconds), self._trials_left - 1
        if not self._trials_left and self._step_seconds < WORTH_A_THREAD:
            self._helpers = 0
        return None

    def close_extras(self, **kwargs: Any) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

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

    def _check_open(self) -> None:
        if self.closed:
            raise gymnasium.error.ClosedEnvironmentError(f"{self.task}: the environments are closed")


class ForeignVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """A Gymnasium environment in `num_envs` copies, stepped by threads. Copy i equals `ForeignEnv` with the same seed.

    No environment is reset automatically: after the end of its episode, an environment stays at its last observation
    until its next reset. An environment that raises an exception or does not answer in time is truncated, with NaN as
    observation and reward. An environment that did not answer is not used again. The others are unaffected.
    `failures` has a line for each environment that failed: which one, in which step, and why.

    Args:
        task: "gymnasium:Hopper-v5".
        num_envs, seed, threads: as for `ExoRLVectorEnv`.
        timeout: seconds that a reset or a step may take.

    Raises:
        UserError: as `ForeignEnv`, fewer than one environment or thread, or another number of seeds.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012

    def __init__(
        self,
        task: str,
        num_envs: int,
        seed: int | Sequence[int | None] | None = None,
        threads: int | None = None,
        timeout: float = STEP_TIMEOUT,
    ) -> None:
        threads = _checked_threads(task, num_envs, threads)
        self.task, self.num_envs, self.failures = task, num_envs, list[str]()
        first, *others = (ForeignEnv(task, number) for number in _seeds(task, seed, num_envs))
        self._environments: list[ForeignEnv | None] = [first, *others]  # None: does not answer
        self.domain = first.domain
        self.single_observation_space, self.single_action_space = first.observation_space, first.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._observations = np.zeros((num_envs, self.domain.observation_size), np.float32)
        self._playing = np.zeros(num_envs, bool)
        self._steps, self._starts = np.zeros(num_envs, np.int64), [None] * num_envs  # of the current episodes
        self._crew, self._timeout = _Crew(min(threads, num_envs), timeout), timeout

    def __repr__(self) -> str:
        sizes = f"observation {self.observation_space.shape}, action {self.action_space.shape}"
        return f"ForeignVectorEnv({self.task}, {sizes}, at most {self.domain.episode_length} steps)"

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[_Observations, dict[str, Any]]:
        """Start an episode in every environment, or in those where `options["reset_mask"]` (num_envs,) is true."""
        mask = (options or {}).get("reset_mask")
        chosen = np.ones(self.num_envs, bool) if mask is None else np.asarray(mask, bool)
        seeds = _seeds(self.task, seed, self.num_envs)
        self._steps[chosen] = 0
        self._starts = [new if is_new else old for new, old, is_new in zip(seeds, self._starts, chosen, strict=True)]
        found = self._each(chosen, lambda index, environment: environment.reset(seed=seeds[index]))
        self._playing &= ~chosen
        for index, (observation, _) in found.items():
            self._observations[index], self._playing[index] = observation, True
        return self._observations.copy(), {}

    def step(
        self, actions: Float[np.ndarray, "environments action"]
    ) -> tuple[_Observations, Float64[np.ndarray, " environments"], _Flags, _Flags, dict[str, Any]]:
        """Apply an action in each environment whose episode has not ended. Others are truncated, with reward NaN."""
        rewards, terminated = np.full(self.num_envs, np.nan), np.zeros(self.num_envs, bool)
        truncated = np.ones(self.num_envs, bool)
        self._steps += self._playing
        found = self._each(self._playing, lambda index, environment: environment.step(actions[index]))
        for index, values in found.items():
            self._observations[index], rewards[index], terminated[index], truncated[index], _ = values
        self._playing = ~(terminated | truncated)
        return self._observations.copy(), rewards, terminated, truncated, {}

    def close_extras(self, **kwargs: Any) -> None:
        """End the threads and close the environments, in other threads: closing may hang."""
        self._crew.end()
        closing = {index: one.close for index, one in enumerate(self._environments) if one is not None}
        crew = _Crew(len(closing), min(self._timeout, CLOSE_TIMEOUT))
        crew.each(closing)
        crew.end()

    def _each(self, chosen: _Flags, work: Callable[[int, ForeignEnv], Any]) -> dict[int, Any]:
        """Do some work for the chosen environments. Return the results of those that did not fail."""
        made = {index: one for index, one in enumerate(self._environments) if chosen[index] and one is not None}
        found = self._crew.each({index: partial(work, index, one) for index, one in made.items()})
        self._observations[[index for index in np.flatnonzero(chosen) if index not in made]] = np.nan
        for index, error in [(index, value) for index, value in found.items() if isinstance(value, BaseException)]:
            if isinstance(error, UserError):
                raise error
            if isinstance(error, TimeoutError):
                self._environments[index] = None  # a thread is still using it
            reason = " ".join(f"{type(error).__name__}: {brief(error)}".split())
            seed = "" if self._starts[index] is None else f" (seed {self._starts[index]})"
            where = f"environment {index}{seed} failed in step {self._steps[index]}"
            self.failures.append(f"{self.task}: {where} ({reason}); its episodes are left out from here on")
            self._observations[index] = np.nan
            del found[index]
        return found


class _Crew:
    """Threads that work on environments, each piece of work for at most `timeout` seconds.

    A thread that hangs is replaced, and the process can end although a thread hangs. New threads in every step would
    double the time of HalfCheetah's steps.
    """

    def __init__(self, size: int, timeout: float) -> None:
        self._size, self._timeout = size, timeout
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        for _ in range(size):
            self._begin()

    def each(self, pieces: Mapping[int, Callable[[], Any]]) -> dict[int, Any]:
        """Return the result or the exception of each piece of work, TimeoutError if it takes too long."""
        pending, began, found, idle = iter(pieces.items()), dict[int, float](), dict[int, Any](), SimpleQueue[None]()

        def run() -> None:
            for index, piece in pending:  # shared by the threads: next() on it is atomic
                began[index] = time.monotonic()
                try:
                    found.setdefault(index, piece())
                except BaseException as error:  # an environment may raise anything
                    found.setdefault(index, error)
            idle.put(None)

        for _ in range(min(self._size, len(pieces))):
            self._work.put(run)
        while len(found) < len(pieces):
            try:
                idle.get(timeout=min(self._timeout, 1.0))
            except Empty:
                late = time.monotonic() - self._timeout
                for index in [index for index, start in list(began.items()) if start < late and index not in found]:
                    found.setdefault(index, TimeoutError(f"no answer in {self._timeout:g} s"))
                    self._begin()
                    self._work.put(run)
        return dict(found)

    def end(self) -> None:
        """End the threads that do not hang."""
        for _ in range(self._size):
            self._work.put(None)

    def _begin(self) -> None:
        threading.Thread(target=self._serve, daemon=True, name="ringrl-foreign").start()

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()


def _checked_threads(task: str, num_envs: int, threads: int | None) -> int:
    """Return the number of threads. UserError for fewer than one environment or thread."""
    threads = available_cores() if threads is None else threads
    for name, number in (("num_envs", num_envs), ("threads", threads)):
        if number < 1:
            raise UserError(f"{task}: {name} is {number}, at least 1 is needed")
    return threads


def _seeds(task: str, seed: int | Sequence[int | None] | None, num_envs: int) -> list[Any]:
    """Return one seed or None per environment."""
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, Integral):
        return [int(seed) + index for index in range(num_envs)]
    if not isinstance(seed, list | tuple | np.ndarray):
        raise UserError(f"{task}: the seed is {seed!r}, it must be an integer or one per environment")
    if len(seed) != num_envs:
        raise UserError(f"{task}: {len(seed)} seeds for {num_envs} environments; give one each")
    return list(seed)


def _share(pool: ThreadPoolExecutor | None, helpers: int, indices: np.ndarray, work: Callable[[int], None]) -> None:
    """Do some work for each index. An idle thread takes the next index, so that a slow one delays no other."""
    pending = iter(indices.tolist())  # shared by the threads: next() on it is atomic

    def run() -> None:
        for index in pending:
            work(index)

    futures = [pool.submit(run) for _ in range(helpers)] if pool else []
    try:
        run()
    finally:
        for future in futures:
            if not future.cancel():  # a helper that has not started has nothing left to do
                future.result()


def make_vec(
    task: str,
    num_envs: int,
    seed: int | Sequence[int | None] | None = None,
    threads: int | None = None,
    timeout: float = STEP_TIMEOUT,
) -> ExoRLVectorEnv | ForeignVectorEnv:
    """Make environments that step in lockstep; see `ExoRLVectorEnv` and `ForeignVectorEnv` (which has a timeout)."""
    if is_foreign(task):
        return ForeignVectorEnv(task, num_envs, seed, threads, timeout)
    return ExoRLVectorEnv(task, num_envs, seed, threads)
