"""Cells of an ablation: training runs with their evaluations, each in a folder of its own.

config.yaml       configuration of the training run (the folder is also a run's folder of `ringrl train`)
cell.yaml         description of the cell: its rollouts, budget and data
evaluation.jsonl  results
log.txt           output
finished.json     written last
"""

import dataclasses
import itertools
import json
import os
import re
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import pydantic
from rich.console import Console

from ringrl.config import TrainConfig
from ringrl.config_files import merged, nested, one_line, read_yaml, to_yaml
from ringrl.data import EpisodeStore
from ringrl.envs import domain_of, import_environments
from ringrl.errors import UserError
from ringrl.evaluation import Protocol, evaluate_all, policy_evaluation, random_evaluation
from ringrl.evaluation.actors import CompiledPolicy
from ringrl.evaluation.policy import load_policy
from ringrl.evaluation.progress import ProgressLines
from ringrl.evaluation.protocol import FIRST_SEED, prompt_only_evaluation
from ringrl.evaluation.records import append_records, data_records, folder_name, library_versions, read_records
from ringrl.files import explain_write_errors, with_crc, without_crc, write_aside, write_whole
from ringrl.methods import METHODS
from ringrl.study.plan import AblationPlan, PromptPlan
from ringrl.training import train
from ringrl.training.budget import longest_episode
from ringrl.training.checkpoints import EarlyStopping, with_checksum, without_checksum
from ringrl.training.run_folder import check_configuration, dataset_fingerprint, flat

EVALUATION = "evaluation.jsonl"
FINISHED, LOG, CELL = "finished.json", "log.txt", "cell.yaml"


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """A piece of an ablation with a folder of its own: a cell or a reference."""

    folder: Path
    about: Mapping[str, Any]  # written to cell.yaml and finished.json, to recognise the same work later
    modules: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)  # of environments

    @property
    def name(self) -> str:
        """Task and folder, "walker_walk/at_2_seed0"."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def is_finished(self) -> bool:
        """Whether all results exist, undamaged."""
        try:
            results = read_records(self.folder / EVALUATION)
        except UserError:
            return False
        finished = self._finished
        has_all = len(results.records) >= finished.get("results", 1)
        return finished.get("did") == self.about and has_all and not results.notes

    @property
    def seconds(self) -> float | None:
        """Seconds that the finished work took; None if it is unfinished or was resumed, or the file is damaged."""
        return self._finished.get("seconds")

    @property
    def _finished(self) -> dict[str, Any]:
        """The content of finished.json; empty if it is missing or damaged."""
        try:
            return dict(json.loads(without_crc((self.folder / FINISHED).read_text().strip())))
        except (OSError, ValueError, TypeError):
            return {}

    def run(self, command: str | None) -> None:
        """Write the results. Interrupted work resumes."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise UserError if the folder belongs to other work.

        More episodes, prompts or test tasks, or the best checkpoint after the last one, are the same work. Episodes
        that several prompts share must stay, since their starts would be divided anew.
        """
        path = self.folder / CELL
        if not path.exists():
            return
        try:
            known = without_checksum(read_yaml(path))
        except UserError as error:
            raise UserError(f"{error}; remove it if it is damaged") from error
        except ValueError as error:
            raise UserError(f"{path}: was edited or damaged ({error}); remove it if the plan is unchanged") from error
        about = {"checkpoint": "last", **self.about}
        extensible = {"test_trajectories", "test_tasks", "prompts", "prompt_baselines"}
        are_shared = ((known.get("prompts") or {}).get("draws") or 1) > 1
        for name in sorted(about.keys() & known.keys() - extensible):
            was, now = known[name], about[name]
            is_more = name == "episodes" and isinstance(was, int) and now > was and not are_shared
            if was != now and not is_more:
                raise UserError(f"{path}: {name} was {was}, but is {now} in the plan; give another output")


@dataclasses.dataclass(frozen=True, eq=False)
class Cell(Work):
    """A policy that is trained and then evaluated by each of its protocols."""

    config: TrainConfig
    protocols: tuple[Protocol, ...]
    variant: str | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that the policy is evaluated in: those of its training, and the plan's test tasks."""
        return tuple(dict.fromkeys((*self.config.tasks, *self.about.get("test_tasks", ()))))

    @property
    def prompt_only(self) -> tuple[tuple[Literal["copy", "clone"], Protocol], ...]:
        """The baselines made of the prompt alone, and the rollouts that are repeated with them."""
        prompted = [one for one in self.protocols if one.prompt_trajectories and not one.prompt_control]
        return tuple(itertools.product(self.about.get("prompt_baselines", ()), prompted))

    def check(self) -> None:
        """Raise UserError as `Work.check` does, or if the training run has other settings."""
        if (self.folder / "config.yaml").exists():
            check_configuration(self.config)
        super().check()

    def run(self, command: str | None) -> None:
        """Train and evaluate. An interrupted run resumes."""
        if not (self.folder / "config.yaml").exists():
            write(self.folder / "config.yaml", to_yaml(self.config))
        train(self.config, resume=True)
        trained = load_policy(self.folder, kind=self.about.get("checkpoint", "last"))
        steps = trained.steps_taken
        has_converged = EarlyStopping.saved(self.folder, steps).has_converged(self.config)
        if steps < self.config.optimiser.steps and not has_converged:
            raise UserError(f"{self.folder}: training was stopped after step {steps}; the same command resumes it")
        compiled = CompiledPolicy(trained.policy, trained.parallel)
        own: dict[str, Any] = {"command": command, "compiled": compiled, "variant": self.variant}
        evaluations = [
            policy_evaluation(trained, protocol, task=task, **own)
            for task in self.tasks
            for protocol in self.protocols
            if protocol.prompt_task != task  # the control is a prompt of another task
        ]
        evaluations += [
            prompt_only_evaluation(one, baseline)
            for baseline, protocol in self.prompt_only
            for one in evaluations
            if one.protocol == protocol
        ]
        evaluate_all(evaluations, progress=ProgressLines(Console()))


