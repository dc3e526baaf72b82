"""The evaluation protocol: which episodes are rolled out for a checkpoint, and what is written down about them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ringrl.data.digest import json_digest
from ringrl.data.normalisation import Normalisation
from ringrl.envs import DOMAINS, domain_of
from ringrl.errors import UserError
from ringrl.evaluation.actors import Actor, PolicyActor, RandomActor
from ringrl.evaluation.play import Plan, Watch, play
from ringrl.evaluation.programs import Programs
from ringrl.evaluation.prompt import Prompt, draw_prompt, open_dataset, trained_returns
from ringrl.evaluation.recipe import configuration_hash, recipe
from ringrl.evaluation.records import EvaluationRecord, library_versions
from ringrl.evaluation.target import NO_TARGET, TargetPolicy
from ringrl.evaluation.told import clipped
from ringrl.methods import method_of
from ringrl.training import TrainedPolicy
from ringrl.training.budget import budget

SIMULATING, COMPUTING = {"ringrl", "numpy", "mujoco", "dm_control"}, {"jax", "jaxlib", "flax"}  # what decides a result
FIRST_SEED = 1_000_000  # environment seeds of evaluations; episodes are collected from any
SEEDS = 2**32  # that there are: what NumPy's RandomState, with which dm_control draws starts, can be seeded with


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is rolled out, the same for every method.

    Each of `environments` streams holds n = `episodes` episodes, one after another in one context; episode k of stream
    i, both from 0, starts from seed + i n + k: evaluations of as many episodes in all have the same starts, whatever n.
    `target` says how the return asked for is chosen (see `TargetPolicy.parse`). `prompt_trajectories`
    trajectories of the data, drawn with `prompt_seed`, stand in the context before the first episode.

    With `control`, the same number of episodes is rolled out without memory of each other, so that best-of-n can be
    compared with best-of-n. A prompt stays: before each of the control's episodes the memory holds it and nothing else.
    Keys and values are kept in `cache_dtype`, or in the dtype that the policy computes in.
    """

    environments: int = 10
    episodes: int = 1
    seed: int = FIRST_SEED
    target: str = "best"
    control: bool = False
    prompt_trajectories: int = 0
    prompt_seed: int = 0
    cache_dtype: str | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("environments", 1),
            ("episodes", 1),
            ("seed", 0),
            ("prompt_trajectories", 0),
            ("prompt_seed", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name}: {getattr(self, name)} is too few, at least {least} is needed")
        last = self.seed + self.environments * self.episodes - 1
        if last >= SEEDS:
            raise UserError(
                f"--seed: the episodes would start from seeds {self.seed} to {last}, and there are none from {SEEDS} "
                "on; give a lower one, or fewer episodes"
            )
        TargetPolicy.parse(self.target)


def plan_policy(
    trained: TrainedPolicy,
    run: Path,
    protocol: Protocol,
    *,
    task: str | None = None,
    data: Path | None = None,
    command: str | None = None,
    programs: Programs | None = None,
) -> Plan:
    """What is to be rolled out for a trained policy; nothing is, yet.

    Args:
      trained: the policy.
      run: its run's folder.
      protocol: how much, and how.
      task: to act in; None: the one that was trained on.
      data: where the run's dataset lies, if it has moved. It is needed for a prompt, for a target that is a quantile,
        and for any target but a number in another task than the one trained on.
      command: the command line, for the records.
      programs: of the same policy, where it acts in several tasks; None: compiled for this one.

    Raises:
      UserError: a task of another domain than the checkpoint's, a domain that is not simulated here, a prompt for a
        method without a context, or a dataset that is needed and is not there, or another one.
    """
    info, config = trained.info, trained.info.config
    task = config.task if task is None else task
    if info.domain not in DOMAINS:
        raise UserError(f"{run}: there is no simulation for {info.domain}, evaluate it in its own environment")
    if domain_of(task).name != info.domain:
        raise UserError(f"{run}: was trained on {info.domain} and cannot act in task {task}")
    choice = _choose(trained, run, protocol, task, data)
    shared = _record(trained, run, protocol, task, choice, command)
    if programs is None or programs.policy is not trained.towards(task):
        programs = programs_of(trained, protocol, task)
    chosen, count = programs, config.context.trajectories
    # Clipped here and not by each rollout: what a policy computes of a prompt is kept as long as it is the same object.
    prompt = None if choice.prompt is None else clipped(choice.prompt.context, count)
    return _plan(shared, protocol, info.normalisation, lambda first: PolicyActor(chosen), count, prompt)


def programs_of(trained: TrainedPolicy, protocol: Protocol, task: str) -> Programs:
    """What a policy computes in a task; in all tasks of its domain, but for one that is told its goal."""
    dtype = None if protocol.cache_dtype is None else jnp.dtype(protocol.cache_dtype)
    return Programs(trained.towards(task), dtype, trained.parallel)


def plan_random(task: str, protocol: Protocol, *, command: str | None = None) -> Plan:
    """What is to be rolled out of uniform random actions, which have no target, no prompt and no control."""
    domain = domain_of(task)
    protocol = dataclasses.replace(protocol, control=False, target="best", prompt_trajectories=0, prompt_seed=0)
    shared = EvaluationRecord(task=task, method="random", target_policy=NO_TARGET, **_common(protocol, command))
    size = domain.observation_size
    identity = Normalisation(np.zeros(size), np.ones(size), domain.episode_length)
    seed, stride = protocol.seed, protocol.episodes
    return _plan(
        shared, protocol, identity, lambda first: RandomActor(domain.action_size, seed + first * stride, stride)
    )


