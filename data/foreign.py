"""Episodes of any source as a store: arrays, folders of npz files, and flat HDF5 files as D4RL's."""

import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np
import pydantic
from jaxtyping import Float32, Float64

from ringrl.config_files import one_line
from ringrl.data.hdf5 import MOST_COMPRESSED, SMALL, read_plain
from ringrl.data.store.format import ROUNDED, Episode, ForeignFacts, Provenance, StoredDomain, reward_key
from ringrl.data.store.reader import EpisodeStore
from ringrl.data.store.writer import create_store
from ringrl.envs import Actions, ForeignDomain, foreign_domain
from ringrl.errors import UserError
from ringrl.files import explain_read_errors
from ringrl.pace import Progress, no_progress

_NAMES = {
    "observation": ("observation", "observations"),
    "action": ("action", "actions"),
    "reward": ("reward", "rewards"),
    "terminated": ("terminated", "termination", "terminations", "terminal", "terminals"),
}
_ENDS = ("done", "dones")  # ambiguous: no value follows a termination, but the last state's value follows a truncation


class Steps(NamedTuple):
    """An episode of T steps, with actions as the environment takes them."""

    observation: Float32[np.ndarray, "time_plus_1 observation"]
    action: Float64[np.ndarray, "time action"]  # one column if actions are choices
    reward: Float32[np.ndarray, " time"]
    is_terminated: bool


def _as_episode(domain: ForeignDomain, steps: Steps, where: str) -> Episode:
    """Return the arrays of an episode in a store. UserError for a wrong action, or a return too large for float32."""
    if domain.is_discrete:
        choice = steps.action[:, 0] - domain.action_low[0]
        outside = (choice != np.round(choice)) | (choice < 0) | (choice >= domain.action_size)
        action = (choice[:, None] == np.arange(domain.action_size)).astype(np.float64)
    else:
        action = domain.scaled(steps.action)
        outside = np.abs(action).max(axis=1) > 1 + ROUNDED
    if outside.any():
        raise UserError(
            f"{where}: the action of step {int(outside.argmax())} is outside the action space: clip such actions, or "
            "give another action space"
        )
    discount = np.ones((len(steps.observation), 1), np.float32)
    discount[-1] = not steps.is_terminated
    with_reset = lambda rows: np.concatenate([np.zeros_like(rows[:1]), rows])  # noqa: E731
    reward = with_reset(steps.reward)
    if abs(reward.sum(dtype=np.float64)) > np.finfo(np.float32).max:
        raise UserError(f"{where}: the return is too large for float32")
    return {
        "observation": steps.observation,
        "action": with_reset(np.clip(action, -1, 1).astype(np.float32)),
        "reward": reward[:, None],
        "discount": discount,
        reward_key(domain.tasks[0]): reward,
    }


def write_steps(
    path: Path,
    facts: dict[str, Any],
    episodes: Iterable[Steps],
    lengths: Sequence[int],
    source: Provenance,
    where: str,
    *,
    overwrite: bool,
    progress: Progress,
) -> EpisodeStore:
    """Write episodes of the given lengths to a new store and open it. UserError, naming `where`, if they do not fit.

    The facts are those of `ForeignFacts` except for physics_size and episode_length.
    """
    try:
        domain = StoredDomain.of(ForeignFacts(physics_size=0, episode_length=max(lengths), **facts))
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: cannot be a store ({one_line(error)})") from error
    with create_store(path, domain, domain.tasks, lengths, source=source, overwrite=overwrite) as writer:
        (writer.recorded_task,) = domain.tasks
        for index, steps in enumerate(episodes):
            writer.append(_as_episode(domain, steps, f"{where}, episode {index}"))
            progress(index + 1, len(lengths))
    return EpisodeStore(path)


