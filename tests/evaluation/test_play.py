"""Evaluations that are interrupted and go on, and that are cut into groups."""

from pathlib import Path

import numpy as np
import pytest

from ringrl.envs import make
from ringrl.evaluation.episode import Episode
from ringrl.evaluation.journal import Journal
from ringrl.evaluation.play import Part, Plan, Watch, play
from ringrl.evaluation.protocol import Protocol, plan_policy, plan_random
from ringrl.evaluation.records import EvaluationRecord
from ringrl.training import load_policy

EPISODES, STREAMS, LENGTH = 2, 2, 250


class Stopwatch(Watch):
    """Counts, and interrupts after so many episodes."""

    def __init__(self, after: int | None = None) -> None:
        self.after, self.steps, self.ended, self.starts, self.begun = after, 0, [], [], []

    def step(self, streams: int) -> None:
        self.steps += streams

    def episode(self, part: Part, index: int, episode: Episode) -> None:
        self.ended.append((part, index))
        self.starts.append(episode.observation[0])
        self.begun.append(episode.observation[:10])
        if len(self.ended) == self.after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def plan(at_run: Path) -> Plan:
    protocol = Protocol(environments=STREAMS, episodes=EPISODES, control=True, prompt_trajectories=1)
    return plan_policy(load_policy(at_run), at_run, protocol)


@pytest.fixture(scope="module")
def whole(plan: Plan) -> list[EvaluationRecord]:
    return play(plan)


def told(records: list[EvaluationRecord]) -> list[tuple]:
    return [(r.context, r.environment_seed, r.returns, r.steps_simulated, r.evaluation) for r in records]


def test_records_of_streams_and_control(plan: Plan, whole: list[EvaluationRecord]) -> None:
    seeds = [1_000_000, 1_000_002]
    assert [(r.context, r.environment_seed) for r in whole] == [(c, seed) for c in (True, False) for seed in seeds]
    streams, control = whole[:2], whole[2:]
    for one, other in zip(streams, control, strict=True):
        assert one.returns[0] == pytest.approx(other.returns[0], rel=1e-6), "the same start, the same memory"
        assert one.returns[1] != other.returns[1]
        assert one.steps_simulated == other.steps_simulated == EPISODES * LENGTH
    assert all(r.wall_seconds > 0 for r in whole)
    assert plan.steps == sum(r.steps_simulated for r in whole)
    assert [r.start_seeds for r in whole] == [(1_000_000, 1_000_001), (1_000_002, 1_000_003)] * 2


def test_as_many_episodes_have_the_same_starts_whatever_the_length_of_a_context() -> None:
    """In streams of one, two and four, the environments grouped or not: number by number those of a plain reset."""
    environment = make("jaco_reach_top_left", seed=0)
    expected = {seed: environment.reset(seed=seed)[0].tobytes() for seed in range(70, 74)}
    for episodes in (1, 2, 4):
        plan = plan_random("jaco_reach_top_left", Protocol(4 // episodes, episodes, seed=70))
        watch = Stopwatch()
        records = play(plan, watch=watch, groups=min(2, 4 // episodes))
        begun = np.stack(watch.starts, axis=1).reshape(4, -1)  # stream by stream
        named = [seed for record in records for seed in record.start_seeds]
        assert {seed: start.tobytes() for seed, start in zip(named, begun, strict=True)} == expected


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_evaluation_goes_on_where_it_stopped(
    after: int, plan: Plan, whole: list[EvaluationRecord], tmp_path: Path
) -> None:
    """In the streams, between them and the control, and in the control; the same numbers to the last bit."""
    with Journal(tmp_path, plan.about) as journal, pytest.raises(KeyboardInterrupt):
        play(plan, journal=journal, watch=Stopwatch(after))
    watch = Stopwatch()
    with Journal(tmp_path, plan.about) as journal:
        records = play(plan, journal=journal, watch=watch)
    assert told(records) == told(whole)
    assert watch.steps == (2 * EPISODES - after) * STREAMS * LENGTH, "what was recorded is not simulated again"
    np.testing.assert_array_equal(watch.starts[:EPISODES], watch.starts[EPISODES:], "the control's starts")
    assert (watch.starts[0] != watch.starts[1]).any()
    assert watch.ended == [("context", 0), ("context", 1), ("control", 0), ("control", 1)]


def test_what_is_in_the_journal_is_believed(plan: Plan, tmp_path: Path) -> None:
    """The episodes are really taken from there."""
    with Journal(tmp_path, plan.about) as journal:
        play(plan, journal=journal)
        first = journal.episodes("context", LENGTH, STREAMS)[0]
        first.reward[:] = 1.0
        journal.add("context", 0, first)
        assert play(plan, journal=journal)[0].returns[0] == LENGTH


def test_two_groups_give_the_episodes_of_one(plan: Plan) -> None:
    """Matrix products of one row may round otherwise than those of two, and contacts soon blow that up."""
    watches = Stopwatch(), Stopwatch()
    for one, other in zip(play(plan, watch=watches[0], groups=2), play(plan, watch=watches[1]), strict=True):
        assert (one.environment_seed, one.start_seeds) == (other.environment_seed, other.start_seeds)
    alike = (0, 2, 3)  # what an earlier episode ended with is remembered in the second
    for index in alike:
        np.testing.assert_allclose(watches[0].begun[index], watches[1].begun[index], rtol=1e-4, atol=1e-5)
    random = plan_random("jaco_reach_top_left", Protocol(environments=3))
    assert told(play(random, groups=2)) == told(play(random, groups=1))