def evaluate_policy(
    trained: TrainedPolicy,
    run: Path,
    protocol: Protocol,
    *,
    task: str | None = None,
    data: Path | None = None,
    command: str | None = None,
    watch: Watch | None = None,
) -> list[EvaluationRecord]:
    """Roll a trained policy out; one record per stream, and one per control stream if asked for.

    Args:
      trained, run, protocol, task, data, command: as in `plan_policy`.
      watch: who is told how it goes.

    Raises:
      UserError: as `plan_policy`.
    """
    return play(plan_policy(trained, run, protocol, task=task, data=data, command=command), watch=watch)


def evaluate_random(task: str, protocol: Protocol, *, command: str | None = None) -> list[EvaluationRecord]:
    """Roll uniform random actions out; one record per stream."""
    return play(plan_random(task, protocol, command=command))


@dataclasses.dataclass(frozen=True)
class _Choice:
    """What the policy is asked for, and what it remembers at first."""

    target_return: float | None
    policy: str
    prompt: Prompt | None

    def prompt_fields(self, protocol: Protocol) -> dict[str, Any]:
        """Of a record."""
        if self.prompt is None:
            return {}
        return {
            "prompt_trajectories": protocol.prompt_trajectories,
            "prompt_seed": protocol.prompt_seed,
            "prompt_episodes": self.prompt.episodes,
            "prompt_returns": self.prompt.returns,
        }


def _record(
    trained: TrainedPolicy, run: Path, protocol: Protocol, task: str, choice: _Choice, command: str | None
) -> EvaluationRecord:
    """What all records of a plan say."""
    info, config = trained.info, trained.info.config
    has_context = config.model.family.has_context
    return EvaluationRecord(
        task=task,
        method=method_of(trained.info.config),
        token_set=config.model.token_set if has_context else None,
        train_trajectories=config.context.trajectories if has_context else None,
        train_task=None if task in (config.task, *config.context.other_tasks) else config.task,
        seed=config.seed,
        target_return=choice.target_return,
        target_policy=choice.policy,
        **choice.prompt_fields(protocol),
        steps_trained=trained.step,
        checkpoint=str(run),
        checkpoint_hash=trained.parameter_hash,
        configuration_hash=configuration_hash(config),
        data_fingerprint=info.data_fingerprint,
        settings=recipe(config),
        budget=budget(info, trained.step, run),
        cache_devices=trained.parallel.ring_size,
        cache_dtype=protocol.cache_dtype if has_context and protocol.cache_dtype != config.model.dtype else None,
        **_common(protocol, command),
    )


def _choose(trained: TrainedPolicy, run: Path, protocol: Protocol, task: str, data: Path | None) -> _Choice:
    info, policy = trained.info, TargetPolicy.parse(protocol.target)
    config, count = info.config, protocol.prompt_trajectories
    has_context = config.model.family.has_context
    if count and not has_context:
        raise UserError(f"--prompt-trajectories: {run} has no context ({method_of(config)}), leave it out")
    if protocol.cache_dtype is not None and not has_context:
        raise UserError(f"--cache-dtype: {run} has no context ({method_of(config)}), leave it out")
    has_target = has_context and config.context.target != NO_TARGET
    other_task = task != config.task and policy.kind != "given"
    store = None
    if count or (has_target and (policy.kind == "quantile" or other_task)):
        store = open_dataset(info, run, data)
    target = None
    if has_target:
        # Of the task trained on, the checkpoint itself knows the best return.
        returns = np.array([info.best_return]) if store is None else trained_returns(info, store, task)
        target = policy.choose(returns)
    prompt = None
    if count and store is not None:
        prompt = draw_prompt(info, store, task, count, protocol.prompt_seed, target)
    return _Choice(target, policy.name if has_target else NO_TARGET, prompt)


def _common(protocol: Protocol, command: str | None) -> dict[str, Any]:
    """What stands in every record."""
    return {
        "test_trajectories": protocol.episodes,
        "returns": (None,) * protocol.episodes,
        "environment_seed": protocol.seed,
        "device": jax.devices()[0].device_kind,
        "versions": library_versions(),
        "command": command,
    }


def _plan(
    shared: EvaluationRecord,
    protocol: Protocol,
    normalisation: Normalisation,
    make_actor: Callable[[int], Actor],
    trajectories: int = 1,
    prompt: Any = None,
) -> Plan:
    decides = shared.model_dump(mode="json", exclude={"checkpoint", "command", "created", "returns", "budget"})
    computing = SIMULATING | COMPUTING
    if shared.method == "random":  # which computes nothing
        computing, decides["device"] = SIMULATING, None
    decides["versions"] = {name: version for name, version in shared.versions.items() if name in computing}
    about = decides | {"environments": protocol.environments, "control": protocol.control}
    shared = shared.model_copy(update={"evaluation": json_digest(about)})
    return Plan(shared, about, protocol.environments, protocol.control, normalisation, make_actor, trajectories, prompt)