def write_episodes(
    path: str | Path,
    episodes: Iterable[Mapping[str, Any]],
    *,
    environment: str | None = None,
    reference_returns: tuple[float, float] | None = None,
    source: str = "arrays",
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> EpisodeStore:
    """Write your own episodes to a new store and open it.

    Args:
        path: the file to write.
        episodes: each a mapping with observation (T+1, ...) or (T, ...), action (T, ...) as the environment takes it,
            reward (T,), and terminated (T,) or a bool (default: False). Of T observations, the last is repeated.
            Choices are integers (T,).
        environment: the Gymnasium environment of the episodes, "gymnasium:Hopper-v5", whose bounds scale the actions.
            None: actions are in [-1, 1], and the store has the file's name.
        reference_returns: mean returns of random actions and of an expert, for normalised scores.
        source: the origin of the episodes, for the store's description and for errors.
        overwrite, progress: as for `import_archive`.

    Raises:
        UserError: arrays of other shapes, numbers that are not finite, no such environment or one with other spaces, an
            existing file, a full disk.
    """
    path = Path(path)
    steps = [_steps(episode, f"{source}, episode {index}") for index, episode in enumerate(episodes)]
    if not steps:
        raise UserError(f"{source}: has no episodes")
    facts = _facts(environment, path, steps, source) | {"reference_returns": reference_returns}
    lengths, made = [len(one.reward) for one in steps], Provenance(source, relabelling="recorded")
    return write_steps(path, facts, steps, lengths, made, source, overwrite=overwrite, progress=progress)


def import_episodes(
    path: Path, destination: Path, format: Literal["npz", "hdf5"], *, environment: str | None = None, **options: Any
) -> EpisodeStore:
    """Import a folder of npz files, one per episode, or a flat HDF5 file of all steps, into a new store and open it.

    Arrays are observation, action and reward, and terminated if known (or their plurals, or terminals). Without a
    further observation, the last one is repeated. A flat file also has timeouts; without them, episodes end after the
    environment's limit of steps. Options are those of `write_episodes`.

    Raises:
        UserError: no environment of that name, other spaces, no or damaged episodes, a taken destination, a full disk.
    """
    limit = foreign_domain(environment).episode_length if environment else None
    with explain_read_errors(f"{path}:", f"check that it is {format}"):
        episodes = [] if format == "npz" else _flat(path, limit)
        for file in _numbered(path) if format == "npz" else ():
            with explain_read_errors(file.name, "remove it or record it again"):
                episodes.append(_npz(file))
    return write_episodes(destination, episodes, environment=environment, source=path.name, **options)


def load_episode(path: Path, domain: ForeignDomain) -> Episode:
    """Return the episode of an npz file, in the arrays of a store. A damaged file raises any error."""
    return _as_episode(domain, _steps(_npz(path), path.name), path.name)


def checked_steps(observation: np.ndarray, action: np.ndarray, reward: np.ndarray, terminated: np.ndarray) -> Steps:
    """Return an episode of T steps from arrays (T+1, ...), (T, ...), (T,) and (T,) or (1,).

    UserError, which does not name the episode, for arrays of other lengths, or values that are not finite.
    """
    length = len(reward)
    if not length or (len(observation), len(action)) != (length + 1, length):
        shapes = f"{len(observation)} observations, {len(action)} actions and {length} rewards"
        raise UserError(f"has {shapes}; expected T + 1 (or T), T and T, with T at least 1")
    if terminated.shape not in ((1,), (length,)):
        raise UserError(f"has terminations of shape {terminated.shape}; expected ({length},) or one bool")
    if terminated[:-1].any():
        raise UserError(f"terminates before its last step (step {int(terminated.argmax())})")
    return Steps(
        finite("observations", observation, np.float32).reshape(length + 1, -1),
        finite("actions", action, np.float64).reshape(length, -1),
        finite("rewards", reward, np.float32),
        bool(terminated[-1]),
    )


def finite(name: str, array: np.ndarray, dtype: type) -> np.ndarray:
    """Return an array in another type. UserError, which does not name the episode, for values that are not finite."""
    if array.dtype.kind not in "fiub":
        raise UserError(f"has {name} that are not numbers")
    with np.errstate(over="ignore"):
        converted: np.ndarray = array.astype(dtype)
    if not (rows := np.isfinite(converted).reshape(len(converted), -1).all(axis=1)).all():
        raise UserError(f"has a value in row {int(np.argmin(rows))} of {name} that is not finite")
    return converted


def _steps(episode: Mapping[str, Any], where: str) -> Steps:
    """Check the arrays of an episode."""
    found = {name: np.asarray(episode[key]) for name, keys in _NAMES.items() for key in keys if key in episode}
    if missing := [name for name in ("observation", "action", "reward") if name not in found]:
        raise UserError(f"{where}: has no array {missing[0]}")
    if "terminated" not in found and (ends := [name for name in _ENDS if name in episode]):
        raise UserError(f"{where}: has an array {ends[0]}; name it terminated, and set it to False at a truncation")
    observation, action = np.atleast_1d(found["observation"]), np.atleast_1d(found["action"])
    reward, terminated = found["reward"].reshape(-1), np.atleast_1d(found.get("terminated", False))
    if terminated.shape == (len(reward), 1):
        terminated = terminated[:, 0]
    if observation.dtype == np.uint8 and observation.ndim > 2:
        raise UserError(f"{where}: has images, which are not supported")
    if len(observation) == len(reward):
        observation = np.concatenate([observation, observation[-1:]])
    try:
        return checked_steps(observation, action, reward, terminated)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _facts(environment: str | None, path: Path, steps: Sequence[Steps], source: str) -> dict[str, Any]:
    """Return the facts about the episodes, with the action space of the environment, or [-1, 1]."""
    sizes = [(one.observation.shape[1], one.action.shape[1]) for one in steps]
    observation_size, action_size = sizes[0]
    if other := [index for index, size in enumerate(sizes) if size != sizes[0]]:
        numbers = "{} and {}".format(*sizes[other[0]])
        raise UserError(
            f"{source}, episode {other[0]}: observations and actions have {numbers} numbers, those of episode 0 have "
            f"{observation_size} and {action_size}"
        )
    if environment is None:
        highest = max(float(np.abs(one.action).max()) for one in steps)
        if highest > 1 + ROUNDED:
            raise UserError(
                f"{source}: its actions reach {highest:g} and are scaled to [-1, 1] by the bounds of the environment: "
                "name it (--environment)"
            )
        actions = Actions((-1.0,) * action_size, (1.0,) * action_size)
        name = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem) or "episodes"
    else:
        made, name = foreign_domain(environment), environment
        actions = made.actions
        columns = 1 if made.is_discrete else made.action_size
        if (observation_size, action_size) != (made.observation_size, columns):
            raise UserError(
                f"{source}: observations and actions have {observation_size} and {action_size} numbers, those of "
                f"{environment} have {made.observation_size} and {columns}: name the environment of the data"
            )
    terminated = sum(one.is_terminated for one in steps)
    return {"name": name, "observation_size": observation_size, "num_terminated": terminated, **actions._asdict()}


