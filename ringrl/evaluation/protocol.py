"""The evaluation protocol (initial states, prompt, control) and the evaluations made from it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from jaxtyping import Int64

from ringrl.config import TrainConfig
from ringrl.context import Context
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.envs import DOMAINS, STEP_TIMEOUT, ForeignDomain, domain_of, is_foreign
from ringrl.errors import UserError
from ringrl.evaluation.actors import (
    Actor,
    CloneActor,
    CompiledPolicy,
    CopyActor,
    PolicyActor,
    RandomActor,
    SegmentActor,
)
from ringrl.evaluation.records import (
    EvaluationRecord,
    ReferenceReturns,
    folder_name,
    library_versions,
    recipe,
)
from ringrl.evaluation.target import NO_TARGET, TargetPolicy, target_and_prompt
from ringrl.files import json_digest
from ringrl.methods import method_of
from ringrl.training.budget import budget
from ringrl.training.checkpoints import RunInfo

if TYPE_CHECKING:
    from ringrl.evaluation.policy import TrainedPolicy

Part = Literal["context", "control"]

FIRST_SEED = 1_000_000  # default of Protocol.seed
SEEDS = 2**32  # NumPy's RandomState, which draws dm_control's starts, takes seeds below this number
# The libraries whose versions are part of an evaluation's hash.
_SIMULATING, _COMPUTING = {"ringrl", "numpy", "mujoco", "dm_control"}, {"jax", "jaxlib", "flax"}


@dataclass(frozen=True)
class Protocol:
    """The settings of a rollout, the same for every method.

    A stream is n = `episodes` episodes, one after another in one context. Episode k of stream i (both from 0) starts
    from the environment seed `seed + i * n + k`. Protocols with the same total of episodes thus share their starts.

    The control repeats the same episodes, but clears the policy's memory before each one, except for the prompt. With
    the control, best-of-n is compared with best-of-n.

    Attributes:
        environments: number of streams.
        episodes: episodes per stream.
        seed: environment seed of the first episode.
        target: rule for the target return (see `TargetPolicy.parse`).
        control: also roll out the control.
        prompt_trajectories: dataset trajectories in the context before the first episode.
        prompt_seed: seed with which the prompt is drawn.
        prompt_task: as a control, draws the prompt from another task of the dataset, with its rewards.
        prompt_rewards: "zero", as a control, shows a prompt whose rewards are all zero.
        prompt_order: "shuffled", as a control, puts the prompt's trajectories in random order.
        step_timeout: seconds that a reset or a step of another package's environment may take before its stream ends.

    Raises:
        UserError: a number is too small, or a seed exceeds 2**32 - 1, or the target cannot be parsed.
    """

    environments: int = 10
    episodes: int = 1
    seed: int = FIRST_SEED
    target: str | float = "best"
    control: bool = False
    prompt_trajectories: int = 0
    prompt_seed: int = 0
    prompt_task: str | None = None
    prompt_rewards: Literal["kept", "zero"] = "kept"
    prompt_order: Literal["kept", "shuffled"] = "kept"
    step_timeout: float = STEP_TIMEOUT

    def __post_init__(self) -> None:
        least = {"environments": 1, "episodes": 1, "seed": 0, "prompt_trajectories": 0, "prompt_seed": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                flag = name.replace("_", "-")
                raise UserError(f"{name}: {getattr(self, name)} is too small; give at least {minimum} (--{flag})")
        if not self.step_timeout > 0:
            raise UserError(f"--step-timeout: {self.step_timeout:g} is too small; give a number of seconds above 0")
        last = self.seed + self.environments * self.episodes - 1
        if last >= SEEDS:
            raise UserError(
                f"--seed: the episodes would start from seeds {self.seed} to {last}, seeds must be below {SEEDS}; "
                "give a lower seed, or fewer episodes"
            )
        if self.prompt_control and not self.prompt_trajectories:
            raise UserError(f"prompt ({self.prompt_control}): no prompt is drawn; give --prompt-trajectories, too")
        TargetPolicy.parse(self.target)

    @property
    def prompt_control(self) -> str | None:
        """The change to the prompt, in words. None: no change."""
        changes = [f"of {self.prompt_task}"] * (self.prompt_task is not None)
        changes += ["zero rewards"] * (self.prompt_rewards == "zero")
        changes += ["shuffled"] * (self.prompt_order == "shuffled")
        return ", ".join(changes) or None


@dataclass(frozen=True)
class Evaluation:
    """The settings of one evaluation, made by `policy_evaluation` or `random_evaluation`."""

    template: EvaluationRecord  # record of a stream, without the returns
    results: Path  # results file (.jsonl) to which the records are appended
    protocol: Protocol
    normalisation: Normalisation  # statistics of the policy's training data
    make_actor: Callable[[int], Actor]  # returns the actor of a group of streams, given the index of its first stream
    trajectories: int = 1  # per training context; trajectory indices of the episodes are clipped below this number
    prompt: Context | None = None  # (1, T, ...) before the first episode

    @property
    def most_steps(self) -> int | None:
        """Return the limit of steps per episode, if episodes may end earlier. None: all are as long as the data's."""
        return domain_of(self.template.task).episode_length if is_foreign(self.template.task) else None

    @property
    def parts(self) -> tuple[Part, ...]:
        """Return the parts that are rolled out, in order."""
        return ("context", "control") if self.protocol.control else ("context",)

    @property
    def seeds(self) -> Int64[np.ndarray, "streams episodes"]:
        """Return the environment seed of each episode."""
        shape = self.protocol.environments, self.protocol.episodes
        return self.protocol.seed + np.arange(shape[0] * shape[1], dtype=np.int64).reshape(shape)

    @property
    def steps(self) -> int:
        """Return the number of environment steps (at most, if episodes end early), including the control."""
        return self.seeds.size * (self.most_steps or self.normalisation.episode_length) * len(self.parts)

    @property
    def videos(self) -> Path:
        """Return the folder of the videos."""
        name = f"{folder_name(self.template.task)}.{str(self.template.evaluation)[:12]}"
        return self.results.with_suffix(".videos") / name

    def own(self, records: Iterable[EvaluationRecord]) -> list[EvaluationRecord]:
        """Return the records of this evaluation."""
        return [record for record in records if record.evaluation == self.template.evaluation]

    def is_finished(self, records: Iterable[EvaluationRecord]) -> bool:
        """Return whether the records contain every stream. A kill during writing may leave only the first streams."""
        expected = {(part == "context", first) for part in self.parts for first in self.seeds[:, 0].tolist()}
        return {(record.context, record.environment_seed) for record in self.own(records)} >= expected


