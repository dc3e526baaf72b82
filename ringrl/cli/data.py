"""ringrl data: download, import, collect, describe and export datasets."""

from pathlib import Path

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
    task: tyro.conf.Positional[str], output: Path, episodes: int = 200, seed: int = 0, workers: int | None = None
) -> None:
    """Collect episodes of a task locally, in ExoRL's format, from nothing to near the ceiling (quadruped: less).

    Args:
        task: for example jaco_reach_top_left.
        output: folder to make; the episodes go into its buffer/.
        episodes: how many.
        seed: the same seed gives the same episodes, for any number of workers.
        workers: processes; by default one per available core.
    """
    from rich.progress import Progress

    from ringrl.data.collect import collect
    from ringrl.envs import domain_of

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("collecting", total=episodes)
        collect(
            task,
            output,
            episodes=episodes,
            seed=seed,
            workers=workers,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    print(f"{output}: {episodes} episodes of {task}; next: ringrl data import {output} --domain {domain_of(task).name}")
