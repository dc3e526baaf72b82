"""The ablation: one question, many small runs. Every cell is a run folder of its own; finished cells are skipped."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import jax
import pydantic
from pydantic import Field
from rich.console import Console

from ringrl.config import Section, TrainConfig, merged, one_line, read_yaml
from ringrl.data import EpisodeStore
from ringrl.envs import domain_of
from ringrl.errors import UserError
from ringrl.evaluation.protocol import Protocol, evaluate_policy, evaluate_random
from ringrl.evaluation.records import EvaluationRecord, append_records, data_records, library_versions
from ringrl.methods import METHODS
from ringrl.training import load_policy, train

EVALUATION = "evaluation.jsonl"


class AblationPlan(Section):
    """What is crossed with what, and what stays the same. All cells see the same number of timesteps in all."""

    data: Path
    """Dataset: a RingRL store (.h5)."""
    task: str
    """Task whose reward is learned."""
    output: Path
    """Folder that holds one run folder per cell."""
    methods: tuple[Literal["at", "ad"], ...] = ("at",)
    """Methods with a context, each trained and evaluated with every number of trajectories."""
    trajectories: tuple[int, ...] = (1, 2, 4)
    """Trajectories per context, in training and in evaluation."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds."""
    baselines: tuple[Literal["bc", "bc-10%", "dt", "td3", "td3+bc"], ...] = ("bc",)
    """Methods that remember no other episode."""
    trajectories_per_batch: int = Field(8, ge=1)
    """Trajectories per optimiser step: a context length n makes batches of trajectories_per_batch / n contexts. td3 and
    td3+bc have batches of transitions, and take as many more steps as it needs to see as many timesteps."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of `ringrl train` shared by all cells, for example {model: {layers: 2}}; those of a method win."""
    environments: int = Field(10, ge=1)
    """Evaluation streams per cell."""
    control: bool = True
    """Also evaluate every policy without memory between episodes (the matched best-of-n control)."""

    @pydantic.model_validator(mode="after")
    def _batches_divide(self) -> Self:
        for count in self.trajectories:
            if count < 1 or self.trajectories_per_batch % count:
                raise ValueError(f"{count} does not divide the {self.trajectories_per_batch} trajectories_per_batch")
        return self


def read_plan(path: Path) -> AblationPlan:
    """A plan file; UserError names the file and the setting that is wrong."""
    try:
        return AblationPlan.model_validate(read_yaml(path))
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: {one_line(error)}") from error


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the ablation."""

    name: str
    config: TrainConfig


def cells(plan: AblationPlan) -> Iterator[Cell]:
    """All runs of a plan, seed by seed, so that an interrupted ablation has whole comparisons."""
    for seed in plan.seeds:
        for baseline in plan.baselines:
            yield _cell(plan, baseline.replace("%", ""), baseline, seed, 1)
        for method in plan.methods:
            for count in plan.trajectories:
                yield _cell(plan, f"{method}_{count}", method, seed, count)


def _cell(plan: AblationPlan, name: str, method: str, seed: int, trajectories: int) -> Cell:
    name = f"{name}_seed{seed}"
    own: dict[str, Any] = {
        "data": plan.data,
        "task": plan.task,
        "run": plan.output / name,
        "seed": seed,
        "context": {"trajectories": trajectories},
    }
    shared = merged(plan.settings, METHODS[method].settings or {})
    try:
        config = TrainConfig.model_validate(merged(shared, own))
        if config.model.kind == "td3_bc":
            own["optimiser"] = {"steps": _steps(plan, config)}
        else:
            own["optimiser"] = {"batch_size": plan.trajectories_per_batch // trajectories}
        return Cell(name, TrainConfig.model_validate(merged(shared, own)))
    except pydantic.ValidationError as error:
        raise UserError(f"settings of the ablation plan: {one_line(error)}") from error


def _steps(plan: AblationPlan, config: TrainConfig) -> int:
    """Steps after which batches of transitions have held as many timesteps as the other cells' batches."""
    timesteps = config.optimiser.steps * plan.trajectories_per_batch * domain_of(plan.task).episode_length
    return max(1, timesteps // config.optimiser.batch_size)


def ablate(plan: AblationPlan, console: Console, command: str | None = None) -> list[Path]:
    """Train and evaluate every cell that is not finished; returns the results files.

    A cell that was interrupted is resumed from its last checkpoint. Random actions and the dataset's own episodes are
    recorded beside the cells.

    Raises:
      UserError: settings that no run accepts, or data that does not fit the task.
    """
    todo = list(cells(plan))
    store = EpisodeStore(plan.data)
    returns = store.returns(plan.task)
    plan.output.mkdir(parents=True, exist_ok=True)
    # The same program serves all seeds of a context length: compile it once.
    jax.config.update("jax_compilation_cache_dir", str((plan.output / ".compiled").absolute()))
    references: dict[str, Callable[[], list[EvaluationRecord]]] = {
        "random": lambda: evaluate_random(plan.task, Protocol(environments=plan.environments), command=command),
        "data": lambda: data_records(
            plan.task, returns, data_fingerprint=store.fingerprint, versions=library_versions()
        ),
    }
    files = [_once(plan.output / name / EVALUATION, make) for name, make in references.items()]
    for number, cell in enumerate(todo, 1):
        console.print(f"[bold]cell {number} of {len(todo)}: {cell.name}")
        files.append(_once(cell.config.run / EVALUATION, partial(_run, cell, plan, console, command)))
    return files


def _once(path: Path, make: Callable[[], list[EvaluationRecord]]) -> Path:
    """Make and write a file of results unless it is there: it is written whole, so being there means finished."""
    if not path.exists():
        records = make()
        partial = path.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        append_records(partial, records)
        partial.replace(path)
    return path


def _run(cell: Cell, plan: AblationPlan, console: Console, command: str | None) -> list[EvaluationRecord]:
    run = train(cell.config, resume=True, console=console)
    trained = load_policy(run)
    is_transformer = cell.config.model.kind == "transformer"
    protocol = Protocol(
        environments=plan.environments,
        episodes=cell.config.context.trajectories if is_transformer else 1,
        control=plan.control and is_transformer and cell.config.context.trajectories > 1,
    )
    return evaluate_policy(trained, run, protocol, command=command)
