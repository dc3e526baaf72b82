"""Tasks of other packages: every environment that is registered with Gymnasium, such as "gymnasium:HalfCheetah-v5".

Arguments of the environment are part of the name: "gymnasium:Hopper-v5(max_episode_steps=500)". Nothing else can be
named, so that a dataset can start only environments of installed packages.
"""

import ast
import copy
import functools
import importlib
import math
import re
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from jaxtyping import Float, Float32

from ringrl.envs.domain import Actions, ForeignDomain
from ringrl.errors import UserError, brief

PREFIX = "gymnasium:"
# Mean returns of random actions and of an expert, for normalised scores as in D4RL (2004.07219, `d4rl.infos`).
_D4RL: Mapping[str, tuple[float, float]] = {
    "HalfCheetah": (-280.178953, 12135.0), "Hopper": (-20.272305, 3234.3), "Walker2d": (1.629008, 4592.3),
    "Ant": (-325.6, 3879.7), "AdroitHandPen": (96.262799, 3076.833102),
    "AdroitHandHammer": (-274.856578, 12794.134825), "AdroitHandDoor": (-56.512833, 2880.569309),
    "AdroitHandRelocate": (-6.425911, 4233.877798),
}  # fmt: skip
_NAME = re.compile(r"gymnasium:((?:[\w-]+/)?[\w.-]+)(?:\((.*)\))?")
_REFUSED = {"render_mode", "vectorization_mode", "disable_env_checker"}


def is_foreign(task: str) -> bool:
    """Return whether a name is that of a Gymnasium environment."""
    return task.startswith(PREFIX)


def foreign_task(identifier: str, arguments: Mapping[str, Any] | None = None) -> str:
    """Return the task of a Gymnasium id (or name) and plain arguments. UserError for a module, or another argument."""
    identifier = identifier.removeprefix(PREFIX)
    written = ",".join(f"{key}={value!r}" for key, value in sorted((arguments or {}).items()))
    task = f"{PREFIX}{identifier}({written})" if written else f"{PREFIX}{identifier}"
    parse_foreign(task)
    return task


def import_environments(module: str) -> None:
    """Import a user's module that registers environments, from the working folder, too. UserError if this fails."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a module may raise anything
        raise UserError(f"{module} cannot be imported ({brief(error) or type(error).__name__})") from error
    finally:
        sys.path.remove(str(Path.cwd()))


def foreign_spec(task: str) -> gymnasium.envs.registration.EnvSpec | None:
    """Return Gymnasium's specification of an environment; None if it is not installed, or cannot be written as JSON."""
    identifier, arguments = parse_foreign(task)
    if identifier not in gymnasium.registry or callable(gymnasium.spec(identifier).entry_point):
        return None
    spec = copy.deepcopy(gymnasium.spec(identifier))
    spec.max_episode_steps = arguments.pop("max_episode_steps", spec.max_episode_steps)
    spec.kwargs = spec.kwargs | arguments
    return spec


def d4rl_returns(task: str) -> tuple[float, float] | tuple[None, None]:
    """Return the mean returns of random actions and of an expert in D4RL; None for environments that D4RL lacks."""
    identifier, arguments = parse_foreign(task)
    return (None, None) if arguments else _D4RL.get(re.sub(r"-v\d+$", "", identifier), (None, None))


def actions_of(space: gymnasium.Space, where: object) -> Actions:
    """Return the bounds of an action space. UserError, which names `where`, unless it is a bounded Box or Discrete."""
    if isinstance(space, spaces.Discrete):
        first, last = float(space.start), float(space.start + space.n - 1)
        return Actions((first,) * int(space.n), (last,) * int(space.n), is_discrete=True)
    if not isinstance(space, spaces.Box):
        raise UserError(f"{where}: its actions are a {type(space).__name__}; only Box and Discrete are supported")
    low, high = (np.asarray(bound, np.float64).ravel() for bound in (space.low, space.high))
    if not (np.isfinite(high - low).all() and (low < high).all()):
        raise UserError(f"{where}: its actions have no bounds and cannot be scaled to [-1, 1]")
    return Actions(tuple(low.tolist()), tuple(high.tolist()))


@functools.cache
def foreign_domain(task: str) -> ForeignDomain:
    """Return the domain of a Gymnasium environment, which is made once. UserError as for `ForeignEnv`."""
    environment = ForeignEnv(task)
    environment.close()
    return environment.domain


class ForeignEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A Gymnasium environment with flat float32 observations and actions in [-1, 1].

    Observations of a Dict (sorted by key) or Tuple of Boxes are concatenated, as `gymnasium.spaces.flatten` does.
    Actions of a Box are scaled to its bounds. Of a discrete space, the largest of the action's numbers chooses.

    Raises:
        UserError: no such environment is installed, it has no step limit, or its spaces are not supported.
    """

    def __init__(self, task: str, seed: int | None = None, render_mode: str | None = None) -> None:
        self.task, self._seed = task, seed
        identifier, arguments = parse_foreign(task)
        self._environment = _made(task, identifier, arguments, render_mode)
        limit = self._environment.spec.max_episode_steps if self._environment.spec else None
        if limit is None:
            raise UserError(f"{task}: has no step limit; add one: {identifier}(max_episode_steps=1000)")
        self.domain = _domain(task, self._environment, limit)
        self._space = _by_key(self._environment.observation_space)
        self.render_mode, self.metadata = render_mode, self._environment.metadata
        self.observation_space, self.action_space = self.domain.spaces()

    def __repr__(self) -> str:
        sizes = f"observation {self.observation_space.shape}, action {self.action_space.shape}"
        return f"ForeignEnv({self.task}, {sizes}, at most {self.domain.episode_length} steps)"

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float32[np.ndarray, " observation"], dict[str, Any]]:
        """Start an episode. A seed begins a new stream of starts."""
        seed, self._seed = self._seed if seed is None else seed, None
        observation, info = self._environment.reset(seed=seed, options=options)
        return self._flat(observation), info

    def step(
        self, action: Float[np.ndarray, " action"]
    ) -> tuple[Float32[np.ndarray, " observation"], float, bool, bool, dict[str, Any]]:
        """Apply an action, clipped to [-1, 1]. UserError for another shape, or an action that is not finite."""
        action = np.asarray(action)
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            raise UserError(f"{self.task}: the action {action} must be {self.action_space.shape} finite numbers")
        taken = native_actions(self.domain, self._environment.action_space, action)
        observation, reward, terminated, truncated, info = self._environment.step(taken)
        return self._flat(observation), float(reward), bool(terminated), bool(truncated), info

    def render(self) -> Any:
        """Return an image, as the environment makes it."""
        return self._environment.render()

    def close(self) -> None:
        """Close the environment. Its exceptions are ignored: no result depends on them."""
        with suppress(Exception):
            self._environment.close()

    def _flat(self, observation: Any) -> Float32[np.ndarray, " observation"]:
        flat = np.asarray(spaces.flatten(self._space, observation), np.float32)
        if flat.shape != self.observation_space.shape:  # NumPy would repeat a single number
            raise ValueError(f"the observation has {flat.size} numbers, its space has {self.domain.observation_size}")
        return flat


def native_actions(
    domain: ForeignDomain, space: gymnasium.Space, actions: Float[np.ndarray, "*batch action"]
) -> np.ndarray:
    """Return actions, clipped to [-1, 1], as an environment takes them: choices (*batch), or (*batch, ...) of a Box."""
    if not isinstance(space, spaces.Box):
        choices: np.ndarray = int(domain.action_low[0]) + actions.argmax(-1)
        return choices
    taken = domain.taken(np.clip(actions, -1.0, 1.0).astype(np.float64))
    taken = (taken if space.dtype.kind == "f" else np.rint(taken)).reshape(*actions.shape[:-1], *space.shape)
    return np.clip(taken, space.low, space.high).astype(space.dtype)


def parse_foreign(task: str) -> tuple[str, dict[str, Any]]:
    """Return the id and the arguments of an environment, installed or not. UserError for another name."""
    match = _NAME.fullmatch(task)
    expected = 'write it like "gymnasium:Hopper-v5" or "gymnasium:Hopper-v5(max_episode_steps=500)"'
    if match is None:
        raise UserError(f"{task}: is not the name of a Gymnasium environment; {expected}")
    identifier, written = match.groups()
    try:
        call = ast.parse(f"_({written or ''})", mode="eval").body
        is_plain = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args
        if not isinstance(call, ast.Call) or not is_plain or any(part.arg is None for part in call.keywords):
            raise ValueError("arguments need names")
        arguments = {str(part.arg): ast.literal_eval(part.value) for part in call.keywords}
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise UserError(f"{task}: its arguments are not plain values; {expected}") from error
    limit = arguments.get("max_episode_steps", 1)
    if type(limit) is not int or not 1 <= limit < 2**31:  # -1 would remove the environment's own limit
        raise UserError(f"{task}: max_episode_steps is {limit!r}; give a whole number of at least 1")
    if refused := sorted(_REFUSED & {*arguments}):
        raise UserError(f"{task}: {refused[0]} is not a part of a task; leave it out")
    return identifier, arguments


def _made(task: str, identifier: str, arguments: dict[str, Any], render_mode: str | None) -> gymnasium.Env:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of newer versions, which are other tasks
            options = arguments if render_mode is None else arguments | {"render_mode": render_mode}
            return gymnasium.make(identifier, **options)
    except gymnasium.error.UnregisteredEnv as error:
        raise UserError(
            f"{task}: no installed package has this environment ({brief(error)}); install the package, name the module "
            "that registers it (--environment MODULE:NAME, or environment_modules in a plan), or choose another "
            "environment with the same spaces"
        ) from error
    except (Exception, SystemExit) as error:  # anything that an environment raises
        raise UserError(f"{task}: cannot be made ({brief(error) or type(error).__name__})") from error


def _domain(task: str, environment: gymnasium.Env, limit: int) -> ForeignDomain:
    actions = actions_of(environment.action_space, task)
    return ForeignDomain(
        name=task,
        tasks=(task,),
        observation_size=_flat_size(task, environment.observation_space),
        action_size=len(actions.action_low),
        physics_size=0,
        episode_length=limit,
        control_timestep=float(getattr(environment.unwrapped, "dt", 0.0) or 0.0),
        **actions._asdict(),
    )


def _by_key(space: gymnasium.Space) -> gymnasium.Space:
    """Return an observation space with the parts of each Dict sorted by key, as in a Minari dataset."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: _by_key(part) for key, part in space.spaces.items()})
    return spaces.Tuple(map(_by_key, space.spaces)) if isinstance(space, spaces.Tuple) else space


def _flat_size(task: str, space: gymnasium.Space) -> int:
    """Return the number of numbers in an observation."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces
        return sum(_flat_size(task, part) for part in parts)
    if not isinstance(space, spaces.Box):
        raise UserError(f"{task}: has {type(space).__name__} observations; only Boxes of numbers are supported")
    if space.dtype == np.uint8 and len(space.shape) >= 2:
        raise UserError(f"{task}: observes images, which are not supported; choose a version that observes states")
    return math.prod(space.shape)
