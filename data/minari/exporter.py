"""Exporting an episode store as a Minari dataset, one episode at a time."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from ringrl import __version__
from ringrl.data.minari.importer import Exported
from ringrl.data.minari.reader import (
    EXPORTED,
    INFOS,
    MinariEpisodes,
    check_id,
    datasets_folder,
    minari_module,
)
from ringrl.data.store import EpisodeStore
from ringrl.data.store.format import episode_bytes, reward_key
from ringrl.data.store.provenance import ForeignDomain
from ringrl.errors import UserError
from ringrl.files import explain_write_errors, lock, reserve, write_aside

SPARE = 1.5  # HDF5's chunks are larger than an episode


def export_minari(
    store: EpisodeStore,
    name: str,
    *,
    task: str | None = None,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a store as the Minari dataset `name` with the rewards of one task, and return the dataset's folder.

    An episode has T+1 observations, T actions and rewards, and truncations that are True at the last step (for
    terminated episodes: terminations). Its infos hold the other arrays, T+1 rows each: physics, the rewards of the
    other tasks, and reward and discount as recorded. The metadata holds the store's provenance.

    An interrupted export leaves no dataset, and the next one of that name removes its files.

    Args:
        store: the store to export.
        name: Minari's name of the dataset, "exorl/walker-rnd-v0".
        task: the task whose rewards become the dataset's; None for the recorded task.
        folder: parent folder of all datasets, as in MINARI_DATASETS_PATH; None for Minari's own.
        progress: is called with (episodes done, episodes in all).

    Raises:
        UserError: Minari is missing, a bad name, an existing dataset, no such task, a full disk.
    """
    check_id(name)
    task = _checked_task(store, task)
    root = datasets_folder() if folder is None else folder
    target = root / name
    if target.exists():
        raise UserError(f"{target}: already exists, choose another --name or delete it (minari delete {name})")
    with explain_write_errors(target), lock(target, "is writing it"), write_aside(target) as growing:
        growing.mkdir()
        # HDF5 continues, and may crash, when a write fails. So the space is checked before, and the content after.
        ballast = growing / "ballast"
        with explain_write_errors(target, _size(store)):
            reserve(ballast, _size(store))
        ballast.unlink(missing_ok=True)
        _write(store, name, task, growing / "data", progress)
        _compare(store, task, growing / "data", target)
        _name_namespaces(root, name)
    return target


def _checked_task(store: EpisodeStore, task: str | None) -> str:
    task = store.recorded_task if task is None else task
    if task is None:
        raise UserError(
            f"{store.path}: was recorded for no single task, choose one (--task {' or '.join(store.tasks)})"
        )
    store.returns(task)  # raises UserError if the store has no such task
    return task


def _size(store: EpisodeStore) -> int:
    """About the bytes of the dataset."""
    length = store.num_steps // store.num_episodes + 1
    return int(SPARE * store.num_episodes * episode_bytes(store.facts, length, relabelled=True))


def _write(store: EpisodeStore, name: str, task: str, data: Path, progress: Callable[[int, int], None] | None) -> None:
    data.mkdir()
    storage = minari_module("minari.dataset.minari_storage").MinariStorage.new(
        data.absolute(),  # Minari cannot compute the size of a relative path
        observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (store.observation_size,), np.float32),
        action_space=gymnasium.spaces.Box(-1.0, 1.0, (store.action_size,), np.float32),
        env_spec=None if isinstance(store.facts, ForeignDomain) else gymnasium.spec(f"ringrl/{task}-v0"),
        data_format="hdf5",
    )
    storage.update_metadata(_metadata(store, name, task))
    try:
        storage.update_episodes(_episodes(store, task, progress))
    except RuntimeError as error:  # HDF5 also raises these when it cannot write
        raise OSError(str(error)) from error


def _metadata(store: EpisodeStore, name: str, task: str) -> dict[str, Any]:
    made = store.provenance
    origin = {
        "ringrl_version": __version__,
        "fingerprint": store.fingerprint,
        "domain": store.domain,
        "task": task,
        "recorded_task": store.recorded_task,
        "provenance": json.loads(made.to_json()),
        "facts": json.loads(store.facts.to_json()) if isinstance(store.facts, ForeignDomain) else None,
    }
    described = f"{store.num_episodes:,} episodes of {store.domain} from {made.source}, with the rewards of {task}"
    metadata: dict[str, Any] = {
        "dataset_id": name,
        "minari_version": minari_module().__version__,
        "description": f"{described} (rewards: {made.relabelling}). Exported by ringrl {__version__}.",
        EXPORTED: origin,
    }
    if not isinstance(store.facts, ForeignDomain):
        metadata["requirements"] = [f"ringrl>={__version__}"]  # contains the environment
    return metadata


def _episodes(store: EpisodeStore, task: str, progress: Callable[[int, int], None] | None) -> Iterator[Any]:
    """Yield Minari's episode buffers, views of the store."""
    buffer = minari_module("minari.data_collector.episode_buffer").EpisodeBuffer
    others = [other for other in store.tasks if other != task]
    for index in range(store.num_episodes):
        rows = store.episode(index)
        if rows["action"][0].any():
            raise UserError(f"{store.path}: episode {index} has an action in its reset row, which Minari cannot store")
        steps = len(rows["action"]) - 1
        is_last, is_terminated = np.arange(steps) == steps - 1, bool(rows["discount"][-1, 0] == 0)
        infos: dict[str, Any] = {name: rows[key] for key, name in INFOS.items() if key in rows}
        if others:
            infos["rewards"] = {other: rows[reward_key(other)] for other in others}
        yield buffer(
            observations=rows["observation"],
            actions=rows["action"][1:],
            rewards=rows[reward_key(task)][1:],
            terminations=is_last & is_terminated,
            truncations=is_last & (not is_terminated),
            infos=infos,
        )
        if progress is not None:
            progress(index + 1, store.num_episodes)


def _compare(store: EpisodeStore, task: str, data: Path, target: Path) -> None:
    """Read the whole dataset. UserError if it differs from the store."""
    with MinariEpisodes(data) as episodes:
        exported = Exported(episodes)
        for index in range(store.num_episodes):
            rows, found = store.episode(index), exported.recorded(index)
            found[reward_key(task)] = np.insert(episodes.read(index).reward, 0, rows[reward_key(task)][0])
            for other in {*store.tasks} - {task}:
                found[reward_key(other)] = episodes.info(index, "rewards", other, row=(), dtype=np.float32)
            for key, array in rows.items():
                if not np.array_equal(array, found[key]):
                    raise UserError(f"{target}: {key} of episode {index} was not written correctly, export it again")


def _name_namespaces(root: Path, name: str) -> None:
    """Mark the folders of a name as namespaces: Minari lists only those."""
    marker = minari_module("minari.namespace").NAMESPACE_METADATA_FILENAME
    folder = root
    for step in name.split("/")[:-1]:
        folder /= step
        if not (folder / marker).exists():
            (folder / marker).write_text("{}")
