"""The plan of an ablation: what is crossed with what, and what stays the same."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field

from ringrl.config import Section, TrainConfig, one_line, read_yaml
from ringrl.envs import domain_of
from ringrl.errors import UserError

Budget = Literal["tokens", "steps", "time"]
_SHORT = ("data", "task", "tasks")


class AblationPlan(Section):
    """Tasks x methods x context lengths x token sets x seeds, and baselines.

    Where all tasks are of one dataset, `data: walker.h5` with `task: walker_walk`, or with `tasks: [walker_walk,
    walker_run]`, says the same as `datasets`.
    """

    datasets: dict[str, Path] = Field(min_length=1)
    """Tasks whose reward is learned, and the dataset (a RingRL store, .h5) of each."""
    output: Path
    """Folder that holds a folder per task, and in it one per cell."""
    methods: tuple[Literal["at", "ad"], ...] = ("at",)
    """Methods with a context, each trained with every number of trajectories."""
    trajectories: tuple[int, ...] = Field((1, 2, 4), min_length=1)
    """Trajectories per context in training."""
    test_trajectories: tuple[int, ...] = ()
    """Episodes per context in evaluation, each for every trained context; by default as many as in training."""
    token_sets: tuple[Literal["at5", "ring4", "dt3", "fused1"], ...] = ()
    """Tokens per timestep, of the methods with a context; by default what the settings say."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field((0, 1, 2), min_length=1)
    """Training seeds; JAX takes a number from 2**32 on for a lower one."""
    baselines: tuple[Literal["bc", "bc-10%", "dt", "td3", "td3+bc"], ...] = ("bc",)
    """Methods that remember no other episode; evaluated in single episodes."""
    budget: Budget = "tokens"
    """What is the same for all cells of a task. tokens: the timesteps seen in training. steps: the optimiser's steps,
    of as many contexts each (baselines: of what their method sets), so that a longer context sees more. time:
    seconds of training, see `seconds`."""
    seconds: float = Field(60.0, gt=0)
    """Of training per cell, for the budget time: the steps are as many as fit in, by the speed measured before the
    first cell starts. They are fixed then, so that the learning rate can fall to its end; no clock stops a run."""
    trajectories_per_batch: int = Field(8, ge=1)
    """Trajectories per optimiser step, for the budgets tokens and time: a context length n makes batches of
    trajectories_per_batch / n contexts. td3 and td3+bc have batches of transitions; for the budget tokens they take as
    many more steps as they need to see as many timesteps."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of `ringrl train` shared by all cells, for example {model: {layers: 2}}; those of a method win, and
    what they leave without effect is refused."""
    task_settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of single tasks, by the task's name, over those that all share."""
    environments: int = Field(10, ge=1)
    """Evaluation streams of the longest context. All cells of a task are rolled out from the same starts: those of
    shorter contexts, and of baselines, in as many more streams as it takes to play as many episodes."""
    control: bool = True
    """Also evaluate every policy without memory between episodes (the matched best-of-n control)."""
    videos: bool = False
    """Also film the first, the median and the best episode of each cell of the lowest seed. That needs OpenGL, and half
    a minute a video without a GPU."""

    @property
    def episodes(self) -> int:
        """That every cell plays in evaluation, of each length: a multiple of all lengths, so that none is cut."""
        rolled_out = (self.test_trajectories or self.trajectories) if self.methods else ()
        return self.environments * math.lcm(1, *rolled_out)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _short_form(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not any(name in values for name in _SHORT):
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
    def _crosses_what_there_is(self) -> Self:
        for name in ("methods", "trajectories", "test_trajectories", "token_sets", "seeds", "baselines"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: a value stands there twice")
        if not self.methods and not self.baselines:
            raise ValueError("methods and baselines are both empty; name at least one")
        for count in (*self.trajectories, *self.test_trajectories):
            if count < 1:
                raise ValueError(f"{count} trajectories are too few, at least 1 is needed")
        for count in self.trajectories:
            if self.budget != "steps" and self.trajectories_per_batch % count:
                raise ValueError(f"{count} does not divide the {self.trajectories_per_batch} trajectories_per_batch")
        return self

    @pydantic.model_validator(mode="after")
    def _settings_are_of_its_tasks(self) -> Self:
        for task in self.task_settings:
            if task not in self.datasets:
                raise ValueError(f"task_settings: {task} is none of the plan's tasks ({', '.join(self.datasets)})")
        return self

    @pydantic.field_validator("datasets")
    @classmethod
    def _tasks_exist(cls, datasets: dict[str, Path]) -> dict[str, Path]:
        for task in datasets:
            try:
                domain_of(task)
            except UserError as error:
                raise ValueError(str(error)) from error
        return datasets


def read_plan(path: Path) -> AblationPlan:
    """A plan file; UserError names the file and the setting that is wrong."""
    values = read_yaml(path)
    if values.keys() <= TrainConfig.model_fields.keys() and not values.keys() <= {*AblationPlan.model_fields, *_SHORT}:
        raise UserError(
            f"{path}: is a file of settings for `ringrl train --config`, not a plan; give a plan, which holds such "
            "settings under settings:"
        )
    try:
        return AblationPlan.model_validate(values)
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: {one_line(error)}") from error
