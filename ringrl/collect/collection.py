"""A collection: its size, its method, and a folder that appears when it is complete."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ringrl import __version__
from ringrl.collect.scripted import search
from ringrl.envs import ForeignDomain, domain_of
from ringrl.errors import UserError
from ringrl.files import explain_write_errors, linked, lock, sync
from ringrl.pace import Progress, no_progress
from ringrl.processes import available_cores

METHODS = ("scripted", "td3")
TRANSITIONS = 200_000  # by default

_DESCRIPTION = "collection.json"


def collect(
    task: str,
    destination: Path,
    *,
    episodes: int | None = None,
    seed: int,
    method: str = "scripted",
    workers: int | None = None,
    progress: Progress = no_progress,
) -> Path:
    """Record a dataset in the ExoRL format, `destination/buffer/episode_{number}_{steps}.npz`. Return `destination`.

    The episodes, in order of their numbers, are the history of a learner. The same arguments give the same arrays on
    the same machine, for any number of workers. Files of a Gymnasium environment, whose episodes may end early, are for
    `ringrl data import --format npz`.

    The folder appears when the collection is complete. Until then, finished episodes are in the hidden folder
    `.{name}.partial` next to it, and the same call resumes there. After the end the same call changes nothing.

    Args:
        task: full task name, "walker_walk".
        destination: folder to create. An empty folder may exist.
        episodes: number of episodes. None: 200,000 transitions.
        seed: seed of initial states, noise, search and learner.
        method: "scripted" searches the parameters of a scripted controller, "td3" learns a policy from scratch.
        workers: processes that record scripted episodes. None: one per available core. With more than one, a script
            must call this under `if __name__ == "__main__":`, because the processes import it.
        progress: called with (recorded episodes, total).

    UserError for an unknown task or method, a number out of range, a taken destination, or a worker that died.
    """
    domain = domain_of(task)
    if isinstance(domain, ForeignDomain) and method != "td3":
        raise UserError(f"{task}: has no script; give --method td3, or record it with Minari's DataCollector")
    if isinstance(domain, ForeignDomain) and domain.is_discrete:
        raise UserError(f"{task}: td3 cannot learn its discrete actions; record it with Minari's DataCollector")
    episodes = TRANSITIONS // domain.episode_length if episodes is None else episodes
    if method not in METHODS:
        raise UserError(f"no method {method!r}; methods are {', '.join(METHODS)}")
    if method != "scripted" and task not in domain.tasks:
        raise UserError(f"{task}: method {method} does not record this task: use scripted, or collect another task")
    for name, number, least in (("episodes", episodes, 1), ("seed", seed, 0), ("workers", workers, 1)):
        if number is not None and number < least:
            raise UserError(f"--{name}: {number} is too small; give at least {least}")
    if method != "scripted" and workers not in (None, 1):
        raise UserError(f"{task}: workers is {workers}, but method {method} learns in one process: leave workers out")
    destination = Path(destination)
    description = {"task": task, "method": method, "episodes": episodes, "seed": seed, "ringrl": __version__}
    with _new_folder(destination, json.dumps(description, indent=2) + "\n", episodes) as folder:
        if folder is None:
            return destination
        if method == "scripted":
            workers = workers or available_cores()
            search(task, folder, episodes=episodes, seed=seed, workers=workers, progress=progress)
        else:
            from ringrl.collect.learner import learn  # imports JAX, which is slow

            learn(task, folder, episodes=episodes, seed=seed, progress=progress)
    return destination


@contextmanager
def _new_folder(destination: Path, description: str, episodes: int) -> Iterator[Path | None]:
    """Yield a hidden folder next to `destination`, which gets that name when the block succeeds.

    Yield None if `destination` is the finished collection of this description. If the block fails, the hidden folder
    stays for the next call, or is deleted if it has no episodes. UserError as for `collect`.
    """
    destination = linked(destination.absolute())
    partial = destination.with_name(f".{destination.name}.partial")

    def is_same(folder: Path) -> bool:
        path = folder / _DESCRIPTION
        return path.is_file() and path.read_text("utf-8", "replace") == description

    with explain_write_errors(destination), lock(destination, "is collecting into it"):
        if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
            if is_same(destination) and len([*destination.glob("buffer/*.npz")]) == episodes:
                yield None
                return
            raise UserError(
                f"{destination}: exists and is neither an empty folder nor this collection, remove it or choose "
                "another name"
            )
        if any(partial.glob("buffer/*.npz")) and not is_same(partial):
            raise UserError(
                f"{destination}: {partial} contains part of another collection (see its {_DESCRIPTION}): continue that "
                "collection, remove the folder or choose another name"
            )
        try:
            (partial / "buffer").mkdir(parents=True, exist_ok=True)
            (partial / _DESCRIPTION).write_text(description, "utf-8")
            yield partial
        except BaseException:
            if not any(partial.glob("buffer/*.npz")):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        partial.replace(destination)
        sync(destination.parent)
