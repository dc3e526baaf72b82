"""Reader of Minari datasets from any source, and access to the Minari library, which is an optional extra.

A dataset may be hostile. Minari's own reader starts the environment that the metadata names, follows links to other
files and reads arrays of any size. This reader checks the metadata first and rejects arrays of any other shape.
"""

import ast
import importlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import gymnasium
import h5py
import numpy as np

from ringrl.data.foreign import Steps, checked_steps
from ringrl.data.hdf5 import plain_dataset, read_plain
from ringrl.data.store.format import LARGEST_ROW, LONGEST_TEXT
from ringrl.envs import foreign_task
from ringrl.errors import UserError
from ringrl.files import explain_read_errors

METADATA = "metadata.json"
EPISODES = "main_data.hdf5"
REPEATED = ("observation_space", "action_space", "env_spec")
REFERENCES = ("ref_min_score", "ref_max_score")  # keys of the metadata
LARGEST_METADATA = 2**24  # bytes


def minari_module(name: str = "minari") -> ModuleType:
    """Return a module of the library. UserError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"Minari cannot be used ({error}): pip install 'ringrl[minari]'") from error


def check_id(name: str) -> None:
    """Raise UserError unless Minari accepts the name of a dataset, such as exorl/walker-rnd-v0."""
    parse = minari_module("minari.dataset.minari_dataset").parse_dataset_id
    try:
        parse(name)
    except (ValueError, TypeError) as error:  # TypeError: the version is missing
        raise UserError(f"{name}: is not a name of a Minari dataset, such as exorl/walker-rnd-v0") from error
    if not name.isascii():
        raise UserError(f"{name}: use letters, digits, - and _ in the name of a dataset")


def datasets_folder() -> Path:
    """Return Minari's folder of datasets: MINARI_DATASETS_PATH, or one in the user's home."""
    return Path(minari_module("minari.storage").get_dataset_path())


def locate(dataset: str) -> Path:
    """Return the folder with the data of a dataset, given its folder or name. UserError if it is not found."""
    for folder in (Path(dataset), Path(dataset) / "data"):
        if (folder / METADATA).is_file():
            return folder
    if Path(dataset).is_dir():
        raise UserError(f"{dataset}: is not a Minari dataset, {METADATA} is missing: give another folder")
    if Path(dataset).is_file():
        raise UserError(f"{dataset}: is a file: give a Minari dataset's name, or the folder with its {METADATA}")
    check_id(dataset)
    folder = datasets_folder() / dataset / "data"
    if not (folder / METADATA).is_file():
        raise UserError(
            f"{dataset}: neither a folder nor a dataset in {datasets_folder()}: check the name (minari list local), or "
            f"fetch it (minari download {dataset})"
        )
    return folder


ActionSpace = gymnasium.spaces.Box | gymnasium.spaces.Discrete
Arrays = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of the arrays of an observation: "observations/joints" (3,), in their order."""


