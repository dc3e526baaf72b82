"""ringrl data: download, import, describe, merge, collect and export datasets."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro
from rich.console import Console

from ringrl.errors import UserError

Store = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="STORE")]


def data_download(
    domain: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DOMAIN")],
    algorithm: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ALGORITHM")],
    output: Path = Path("datasets"),
    import_store: Annotated[bool, tyro.conf.arg(name="import")] = False,
    delete_archive: bool = False,
    url: str = "https://dl.fbaipublicfiles.com/exorl",
    timeout: float = 30.0,
) -> None:
    """Fetch a public ExoRL archive (walker rnd: 2.6 GB). After a cut the same command goes on where it stopped.

    Args:
        domain: walker, cheetah, cartpole, jaco, quadruped or point_mass_maze.
        algorithm: aps, icm_apt, diayn, disagreement, icm, proto, random, rnd or smm.
        output: folder; the archive becomes OUTPUT/DOMAIN/ALGORITHM.zip.
        import_store: then import it into OUTPUT/DOMAIN/ALGORITHM.h5, relabelled for all tasks of the domain.
        delete_archive: with --import, remove the archive once the store is whole and verified.
        url: address under which DOMAIN/ALGORITHM.zip lies (http or https).
        timeout: seconds for which a server may send nothing before it is asked again.
    """
    from ringrl.data.card import describe
    from ringrl.data.download import Patience, download_archive, download_store

    if delete_archive and not import_store:
        raise UserError("--delete-archive: only together with --import, else nothing would be left")
    patience = Patience(timeout=timeout)
    with _download_display(f"{domain}/{algorithm}.zip") as (progress, import_progress, notice):
        if not import_store:
            path = download_archive(
                domain, algorithm, output, url=url, patience=patience, progress=progress, notice=notice
            )
            said = f"{path}; next: ringrl data import {path} --domain {domain}"
        else:
            store = download_store(
                domain,
                algorithm,
                output,
                delete_archive=delete_archive,
                url=url,
                patience=patience,
                progress=progress,
                import_progress=import_progress,
                notice=notice,
            )
            said = f"{output / domain / algorithm}.h5\n{describe(store)}"
    print(said)


class _DownloadDisplay(NamedTuple):
    progress: Callable[[int, int], None]  # bytes
    import_progress: Callable[[int, int], None]  # episodes
    notice: Callable[[str], None]


@contextlib.contextmanager
def _download_display(name: str) -> Iterator[_DownloadDisplay]:
    """Two bars, each shown when its work begins, and lines of text above them."""
    from rich.console import Group
    from rich.live import Live
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    fetching = Progress(
        "{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    )
    importing = Progress()
    bytes_bar = fetching.add_task(name, visible=False)
    episodes_bar = importing.add_task("importing", visible=False)
    with Live(Group(fetching, importing), console=console, transient=True):
        yield _DownloadDisplay(
            lambda done, total: fetching.update(bytes_bar, completed=done, total=total, visible=True),
            lambda done, total: importing.update(episodes_bar, completed=done, total=total, visible=True),
            lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
        )


def data_import(
    archive: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ARCHIVE")],
    domain: str | None = None,
    format: Literal["exorl", "minari"] = "exorl",
    output: Path | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    relabel: Literal["control_aware", "exorl_compat"] = "control_aware",
    subset: Literal["first", "last", "random", "spread"] = "first",
    max_episodes: int | None = None,
    max_transitions: int | None = None,
    seed: int = 0,
    on_damaged: Literal["stop", "skip"] = "stop",
    download: bool = False,
) -> None:
    """Import an ExoRL archive or a Minari dataset into an episode store.

    An archive (zip or folder) is relabelled for all tasks of its domain; after a stop of any kind the same command goes
    on where it was. A Minari dataset keeps its recorded rewards, unless `ringrl data export` wrote it. Of the other
    flags it takes output, overwrite and download alone.

    Args:
        archive: zip file or folder with buffer/episode_{index}_{length}.npz; a Minari dataset's name or folder.
        domain: walker, cheetah, cartpole, jaco, quadruped or point_mass_maze; an ExoRL archive needs it.
        format: exorl for such an archive, minari for a Minari dataset.
        output: store to write; by default the archive's name with the ending .h5 (of a Minari dataset: in this folder).
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
        download: let Minari fetch a dataset that is not on this machine.
    """
    if format == "minari":
        for_archives = {
            "--domain": domain is not None,
            "--workers": workers is not None,
            "--relabel": relabel != "control_aware",
            "--subset": subset != "first",
            "--max-episodes": max_episodes is not None,
            "--max-transitions": max_transitions is not None,
            "--seed": seed != 0,
            "--on-damaged": on_damaged != "stop",
        }
        if given := [flag for flag, is_given in for_archives.items() if is_given]:
            raise UserError(f"{', '.join(given)}: only for ExoRL archives, leave it out with --format minari")
        return _import_minari(str(archive), output, overwrite, download)
    if domain is None:
        raise UserError(f"--domain: say which domain {archive} is of (walker, cheetah, cartpole, ...)")
    if download:
        raise UserError("--download: only with --format minari; ExoRL archives: ringrl data download")
    if seed and subset != "random":
        raise UserError("--seed: only with --subset random; leave it out")
    from ringrl.data import import_archive
    from ringrl.data.card import describe
    from ringrl.data.subset import Subset

    destination = output or _beside(archive)
    chosen = Subset(subset, max_episodes, max_transitions, seed)
    try:
        with _bar("importing") as progress:
            store = import_archive(
                archive,
                destination,
                domain,
                overwrite=overwrite,
                progress=progress,
                workers=workers,
                relabelling=relabel,
                subset=chosen,
                on_damaged=on_damaged,
            )
    except KeyboardInterrupt:
        print("ringrl: run the same command again to go on with the import", file=sys.stderr)
        raise
    print(f"{destination}\n{describe(store)}")
    return None


def _beside(archive: Path) -> Path:
    """Where the store of an archive goes by default: a folder's name may have dots in it."""
    named = archive if archive.name not in ("", "..") else archive.resolve()
    return named.with_suffix(".h5") if named.suffix == ".zip" else named.parent / f"{named.name}.h5"


