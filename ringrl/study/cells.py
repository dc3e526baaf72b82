"""The cells of an ablation: each is a folder of its own, with all that it is, and says itself how it stands.

config.yaml       the training run's whole configuration (the folder is a run's folder, as `ringrl train` makes it)
cell.yaml         what is rolled out afterwards
evaluation.jsonl  the results
log.txt           what was said
finished.json     written last: there is nothing more to do
failed.txt        why it failed, in one line
"""

import dataclasses
import json
import os
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import pydantic
import yaml

from ringrl.config import TrainConfig, merged, one_line, read_yaml, to_yaml
from ringrl.data import EpisodeStore
from ringrl.envs import domain_of
from ringrl.errors import UserError
from ringrl.evaluation.protocol import Protocol, plan_policy, plan_random
from ringrl.evaluation.records import append_records, data_records, library_versions
from ringrl.evaluation.session import Audience, Job, evaluate_all
from ringrl.files import write_whole
from ringrl.methods import METHODS
from ringrl.study.plan import AblationPlan
from ringrl.training import load_policy, train
from ringrl.training.run_folder import check_configuration, dataset_fingerprint, flat

EVALUATION = "evaluation.jsonl"
FINISHED, FAILED, LOG, CELL = "finished.json", "failed.txt", "log.txt", "cell.yaml"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A policy that is trained and then evaluated, by each of the protocols."""

    config: TrainConfig
    protocols: tuple[Protocol, ...]  # of as many episodes each
    environments: int  # as the plan has it, see there
    control: bool
    videos: bool = False
    seconds: float | None = None  # of training, where that is what is the same for all cells
    fingerprint: str | None = None  # of the dataset

    @property
    def folder(self) -> Path:
        """Of the run, and of all else."""
        return self.config.run

    @property
    def name(self) -> str:
        """Task and folder."""
        return f"{self.config.task}/{self.folder.name}"

    @property
    def steps_done(self) -> int:
        """Optimiser steps up to its newest checkpoint."""
        checkpoints = self.folder / "checkpoints"
        names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def describe(self) -> dict[str, Any]:
        """What is done beside training, and what is known of its data and time; as cell.yaml has it."""
        return {
            "task": self.config.task,
            "test_trajectories": [protocol.episodes for protocol in self.protocols],
            "episodes": self.protocols[0].environments * self.protocols[0].episodes,
            "environments": self.environments,
            "control": self.control,
            "videos": self.videos,
            "seconds": self.seconds,
            "data": self.fingerprint,
        }

    def run(self, command: str | None) -> None:
        """Train and evaluate, or go on with either where it was stopped."""
        if not (self.folder / "config.yaml").exists():
            write(self.folder / "config.yaml", to_yaml(self.config))
        train(self.config, resume=True)
        trained = load_policy(self.folder)
        if trained.step < self.config.optimiser.steps:
            raise UserError(f"{self.folder}: was told to stop after step {trained.step}; --retry goes on from there")
        plans = [plan_policy(trained, self.folder, protocol, command=command) for protocol in self.protocols]
        for job in (Job(plan, self.folder / EVALUATION) for plan in plans):
            filmed = (job.videos / "best.mp4").is_file()  # the last one; without it, all are made again
            evaluate_all([job], again=self.videos and not filmed, video=self.videos, audience=_Log())

    def of_steps(self, steps: int) -> "Cell":
        """The same with so many optimiser steps."""
        optimiser = self.config.optimiser.model_copy(update={"steps": steps})
        return dataclasses.replace(self, config=self.config.model_copy(update={"optimiser": optimiser}))


class _Log(Audience):
    """Says what is worth knowing, for the cell's log."""

    def remark(self, text: str) -> None:
        print(text, flush=True)


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the cells of a task are compared with: random actions, or the dataset's own episodes."""

    kind: Literal["random", "data"]
    task: str
    data: Path
    folder: Path
    episodes: int  # of random actions
    fingerprint: str | None = None  # of the dataset

    @property
    def name(self) -> str:
        """Task and folder."""
        return f"{self.task}/{self.folder.name}"

    def describe(self) -> dict[str, Any]:
        """What it is, to tell whether it has been done."""
        about: dict[str, Any] = {"kind": self.kind, "task": self.task}
        return about | ({"episodes": self.episodes} if self.kind == "random" else {"data": self.fingerprint})

    def run(self, command: str | None) -> None:
        """Write the results."""
        results = self.folder / EVALUATION
        if self.kind == "random":
            evaluate_all([Job(plan_random(self.task, Protocol(self.episodes), command=command), results)])
            return
        store = EpisodeStore(self.data)
        records = data_records(
            self.task,
            store.returns(self.task),
            data_fingerprint=dataset_fingerprint(store),
            versions=library_versions(),
        )
        partial = results.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        append_records(partial, records)
        partial.replace(results)


