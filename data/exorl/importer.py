"""Import of ExoRL archives into an episode store in one pass: read, validate, relabel for every task, write.

The unfinished file has the digest of each finished episode. The same command resumes an interrupted import.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int64

from ringrl.data.exorl.archive import Archive, Member, shown
from ringrl.data.relabel import relabel_all
from ringrl.data.store.format import FORMAT_VERSION, Episode, Layout, Provenance, reward_key
from ringrl.data.store.reader import EpisodeStore
from ringrl.data.store.writer import (
    Record,
    UnfinishedStore,
    create_file,
    finish,
    finished_store,
    hidden_name,
    refuse_taken,
    reserve_space,
)
from ringrl.envs import Domain, domain_named, make
from ringrl.errors import UnreadableError, UserError
from ringrl.files import explain_write_errors, linked, lock, raise_unreadable
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

    An interrupted import (killed, Ctrl-C, disk full) leaves a hidden file next to `destination`. The same call resumes
    it and writes the same bytes. With `overwrite`, the old store stays until the new one is whole. Without, an existing
    store is opened if the same call would write it.

    Args:
        source: zip file or folder with buffer/episode_{number}_{steps}.npz, or several.
        destination: the store to write. A link stays, and the file that it leads to is written.
        domain: name of the domain, "walker".
        overwrite: replace an existing store.
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
    plan = _plan(sources, destination, facts, tasks, subset, max_episodes)
    if not overwrite and (store := _finished_before(plan)):
        return store
    refuse_taken(destination, overwrite=overwrite)
    with explain_write_errors(destination), lock(destination, "is writing it"), _resumable(plan) as partial:
        with UnfinishedStore(partial, plan.layout, plan.identity) as unfinished:
            imported = _import_episodes(plan, unfinished, progress)
            task = _recorded_task(unfinished, imported)
        finish(partial, destination, plan.layout, [episode.record for episode in imported], task, plan.provenance)
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


class Imported(NamedTuple):
    """An episode that has been written."""

    record: Record
    matches: tuple[str, ...]  # tasks whose rewards equal the recorded rewards
    has_reward: bool  # whether any recorded reward is not zero


@dataclass(frozen=True)
class ImportPlan:
    """Everything that determines the content of the store."""

    destination: Path
    members: tuple[tuple[Path, Member], ...]  # archives and their episodes
    layout: Layout
    provenance: Provenance
    changed: int  # time of the last change of an episode of a folder, in ns; 0 for zip files
    identity: str  # an import with the same identity resumes an interrupted import


def _plan(
    sources: Sequence[Path],
    destination: Path,
    domain: Domain,
    tasks: tuple[str, ...],
    subset: Subset,
    max_episodes: int | None,
) -> ImportPlan:
    members, stamps, origins, changed = list[tuple[Path, Member]](), list[Any](), list[Provenance](), 0
    for source in sources:
        with Archive(source, domain) as archive:
            chosen, description = chosen_episodes(subset, max_episodes, len(archive.members))
            for index in chosen:
                archive.check_length(archive.members[index])
                members.append((source, archive.members[index]))
            name = "/".join(source.resolve().parts[-2:])
            origins.append(Provenance(name, archive.size(), archive.listing_sha256(), subset=description))
            stamps.append(archive.stamps())
            changed = max(changed, *(stamp for _, _, stamp in stamps[-1])) if source.is_dir() else changed
    provenance = origins[0]
    if len(origins) > 1:
        listings = "".join(one.source_sha256 for one in origins)
        provenance = Provenance(
            source=" + ".join(one.source for one in origins),
            source_bytes=sum(one.source_bytes for one in origins),
            source_sha256=hashlib.sha256(listings.encode()).hexdigest(),
            subset="; ".join(dict.fromkeys(one.subset for one in origins)),
        )
    episodes = [member for _, member in members]
    facts = [FORMAT_VERSION, domain.name, asdict(replace(provenance, created="")), episodes, stamps, tasks]
    return ImportPlan(
        destination=destination,
        members=tuple(members),
        layout=Layout(domain, tasks, [domain.episode_length] * len(members)),
        provenance=provenance,
        changed=changed,
        identity=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
    )


def _finished_before(plan: ImportPlan) -> EpisodeStore | None:
    """Return the existing store if it is the result of this plan."""
    store = finished_store(plan.destination, plan.provenance)
    if store is None or (store.domain, store.tasks) != (plan.layout.domain.name, plan.layout.tasks):
        return None
    return None if store.path.stat().st_mtime_ns < plan.changed else store


@contextmanager
def _resumable(plan: ImportPlan) -> Iterator[Path]:
    """Create the hidden file, or reuse the file of an interrupted import of the same plan, and yield its path.

    If the block fails, the file is deleted unless it has a finished episode.
    """
    partial = hidden_name(plan.destination)
    if not _has_episodes(plan):
        create_file(partial, plan.layout, plan.identity)
    try:
        with explain_write_errors(plan.destination):
            yield partial
    except BaseException as error:
        if not _has_episodes(plan):
            partial.unlink(missing_ok=True)
        elif isinstance(error, UserError):
            raise UserError(f"{error}; finished episodes are kept: run the same command again to resume") from error
        raise


def _has_episodes(plan: ImportPlan) -> bool:
    """Return whether the hidden file is of this plan and has a finished episode."""
    partial = hidden_name(plan.destination)
    try:
        with UnfinishedStore(partial, plan.layout, plan.identity) as store:
            return any(map(store.finished, range(len(plan.members))))
    except Exception as error:  # HDF5 raises nearly anything when the bytes are damaged
        raise_unreadable(partial, error)
        return False


def _import_episodes(plan: ImportPlan, store: UnfinishedStore, progress: Progress) -> list[Imported]:
    """Write every episode that an interrupted import has not written.

    UserError for a damaged episode, or one that is in two archives, which deletes the file.
    """
    layout, partial, imported = plan.layout, hidden_name(plan.destination), list[Imported]()
    domain, given = layout.domain, layout.tasks
    # Another task of the domain may have the same rewards, whether it is imported or not.
    others = () if domain.records_all_tasks else tuple(task for task in domain.tasks if task not in given)
    seen = dict[bytes, Path]()  # archives of the recorded content; collections with equal seeds begin alike
    with ExitStack() as opened:
        archives = {source: opened.enter_context(Archive(source, domain)) for source in dict(plan.members)}
        for index, (source, member) in enumerate(plan.members):
            record = store.finished(index)
            if record:
                episode: Episode = store.read(index)
                rewards = {task: episode[reward_key(task)] for task in given}
                if others:
                    rewards |= relabel_all(domain.name, episode["physics"], episode["action"], others)
            else:
                try:
                    recorded = archives[source].read(member)
                except UnreadableError:
                    raise
                except UserError:
                    partial.unlink()
                    raise
                rewards = relabel_all(domain.name, recorded["physics"], recorded["action"], (*given, *others))
                episode = recorded | {reward_key(task): rewards[task] for task in given}
                record = store.write(index, episode)
            if (other := seen.setdefault(record.recorded, source)) != source:
                partial.unlink()
                raise UserError(
                    f"{source}: {shown(member.path)} is also in {other}: leave it out (--subset), or collect with "
                    "another --seed"
                )
            if not imported:  # not earlier: an archive of false names would reserve any amount
                reserve_space(partial, plan.destination)
            errors = {task: np.abs(reward - episode["reward"][:, 0]).max() for task, reward in rewards.items()}
            matches = tuple(task for task, error in errors.items() if error <= SAME_REWARD)
            imported.append(Imported(record, matches, bool(episode["reward"].any())))
            progress(len(imported), len(plan.members))
    return imported


def _recorded_task(store: UnfinishedStore, imported: Sequence[Imported]) -> str | None:
    """Return the task whose rewards were recorded.

    None: no task or several fit, the task is not imported, or rewards of all tasks were recorded.
    """
    domain = store.layout.domain
    if domain.records_all_tasks or not any(episode.has_reward for episode in imported):
        return None
    candidates = [task for task in domain.tasks if all(task in episode.matches for episode in imported)]
    if not candidates:
        return None
    nearest = candidates[0] if len(candidates) == 1 else _nearest_start(candidates, store, len(imported))
    return nearest if nearest in store.layout.tasks else None


def _nearest_start(candidates: Sequence[str], store: UnfinishedStore, episodes: int) -> str | None:
    """Return the task whose starts are clearly nearest to those of the episodes; None if none is."""
    # Cartpole's balance and swingup have the same reward and differ only in the start. The nearer start decides.
    start = np.mean([store.read(index)["physics"][0] for index in range(episodes)], axis=0)
    distances = {}
    for task in candidates:
        env = make(task, seed=0)
        own = np.stack([env.reset()[1]["physics"] for _ in range(8)])
        distances[task] = float(np.linalg.norm(own.mean(axis=0) - start))
    nearest, second = sorted(candidates, key=distances.__getitem__)[:2]
    return nearest if distances[nearest] < 0.5 * distances[second] else None