def _numbered(folder: Path) -> list[Path]:
    """Return the npz files of a folder, by the numbers in their names."""
    if not folder.is_dir():
        raise UserError("is no folder; give a folder of npz files, one per episode")
    parts = lambda path: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", path.name)]  # noqa: E731
    files = sorted(folder.glob("*.npz"), key=parts)
    if not files:
        raise UserError("has no npz files")
    return files


def _npz(path: Path) -> dict[str, Any]:
    """Read an npz file, without pickles and not larger than it may be."""
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > SMALL + MOST_COMPRESSED * path.stat().st_size:
        raise UserError(f"claims {size:,} bytes, far more than it stores")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files if name in sum(_NAMES.values(), _ENDS)}


def _flat(path: Path, limit: int | None) -> list[dict[str, Any]]:
    """Read a flat file: observations, actions, rewards, terminals, and timeouts or next_observations if it has them."""
    if not path.is_file():
        raise UserError("is no file")
    wanted = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    with h5py.File(path, "r", locking=False) as file:
        arrays = {name: read_plain(file, name) for name in wanted if file.get(name, getlink=True)}
    if missing := [name for name in wanted[:4] if name not in arrays]:
        raise UserError(f"has no array {missing[0]}; a flat file has {', '.join(wanted[:4])} and timeouts")
    rows = len(arrays["rewards"])
    if other := [name for name, array in arrays.items() if len(array) != rows]:
        raise UserError(f"has {len(arrays[other[0]])} {other[0]} and {rows} rewards")
    for name in {"terminals", "timeouts"} & {*arrays}:
        if arrays[name].size != rows:
            raise UserError(f"has {name} of shape {arrays[name].shape}; expected ({rows},)")
    terminals = arrays["terminals"].astype(bool).reshape(-1)
    if "timeouts" not in arrays and limit is None:
        raise UserError("has no timeouts; name its environment, whose limit of steps is used (--environment)")
    ends = terminals | arrays["timeouts"].astype(bool).reshape(-1) if "timeouts" in arrays else terminals.copy()
    limit = None if "timeouts" in arrays else limit
    episodes, first = [], 0
    for row in range(rows):
        if ends[row] or row == rows - 1 or (limit is not None and row + 1 - first == limit):
            part = slice(first, row + 1)
            observation = arrays["observations"][part]
            if "next_observations" in arrays:
                observation = np.concatenate([observation, arrays["next_observations"][row : row + 1]])
            episodes.append({
                "observation": observation, "action": arrays["actions"][part], "reward": arrays["rewards"][part],
                "terminated": terminals[part],
            })  # fmt: skip
            first = row + 1
    return episodes
