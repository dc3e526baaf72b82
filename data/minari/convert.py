"""Import of a Minari dataset into an episode store, and export of a store as a Minari dataset."""

import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from ringrl import __version__
from ringrl.data.foreign import write_steps
from ringrl.data.minari.reader import (
    REFERENCES,
    ActionSpace,
    MinariEpisodes,
    check_id,
    datasets_folder,
    locate,
    minari_module,
    read_spaces,
)
from ringrl.data.store import EpisodeStore
from ringrl.data.store.format import Provenance, StoredDomain, episode_bytes, reward_key
from ringrl.envs import actions_of, foreign_domain, foreign_spec, is_foreign, native_actions
from ringrl.errors import UserError
from ringrl.files import explain_read_errors, explain_write_errors, lock, reserve, write_aside
from ringrl.pace import Progress, no_progress

SPARE = 1.5  # HDF5's chunks are larger than an episode
INFOS = {"reward": "recorded_reward", "discount": "recorded_discount", "physics": "physics"}  # array -> name


def import_minari(
    dataset: str,
    destination: str | Path,
    *,
    environment: str | None = None,
    reference_returns: tuple[float, float] | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> EpisodeStore:
    """Import a Minari dataset into a new episode store of its environment (see `StoredDomain`) and open it.

    Observations are flattened to float32, actions scaled to [-1, 1] or one of several choices. The only task has the
    recorded rewards, and the discount is 0 where an episode terminated.

    Args:
        dataset: name of a dataset, or its folder.
        destination, overwrite, progress: as for `ringrl.data.import_archive`.
        environment: "gymnasium:Hopper-v5". None: the one that the dataset names.
        reference_returns: mean returns of random actions and of an expert, for normalised scores. None: the dataset's.

    Raises:
        UserError: Minari or the dataset is missing; observations other than Boxes of numbers, or a Dict or Tuple of
            them; actions other than a bounded Box or Discrete; damage; an existing destination; a full disk.
    """
    minari_module()
    with MinariEpisodes(locate(dataset)) as episodes:
        source = f"Minari ({episodes.metadata['dataset_id']})"
        return write_steps(
            Path(destination),
            _facts(episodes, environment, reference_returns),
            map(episodes.read, range(len(episodes.lengths))),
            episodes.lengths,
            Provenance(source, source_bytes=episodes.size, relabelling="recorded"),
            str(episodes.folder),
            overwrite=overwrite,
            progress=progress,
        )


def _facts(
    episodes: MinariEpisodes, environment: str | None, reference_returns: tuple[float, float] | None
) -> dict[str, Any]:
    """Return the facts about a dataset from another source."""
    actions = actions_of(episodes.action, episodes.folder)
    observation_size = sum(math.prod(shape) for _, shape in episodes.observation)
    made = foreign_domain(environment) if environment else None
    if made and (observation_size, actions) != (made.observation_size, made.actions):
        own, found = (observation_size, len(actions.action_low)), (made.observation_size, made.action_size)
        numbers = "observations and actions have {} and {} numbers, those of {environment} have {} and {}"
        bounds = "actions have other bounds than those of {environment}"
        differ = (numbers if own != found else bounds).format(*own, *found, environment=environment)
        raise UserError(f"{episodes.folder}: {differ}: name the environment of the data")
    return actions._asdict() | {
        "name": environment or episodes.environment() or episodes.metadata["dataset_id"],
        "observation_size": observation_size,
        "observation": {
            name.removeprefix("observations/"): math.prod(shape) for name, shape in episodes.observation if "/" in name
        },
        "minari": {name: text for name, text in episodes.texts().items() if not (environment and name == "env_spec")},
        "num_terminated": episodes.num_terminated,
        "reference_returns": reference_returns or episodes.reference_returns(),
    }


def export_minari(store: EpisodeStore, name: str, *, task: str | None = None, progress: Progress = no_progress) -> Path:
    """Write a store as the Minari dataset `name` with the rewards of one task, and return the dataset's folder.

    The name is one like "exorl/walker-rnd-v0". The variable MINARI_DATASETS_PATH names another parent folder than
    Minari's own. Infos hold T+1 rows of physics, of the rewards of the other tasks, and of reward and discount as
    recorded. The metadata holds the store's provenance. An interrupted export leaves no dataset. Without a `task`, the
    rewards are those of the recorded task.

    UserError if Minari is missing, for a bad name, an existing dataset, no such task, or a full disk.
    """
    check_id(name)
    task = store.recorded_task if task is None else task
    if task is None:
        raise UserError(
            f"{store.path}: was recorded for no single task, choose one (--task {' or '.join(store.tasks)})"
        )
    store.returns(task)  # raises UserError if the store has no such task
    root = datasets_folder()
    target = root / name
    if target.exists():
        raise UserError(f"{target}: already exists, choose another --name or delete it (minari delete {name})")
    with explain_write_errors(target), lock(target, "is writing it"), write_aside(target) as growing:
        growing.mkdir()
        # HDF5 may crash when the disk is full, so the space is checked before.
        length, space = store.num_steps // store.num_episodes + 1, growing / "space"
        size = int(SPARE * store.num_episodes * episode_bytes(store.facts, length, relabelled=True))
        with explain_write_errors(target, size):
            reserve(space, size)
        space.unlink(missing_ok=True)
        _write(store, name, task, growing / "data", progress)
        with MinariEpisodes(growing / "data") as written:
            if written.lengths != store.lengths.tolist():
                raise UserError(f"{target}: was not written correctly, export it again")
        # Minari lists only folders that are marked as namespaces.
        for namespace in Path(name).parents[:-1]:
            marker = root / namespace / minari_module("minari.namespace").NAMESPACE_METADATA_FILENAME
            if not marker.exists():
                marker.write_text("{}")
    return target


def _write(store: EpisodeStore, name: str, task: str, data: Path, progress: Progress) -> None:
    data.mkdir()
    observation, action = _spaces(store)
    imported = store.facts.minari if isinstance(store.facts, StoredDomain) else {}
    known = {name: text for name, text in imported.items() if name == "env_spec"}
    made = foreign_spec(task) if is_foreign(task) else gymnasium.registry.get(f"ringrl/{task}-v0")
    storage = minari_module("minari.dataset.minari_storage").MinariStorage.new(
        data.absolute(),  # Minari fails for a relative path
        observation_space=observation,
        action_space=action,
        env_spec=None if known else made,
        data_format="hdf5",
    )
    storage.update_metadata(_metadata(store, name, task) | known)
    try:
        storage.update_episodes(_episodes(store, task, observation, action, progress))
    except RuntimeError as error:  # HDF5 also raises these when it cannot write
        raise OSError(str(error)) from error


def _spaces(store: EpisodeStore) -> tuple[gymnasium.Space, ActionSpace]:
    """Return the spaces of the imported dataset, or flat spaces. UserError if they do not fit the store."""
    domain, spaces = store.facts, gymnasium.spaces
    if not isinstance(domain, StoredDomain):
        return domain.spaces()
    if "observation_space" not in domain.minari:
        flat, _ = domain.spaces()
        if domain.is_discrete:
            return flat, spaces.Discrete(domain.action_size, start=int(domain.action_low[0]))
        low, high = (np.array(bound, np.float32) for bound in domain.actions[:2])
        return flat, spaces.Box(low, high)
    with explain_read_errors(f"{store.path}: its spaces", "import the dataset again"):
        arrays, action = read_spaces(domain.minari)
        size = sum(math.prod(shape) for _, shape in arrays)
        if (size, actions_of(action, "")) != (domain.observation_size, domain.actions):
            raise UserError("differ from its arrays: import the dataset again")
        text = domain.minari["observation_space"]
        return minari_module("minari.serialization").deserialize_space(text), action


def _parts(space: Any, columns: Iterator[np.ndarray]) -> Any:
    """Return observations (T+1, ...) in the form of their space, given the columns (T+1,) of flat observations."""
    if isinstance(space, gymnasium.spaces.Dict):
        return {key: _parts(space[key], columns) for key in sorted(space.spaces)}
    if isinstance(space, gymnasium.spaces.Tuple):
        return tuple(_parts(part, columns) for part in space.spaces)
    rows = np.stack(list(islice(columns, math.prod(space.shape))), axis=1)
    return rows.reshape(-1, *space.shape).astype(space.dtype, copy=False)


def _metadata(store: EpisodeStore, name: str, task: str) -> dict[str, Any]:
    made, foreign = store.provenance, store.facts if isinstance(store.facts, StoredDomain) else None
    described = f"{store.num_episodes:,} episodes of {store.domain} from {made.source}, with the rewards of {task}"
    metadata: dict[str, Any] = {
        "dataset_id": name,
        "minari_version": minari_module().__version__,
        "description": f"{described} (rewards: {made.relabelling}). Exported by ringrl {__version__}.",
        "ringrl": {"fingerprint": store.fingerprint, "task": task, "provenance": json.loads(made.to_json())},
    }
    if foreign and foreign.reference_returns:
        metadata |= zip(REFERENCES, foreign.reference_returns, strict=True)
    if foreign is None:
        metadata["requirements"] = [f"ringrl>={__version__}"]  # contains the environment
    return metadata


def _episodes(
    store: EpisodeStore, task: str, observation: gymnasium.Space, action: ActionSpace, progress: Progress
) -> Iterator[Any]:
    """Yield Minari's episode buffers."""
    buffer = minari_module("minari.data_collector.episode_buffer").EpisodeBuffer
    domain, others = store.facts, [other for other in store.tasks if other != task]
    for index in range(store.num_episodes):
        rows = store.episode(index)
        if rows["action"][0].any():
            raise UserError(f"{store.path}: episode {index} has an action in its reset row, which Minari cannot store")
        actions, steps = rows["action"][1:], len(rows["action"]) - 1
        is_last, is_terminated = np.arange(steps) == steps - 1, bool(rows["discount"][-1, 0] == 0)
        infos: dict[str, Any] = {name: rows[key] for key, name in INFOS.items() if key in rows}
        if others:
            infos["rewards"] = {other: rows[reward_key(other)] for other in others}
        yield buffer(
            observations=_parts(observation, iter(rows["observation"].T)),
            actions=native_actions(domain, action, actions) if isinstance(domain, StoredDomain) else actions,
            rewards=rows[reward_key(task)][1:],
            terminations=is_last & is_terminated,
            truncations=is_last & (not is_terminated),
            infos=infos,
        )
        progress(index + 1, store.num_episodes)
