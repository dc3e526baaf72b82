"""The command line: one function per subcommand, and how errors are told."""

import contextlib
import difflib
import functools
import inspect
import io
import logging
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import pydantic
import tyro
from rich.console import Console

import ringrl
from ringrl.config import TrainConfig, one_line, read_yaml
from ringrl.errors import UserError

Settings = Annotated[TrainConfig, tyro.conf.arg(name="")]  # its flags stand at the top: --model.layers 4
console = Console()


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


def train(settings: Settings, config: Path | None = None, resume: bool = False) -> None:
    """Train a policy.

    Args:
        config: YAML file of settings; flags given beside it win.
        resume: go on with the run exactly where its last checkpoint stands.
    """
    from ringrl.training import train as train_run

    run = train_run(settings, resume=resume)
    print(f"{run}; next: ringrl evaluate --checkpoint {run}")


def evaluate(
    checkpoint: Path | None = None,
    task: str | None = None,
    episodes: int = 1,
    environments: int = 10,
    seed: int = 1_000_000,
    target_return: float | None = None,
    control: bool = False,
    step: int | None = None,
    output: Path | None = None,
) -> None:
    """Roll a policy out in dm_control and append one result per stream of episodes.

    Args:
        checkpoint: folder of a run made by `ringrl train`; without it, uniform random actions in --task.
        task: task to act in; by default the one that was trained on.
        episodes: in-context episodes per stream, one after another in one context.
        environments: streams, rolled out in lockstep.
        seed: stream i starts from environment seed + i.
        target_return: return asked for, in units of the task; by default the best of the training data.
        control: also roll out as many episodes without memory of each other.
        step: checkpoint to take; by default the newest.
        output: results file (.jsonl); by default evaluation.jsonl in the run's folder.
    """
    from ringrl.evaluation.protocol import Protocol, evaluate_policy, evaluate_random
    from ringrl.evaluation.records import append_records
    from ringrl.study.report import table
    from ringrl.training import load_policy

    protocol = Protocol(environments, episodes, seed, target_return, control)
    if checkpoint is None:
        if task is None:
            raise UserError("--checkpoint: give the folder of a run, or --task alone to evaluate random actions")
        output = output or Path("random.jsonl")
        records = evaluate_random(task, protocol, command=_command_line())
    else:
        trained = load_policy(checkpoint, step)
        output = output or checkpoint / "evaluation.jsonl"
        with console.status("rolling out") as status:
            records = evaluate_policy(
                trained,
                checkpoint,
                protocol,
                task=task,
                command=_command_line(),
                on_episode=lambda returns: status.update(f"rolling out: mean return {returns.mean():.1f}"),
            )
    append_records(output, records)
    console.print(table([output]))
    print(output)


def ablate(plan: tyro.conf.Positional[Path]) -> None:
    """Train and evaluate all cells of a plan: context lengths x seeds, and baselines. Finished cells are skipped.

    Args:
        plan: YAML file, for example ringrl/configs/ablation_demo.yaml.
    """
    from ringrl.study.ablate import ablate as run_plan
    from ringrl.study.ablate import read_plan

    chosen = read_plan(plan)
    run_plan(chosen, Console(stderr=True), _command_line())
    print(f"{chosen.output}; next: ringrl report {chosen.output}")


def report(results: tyro.conf.Positional[tuple[Path, ...]], output: Path = Path("report")) -> None:
    """Make a page from results: returns per task, return against context length with intervals.

    Args:
        results: results files (.jsonl), or folders that hold them.
        output: folder of the page.
    """
    from ringrl.study.report import table, write_report

    page = write_report(results, output)
    console.print(table(results))
    print(page)


def demo(output: Path = Path("demo")) -> None:
    """Collect, train, evaluate, ablate and report for one task, in a few minutes on two cores.

    Args:
        output: folder of everything that the demo makes; an interrupted demo goes on where it stopped.
    """
    from ringrl.study.demo import run_demo
    from ringrl.study.report import table

    page = run_demo(output, Console(stderr=True), _command_line())
    console.print(table([output / "runs"]))
    print(page.absolute().as_uri())


COMMANDS: dict[str, Callable[..., None]] = {
    "data import": data_import,
    "data info": data_info,
    "data collect": data_collect,
    "train": train,
    "evaluate": evaluate,
    "ablate": ablate,
    "report": report,
    "demo": demo,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Errors that the user can mend end in one line and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs a traceback of what is told here in one line
    try:
        _run(arguments)
    except UserError as error:
        _fail(str(error))
    except pydantic.ValidationError as error:
        _fail(one_line(error))
    except KeyboardInterrupt:
        print("ringrl: stopped; what was finished is kept", file=sys.stderr)
        sys.exit(130)


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        firsts = {name: str(command.__doc__).splitlines()[0] for name, command in COMMANDS.items()}
        lines = [f"  ringrl {name:<{max(map(len, COMMANDS))}}  {first}" for name, first in firsts.items()]
        print("\n".join([str(ringrl.__doc__), *lines, "", "Each has --help with units and defaults."]))
        return
    if arguments == ["--version"]:
        print(ringrl.__version__)
        return
    words = 2 if arguments[0] == "data" else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=3, cutoff=0.4) or list(COMMANDS)
        raise UserError(f"no command {name!r}; did you mean {' or '.join(near)}? (ringrl --help lists all)")
    command = COMMANDS[name]
    _parse(name, rest, _with_settings(rest) if command is train else command)()


def _with_settings(arguments: list[str]) -> Callable[..., None]:
    """`train` with the settings of a --config file as the defaults of its flags."""
    files = [b for a, b in pairwise([*arguments, ""]) if a == "--config"]
    files += [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
    values = read_yaml(Path(files[-1])) if files else {}
    required: dict[str, Any] = {"data": Path(), "task": "", "run": Path()}
    try:
        whole = TrainConfig.model_validate(required | values)
    except pydantic.ValidationError as error:
        raise UserError(f"{files[-1]}: {one_line(error)}") from error
    default = whole.model_copy(update={name: tyro.MISSING for name in required if name not in values})

    @functools.wraps(train)
    def command(settings: Settings = default, config: Path | None = None, resume: bool = False) -> None:
        train(settings, config, resume)

    command.__signature__ = inspect.signature(command, follow_wrapped=False)  # type: ignore[attr-defined]
    return command


def _parse(name: str, arguments: list[str], command: Callable[..., None]) -> Callable[[], None]:
    """The command with its flags filled in. What tyro says in a box about wrong flags becomes one line."""

    @functools.wraps(command)
    def bind(*values: Any, **flags: Any) -> Callable[[], None]:
        return functools.partial(command, *values, **flags)

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(bind, args=arguments, prog=f"ringrl {name}", config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:
        if not stop.code:
            raise
        text = " ".join(re.sub(r"[─│╭╮╰╯├┤]", " ", said.getvalue()).split())
        noise = r"\d+ validation errors? for \w+|\[type=.*For further information visit \S+"
        raise UserError(re.sub(noise, "", text)) from None


def _command_line() -> str:
    return shlex.join(["ringrl", *sys.argv[1:]])


def _fail(message: str) -> None:
    print(f"ringrl: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