Work = Cell | Reference


def references(plan: AblationPlan, fingerprints: Mapping[str, str] = MappingProxyType({})) -> Iterator[Reference]:
    """Two for each task; `fingerprints` of the tasks' datasets, where they are known."""
    kinds: tuple[Literal["random", "data"], ...] = ("random", "data")
    for task, data in plan.datasets.items():
        for kind in kinds:
            yield Reference(kind, task, data, plan.output / task / kind, plan.episodes, fingerprints.get(task))


def cells(plan: AblationPlan, fingerprints: Mapping[str, str] = MappingProxyType({})) -> Iterator[Cell]:
    """All runs of a plan, seed by seed, so that an interrupted ablation has whole comparisons.

    Raises:
      UserError: settings that no run accepts, or that reach none.
    """
    found = list(_cells(plan))
    in_question = [cell for cell in found if cell.folder.name.partition("_")[0] in plan.methods] or found
    _check_heeded("settings", plan.settings, in_question)
    for task, settings in plan.task_settings.items():
        _check_heeded(f"task_settings: {task}", settings, [cell for cell in in_question if cell.config.task == task])
    for cell in found:
        yield dataclasses.replace(cell, fingerprint=fingerprints.get(cell.config.task))


def _check_heeded(where: str, settings: Mapping[str, Any], found: Sequence[Cell]) -> None:
    """UserError where one of the settings is another in every cell, so that its reader would be misled."""
    for name, value in flat(dict(settings)).items():
        # Steps of a cell may be counted from the plan's by its budget.
        if name != "optimiser.steps" and not any(_has(cell.config, name, value) for cell in found):
            raise UserError(
                f"{where}: {name}: has no effect, since the plan itself or its methods set it otherwise; leave it out"
            )


def _has(config: TrainConfig, name: str, value: Any) -> bool:
    for part in reversed(name.split(".")):
        value = {part: value}
    try:
        return TrainConfig.model_validate(merged(config.model_dump(), value)) == config
    except pydantic.ValidationError:  # it does not even go with what the method sets
        return False


def _cells(plan: AblationPlan) -> Iterator[Cell]:
    for seed in plan.seeds:
        for task in plan.datasets:
            for baseline in plan.baselines:
                yield _cell(plan, task, baseline.replace("%", ""), baseline, seed, 1, None)
            for method in plan.methods:
                for tokens in plan.token_sets or (None,):
                    for count in plan.trajectories:
                        name = f"{method}_{count}" if tokens is None else f"{method}_{count}_{tokens}"
                        yield _cell(plan, task, name, method, seed, count, tokens)