@dataclasses.dataclass(frozen=True, eq=False)
class Reference(Work):
    """The returns of random actions or of the dataset's episodes, as a reference for the cells of a task."""

    data: Path

    def run(self, command: str | None) -> None:
        """Write the results."""
        results, task, store = self.folder / EVALUATION, self.about["task"], EpisodeStore(self.data)
        own: dict[str, Any] = {"reference_returns": store.reference_returns}
        if self.about["kind"] == "random":
            protocol = Protocol(self.about["episodes"])
            evaluate_all([random_evaluation(task, protocol, command=command, results=results, **own)])
            return
        own |= {"data_fingerprint": dataset_fingerprint(store), "versions": library_versions()}
        records = data_records(task, store.returns(task), **own)
        with write_aside(results) as unfinished:
            append_records(unfinished, records)


def references(plan: AblationPlan, fingerprints: Mapping[str, str] = MappingProxyType({})) -> list[Reference]:
    """Return two references for every task that a cell acts in. `fingerprints`: task -> fingerprint of its dataset.

    A task without a dataset of its own in the plan has the dataset of the first cell that acts in it.
    """
    sources = {task: task for task in plan.datasets}
    for cell in cells(plan):
        sources |= {task: cell.config.task for task in cell.tasks if task not in sources}
    found = []
    for task, source in sources.items():
        episodes = max(part.episodes for part in plan.whole if source in part.datasets)
        own: dict[str, dict[str, Any]] = {"random": {"episodes": episodes}, "data": {"data": fingerprints.get(source)}}
        for kind in own:
            folder, about = plan.output / folder_name(task) / kind, {"kind": kind, "task": task, **own[kind]}
            found.append(Reference(folder, about, plan.datasets[source], modules=plan.environment_modules))
    return found


