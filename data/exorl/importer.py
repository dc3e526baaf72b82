"""Import of ExoRL archives into an episode store in one pass: read, validate, relabel for every task, write."""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from ringrl.data.exorl.archive import Archive, Member, shown
from ringrl.data.relabel import relabel_all
from ringrl.data.store.format import Provenance, reward_key
from ringrl.data.store.reader import EpisodeStore
from ringrl.data.store.writer import StoreWriter, create_store
from ringrl.envs import Domain, domain_named, make
from ringrl.errors import UserError
from ringrl.files import linked
from ringrl.pace import Progress, no_progress

Subset = Literal["first", "last", "spread"]
"""The episodes to import if there is a limit: the first ones, the last ones, or episodes at equal distances."""

SAME_REWARD = 1e-5  # the same task recorded in float32 by another MuJoCo differs by about 3e-8


def import_archive(
    source: str | Path | Sequence[str | Path],
    destination: str | Path,
    domain: str,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
    subset: Subset = "first",
    max_episodes: int | None = None,
    tasks: Sequence[str] | None = None,
) -> EpisodeStore:
    """Import a zip archive or folder in ExoRL's layout, or several in this order, into a new episode store and open it.

    The same call writes the same bytes. A store that it would write again is only opened.

    Args:
        source: zip file or folder with buffer/episode_{number}_{steps}.npz, or several.
        destination: the store to write. A link stays, and the file that it leads to is written.
        domain: name of the domain, "walker".
        overwrite: replace an existing store, which stays until the new one is whole.
        progress: called with (finished episodes, total).
        subset: the episodes to take from an archive with more than `max_episodes`.
        max_episodes: limit on the number of episodes of each archive. None: all.
        tasks: full names of the tasks to compute rewards for. None: all tasks of the domain.

    Raises:
        UserError: bad input, an episode that is in two archives, another existing destination, a full disk.
    """
    if max_episodes is not None and max_episodes < 1:
        raise UserError(f"--max-episodes: {max_episodes} is too small; give at least 1")
    destination = linked(Path(destination))
    facts = domain_named(domain)
    tasks = tuple(dict.fromkeys(tasks or facts.tasks))
    if unknown := [task for task in tasks if not facts.has_task(task)]:
        raise UserError(f"--tasks: {unknown[0]} is not a task of {domain}; choose from {', '.join(facts.tasks)}")
    sources = tuple(map(Path, [source] if isinstance(source, str | Path) else source))
    if len({path.resolve() for path in sources}) < len(sources):
        raise UserError(f"{', '.join(map(str, sources))}: one archive is named twice; name it once")
    selected = _select(sources, facts, tasks, subset, max_episodes)
    if not overwrite and (store := _finished_before(destination, selected)):
        return store
    lengths = [facts.episode_length] * len(selected.members)
    with create_store(destination, facts, tasks, lengths, source=selected.provenance, overwrite=overwrite) as writer:
        writer.recorded_task = _import_episodes(selected, writer, progress)
    return EpisodeStore(destination)


def chosen_episodes(subset: Subset, limit: int | None, episodes: int) -> tuple[Int64[np.ndarray, " chosen"], str]:
    """Return ascending indices among `episodes` episodes, and a description: "10 of 240 episodes, the first ones"."""
    if limit is None or limit >= episodes:
        return np.arange(episodes), f"all {episodes:,} episodes"
    chosen, how = {
        "first": (np.arange(limit), "the first ones"),
        "last": (np.arange(episodes - limit, episodes), "the last ones"),
        "spread": (np.round(np.linspace(0, episodes - 1, limit)).astype(np.int64), "at equal distances"),
    }[subset]
    return chosen, f"{limit:,} of {episodes:,} episodes, {how}"


class Selection(NamedTuple):
    """The episodes to import, and all else that determines the content of the store."""

    members: list[tuple[Path, Member]]  # archives and their episodes
    domain: Domain
    tasks: tuple[str, ...]
    provenance: Provenance
    changed: int  # time of the last change of an episode of a folder, in ns; 0 for zip files


