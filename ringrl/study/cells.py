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
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from ringrl.config import TrainConfig, merged, one_line, read_yaml, to_yaml
from ringrl.data import EpisodeStore
from ringrl.envs import domain_of
from ringrl.errors import UserError
from ringrl.evaluation.protocol import Protocol, plan_policy, plan_random
from ringrl.evaluation.records import append_records, data_records, library_versions
from ringrl.evaluation.session import Job, evaluate_all
from ringrl.methods import METHODS
from ringrl.study.plan import AblationPlan
from ringrl.training import load_policy, train
from ringrl.training.run_folder import check_configuration, dataset_fingerprint

EVALUATION = "evaluation.jsonl"
FINISHED, FAILED, LOG, CELL = "finished.json", "failed.txt", "log.txt", "cell.yaml"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A policy that is trained and then evaluated, by each of the protocols."""

    config: TrainConfig
    protocols: tuple[Protocol, ...]
    control: bool

    @property
    def folder(self) -> Path:
        """Of the run, and of all else."""
        return self.config.run

    @property
    def name(self) -> str:
        """Task and folder."""
        return f"{self.config.task}/{self.folder.name}"

    def describe(self) -> dict[str, Any]:
        """What is rolled out, as cell.yaml has it."""
        return {
            "task": self.config.task,
            "test_trajectories": [protocol.episodes for protocol in self.protocols],
            "environments": self.protocols[0].environments,
            "control": self.control,
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
        evaluate_all([Job(plan, self.folder / EVALUATION) for plan in plans])


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the cells of a task are compared with: random actions, or the dataset's own episodes."""

    kind: Literal["random", "data"]
    task: str
    data: Path
    folder: Path
    environments: int

    @property
    def name(self) -> str:
        """Task and folder."""
        return f"{self.task}/{self.folder.name}"

    def describe(self) -> dict[str, Any]:
        """What it is, to tell whether it has been done."""
        return {"kind": self.kind, "task": self.task, "environments": self.environments}

    def run(self, command: str | None) -> None:
        """Write the results."""
        results = self.folder / EVALUATION
        if self.kind == "random":
            evaluate_all([Job(plan_random(self.task, Protocol(self.environments), command=command), results)])
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


def references(plan: AblationPlan) -> Iterator[Reference]:
    """Two for each task."""
    kinds: tuple[Literal["random", "data"], ...] = ("random", "data")
    for task, data in plan.datasets.items():
        for kind in kinds:
            yield Reference(kind, task, data, plan.output / task / kind, plan.environments)


def cells(plan: AblationPlan) -> Iterator[Cell]:
    """All runs of a plan, seed by seed, so that an interrupted ablation has whole comparisons."""
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
        if plan.budget != "steps" and config.model.kind != "td3_bc":
            own["optimiser"] = {"batch_size": plan.trajectories_per_batch // trajectories}
        elif plan.budget == "tokens":
            own["optimiser"] = {"steps": _steps(plan, config)}
        config = TrainConfig.model_validate(merged(shared, own))
    except pydantic.ValidationError as error:
        raise UserError(f"settings of the ablation plan: {one_line(error)}") from error
    rolled_out = (plan.test_trajectories or (trajectories,)) if method in plan.methods else (1,)
    protocols = tuple(Protocol(plan.environments, n, control=plan.control and n > 1) for n in rolled_out)
    return Cell(config, protocols, plan.control)


def _steps(plan: AblationPlan, config: TrainConfig) -> int:
    """Steps after which batches of transitions have held as many timesteps as the other cells' batches."""
    timesteps = config.optimiser.steps * plan.trajectories_per_batch * domain_of(config.task).episode_length
    return max(1, timesteps // config.optimiser.batch_size)


def check(work: Work) -> None:
    """UserError where the folder holds another cell. More lengths to be rolled out make no other cell of it."""
    if isinstance(work, Cell) and (work.folder / "config.yaml").exists():
        check_configuration(work.config)
    path, now = work.folder / CELL, work.describe()
    if not path.exists():
        return
    try:
        known = read_yaml(path)
    except UserError as error:
        raise UserError(f"{error}; remove it if it is damaged") from error
    for name in set(now) - {"test_trajectories"}:
        if known.get(name) != now[name]:
            raise UserError(f"{path}: {name} was {known.get(name)}, the plan says {now[name]}; give another output")


def is_finished(work: Work) -> bool:
    """Whether there is nothing more to do."""
    try:
        return bool(json.loads((work.folder / FINISHED).read_text())["did"] == work.describe())
    except (OSError, ValueError, KeyError, TypeError):
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
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); free some space, then do it again") from error