def policy_evaluation(
    trained: "TrainedPolicy",
    protocol: Protocol,
    *,
    task: str | None = None,
    data: Path | None = None,
    command: str | None = None,
    results: Path | None = None,
    compiled: CompiledPolicy | None = None,
    variant: str | None = None,
) -> Evaluation:
    """Return the evaluation of a trained policy.

    Args:
      trained: the policy.
      protocol: see `Protocol`.
      task: None: the task of the run.
      data: path of the run's dataset if it was moved. The dataset is read for a prompt, for a target that is a
        quantile, and for another task than the run's unless the target is a number.
      command: command line, for the records.
      results: None: evaluation.jsonl in the run's folder.
      compiled: programs of the same policy, which all tasks share. None: new programs.
      variant: name of the run's settings in an ablation plan, for the records.

    Raises:
      UserError: the task belongs to another domain than the checkpoint, or has other spaces; a prompt is given for a
        method without a context; the dataset is missing or is another one.
    """
    run, info, config = trained.run, trained.info, trained.info.config
    task = config.task if task is None else task
    check_environment(run, info, task)
    if protocol.episodes > 1 and config.context.segment_steps and config.model.family.has_context:
        raise UserError(
            f"--episodes {protocol.episodes}: {run} was trained on segments and remembers the prompt and "
            f"{config.context.segment_steps} steps of the live episode, not earlier episodes; give --episodes 1"
        )
    target_return, target_policy, prompt, prompt_fields = target_and_prompt(trained, protocol, task, data)
    has_context = config.model.family.has_context
    template = EvaluationRecord(
        task=task,
        method=method_of(config),
        variant=variant,
        token_set=config.model.token_set if has_context else None,
        train_trajectories=config.context.trajectories if has_context else None,
        train_task=None if task in config.tasks else config.task,
        reference_returns=info.reference_returns if task == config.task or not is_foreign(config.task) else None,
        seed=config.seed,
        target_return=target_return,
        target_policy=target_policy,
        steps_trained=trained.step,
        checkpoint=str(run),
        checkpoint_hash=trained.parameter_hash,
        configuration_hash=json_digest(config.model_dump(mode="json")),
        data_fingerprint=info.data_fingerprint,
        settings=recipe(config),
        budget=budget(info, trained.steps_taken, run),
        cache_devices=trained.parallel.ring_size,
        **prompt_fields,
        **_common_fields(protocol, command),
    )
    policy = compiled or CompiledPolicy(trained.policy, trained.parallel)
    return Evaluation(
        _with_hash(template, protocol),
        results or run / "evaluation.jsonl",
        protocol,
        normalisation=info.normalisation,
        make_actor=lambda first: make_actor(policy, config),
        trajectories=config.context.trajectories,
        prompt=prompt,
    )


