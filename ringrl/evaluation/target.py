"""What a policy is conditioned on: the target return, chosen by `--target`, and the prompt."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from jaxtyping import Float

from ringrl.context import Context
from ringrl.data import EpisodeStore
from ringrl.data.sampling.held_out import held_out
from ringrl.data.sampling.sampler import ContextDraw, ContextSampler, eligible_episodes
from ringrl.envs import is_foreign
from ringrl.errors import UserError
from ringrl.evaluation.formatting import all_digits
from ringrl.methods import method_of
from ringrl.training.checkpoints import RunInfo
from ringrl.training.run_folder import dataset_fingerprint

if TYPE_CHECKING:
    from ringrl.evaluation.policy import TrainedPolicy
    from ringrl.evaluation.protocol import Protocol

FIRST_DRAW = 2**64  # the sampler's step for the first draw; no training reaches this step
NO_TARGET = "none"  # name of the rule in records of methods without a target return


@dataclass(frozen=True)
class TargetPolicy:
    """A rule for the target return."""

    kind: Literal["given", "factor", "quantile"]  # a return; a multiple of the data's best return; a quantile of them
    value: float

    @classmethod
    def parse(cls, target: str | float) -> Self:
        """Parse "best", "0.9x" (of the best), "q0.75" (quantile) or a return. UserError for anything else."""
        text = str(target).strip().lower()
        if text == "best":
            return cls("factor", 1.0)
        try:
            if text.endswith("x"):
                found = cls("factor", float(text[:-1]))
            elif text.startswith("q"):
                found = cls("quantile", float(text[1:]))
            else:
                found = cls("given", float(text))
        except ValueError:
            found = cls("given", math.nan)
        if not math.isfinite(found.value) or (found.kind == "quantile" and not 0 <= found.value <= 1):
            raise UserError(
                f'--target: {text!r} is not a target; give "best", a return (800), "0.9x" (of the best) or "q0.75"'
            )
        return found

    @property
    def name(self) -> str:
        """Name of the rule in records: "data_best", "0.9x data_best", "data_quantile_0.75" or "given"."""
        value = all_digits(self.value)
        if self.kind == "quantile":
            return f"data_quantile_{value}"
        if self.kind == "factor":
            return "data_best" if self.value == 1 else f"{value}x data_best"
        return "given"

    def needs_dataset(self, info: RunInfo, task: str) -> bool:
        """Return whether the target in a task depends on returns that the checkpoint of a run does not contain."""
        return self.kind == "quantile" or (self.kind == "factor" and task != info.config.task)

    def choose(self, returns: Float[np.ndarray, " episodes"]) -> float:
        """Return the target return, given the returns of the training data."""
        if self.kind == "quantile":
            return float(np.quantile(returns.astype(np.float64), self.value))
        return self.value * float(returns.max()) if self.kind == "factor" else self.value


def trained_returns(info: RunInfo, task: str, store: EpisodeStore | None) -> Float[np.ndarray, " episodes"]:
    """Return the returns, in a task, of the episodes that training selects; without the store, only the best one."""
    if store is None:
        return np.array([info.best_return])
    config, context = info.config, info.config.context
    selection = context.max_transitions, context.best_fraction, held_out(store, config)
    chosen = eligible_episodes(store, task, config.seed, *selection)
    return store.returns(task)[chosen]


def target_and_prompt(
    trained: "TrainedPolicy", protocol: "Protocol", task: str, data: Path | None
) -> tuple[float | None, str, Context | None, dict[str, Any]]:
    """Return the target return, the name of its rule, the prompt and its fields. Opens the dataset only if needed."""
    run, info, config = trained.run, trained.info, trained.info.config
    if is_foreign(task):
        task = config.task  # another version of an environment has no data
    rule = TargetPolicy.parse(protocol.target)
    count, has_context = protocol.prompt_trajectories, config.model.family.has_context
    if count and not has_context:
        raise UserError(f"--prompt-trajectories: {run} has no context ({method_of(config)}); leave it out")
    has_target = has_context and config.context.target != NO_TARGET
    needs_dataset = count or (has_target and rule.needs_dataset(info, task))
    store = open_dataset(info, run, data) if needs_dataset else None
    target = rule.choose(trained_returns(info, task, store)) if has_target else None
    name = rule.name if has_target else NO_TARGET
    if not count or store is None:
        return target, name, None, {}
    if protocol.prompt_task == task:
        raise UserError(f"--prompt-task {task}: is the task itself; name another task, or leave it out")
    if protocol.prompt_order == "shuffled" and (count == 1 or config.context.order == "random"):
        raise UserError("--prompt-order shuffled: has no effect on one trajectory or on a random order; leave it out")
    return target, name, *draw_prompt(info, store, protocol.prompt_task or task, protocol, target)


def open_dataset(info: RunInfo, run: Path, data: Path | None) -> EpisodeStore:
    """Open the dataset of a run, at `data` or the configuration's path. UserError if it is missing or another one."""
    path = info.config.data if data is None else data
    if data is None and not path.is_file():
        raise UserError(f"{path}: the dataset of {run} is missing; give its path with --data")
    store = EpisodeStore(path)
    found = dataset_fingerprint(store)
    if found != info.data_fingerprint:
        raise UserError(
            f"{path}: is not the dataset that {run} was trained on (fingerprint {found[:12]}, expected "
            f"{info.data_fingerprint[:12]}); give the right one with --data"
        )
    return store


