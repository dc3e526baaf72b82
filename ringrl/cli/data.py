"""ringrl data: download, import, describe, collect and export datasets."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ringrl.cli.flags import environment_task, reject_flags
from ringrl.errors import UserError
from ringrl.pace import Pace, Progress


def download(
    domain: str,
    algorithm: str,
    /,
    *,
    output: Path = Path("datasets"),
    url: str = "https://dl.fbaipublicfiles.com/exorl",
    timeout: float = 30.0,
) -> None:
    """Download a public ExoRL archive (walker rnd: 2.6 GB). The same command resumes an interrupted download.

    Args:
        domain: walker, cheetah, cartpole, jaco, quadruped or point_mass_maze.
        algorithm: aps, icm_apt, diayn, disagreement, icm, proto, random, rnd or smm.
        output: folder. The archive is written to OUTPUT/DOMAIN/ALGORITHM.zip.
        url: address that contains DOMAIN/ALGORITHM.zip (http or https).
        timeout: seconds without data from the server before the request is repeated.
    """
    from ringrl.data.exorl.download import download_archive

    with _bars() as bar:
        progress = bar(f"{domain}/{algorithm}.zip", "MB", 1e6)
        path = download_archive(domain, algorithm, output, url=url, timeout=timeout, progress=progress)
    print(f"{path}; next: ringrl data import {path} --domain {domain}")


def import_(
    archives: tuple[Path, ...],
    /,
    *,
    domain: str | None = None,
    format: Literal["exorl", "minari", "npz", "hdf5"] = "exorl",
    environment: str | None = None,
    reference_returns: tuple[float, float] | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    subset: Literal["first", "last", "spread"] = "first",
    max_episodes: int | None = None,
    tasks: tuple[str, ...] = (),
) -> None:
    """Import ExoRL archives, a Minari dataset or your own episodes into an episode store.

    ExoRL archives (zip files or folders) get the rewards of all tasks of their domain. Other formats keep the recorded
    rewards and accept only the flags --environment, --reference-returns, --output and --overwrite. An interrupted
    import leaves no store: run the same command again.

    Args:
        archives: zip files or folders of one domain with buffer/episode_{index}_{length}.npz. With another --format:
            the name or folder of a Minari dataset, a folder of npz files, or a flat HDF5 file.
        domain: walker, cheetah, cartpole, jaco, quadruped or point_mass_maze. Required for an ExoRL archive.
        format: format of ARCHIVES. npz: a file per episode with observation, action, reward and, if known, terminated.
            hdf5: all steps in observations, actions, rewards, terminals and timeouts, as in D4RL.
        environment: Gymnasium environment of the data, for example Hopper-v5. Default: the Minari dataset's.
        reference_returns: mean returns of random actions and of an expert, which score 0 and 100. Default: the Minari
            dataset's, or else D4RL's.
        output: store to write. Default: the archive's name with suffix .h5 (other formats: in the working directory).
            Required for several archives.
        overwrite: replace an existing store.
        subset: episodes to take if an archive has more than --max-episodes (spread: evenly spaced).
        max_episodes: maximum number of episodes of each archive.
        tasks: tasks to compute rewards for. Default: all tasks of the domain. In the maze, a goal may be anywhere in a
            room, for example "point_mass_maze_reach(-0.1,0.25)" (metres).
    """
    given = locals()
    from ringrl.data.store.summary import describe

    if len(archives) > 1 and (output is None or format != "exorl"):
        raise UserError("give one archive, or several ExoRL archives and the --output of their episodes")
    archive = archives[0]
    if format != "exorl":
        used = {"archives", "format", "environment", "reference_returns", "output", "overwrite"}
        reject_flags(import_, given, f"has no effect with --format {format}; remove it", used=used)
        from ringrl.data.foreign import import_episodes
        from ringrl.data.minari import import_minari

        name = archive.resolve().stem if format == "hdf5" else archive.resolve().name
        output = output or Path(f"{name}.h5")
        options: dict[str, Any] = {"environment": environment_task(environment) if environment else None}
        options |= {"reference_returns": reference_returns, "overwrite": overwrite}
        with _bars() as bar:
            options["progress"] = bar("importing")
            if format == "minari":
                store = import_minari(str(archive), output, **options)
            else:
                store = import_episodes(archive, output, format, **options)
        print(f"{output}\n{describe(store)}")
        return
    if environment or reference_returns:
        flag = "--environment" if environment else "--reference-returns"
        raise UserError(f"{flag}: ExoRL archives have a --domain instead; leave it out, or give another --format")
    if domain is None:
        raise UserError(f"--domain: give the domain of {archive} (walker, cheetah, cartpole, ...)")
    from ringrl.data import import_archive

    if output is None:
        # A folder's name may contain dots.
        named = archive if archive.name not in ("", "..") else archive.resolve()
        output = named.with_suffix(".h5") if named.suffix == ".zip" else named.parent / f"{named.name}.h5"
    with _bars() as bar:
        store = import_archive(
            archives, output, domain, overwrite=overwrite, subset=subset, max_episodes=max_episodes, tasks=tasks,
            progress=bar("importing"),
        )  # fmt: skip
    print(f"{output}\n{describe(store)}")


def export(store: Path, /, *, name: str, task: str | None = None) -> None:
    """Export a store as a Minari dataset with the rewards of one task, into the folder MINARI_DATASETS_PATH.

    Args:
        store: RingRL store (.h5).
        name: name of the Minari dataset, for example exorl/walker-rnd-v0.
        task: task whose rewards are exported. Default: the recorded task.
    """
    from ringrl.data import EpisodeStore
    from ringrl.data.minari import export_minari

    opened = EpisodeStore(store)
    with _bars() as bar:
        folder = export_minari(opened, name, task=task, progress=bar("exporting"))
    print(f"{folder}; next: python -c \"import minari; print(minari.load_dataset('{name}')[0])\"")


def info(store: Path, /, *, verify: bool = False) -> None:
    """Print a dataset's episodes, lengths, returns per task and origin.

    Args:
        store: RingRL store (.h5).
        verify: read the whole store first and compare it with its checksums.
    """
    from ringrl.data import EpisodeStore
    from ringrl.data.store.summary import describe

    opened = EpisodeStore(store)
    if verify:
        opened.verify()
    print(describe(opened))
    if verify:
        print("verified: all checksums match")


def collect(
    task: str,
    /,
    *,
    output: Path,
    method: Literal["scripted", "td3"] = "scripted",
    episodes: int | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Collect episodes of a task on this machine, in ExoRL's format.

    Gymnasium environments need --method td3, and their episodes are npz files for `ringrl data import --format npz`.

    The folder appears when all episodes are recorded. Until then, finished episodes are in the hidden folder
    .NAME.partial next to it, which can be imported. The same command resumes an interrupted collection.

    Args:
        task: for example jaco_reach_top_left, "point_mass_maze_reach(-0.1,0.25)" for a goal in metres, or
            gymnasium:HalfCheetah-v5.
        output: folder to create. Episodes are written to OUTPUT/buffer/.
        method: scripted searches the parameters of a scripted controller, td3 learns a policy.
        episodes: number of episodes. Default: 200,000 transitions, which are 200 episodes (800 in jaco). They take 1 to
            4 minutes (scripted) or 10 to 20 (td3). ExoRL's archives have 10,000,000 transitions.
        seed: the same seed gives the same episodes on the same machine, for any number of workers.
        workers: processes (scripted only). Default: one per available core.
    """
    from ringrl.collect import collect as collect_episodes
    from ringrl.envs import domain_of, is_foreign

    with _bars() as bar:
        collect_episodes(
            task, output, episodes=episodes, seed=seed, method=method, workers=workers, progress=bar("collecting")
        )
    domain = domain_of(task)
    import_it = f"ringrl data import {output} --domain {domain.name}"
    if is_foreign(task):
        import_it = f'ringrl data import {output}/buffer --format npz --environment "{task}" --output {output}.h5'
    elif task not in domain.tasks:
        import_it += f' --tasks "{task}"'
    print(f"{output}: episodes of {task}; next: {import_it}")


@contextlib.contextmanager
def _bars() -> Iterator[Callable[..., Progress]]:
    """Yield a function that adds a progress bar on stderr, or without a terminal prints a line from time to time."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    pace = Pace()
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"), TimeRemainingColumn()
    # Without a terminal, bars would leave an empty line.
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def add(name: str, unit: str = "episodes", scale: float = 1) -> Progress:
            bar = progress.add_task(name, total=None, visible=False, amount="")  # visible once work begins

            def report(done: int, total: int) -> None:
                amount = f"{done / scale:,.0f}/{total / scale:,.0f} {unit}"
                progress.update(bar, completed=done, total=total, visible=True, amount=amount)
                if progress.disable and pace.is_due():
                    print(f"{name}: {amount}", file=sys.stderr, flush=True)

            return report

        yield add