def _select(
    sources: Sequence[Path], domain: Domain, tasks: tuple[str, ...], subset: Subset, max_episodes: int | None
) -> Selection:
    members, origins, changed = list[tuple[Path, Member]](), list[Provenance](), 0
    for source in sources:
        with Archive(source, domain) as archive:
            chosen, description = chosen_episodes(subset, max_episodes, len(archive.members))
            for index in chosen:
                archive.check_length(archive.members[index])
                members.append((source, archive.members[index]))
            name = "/".join(source.resolve().parts[-2:])
            origins.append(Provenance(name, archive.size(), archive.listing_sha256(), subset=description))
            if source.is_dir():
                changed = max(changed, *(stamp for _, _, stamp in archive.stamps()))
    provenance = origins[0]
    if len(origins) > 1:
        listings = "".join(one.source_sha256 for one in origins)
        provenance = Provenance(
            source=" + ".join(one.source for one in origins),
            source_bytes=sum(one.source_bytes for one in origins),
            source_sha256=hashlib.sha256(listings.encode()).hexdigest(),
            subset="; ".join(dict.fromkeys(one.subset for one in origins)),
        )
    return Selection(members, domain, tasks, provenance, changed)


def _finished_before(destination: Path, selected: Selection) -> EpisodeStore | None:
    """Return the existing store if this selection was written to it, on any day."""
    try:
        store = EpisodeStore(destination)
    except UserError:
        return None
    provenance = replace(selected.provenance, created=store.provenance.created)
    if (store.provenance, store.domain, store.tasks) != (provenance, selected.domain.name, selected.tasks):
        return None
    return None if destination.stat().st_mtime_ns < selected.changed else store


def _import_episodes(selected: Selection, writer: StoreWriter, progress: Progress) -> str | None:
    """Write every episode. Return the task whose rewards were recorded; None if none, several or another one fits."""
    domain, given = selected.domain, selected.tasks
    # Another task of the domain may have the same rewards, whether it is imported or not.
    others = () if domain.records_all_tasks else tuple(task for task in domain.tasks if task not in given)
    candidates = [task for task in domain.tasks if task in (*given, *others)]  # with the recorded rewards
    starts, has_reward = list[np.ndarray](), False
    seen = dict[bytes, Path]()  # archives of the recorded content; collections with equal seeds begin alike
    with ExitStack() as opened:
        archives = {source: opened.enter_context(Archive(source, domain)) for source in dict(selected.members)}
        for index, (source, member) in enumerate(selected.members):
            recorded = archives[source].read(member)
            rewards = relabel_all(domain.name, recorded["physics"], recorded["action"], (*given, *others))
            writer.append(recorded | {reward_key(task): rewards[task] for task in given})
            if (other := seen.setdefault(writer.records[index].recorded, source)) != source:
                raise UserError(
                    f"{source}: {shown(member.path)} is also in {other}: leave it out (--subset), or collect with "
                    "another --seed"
                )
            reward = recorded["reward"][:, 0]
            candidates = [task for task in candidates if np.abs(rewards[task] - reward).max() <= SAME_REWARD]
            has_reward |= bool(recorded["reward"].any())
            starts.append(recorded["physics"][0].copy())
            progress(index + 1, len(selected.members))
    if domain.records_all_tasks or not has_reward:
        return None
    nearest = _nearest_start(candidates, np.mean(starts, axis=0))
    return nearest if nearest in given else None


def _nearest_start(tasks: Sequence[str], start: Float64[np.ndarray, " physics"]) -> str | None:
    """Return the only task, or that of the nearest mean start, or None. Cartpole's tasks may differ only in it."""
    if len(tasks) < 2:
        return tasks[0] if tasks else None
    distances = {}
    for task in tasks:
        env = make(task, seed=0)
        own = np.stack([env.reset()[1]["physics"] for _ in range(8)])
        distances[task] = float(np.linalg.norm(own.mean(axis=0) - start))
    nearest, second = sorted(tasks, key=distances.__getitem__)[:2]
    return nearest if distances[nearest] < 0.5 * distances[second] else None
