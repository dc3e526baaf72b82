"""The plan of an ablation: the settings to cross, and the settings that all cells share."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field

from ringrl.config import FilePath, Section
from ringrl.config_files import merged, nested, one_line, read_yaml
from ringrl.configs import settings_file
from ringrl.envs import domain_of, import_environments
from ringrl.errors import UserError

Budget = Literal["tokens", "steps"]
_SHORT = ("data", "task", "tasks")


class PromptPlan(Section):
    """Prompts: dataset trajectories in the memory of a policy before its first episode."""

    trajectories: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    """Prompt lengths. A cell uses those shorter than its training context; 0 is an empty memory."""
    draws: int = Field(5, ge=1)
    """Different prompts of each length, which share the plan's episodes equally."""
    controls: tuple[str, ...] = ()
    """Prompts to roll out as controls: the name of another training task, `zero rewards` or `shuffled`."""
    baselines: tuple[Literal["copy", "clone"], ...] = ()
    """Baselines made of the prompt alone, for the prompts of the cells with the longest context. copy: the action of
    the prompt's step with the nearest observation. clone: a feed-forward network trained on the prompt."""


class AblationPlan(Section):
    """Tasks x methods x context lengths x variants x seeds, and baselines.

    If all tasks share one dataset, `data: walker.h5` with `task: walker_walk` or `tasks: [walker_walk, walker_run]`
    replaces `datasets`.
    """

    datasets: dict[str, FilePath] = Field(min_length=1)
    """Task -> dataset (a RingRL store, .h5)."""
    output: FilePath
    """Folder of the results: a folder per task, and in it a folder per cell."""
    methods: tuple[Literal["at", "ad"], ...] = ("at",)
    """Methods with a context, each trained with every number of trajectories."""
    trajectories: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 2, 4), min_length=1)
    """Trajectories per training context."""
    test_trajectories: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Episodes per context in evaluation. Every cell is evaluated with each number. Default: as in training."""
    test_tasks: tuple[str, ...] = ()
    """More tasks to evaluate in. Every cell is also evaluated in those of its own domain."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field((0, 1, 2), min_length=1)
    """Training seeds, below 2**32: JAX ignores higher bits."""
    baselines: tuple[Literal["bc", "bc-10%", "bc-25%", "bc-50%", "dt", "td3", "td3+bc"], ...] = ("bc",)
    """Methods without memory of other episodes, evaluated in single episodes."""
    budget: Budget = "tokens"
    """Training cost that all cells of a task share. tokens: timesteps of data. steps: optimiser steps with the batch
    size of the settings (longer contexts then see more data)."""
    trajectories_per_batch: int = Field(8, ge=1)
    """Trajectories per optimiser step for the budget tokens: a batch has trajectories_per_batch / n contexts of n
    trajectories. td3 and td3+bc train on transitions, and their number of steps follows from the timesteps of the other
    methods."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of `ringrl train` for all cells, for example {model: {layers: 2}}. The settings of a method override
    them; settings without effect on any cell are rejected."""
    task_settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Task -> settings that override the settings of all cells."""
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Name -> settings, which override the settings of a method, too. Every cell is repeated with each variant. The
    report shows the name."""
    sweep: dict[str, Any] = Field(default_factory=dict)
    """Setting -> values, for example {optimiser.learning_rate: [0.001, 0.003], model.layers: [1, 2]}. Every combination
    becomes a variant."""
    variants_only: bool = False
    """Leave out the cells without a variant."""
    episodes: int = Field(40, ge=1)
    """Episodes per cell: episodes / n streams of contexts of n episodes. All context lengths share the same starts."""
    prompts: PromptPlan | None = None
    """Also roll out single episodes after prompts, for the methods with a context."""
    checkpoint: Literal["last", "best"] = "last"
    """Checkpoint to evaluate. best: lowest held-out loss, which needs validation_fraction in the settings. td3 and
    td3+bc use the last in any case, since their held-out loss measures imitation, not what they maximise."""
    control: bool = True
    """Also roll out every context without memory between its episodes (the matched best-of-n control)."""
    environment_modules: tuple[str, ...] = ()
    """Python modules that register the environments of the tasks, for example myenv for a file myenv.py."""
    parts: tuple[dict[str, Any], ...] = ()
    """More cells in the same output. Each part takes all keys of the plan except those that it overrides (settings are
    merged); `tasks` selects some of the datasets."""

    @property
    def whole(self) -> tuple["AblationPlan", ...]:
        """The plan without its parts, and each part as a plan of its own."""
        own = self.model_dump(exclude={"parts"})
        parts = (_part(f"parts.{number}", own, changes) for number, changes in enumerate(self.parts))
        return self.model_copy(update={"parts": ()}), *parts

    def inside(self, folder: Path) -> Self:
        """Return the plan with its relative paths in a folder."""
        datasets = {task: folder / path for task, path in self.datasets.items()}
        return self.model_copy(update={"datasets": datasets, "output": folder / self.output})

    @pydantic.model_validator(mode="before")
    @classmethod
    def _expand_short_form(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        if values.get("sweep"):
            if values.get("variants"):
                raise ValueError("sweep: makes variants of its own; leave variants out, or put them into a part")
            values = {**values, "variants": _combinations(values["sweep"]), "sweep": {}}
        if not any(name in values for name in _SHORT):
            return values
        given = {name: values[name] for name in _SHORT if name in values}
        rest = {name: value for name, value in values.items() if name not in _SHORT}
        if "datasets" in values or "data" not in given or len(given) != 2:
            raise ValueError("give datasets: {task: file}, or data with task, or data with tasks")
        tasks = given.get("tasks", [given.get("task")])
        if not isinstance(tasks, list | tuple) or not tasks or not all(isinstance(task, str) for task in tasks):
            raise ValueError("task is a name, and tasks a list of names")
        return rest | {"datasets": dict.fromkeys(tasks, given["data"])}

    @pydantic.model_validator(mode="after")
    def _check_numbers(self) -> Self:
        for name in ("methods", "trajectories", "test_trajectories", "test_tasks", "seeds", "baselines"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: contains a value twice")
        if not self.methods and not self.baselines and not self.parts:
            raise ValueError("methods and baselines are both empty; name at least one")
        if self.variants_only and not self.variants:
            raise ValueError("variants_only: there are no variants; name at least one")
        for count in self.trajectories if self.methods else ():
            if self.budget == "tokens" and self.trajectories_per_batch % count:
                raise ValueError(f"{count} does not divide the {self.trajectories_per_batch} trajectories_per_batch")
        lengths = (self.test_trajectories or self.trajectories) if self.methods else ()
        draws = self.prompts.draws if self.prompts and self.methods else 1
        shared = math.lcm(draws, *lengths)
        if self.episodes % shared:
            raise ValueError(
                f"episodes: {self.episodes} cannot be divided into contexts of {', '.join(map(str, lengths))} episodes"
                f"{f' and {draws} prompts' if draws > 1 else ''}; give a multiple of {shared}"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_tasks_and_parts(self) -> Self:
        for module in self.environment_modules:
            import_environments(module)
        for task in (*self.datasets, *self.test_tasks):
            domain_of(task)
        for task in self.task_settings:
            if task not in self.datasets:
                raise ValueError(f"task_settings: {task} is not a task of the plan ({', '.join(self.datasets)})")
        _ = self.whole  # raises if a part is not a plan
        return self


def read_plan(path: str | Path) -> AblationPlan:
    """Return the plan of a file or a preset. Raise UserError with the file and the wrong setting."""
    try:
        return AblationPlan.model_validate(read_yaml(settings_file(path)))
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: {one_line(error)}") from error


def _combinations(sweep: Any) -> dict[str, dict[str, Any]]:
    """Return the variants of a sweep: "learning rate 0.001, layers 2" -> settings."""
    if not isinstance(sweep, Mapping) or not all(isinstance(values, list) and values for values in sweep.values()):
        raise ValueError(
            "sweep: give a list of values for each setting, as in {optimiser.learning_rate: [0.001, 0.003]}"
        )
    found = {}
    for values in itertools.product(*sweep.values()):
        words, settings = [], dict[str, Any]()
        for name, value in zip(map(str, sweep), values, strict=True):
            words.append(f"{name.rpartition('.')[2].replace('_', ' ')} {'none' if value is None else value}")
            settings = merged(settings, nested(name, value))
        found[", ".join(words)] = settings
    if len(found) < math.prod(map(len, sweep.values())):
        raise ValueError("sweep: contains a value twice")
    return found


def _part(name: str, own: Mapping[str, Any], changes: Mapping[str, Any]) -> AblationPlan:
    """Return a part as a plan of its own. Raise UserError with the part's name if it is not valid."""
    try:
        if wrong := [key for key in ("datasets", "data", "task", "output", "parts") if key in changes]:
            raise UserError(f"{wrong[0]} cannot differ between the parts of a plan; leave it out")
        values = merged(own, {key: value for key, value in changes.items() if key != "tasks"})
        tasks = changes.get("tasks", list(own["datasets"]))
        if not isinstance(tasks, list | tuple) or not tasks or not set(tasks) <= set(own["datasets"]):
            raise UserError(f"tasks: {tasks} is not a list of tasks of the plan ({', '.join(own['datasets'])})")
        values["variants"] = changes.get("variants", {} if "sweep" in changes else own["variants"])
        for key in ("datasets", "task_settings"):
            values[key] = {task: value for task, value in values[key].items() if task in tasks}
        return AblationPlan.model_validate(values)
    except ValueError as error:
        reason = one_line(error) if isinstance(error, pydantic.ValidationError) else error
        raise UserError(f"{name}: {reason}") from error
