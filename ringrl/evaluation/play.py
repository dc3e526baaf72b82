"""One evaluation: its rollouts, watched and written down, and the records that come of them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Int64

from ringrl.context import Context
from ringrl.data.normalisation import Normalisation
from ringrl.envs import make_vec
from ringrl.evaluation.actors import Actor
from ringrl.evaluation.episode import Episode
from ringrl.evaluation.journal import Journal
from ringrl.evaluation.records import EvaluationRecord
from ringrl.evaluation.rollout import Group, rollout

Part = Literal["context", "control"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is needed to roll one task out.

    Attributes:
        shared: what all records say; the returns are still missing.
        about: all that decides the result, plain values; `shared.evaluation` is its hash.
        environments: streams.
        control: whether as many episodes follow without memory of each other.
        normalisation: that the policy was trained with.
        make_actor: of a group of streams, given the index of its first.
        trajectories: of a training context; the policy knows no higher index.
        prompt: a context (1, T, ...) that comes before the first episode.
    """

    shared: EvaluationRecord
    about: Mapping[str, Any]
    environments: int
    control: bool
    normalisation: Normalisation
    make_actor: Callable[[int], Actor]
    trajectories: int
    prompt: Context | None

    @property
    def episodes(self) -> int:
        """Of each stream."""
        return self.shared.test_trajectories

    @property
    def parts(self) -> tuple[Part, ...]:
        """The streams, and the control where it is asked for."""
        return ("context", "control") if self.control else ("context",)

    @property
    def last(self) -> tuple[Part, int]:
        """Part and index of the episode that ends last."""
        return self.parts[-1], self.episodes - 1

    @property
    def seeds(self) -> Int64[np.ndarray, "streams episodes"]:
        """What the start of each episode is drawn with: so many episodes in all have the same starts, whatever n."""
        numbers = np.arange(self.environments * self.episodes, dtype=np.int64)
        return self.shared.environment_seed + numbers.reshape(self.environments, self.episodes)

    @property
    def streams(self) -> set[tuple[bool, int]]:
        """(whether in context, environment seed) of every record."""
        return {(part == "context", first) for part in self.parts for first in self.seeds[:, 0].tolist()}

    @property
    def steps(self) -> int:
        """Environment steps in all, the control's included."""
        return self.environments * self.episodes * self.normalisation.episode_length * (2 if self.control else 1)


class _Outcome(NamedTuple):
    """What is kept of an episode."""

    returns: np.ndarray  # (streams,)
    steps: np.ndarray  # (streams,)
    seconds: float


class Watch:
    """Somebody who is told how an evaluation goes; this one does not care."""

    def step(self, streams: int) -> None:
        """So many environments have been simulated for a step."""

    def episode(self, part: Part, index: int, episode: Episode) -> None:
        """An episode has ended, or was found in the journal."""


def play(
    plan: Plan, *, journal: Journal | None = None, watch: Watch | None = None, groups: int | None = None
) -> list[EvaluationRecord]:
    """Roll a plan out: one record per stream, then one per control stream.

    Args:
      plan: what.
      journal: where each episode is written down as it ends, and those that stand there already are taken from. The
        result is then, bit for bit, that of a rollout which was never interrupted (on a CPU).
      watch: who is told.
      groups: of environments that take turns; None: two where an accelerator can work meanwhile, else one.
    """
    watch = watch or Watch()
    made = _make_groups(plan, _default_groups(plan) if groups is None else groups)
    try:
        return [
            record
            for part in plan.parts
            for record in _records(plan, part, _roll_out(plan, part, made, journal, watch))
        ]
    finally:
        for group in made:
            group.environments.close()


def _default_groups(plan: Plan) -> int:
    return 1 if jax.default_backend() == "cpu" else min(2, plan.environments)


def _make_groups(plan: Plan, count: int) -> list[Group]:
    """Neighbouring streams, shared out as evenly as can be."""
    return [
        Group(plan.make_actor(int(part[0])), make_vec(plan.shared.task, len(part), plan.seeds[part, 0].tolist()))
        for part in np.array_split(np.arange(plan.environments), count)
    ]


def _roll_out(plan: Plan, part: Part, groups: Sequence[Group], journal: Journal | None, watch: Watch) -> list[_Outcome]:
    """All episodes of the streams, or of the control: each of its episodes is a rollout of its own, from the same
    starts as the streams'."""
    size = plan.normalisation.episode_length, plan.environments
    recorded = [] if journal is None else journal.episodes(part, *size)[: plan.episodes]
    done: list[_Outcome] = []

    def keep(episode: Episode) -> None:
        if journal is not None and len(done) >= len(recorded):
            journal.add(part, len(done), episode)
        watch.episode(part, len(done), episode)
        done.append(_Outcome(episode.returns, episode.steps, episode.seconds))

    run = partial(
        rollout,
        groups,
        plan.normalisation,
        target_return=plan.shared.target_return,
        trajectories=plan.trajectories,
        prompt=plan.prompt,
        on_step=watch.step,
        on_episode=keep,
    )
    if part == "context":
        run(seeds=plan.seeds, recorded=recorded)
    else:
        for index in range(plan.episodes):
            run(seeds=plan.seeds[:, index : index + 1], recorded=recorded[index : index + 1])
    return done


def _records(plan: Plan, part: Part, episodes: Sequence[_Outcome]) -> list[EvaluationRecord]:
    returns = np.stack([episode.returns for episode in episodes], axis=1)
    returns[np.logical_or.accumulate(np.isnan(returns), axis=1)] = np.nan  # the control's streams end as the others do
    before = np.pad(np.isfinite(returns), ((0, 0), (1, 0)), constant_values=True)[:, :-1]  # it had not failed by then
    steps = np.sum([episode.steps for episode in episodes] * before.T, axis=0)
    seconds = sum(episode.seconds for episode in episodes)
    return [
        EvaluationRecord.model_validate(
            dict(plan.shared)
            | {
                "context": part == "context",
                "environment_seed": seeds[0],
                "start_seeds": seeds,
                "returns": tuple(None if np.isnan(value) else float(value) for value in row),
                "steps_simulated": int(steps[index]),
                "wall_seconds": seconds,
                "created": datetime.now(UTC),
            }
        )
        for index, (row, seeds) in enumerate(zip(returns, plan.seeds.tolist(), strict=True))
    ]