class MinariEpisodes:
    """The episodes of a dataset, read one at a time. Use it as a context manager.

    Raises UserError, naming dataset and episode, for spaces that no store can hold and for damage.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with self._reading(METADATA):
            self.metadata, self.observation, self.action = _read_metadata(folder / METADATA)
        with self._reading(EPISODES):
            if not (folder / EPISODES).is_file():
                raise FileNotFoundError(f"no file {EPISODES}")
            self.size = (folder / EPISODES).stat().st_size
            # Without HDF5's file lock: network file systems often reject it, and nothing is written.
            self._file = h5py.File(folder / EPISODES, "r", locking=False)
        try:
            ends = [self._end(index) for index in range(self.metadata["total_episodes"])]
        except UserError:
            self._file.close()
            raise
        self.lengths = [length for length, _ in ends]
        self.num_terminated = sum(is_terminated for _, is_terminated in ends)

    def read(self, index: int) -> Steps:
        """Return one episode of finite numbers."""
        length = self.lengths[index]
        with self._reading(f"episode {index}"):
            parts = [self._array(index, name, (length + 1, *shape)) for name, shape in self.observation]
            return checked_steps(
                np.concatenate([part.reshape(length + 1, -1) for part in parts], axis=1),
                self._array(index, "actions", (length, *(self.action.shape or ()))),
                self._array(index, "rewards", (length,)),
                self._array(index, "terminations", (length,)),
            )

    def environment(self) -> str | None:
        """Return the environment in the metadata; None without one, or with wrappers, paths or infinite arguments."""
        with self._reading("its environment"):
            given = self.metadata.get("env_spec")
            spec = json.loads(given) if isinstance(given, str) else given
            if not spec or spec.get("additional_wrappers"):
                return None
            arguments, limit = dict(spec.get("kwargs") or {}), spec.get("max_episode_steps")
            installed = gymnasium.registry.get(spec["id"])
            for key, value in installed.kwargs.items() if installed else ():  # a maze, which would make a long name
                if key in arguments and repr(arguments[key]) == repr(value):
                    del arguments[key]
            if installed is not None and limit is not None and limit != installed.max_episode_steps:
                arguments["max_episode_steps"] = limit
            arguments.pop("render_mode", None)
            try:
                task = foreign_task(spec["id"], arguments)
            except UserError:
                return None
            texts = [node.value for node in ast.walk(ast.parse(repr(arguments))) if isinstance(node, ast.Constant)]
            # A dataset must not choose the files or modules that an environment reads.
            return None if any({*"/\\:"} & {*str(text)} for text in texts) else task

    def reference_returns(self) -> tuple[float, float] | None:
        """Return the mean returns of random actions and of an expert. None if the metadata lacks them."""
        with self._reading("its reference returns"):
            low, high = (self.metadata.get(name) for name in REFERENCES)
            return None if low is None or high is None else (float(low), float(high))

    def texts(self) -> dict[str, str]:
        """Return the metadata that an export repeats. Nothing if a store cannot hold so much text."""
        found = {name: self.metadata[name] for name in REPEATED if isinstance(self.metadata.get(name), str)}
        return found if sum(map(len, found.values())) <= LONGEST_TEXT // 2 else {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _end(self, index: int) -> tuple[int, bool]:
        """Return the number of steps of an episode, and whether the episode terminated."""
        with self._reading(f"episode {index}"):
            rewards = plain_dataset(self._file, f"episode_{index}/rewards")
            if rewards.ndim != 1 or len(rewards) == 0:
                raise UserError("has no list of rewards, one for each step")
            return len(rewards), bool(self._array(index, "terminations", rewards.shape)[-1])

    def _array(self, index: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return read_plain(self._file, f"episode_{index}/{name}", shape)

    def _reading(self, what: str) -> AbstractContextManager[None]:
        return explain_read_errors(f"{self.folder}: {what}", "make or download the dataset again")


def _read_metadata(path: Path) -> tuple[dict[str, Any], Arrays, ActionSpace]:
    """Return all metadata, the arrays of an observation, and the action space."""
    with path.open("rb") as file:
        content = file.read(LARGEST_METADATA + 1)
    if len(content) > LARGEST_METADATA:
        raise UserError(f"is larger than {LARGEST_METADATA:,} bytes")
    raw: dict[str, Any] = json.loads(content)
    if raw["data_format"] != "hdf5":
        raise UserError(f"has the data format {str(raw['data_format'])[:20]!r}, only hdf5 can be read")
    episodes = raw["total_episodes"]
    if not isinstance(raw["dataset_id"], str) or type(episodes) is not int or episodes < 1:
        raise UserError("names no dataset with episodes")
    return raw, *read_spaces(raw)


def read_spaces(texts: Mapping[str, Any]) -> tuple[Arrays, ActionSpace]:
    """Return the arrays of an observation and the action space, given Minari's texts of both.

    UserError, which does not name the dataset, for spaces that no store can hold. Damage raises other errors, too.
    """
    # If the metadata lacks the spaces, Minari runs the environment that the dataset names.
    for name in ("observation_space", "action_space"):
        if not isinstance(texts.get(name), str):
            raise UserError(f"lacks the {name}")
    observation, action = json.loads(texts["observation_space"]), json.loads(texts["action_space"])
    arrays = tuple(_arrays(observation, "observations"))
    if not 1 <= sum(math.prod(shape) for _, shape in arrays) <= LARGEST_ROW:
        raise UserError("has no observations, or too large ones")
    # Checked before Minari makes the space.
    if action["type"] == "Discrete":
        if not 1 <= int(action["n"]) <= LARGEST_ROW:
            raise UserError(f"has {action['n']} choices of actions")
    elif action["type"] == "Box":
        tuple(_arrays(action, "actions"))
    else:
        raise UserError(f"has {str(action['type'])[:20]} actions: only a Box of numbers and Discrete are supported")
    return arrays, minari_module("minari.serialization").deserialize_space(action)


def _arrays(space: dict[str, Any], name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of the arrays of a serialised space in Gymnasium's order. UserError for unusable ones."""
    kind = space["type"]
    if kind in ("Dict", "Tuple"):
        parts = space["subspaces"]
        named = sorted(parts.items()) if kind == "Dict" else [(f"_index_{i}", part) for i, part in enumerate(parts)]
        for key, part in named:
            if not key or "/" in key or key == ".":
                raise UserError(f"has {key!r} in its {name}, which is not an array name")
            yield from _arrays(part, f"{name}/{key}")
        return
    if kind != "Box":
        raise UserError(f"has {str(kind)[:20]} {name}: only a Box of numbers, or a Dict or Tuple of Boxes is supported")
    shape, dtype = space["shape"], np.dtype(space["dtype"])
    if not all(type(side) is int and side >= 1 for side in shape) or math.prod(shape) > LARGEST_ROW:
        raise UserError(f"has {name} of shape {str(shape)[:40]}")
    if dtype.kind not in "fiub":
        raise UserError(f"has {name} that are not numbers ({dtype})")
    if dtype == np.uint8 and len(shape) >= 2:
        raise UserError(f"has images as {name} ({'x'.join(map(str, shape))} bytes), which are not supported")
    yield name, tuple(shape)
