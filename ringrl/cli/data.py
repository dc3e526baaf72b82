"""ringrl data: download, import, collect, describe and export datasets."""

from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console


def data_import(
    archive: tyro.conf.Positional[Path], domain: str, output: Path | None = None, overwrite: bool = False
) -> None:
    """Import an ExoRL archive (zip or folder) into an episode store, relabelled for all tasks of the domain.

    Args:
        archive: zip file or folder with buffer/episode_{index}_{length}.npz.
        domain: walker, cheetah, cartpole, jaco, quadruped or point_mass_maze.
        output: store to write; by default the archive's name with the ending .h5.
        overwrite: replace an existing store.
    """
    from rich.progress import Progress

    from ringrl.data import import_archive
    from ringrl.data.card import describe

    destination = output or archive.with_suffix(".h5")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("importing", total=None)
        store = import_archive(
            archive,
            destination,
            domain,
            overwrite=overwrite,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    print(f"{destination}\n{describe(store)}")


def data_info(store: tyro.conf.Positional[Path]) -> None:
    """Say what a dataset holds: episodes, lengths, returns per task, where it came from.

    Args:
        store: RingRL store (.h5).
    """
    from ringrl.data import EpisodeStore
    from ringrl.data.card import describe

    print(describe(EpisodeStore(store)))


def data_collect(
    task: tyro.conf.Positional[str],
    output: Path,
    method: Literal["scripted", "td3", "rnd"] = "scripted",
    preset: Literal["tiny", "small", "exorl_like"] = "small",
    episodes: int | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Collect episodes of a task locally, in ExoRL's format: the history of a learner, from nothing to what it reached.

    The folder appears when all is recorded. Until then the finished episodes are in the hidden folder .NAME.partial
    beside it, which can be imported as it is; the same command goes on there after an interruption, to the same
    episodes.

    Args:
        task: for example jaco_reach_top_left.
        output: folder to make; the episodes go into its buffer/.
        method: scripted searches a scripted controller's parameters, td3 learns a policy, rnd one that looks for states
            it has not seen (random network distillation); the recorded reward is the task's with all of them.
        preset: how much: tiny is 10,000 transitions (seconds; td3 and rnd up to a minute), small 200,000 (scripted a
            minute, td3 and rnd 10 to 20), exorl_like 10,000,000 as in ExoRL's archives (scripted an hour, td3 and rnd
            more than half a day of one core, and up to 4 GB of memory).
        episodes: how many, in place of the preset's.
        seed: the same seed gives the same episodes on the same machine, for any number of workers.
        workers: processes (scripted only); by default one per available core.
    """
    from rich.progress import Progress

    from ringrl.data.collect import collect, preset_episodes
    from ringrl.envs import domain_of

    episodes = preset_episodes(preset, task) if episodes is None else episodes
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("collecting", total=episodes)
        collect(
            task,
            output,
            episodes=episodes,
            seed=seed,
            method=method,
            workers=workers,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    print(f"{output}: {episodes} episodes of {task}; next: ringrl data import {output} --domain {domain_of(task).name}")
