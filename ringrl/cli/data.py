"""ringrl data: download, import, collect, describe and export datasets."""

import sys
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console


def data_import(
    archive: tyro.conf.Positional[Path],
    domain: str,
    output: Path | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    relabel: Literal["control_aware", "exorl_compat"] = "control_aware",
    subset: Literal["first", "last", "random", "spread"] = "first",
    max_episodes: int | None = None,
    max_transitions: int | None = None,
    seed: int = 0,
    on_damaged: Literal["stop", "skip"] = "stop",
) -> None:
    """Import an ExoRL archive (zip or folder) into an episode store, relabelled for all tasks of the domain.

    After a stop of any kind the same command goes on where it was.

    Args:
        archive: zip file or folder with buffer/episode_{index}_{length}.npz.
        domain: walker, cheetah, cartpole, jaco, quadruped or point_mass_maze.
        output: store to write; by default the archive's name with the ending .h5.
        overwrite: replace an existing store.
        workers: processes; by default one per available core. The result is the same for any number.
        relabel: control_aware rewards a state with the action that led to it; exorl_compat with a control of zero, as
            ExoRL's own code does (too high in dense cartpole and the maze).
        subset: which episodes are taken if max-episodes or max-transitions leave some out: the first, the last, some
            at random or some at equal distances.
        max_episodes: take at most so many episodes.
        max_transitions: take at most so many steps.
        seed: of the random subset.
        on_damaged: stop at the first damaged episode, or skip such episodes and say so on the card.
    """
    from rich.progress import Progress

    from ringrl.data import import_archive
    from ringrl.data.card import describe
    from ringrl.data.subset import Subset

    destination = output or archive.with_suffix(".h5")
    chosen = Subset(subset, max_episodes, max_transitions, seed)
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("importing", total=None)
            store = import_archive(
                archive,
                destination,
                domain,
                overwrite=overwrite,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
                workers=workers,
                relabelling=relabel,
                subset=chosen,
                on_damaged=on_damaged,
            )
    except KeyboardInterrupt:
        print("ringrl: run the same command again to go on with the import", file=sys.stderr)
        raise
    print(f"{destination}\n{describe(store)}")


def data_info(store: tyro.conf.Positional[Path], json: bool = False, verify: bool = False) -> None:
    """Say what a dataset holds: episodes, lengths, returns per task, where it came from.

    Args:
        store: RingRL store (.h5).
        json: print JSON.
        verify: read everything first and compare it with its checksums.
    """
    from ringrl.data import EpisodeStore
    from ringrl.data.card import describe, to_json

    opened = EpisodeStore(store)
    if verify:
        opened.verify()
    print(to_json(opened) if json else describe(opened))
    if verify and not json:
        print("verified: all of it has its checksums")


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
