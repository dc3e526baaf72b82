"""Importing a Minari dataset into an episode store: our own exports, or datasets of any other domain."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from ringrl.data.minari.reader import EXPORTED, INFOS, MinariEpisodes, locate, minari_module
from ringrl.data.relabel import relabel_all
from ringrl.data.store import EpisodeStore
from ringrl.data.store.format import ROUNDED, Episode, recorded_arrays, reward_key
from ringrl.data.store.provenance import ForeignDomain, Provenance, software_versions
from ringrl.data.store.writer import create_store, refuse_taken
from ringrl.envs import Domain, domain_named
from ringrl.errors import UserError

PHYSICS = (("physics",), ("qpos", "qvel"))  # infos that may hold the state of a simulation


def import_minari(
    dataset: str,
    destination: str | Path,
    *,
    overwrite: bool = False,
    download: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> EpisodeStore:
    """Import a Minari dataset into a new episode store and open it.

    An export of `export_minari` is restored with every recorded number bit-equal, and its rewards are computed again.
    Any other dataset becomes a store of a domain with the dataset's name (see `ForeignDomain`): observations flattened
    to float32, actions scaled to [-1, 1], recorded rewards under a task of the same name, discount 0 where an episode
    terminated, and physics where the infos have "physics" or "qpos" and "qvel".

    Args:
        dataset: name of a dataset, or its folder.
        destination: the store to write.
        overwrite: replace an existing store.
        download: let Minari download a missing dataset.
        progress: is called with (episodes done, episodes in all).

    Raises:
        UserError: Minari or the dataset is missing; spaces other than Boxes of numbers (observations may be a Dict of
            Boxes), images, actions without bounds; damage; an existing destination; a full disk.
    """
    minari_module()
    destination = Path(destination)
    refuse_taken(destination, overwrite=overwrite)
    with MinariEpisodes(locate(dataset, download=download)) as episodes:
        exported = EXPORTED in episodes.description.raw
        origin: _Origin = Exported(episodes) if exported else _Foreign(episodes)
        domain, total = origin.domain, len(episodes.lengths)
        with create_store(
            destination, domain, domain.tasks, episodes.lengths, source=origin.provenance, overwrite=overwrite
        ) as writer:
            writer.recorded_task = origin.recorded_task
            for index in range(total):
                writer.append(origin.episode(index))
                if progress is not None:
                    progress(index + 1, total)
            if origin.fingerprint not in (None, writer.fingerprint()):
                raise UserError(f"{episodes.folder}: its episodes are not the exported ones: export it again")
    return EpisodeStore(destination)


class _Origin(Protocol):
    """Converts episodes of a dataset to episodes of a store."""

    domain: Domain
    recorded_task: str | None
    provenance: Provenance
    fingerprint: str | None  # expected of the content, where known

    def episode(self, index: int) -> Episode: ...


class Exported:
    """A dataset that `export_minari` wrote. UserError for incomplete metadata."""

    def __init__(self, episodes: MinariEpisodes) -> None:
        self._episodes, description = episodes, episodes.description
        try:
            origin = description.raw[EXPORTED]
            self.recorded_task: str | None = origin["recorded_task"]
            self.fingerprint: str | None = origin["fingerprint"]
            facts = origin["facts"]
            found = ForeignDomain.from_json(json.dumps(facts)) if facts else domain_named(origin["domain"])
            made = Provenance.from_json(json.dumps(origin["provenance"]))
            if self.recorded_task not in (*found.tasks, None) or not isinstance(self.fingerprint, str):
                raise ValueError(f"recorded for {self.recorded_task}")
            if (made.relabelling == "recorded") != isinstance(found, ForeignDomain):
                raise ValueError(f"relabelling {made.relabelling}")
        except (ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:100]
            raise UserError(
                f"{episodes.folder}: its metadata under {EXPORTED!r} is damaged ({reason}): export it again"
            ) from error
        self.domain: Domain = found
        self.provenance = dataclasses.replace(
            made, source=f"{made.source} by way of Minari", created_by=software_versions()
        )

    def episode(self, index: int) -> Episode:
        """Return all arrays of an episode."""
        episode = self.recorded(index)
        if self.provenance.relabelling == "recorded":
            return episode | {reward_key(self.domain.tasks[0]): episode["reward"][:, 0]}
        rewards = relabel_all(self.domain.name, episode["physics"], episode["action"], self.provenance.relabelling)
        return episode | {reward_key(task): reward for task, reward in rewards.items()}

    def recorded(self, index: int) -> dict[str, np.ndarray]:
        """Return the recorded arrays of an episode."""
        steps, info = self._episodes.read(index), self._episodes.info
        episode = {"observation": steps.observation, "action": _with_reset(steps.action.astype(np.float32))}
        for key, spec in recorded_arrays(self.domain).items():
            if key not in episode:
                episode[key] = info(index, INFOS[key], row=(spec.width,), dtype=spec.dtype.type)
        return episode


class _Foreign:
    """Any other dataset."""

    fingerprint: str | None = None

    def __init__(self, episodes: MinariEpisodes) -> None:
        self._episodes, description = episodes, episodes.description
        low, high = (bound.astype(np.float64).ravel() for bound in (description.action.low, description.action.high))
        if not (np.isfinite(high - low).all() and (low < high).all()):
            raise UserError(
                f"{episodes.folder}: its actions have no bounds and cannot be scaled to [-1, 1]: give its action space "
                "bounds"
            )
        self._center, self._radius = (high + low) / 2, (high - low) / 2
        self._physics = _physics_of(episodes)
        try:
            found = ForeignDomain.of(
                description.dataset_id,
                observation_size=sum(int(np.prod(box.shape)) for _, box in description.observation),
                physics_size=sum(self._physics.values()),
                action_low=tuple(low.tolist()),
                action_high=tuple(high.tolist()),
                episode_length=max(episodes.lengths),
                num_terminated=episodes.num_terminated,
            )
        except ValueError as error:
            raise UserError(f"{episodes.folder}: cannot be a store ({error}): rename the dataset") from error
        self.domain: Domain = found
        (self._task,) = found.tasks
        self.recorded_task: str | None = self._task
        self.provenance = Provenance(
            f"Minari ({description.dataset_id})", source_bytes=episodes.size, relabelling="recorded"
        )

    def episode(self, index: int) -> Episode:
        steps = self._episodes.read(index)
        discount = np.ones((len(steps.observation), 1), np.float32)
        discount[-1] = not steps.is_terminated
        reward = _with_reset(steps.reward)
        if abs(reward.sum(dtype=np.float64)) > np.finfo(np.float32).max:
            raise UserError(f"{self._episodes.folder}: the return of episode {index} is too large for float32")
        episode = {
            "observation": steps.observation,
            "action": _with_reset(self._scaled(index, steps.action)),
            "reward": reward[:, None],
            "discount": discount,
            reward_key(self._task): reward,
        }
        if self._physics:
            widths, info = self._physics.items(), self._episodes.info
            parts = [info(index, key, row=(width,), dtype=np.float64) for key, width in widths]
            episode["physics"] = np.concatenate(parts, axis=1)
        return episode

    def _scaled(self, index: int, action: np.ndarray) -> np.ndarray:
        scaled = (action - self._center) / self._radius
        if np.abs(scaled).max() > 1 + ROUNDED:
            step = int(np.argmax(np.abs(scaled).max(axis=1)))
            raise UserError(
                f"{self._episodes.folder}: the action of step {step} of episode {index} is outside the bounds of the "
                "action space: clip such actions or widen the bounds"
            )
        return np.clip(scaled, -1, 1).astype(np.float32)


def _physics_of(episodes: MinariEpisodes) -> dict[str, int]:
    """The infos that hold the state of the simulation, with their widths; none if the first episode has none."""
    for keys in PHYSICS:
        widths = {key: episodes.info_width(key) for key in keys}
        found = {key: width for key, width in widths.items() if width is not None}
        if len(found) == len(keys):
            return found
    return {}


def _with_reset(steps: np.ndarray) -> np.ndarray:
    """Prepend a row of zeros for the reset."""
    return np.concatenate([np.zeros_like(steps[:1]), steps])
