"""From an episode store to a Minari dataset, one episode at a time."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from ringrl import __version__
from ringrl.data import part
from ringrl.data.foreign import ForeignDomain
from ringrl.data.minari.episodes import MinariEpisodes
from ringrl.data.minari.importer import Exported
from ringrl.data.minari.library import EPISODES, EXPORTED, INFOS, METADATA, check_id, datasets_folder, minari_module
from ringrl.data.schema import episode_bytes, reward_key
from ringrl.data.store import EpisodeStore
from ringrl.errors import UserError

SPARE = 1.5  # HDF5's chunks do not fit an episode exactly


def export_minari(
    store: EpisodeStore,
    name: str,
    *,
    task: str | None = None,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes a store as the Minari dataset `name` with the rewards of one task; returns the dataset's folder.

    An episode has T+1 observations, T actions and rewards, and truncations that are True at the last step (for episodes
    that ended by themselves: terminations). Its infos hold what else the store knows, T+1 rows each: physics, the
    rewards of the other tasks, and reward and discount as they were recorded. The metadata says where it comes from.

    An export that is interrupted leaves no dataset, and the next one of that name removes its remains.

    Args:
        store: what to export.
        name: Minari's name for it, "exorl/walker-rnd-v0".
        task: whose rewards become the dataset's; None for the task whose rewards were recorded.
        folder: where datasets lie, as in MINARI_DATASETS_PATH; None for Minari's own.
        progress: is called with (episodes done, episodes in all).

    Raises:
        UserError: Minari is missing, a bad name, one that is taken, no such task, a disk that is full.
    """
    check_id(name)
    task = _checked_task(store, task)
    root = datasets_folder() if folder is None else folder
    target = root / name
    if target.exists():
        raise UserError(f"{target}: already exists, choose another --name or delete it (minari delete {name})")
    with part.cannot_write(target):
        descriptor = part.claim(target)
        growing = target.with_name(f".{target.name}.growing")
        try:
            shutil.rmtree(growing, ignore_errors=True)  # what a kill left
            growing.mkdir()
            with part.cannot_write(target, _size(store)):
                # HDF5 goes on, and may crash, when a write fails: a full disk must show before, and damage after.
                _require_space(store, growing)
            _write(store, name, task, growing / "data", progress)
            _compare(store, task, growing / "data", target)
            _sync(growing / "data")
            _name_namespaces(root, name)
            growing.rename(target)
            part.sync_folder(target.parent)
        finally:
            shutil.rmtree(growing, ignore_errors=True)
            part.discard(target)
            os.close(descriptor)
    return target


def _checked_task(store: EpisodeStore, task: str | None) -> str:
    task = store.recorded_task if task is None else task
    if task is None:
        raise UserError(
            f"{store.path}: was recorded for no single task, choose one (--task {' or '.join(store.tasks)})"
        )
    store.returns(task)  # a UserError if the store has no such task
    return task


def _require_space(store: EpisodeStore, folder: Path) -> None:
    """Claims about the bytes that the dataset will have, and gives them back at once. Raises OSError."""
    with (folder / "ballast").open("wb") as file:
        part.reserve(file.fileno(), _size(store))
    (folder / "ballast").unlink()


def _size(store: EpisodeStore) -> int:
    length = store.num_steps // store.num_episodes + 1
    return int(SPARE * store.num_episodes * episode_bytes(store.facts, length, relabelled=True))


def _write(store: EpisodeStore, name: str, task: str, data: Path, progress: Callable[[int, int], None] | None) -> None:
    data.mkdir()
    storage = minari_module("minari.dataset.minari_storage").MinariStorage.new(
        data.absolute(),  # of a relative path Minari cannot tell the size
        observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (store.observation_size,), np.float32),
        action_space=gymnasium.spaces.Box(-1.0, 1.0, (store.action_size,), np.float32),
        env_spec=None if isinstance(store.facts, ForeignDomain) else gymnasium.spec(f"ringrl/{task}-v0"),
        data_format="hdf5",
    )
    storage.update_metadata(_metadata(store, name, task))
    try:
        storage.update_episodes(_episodes(store, task, progress))
    except RuntimeError as error:  # which HDF5 raises as well when it cannot write
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
        metadata["requirements"] = [f"ringrl>={__version__}"]  # which has the environment
    return metadata


def _episodes(store: EpisodeStore, task: str, progress: Callable[[int, int], None] | None) -> Iterator[Any]:
    """Minari's episode buffers: views of the store."""
    buffer = minari_module("minari.data_collector.episode_buffer").EpisodeBuffer
    others = [other for other in store.tasks if other != task]
    for index in range(store.num_episodes):
        rows = store.episode(index)
        if rows["action"][0].any():
            raise UserError(f"{store.path}: episode {index} has an action before its first state, Minari has no place")
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
    """Reads all of the dataset. UserError if it is not what the store holds."""
    with MinariEpisodes(data) as episodes:
        exported = Exported(episodes)
        for index in range(store.num_episodes):
            rows, found = store.episode(index), exported.recorded(index)
            found[reward_key(task)] = np.insert(episodes.read(index).reward, 0, rows[reward_key(task)][0])
            for other in {*store.tasks} - {task}:
                found[reward_key(other)] = episodes.info(index, "rewards", other, row=(), dtype=np.float32)
            for key, array in rows.items():
                if not np.array_equal(array, found[key]):
                    raise UserError(f"{target}: {key} of episode {index} did not reach the disk whole, export it again")


def _sync(data: Path) -> None:
    for path in (data / EPISODES, data / METADATA):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _name_namespaces(root: Path, name: str) -> None:
    """Minari lists only those namespaces whose folders say that they are such."""
    says = minari_module("minari.namespace").NAMESPACE_METADATA_FILENAME
    folder = root
    for step in name.split("/")[:-1]:
        folder /= step
        if not (folder / says).exists():
            (folder / says).write_text("{}")