def _cell(
    plan: AblationPlan, task: str, name: str, method: str, seed: int, trajectories: int, tokens: str | None
) -> Cell:
    own: dict[str, Any] = {
        "data": plan.datasets[task],
        "task": task,
        "run": plan.output / task / f"{name}_seed{seed}",
        "seed": seed,
        "context": {"trajectories": trajectories},
    }
    shared = merged(merged(plan.settings, plan.task_settings.get(task, {})), METHODS[method].settings or {})
    if tokens is not None:
        own["model"] = {"token_set": tokens}
    try:
        config = TrainConfig.model_validate(merged(shared, own))
        if plan.budget != "steps" and config.model.family.source == "contexts":
            own["optimiser"] = {"batch_size": plan.trajectories_per_batch // trajectories}
        elif plan.budget == "tokens":
            own["optimiser"] = {"steps": _steps(plan, config)}
        config = TrainConfig.model_validate(merged(shared, own))
    except pydantic.ValidationError as error:
        raise UserError(f"{task}, {name}: settings or task_settings of the ablation plan: {one_line(error)}") from error
    rolled_out = (plan.test_trajectories or (trajectories,)) if method in plan.methods else (1,)
    protocols = tuple(Protocol(plan.episodes // n, n, control=plan.control and n > 1) for n in rolled_out)
    seconds = plan.seconds if plan.budget == "time" else None
    return Cell(config, protocols, plan.environments, plan.control, plan.videos and seed == min(plan.seeds), seconds)


def _steps(plan: AblationPlan, config: TrainConfig) -> int:
    """Steps after which batches of transitions have held as many timesteps as the other cells' batches."""
    timesteps = config.optimiser.steps * plan.trajectories_per_batch * domain_of(config.task).episode_length
    return max(1, timesteps // config.optimiser.batch_size)


def check(work: Work) -> None:
    """UserError where the folder holds another cell. More to be rolled out, or filmed, makes no other cell of it."""
    if isinstance(work, Cell) and (work.folder / "config.yaml").exists():
        check_configuration(work.config)
    path, now = work.folder / CELL, work.describe()
    if not path.exists():
        return
    try:
        known = read_yaml(path)
    except UserError as error:
        raise UserError(f"{error}; remove it if it is damaged") from error
    for name in sorted(set(now) & set(known) - {"test_trajectories", "episodes", "videos"}):
        if known[name] != now[name]:
            raise UserError(f"{path}: {name} was {known.get(name)}, the plan says {now[name]}; give another output")


def is_finished(work: Work) -> bool:
    """Whether there is nothing more to do, and the results are there."""
    try:
        did, now = json.loads((work.folder / FINISHED).read_text())["did"], work.describe()
        if did.get("videos"):  # which are not asked for any more
            did["videos"] = now.get("videos")
        return bool(did == now) and (work.folder / EVALUATION).stat().st_size > 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def failure(work: Work) -> str | None:
    """Why it failed when it was last tried; None where it did not, or was not."""
    try:
        return (work.folder / FAILED).read_text().strip()
    except OSError:
        return None


def forget_failure(work: Work) -> None:
    """Let it be tried again."""
    (work.folder / FAILED).unlink(missing_ok=True)


def note_failure(work: Work, why: str) -> str:
    """Write down why it failed; returns it, as one line."""
    line = " ".join(why.split())
    with suppress(UserError):  # a disk that is full, for example, in which case it is only said
        write(work.folder / FAILED, line + "\n")
    return line


def attempt_logged(work: Work, command: str | None) -> str | None:
    """`attempt` in a process of its own: from here on, what that says goes to the cell's log."""
    try:
        work.folder.mkdir(parents=True, exist_ok=True)
        log = os.open(work.folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    except OSError as error:
        return f"{work.folder}: cannot be written ({error.strerror})"
    for number in (1, 2):
        os.dup2(log, number)
    os.close(log)
    return attempt(work, command)


def attempt(work: Work, command: str | None) -> str | None:
    """Run a cell to its end and write down how it ended; returns why it failed, or None. Nothing is raised."""
    began = time.perf_counter()
    try:
        write(work.folder / CELL, yaml.safe_dump(work.describe(), sort_keys=False))
        work.run(command)
        finished = {"did": work.describe(), "seconds": time.perf_counter() - began}
        write(work.folder / FINISHED, json.dumps(finished) + "\n")
    except Exception as error:  # whatever it is, the other cells go on
        with suppress(OSError):  # where the log is on a disk that is full
            traceback.print_exc()
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return note_failure(work, f"{kind}{error}")
    forget_failure(work)
    return None


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all, and its folder where it is missing. UserError if it cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free some space, then do it again") from error