def cells(plan: AblationPlan, fingerprints: Mapping[str, str] = MappingProxyType({})) -> list[Cell]:
    """Return all cells of a plan, seed by seed, so that an interrupted ablation has whole comparisons.

    Raise UserError for settings that no run accepts or that have no effect, or if two parts make the same cell.
    """
    parts = [list(_cells(part, fingerprints)) for part in plan.whole]
    found = [cell for part in parts for cell in part]
    name, count = Counter(cell.name for cell in found).most_common(1)[0]
    if count > 1:
        raise UserError(f"{name}: two parts of the plan make this cell; give one of them a variant")
    # A setting must have an effect on the methods with a context, if the plan has any.
    read = [
        [cell for cell in part if cell.folder.name.partition("_")[0] in whole.methods] or part
        for whole, part in zip(plan.whole, parts, strict=True)
    ]
    _check_settings("", plan.model_dump(), [cell for part in read for cell in part])
    for number, (changes, part) in enumerate(zip(plan.parts, read[1:], strict=True)):
        _check_settings(f"parts.{number}: ", changes, part)
    trained = {task for cell in found for task in cell.config.tasks if cell.config.context.other_tasks}
    for control in (name for part in plan.whole if part.prompts for name in part.prompts.controls):
        if control not in ("zero rewards", "shuffled", *trained):
            raise UserError(f"prompts.controls: no cell is trained on {control} and another task; leave it out")
    for name in (name for part in plan.whole for name in part.test_tasks):
        if not any(name in cell.tasks for cell in found):
            raise UserError(f"test_tasks: the plan has no dataset for {name}; leave it out")
    seeds = list(dict.fromkeys(seed for part in plan.whole for seed in part.seeds))
    return sorted(found, key=lambda cell: seeds.index(cell.config.seed))


def _check_settings(where: str, plan: Mapping[str, Any], found: Sequence[Cell]) -> None:
    """Raise UserError for a setting that no cell has, since it would mislead the reader of the plan."""
    groups = [("settings", plan.get("settings", {}), found)]
    for task, settings in plan.get("task_settings", {}).items():
        groups.append((f"task_settings: {task}", settings, [cell for cell in found if cell.config.task == task]))
    for name, settings in plan.get("variants", {}).items():
        groups.append((f"variants: {name}", settings, [cell for cell in found if cell.variant == name]))
    for group, settings, chosen in groups:
        for name, value in flat(settings).items():
            # The budget may compute the steps of a cell from the steps of the plan.
            if name != "optimiser.steps" and not any(_has(cell.config, name, value) for cell in chosen):
                instead = "use trajectories_per_batch" if name == "optimiser.batch_size" else "leave it out"
                raise UserError(
                    f"{where}{group}: {name}: has no effect, since the plan itself or its methods set it otherwise; "
                    f"{instead}"
                )


def _has(config: TrainConfig, name: str, value: Any) -> bool:
    try:
        return TrainConfig.model_validate(merged(config.model_dump(), nested(name, value))) == config
    except pydantic.ValidationError:  # contradicts the settings of the method
        return False


def _cells(plan: AblationPlan, fingerprints: Mapping[str, str]) -> Iterator[Cell]:
    for seed in plan.seeds:
        for task in plan.datasets:
            for variant in (*(() if plan.variants_only else (None,)), *plan.variants):
                cell = partial(_cell, plan, fingerprints.get(task), task, seed, variant)
                yield from (cell(baseline, 1) for baseline in plan.baselines)
                for method in plan.methods:
                    yield from (cell(method, count) for count in plan.trajectories)