def check_environment(run: Path, info: RunInfo, task: str) -> None:
    """Raise UserError unless the environment of a task has the spaces of a run's data."""
    if info.domain not in DOMAINS and not is_foreign(info.domain) and not is_foreign(task):
        raise UserError(f"{run}: {info.domain} names no environment; give one with the same spaces (--environment)")
    domain = domain_of(task)
    if domain.name == info.domain and not isinstance(domain, ForeignDomain):
        return
    if not isinstance(domain, ForeignDomain) or info.domain in DOMAINS:
        raise UserError(f"{run}: was trained on {info.domain} and cannot act in task {task}")
    own, found = ((one.observation_size, one.action_size) for one in (info, domain))
    if own != found:
        raise UserError(
            f"{task}: observations and actions have {found[0]} and {found[1]} numbers, those of {run} have "
            f"{own[0]} and {own[1]}"
        )
    if info.actions is not None and info.actions != (domain.action_low, domain.action_high, domain.is_discrete):
        raise UserError(f"{task}: its actions have other bounds than those of the data of {run}")


def make_actor(compiled: CompiledPolicy, config: TrainConfig) -> Actor:
    """Return an actor for a policy: segments of episodes or whole contexts, as in its training."""
    segment_steps = config.context.segment_steps if config.model.family.has_context else None
    return SegmentActor(compiled, segment_steps) if segment_steps else PolicyActor(compiled)


def random_evaluation(
    task: str,
    protocol: Protocol,
    *,
    command: str | None = None,
    results: Path = Path("random.jsonl"),
    reference_returns: ReferenceReturns = None,
) -> Evaluation:
    """Return the evaluation of uniform random actions, which have no target, no prompt and no control."""
    domain = domain_of(task)
    size, n = domain.observation_size, protocol.episodes
    protocol = Protocol(protocol.environments, n, protocol.seed, step_timeout=protocol.step_timeout)
    own: dict[str, Any] = {"target_policy": NO_TARGET, "reference_returns": reference_returns}
    template = EvaluationRecord(task=task, method="random", **own, **_common_fields(protocol, command))
    return Evaluation(
        _with_hash(template, protocol),
        results,
        protocol,
        normalisation=Normalisation(np.zeros(size), np.ones(size), domain.episode_length),
        make_actor=lambda first: RandomActor(domain.action_size, protocol.seed + first * n, n),
    )


def prompt_only_evaluation(evaluation: Evaluation, method: Literal["copy", "clone"]) -> Evaluation:
    """Return the same rollouts by a policy made of the prompt alone (CopyActor, CloneActor). UserError without one."""
    if evaluation.prompt is None:
        raise UserError(f"--policy {method}: there is no prompt; give --prompt-trajectories, too")
    trained = ("token_set", "train_trajectories", "target_return", "steps_trained", "checkpoint", "checkpoint_hash",
               "budget")  # fmt: skip
    own = {"method": method, "target_policy": NO_TARGET, "settings": {}, "cache_devices": 1}
    template = evaluation.template.model_copy(update=dict.fromkeys(trained) | own)
    actor = CopyActor if method == "copy" else CloneActor
    return replace(evaluation, template=_with_hash(template, evaluation.protocol), make_actor=lambda first: actor())


def _common_fields(protocol: Protocol, command: str | None) -> dict[str, Any]:
    n, device = protocol.episodes, jax.devices()[0].device_kind
    own = {"test_trajectories": n, "returns": (None,) * n, "environment_seed": protocol.seed}
    return own | {"device": device, "versions": library_versions(), "command": command}


def _with_hash(template: EvaluationRecord, protocol: Protocol) -> EvaluationRecord:
    """Return the template with the hash of everything that decides the result of its evaluation."""
    names = {
        "checkpoint", "command", "created", "returns", "lengths", "terminated", "budget", "variant",
        "reference_returns",
    }  # fmt: skip
    decides = template.model_dump(mode="json", exclude=names)
    libraries = _SIMULATING | _COMPUTING
    if template.method in ("random", "copy"):  # no policy is computed
        libraries, decides["device"] = _SIMULATING, None
    libraries = libraries | ({"gymnasium"} if is_foreign(template.task) else set())
    decides["versions"] = {name: version for name, version in template.versions.items() if name in libraries}
    decides |= {"environments": protocol.environments, "control": protocol.control}
    return template.model_copy(update={"evaluation": json_digest(decides)})