def _import_minari(dataset: str, output: Path | None, overwrite: bool, download: bool) -> None:
    from ringrl.data.card import describe
    from ringrl.data.minari import import_minari

    destination = output or Path(f"{Path(dataset).resolve().name}.h5")
    with _bar("importing") as progress:
        store = import_minari(dataset, destination, overwrite=overwrite, download=download, progress=progress)
    print(f"{destination}\n{describe(store)}")


def data_export(
    store: Store,
    name: str,
    task: str | None = None,
    format: Literal["minari"] = "minari",
    output: Path | None = None,
) -> None:
    """Export a store as a Minari dataset with the rewards of one task.

    Args:
        store: RingRL store (.h5).
        name: the dataset's name for Minari, for example exorl/walker-rnd-v0.
        task: whose rewards become the dataset's; by default the task that was recorded.
        format: minari is the only one.
        output: folder of datasets to write into; by default Minari's own (MINARI_DATASETS_PATH).
    """
    from ringrl.data import EpisodeStore
    from ringrl.data.minari import export_minari

    opened = EpisodeStore(store)
    with _bar("exporting") as progress:
        folder = export_minari(opened, name, task=task, folder=output, progress=progress)
    root = f"MINARI_DATASETS_PATH={output} " if output else ""
    print(f"{folder}; next: {root}python -c \"import minari; print(minari.load_dataset('{name}')[0])\"")


def data_merge(stores: tyro.conf.Positional[tuple[Path, ...]], output: Path, overwrite: bool = False) -> None:
    """Merge several stores of one domain into one, their episodes in the order given.

    Args:
        stores: RingRL stores (.h5), at least two.
        output: store to write.
        overwrite: replace an existing store.
    """
    from ringrl.data.card import describe
    from ringrl.data.merge import merge_stores

    with _bar("merging") as progress:
        store = merge_stores(stores, output, overwrite=overwrite, progress=progress)
    print(f"{output}\n{describe(store)}")


def data_info(store: Store, json: bool = False, verify: bool = False) -> None:
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
    task: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TASK")],
    output: Path,
    method: Literal["scripted", "td3", "rnd"] = "scripted",
    preset: Literal["tiny", "small", "exorl_like"] = "small",
    episodes: int | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Collect episodes of a task locally, in ExoRL's format: a controller's search, or a learner's whole history.

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
    from ringrl.data.collect import collect, preset_episodes
    from ringrl.envs import domain_of

    episodes = preset_episodes(preset, task) if episodes is None else episodes
    with _bar("collecting") as progress:
        collect(task, output, episodes=episodes, seed=seed, method=method, workers=workers, progress=progress)
    print(f"{output}: {episodes} episodes of {task}; next: ringrl data import {output} --domain {domain_of(task).name}")


@contextlib.contextmanager
def _bar(word: str) -> Iterator[Callable[[int, int | None], None]]:
    """Shows how much of the whole is done, as it is told."""
    from rich.progress import Progress

    console = Console(stderr=True)  # where it is no terminal, a bar would leave an empty line
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(word, total=None, visible=False)  # a mistake is told before there is anything to show
        yield lambda done, total: progress.update(bar, completed=done, total=total, visible=True)