def _cell(
    plan: AblationPlan,
    fingerprint: str | None,
    task: str,
    seed: int,
    variant: str | None,
    method: str,
    trajectories: int,
) -> Cell:
    is_rolled_out = method in plan.methods  # other methods act in single episodes
    length = str(trajectories) if is_rolled_out else None
    slug = re.sub(r"[^\w.+=-]+", "-", variant) if variant else None
    name = "_".join(part for part in (method.replace("%", ""), length, slug) if part)
    folder = plan.output / folder_name(task) / f"{name}_seed{seed}"
    own: dict[str, Any] = {"data": plan.datasets[task], "task": task, "run": folder, "seed": seed}
    own["context"] = {"trajectories": trajectories}
    settings = plan.settings
    for above in (plan.task_settings.get(task), METHODS[method].settings, plan.variants.get(variant or "")):
        settings = merged(settings, above or {})
    try:
        config = _with_budget(plan, merged(settings, own))
    except pydantic.ValidationError as error:
        raise UserError(
            f"{task}, {name}: settings, task_settings or variants of the plan: {one_line(error)}"
        ) from error
    remembers = is_rolled_out and config.context.segment_steps is None
    tests = (plan.test_trajectories or (trajectories,)) if remembers else (1,)
    about: dict[str, Any] = {"task": task, "test_trajectories": list(tests)}
    about |= {"episodes": plan.episodes, "control": plan.control, "data": fingerprint}
    about |= {"variant": variant} if variant else {}
    own_domain = [name for name in plan.test_tasks if domain_of(name) is domain_of(task)]
    about |= {"test_tasks": own_domain} if own_domain else {}
    if plan.checkpoint == "best" and config.model.family.source == "contexts":
        about["checkpoint"] = "best"
        if not config.validation_fraction:
            raise UserError(
                f"{task}, {name}: checkpoint: best needs held-out episodes; set validation_fraction in the settings"
            )
    protocols = [Protocol(plan.episodes // n, n, control=plan.control and n > 1) for n in tests]
    shown = plan.prompts if is_rolled_out else None
    if shown and (prompts := _prompts(shown, config.tasks, plan.episodes, trajectories)):
        about["prompts"] = shown.model_dump(mode="json", exclude={"baselines"})
        is_longest = method == plan.methods[0] and trajectories == max(plan.trajectories)  # others have fewer prompts
        if shown.baselines and is_longest:
            about["prompt_baselines"] = list(shown.baselines)
        protocols += [protocol for protocol in prompts if protocol not in protocols]
    return Cell(folder, about, config, tuple(protocols), variant, modules=plan.environment_modules)


def _with_budget(plan: AblationPlan, settings: dict[str, Any]) -> TrainConfig:
    """Return the settings of a run, with the batch size or the steps of the budget."""
    config = TrainConfig.model_validate(settings)
    optimiser = {}
    if plan.budget == "tokens" and config.model.family.source == "contexts":
        optimiser = {"batch_size": plan.trajectories_per_batch // config.context.trajectories}
    elif plan.budget == "tokens":  # as many timesteps in batches of transitions
        length = config.context.segment_steps or longest_episode(config)
        timesteps = config.optimiser.steps * plan.trajectories_per_batch * length
        optimiser = {"steps": max(1, timesteps // config.optimiser.batch_size)}
    return TrainConfig.model_validate(merged(settings, {"optimiser": optimiser}))


def _prompts(plan: PromptPlan, tasks: Sequence[str], episodes: int, trajectories: int) -> list[Protocol]:
    """Return the rollouts of single episodes after prompts shorter than the training context.

    The draws of a prompt length divide the starts between them, so that every length has the same starts.
    """
    share, found = episodes // plan.draws, []
    known = {name: {"prompt_task": name} for name in tasks} if len(tasks) > 1 else {}
    known |= {"zero rewards": {"prompt_rewards": "zero"}, "shuffled": {"prompt_order": "shuffled"}}
    changes: list[dict[str, Any]] = [{}, *(known[control] for control in plan.controls if control in known)]
    for length in sorted(set(plan.trajectories)):
        if length == 0:
            found.append(Protocol(episodes))
        elif length < trajectories:
            found += [
                Protocol(share, seed=FIRST_SEED + draw * share, prompt_trajectories=length, prompt_seed=draw, **change)
                for change in changes
                if length > 1 or "prompt_order" not in change  # one trajectory has no order
                for draw in range(plan.draws)
            ]
    return found


def attempt_logged(work: Work, command: str | None) -> str | None:
    """Do `attempt` in a process of its own, whose output goes to the cell's log from now on."""
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
    """Run a cell and write how it ended. Return why it failed, or None. Nothing is raised."""
    began = time.perf_counter()
    try:
        is_resumed = (work.folder / CELL).exists()  # then the whole time is not known
        write(work.folder / CELL, to_yaml(with_checksum(work.about)))
        for module in work.modules:
            import_environments(module)
        work.run(command)
        finished = {
            "did": work.about,
            "seconds": None if is_resumed else time.perf_counter() - began,
            "results": len(read_records(work.folder / EVALUATION).records),
        }
        write(work.folder / FINISHED, with_crc(json.dumps(finished)) + "\n")
    except (Exception, SystemExit) as error:  # the other cells continue
        with suppress(OSError):  # the log may be on a full disk
            traceback.print_exc()
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return " ".join(f"{kind}{error}".split())
    return None


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all, and create its folder. Raise UserError if the file cannot be written."""
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