def draw_prompt(
    info: RunInfo, store: EpisodeStore, task: str, protocol: "Protocol", target_return: float | None
) -> tuple[Context, dict[str, Any]]:
    """Draw a prompt, selected and ordered as in training. A run trained on segments has prompts of segments.

    Returns the prompt as a context (1, T, ...) in the order of time, and the fields of an `EvaluationRecord` that
    describe it. If training contexts have one target, that of the prompt is `target_return`, as in the live episodes.
    With `prompt_rewards` zero, every return-to-go is the target of the live episodes, and no trajectory completes.

    Raise UserError if the dataset has fewer trajectories.
    """
    config, trajectories, seed = info.config, protocol.prompt_trajectories, protocol.prompt_seed
    drawn = config.context.model_copy(update={"trajectories": trajectories, "other_tasks": ()})
    if drawn.sampling == "fixed":  # the same trajectories at every step
        drawn = drawn.model_copy(update={"sampling": "uniform"})
    excluded = held_out(store, config)
    try:
        sampler = ContextSampler(store, task, drawn, info.normalisation, 1, config.seed, excluded=excluded)
    except UserError as error:
        raise UserError(f"--prompt-trajectories: {error}") from error
    draw = sampler.draw(FIRST_DRAW + seed)
    if protocol.prompt_order == "shuffled":
        draw = _shuffled(draw, np.random.default_rng([seed, trajectories]))
    (episodes,) = draw.episodes
    returns = store.returns(task)[episodes].astype(np.float64)
    if config.context.target == "best" and target_return is not None:
        targets = np.full_like(draw.targets, target_return)
        draw = draw._replace(targets=targets, completes=returns[None] >= targets)
    steps = int(draw.starts[0, -1])
    context = sampler.read(draw, slice(None), np.arange(steps))
    if protocol.prompt_rewards == "zero":
        none = np.zeros_like(context.reward)
        context = context._replace(
            reward=none,
            completion=none,
            return_to_go=info.normalisation.return_to_go(none + (target_return or 0.0)),
            previous=context.previous._replace(reward=none, completion=none),
        )
    context = context._replace(trajectory=np.minimum(context.trajectory, config.context.trajectories - 1))
    return context, {
        "prompt_trajectories": trajectories,
        "prompt_seed": seed,
        "prompt_control": protocol.prompt_control,
        "prompt_episodes": tuple(episodes.tolist()),
        "prompt_returns": tuple(returns.tolist()),
    }


def _shuffled(draw: ContextDraw, generator: np.random.Generator) -> ContextDraw:
    """Return the draw of one context with its trajectories in another order."""
    count = draw.episodes.shape[1]
    order = np.arange(count)
    while (order == np.arange(count)).all():
        order = generator.permutation(count)
    lengths = np.diff(draw.starts, axis=1)[:, order]
    columns = ("episodes", "targets", "completes", "first_timesteps")
    moved = {name: getattr(draw, name)[:, order] for name in columns}
    return draw._replace(**moved, starts=np.concatenate([[[0]], np.cumsum(lengths, axis=1)], axis=1))
