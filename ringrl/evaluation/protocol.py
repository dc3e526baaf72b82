"""The evaluation protocol: which episodes are rolled out for a checkpoint, and what is written down about them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ringrl.data.normalisation import Normalisation
from ringrl.envs import DOMAINS, domain_of, make_vec
from ringrl.errors import UserError
from ringrl.evaluation.actors import Actor, PolicyActor, RandomActor
from ringrl.evaluation.records import EvaluationRecord, library_versions
from ringrl.evaluation.rollout import rollout
from ringrl.methods import method_of
from ringrl.training import TrainedPolicy

FIRST_SEED = 1_000_000  # environment seeds of evaluations; the data's and the training's lie far below


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is rolled out, the same for every method.

    Each of `environments` streams holds `episodes` episodes, one after another in one context; stream i starts from
    seed + i. The target return is the best of the training data (`data_best`) unless a number is given. With
    `control`, the same number of episodes is rolled out without memory of each other, so that best-of-n can be
    compared with best-of-n.
    """

    environments: int = 10
    episodes: int = 1
    seed: int = FIRST_SEED
    target_return: float | None = None
    control: bool = False

    def __post_init__(self) -> None:
        for name in ("environments", "episodes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is too few, at least 1 is needed")


def evaluate_policy(
    trained: TrainedPolicy,
    run: Path,
    protocol: Protocol,
    *,
    task: str | None = None,
    command: str | None = None,
    on_episode: Callable[[np.ndarray], None] = lambda returns: None,
) -> list[EvaluationRecord]:
    """Roll a trained policy out; one record per stream, and one per control stream if asked for.

    Raises:
      UserError: a task of another domain than the checkpoint's, or a domain that is not simulated here.
    """
    info, config = trained.info, trained.info.config
    task = config.task if task is None else task
    if info.domain not in DOMAINS:
        raise UserError(f"{run}: there is no simulation for {info.domain}, evaluate it in its own environment")
    if domain_of(task).name != info.domain:
        raise UserError(f"{run}: was trained on {info.domain} and cannot act in task {task}")
    target = info.best_return if protocol.target_return is None else protocol.target_return
    is_transformer = config.model.kind == "transformer"
    shared = EvaluationRecord(
        task=task,
        method=method_of(config),
        token_set=config.model.token_set if is_transformer else None,
        train_trajectories=config.context.trajectories if is_transformer else None,
        seed=config.seed,
        environment_seed=protocol.seed,
        returns=(0.0,),
        target_return=target,
        target_policy="data_best" if protocol.target_return is None else "given",
        steps_trained=trained.step,
        checkpoint=str(run),
        checkpoint_hash=trained.parameter_hash,
        data_fingerprint=info.data_fingerprint,
        command=command,
        versions=library_versions(),
    )
    actor = PolicyActor(trained.towards(task))
    trajectories = config.context.trajectories
    return _streams(actor, shared, info.normalisation, protocol, trajectories, on_episode)


def evaluate_random(task: str, protocol: Protocol, *, command: str | None = None) -> list[EvaluationRecord]:
    """Roll uniform random actions out; one record per stream."""
    domain = domain_of(task)
    shared = EvaluationRecord(
        task=task, method="random", environment_seed=protocol.seed, returns=(0.0,), versions=library_versions(),
        command=command,
    )  # fmt: skip
    size = domain.observation_size
    identity = Normalisation(np.zeros(size), np.ones(size), domain.episode_length)
    actor = RandomActor(domain.action_size, protocol.seed)
    return _streams(actor, shared, identity, dataclasses.replace(protocol, control=False), 1, lambda returns: None)


def _streams(
    actor: Actor,
    shared: EvaluationRecord,
    normalisation: Normalisation,
    protocol: Protocol,
    trajectories: int,
    on_episode: Callable[[np.ndarray], None],
) -> list[EvaluationRecord]:
    environments = make_vec(shared.task, protocol.environments, protocol.seed)

    def run(episodes: int, seed: int | None) -> np.ndarray:
        return rollout(
            actor,
            environments,
            normalisation,
            episodes=episodes,
            target_return=shared.target_return or 0.0,
            trajectories=trajectories,
            seed=seed,
            on_episode=on_episode,
        )

    try:
        records = _records(shared, protocol, run(protocol.episodes, protocol.seed), context=True)
        if protocol.control:
            # The same starts as above: reseeded once, then each episode with an empty memory.
            parts = [run(1, protocol.seed if i == 0 else None) for i in range(protocol.episodes)]
            records += _records(shared, protocol, np.concatenate(parts, axis=1), context=False)
    finally:
        environments.close()
    return records


def _records(
    shared: EvaluationRecord, protocol: Protocol, returns: np.ndarray, *, context: bool
) -> list[EvaluationRecord]:
    return [
        shared.model_copy(
            update={
                "test_trajectories": len(row),
                "context": context,
                "environment_seed": protocol.seed + index,
                "returns": tuple(row.tolist()),
            }
        )
        for index, row in enumerate(returns)
    ]
