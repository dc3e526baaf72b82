"""Running evaluations: results files, interruptions, videos and groups of environments."""

import json
from pathlib import Path

import numpy as np
import pytest

from ringrl.envs import make
from ringrl.errors import UserError
from ringrl.evaluation import (
    Evaluation,
    EvaluationProgress,
    EvaluationRecord,
    Protocol,
    evaluate_all,
    load_policy,
    policy_evaluation,
    random_evaluation,
    read_records,
)
from ringrl.evaluation import evaluate as evaluate_module
from ringrl.evaluation.evaluate import roll_out
from ringrl.evaluation.protocol import Part
from ringrl.evaluation.rollout import EpisodeBatch
from ringrl.evaluation.scores import EvaluationSummary
from ringrl.evaluation.video import EpisodeStates, VideoOptions, choose

TASKS = ("jaco_reach_top_left", "jaco_reach_top_right")
EPISODES = 2


class Listener(EvaluationProgress):
    """Records all events, and interrupts after a number of episodes."""

    def __init__(self, after: int | None = None) -> None:
        self.after, self.heard, self.steps, self.messages = after, [], 0, []

    def on_begin(self, evaluation: Evaluation) -> None:
        self.heard.append(f"begin {evaluation.template.task}")

    def on_step(self, streams: int) -> None:
        self.steps += streams

    def on_episode(self, part: Part, index: int, episode: EpisodeBatch) -> None:
        self.heard.append(index)
        if [type(event) for event in self.heard].count(int) == self.after:
            raise KeyboardInterrupt

    def on_finish(self, evaluation: Evaluation, summary: EvaluationSummary, *, rolled_out: bool) -> None:
        self.heard.append(rolled_out)

    def on_message(self, text: str) -> None:
        self.messages.append(text)


def evaluations_in(results: Path, **changes: object) -> list[Evaluation]:
    protocol = Protocol(**({"environments": 1, "episodes": EPISODES} | changes))
    return [random_evaluation(task, protocol, results=results) for task in TASKS]


def returns_in(results: Path) -> list[tuple]:
    return [record.returns for record in read_records(results).records]


def test_finished_evaluations_are_kept_and_interrupted_ones_start_again(tmp_path: Path) -> None:
    whole, results = tmp_path / "whole" / "evaluation.jsonl", tmp_path / "evaluation.jsonl"
    evaluate_all(evaluations_in(whole))
    with pytest.raises(KeyboardInterrupt):
        evaluate_all(evaluations_in(results), progress=Listener(after=3))
    assert len(read_records(results).records) == 1, "the first task is finished"
    assert len(json.loads(results.with_suffix(".json").read_text())["evaluations"]) == 1

    listener = Listener()
    summaries = evaluate_all(evaluations_in(results), progress=listener)
    assert listener.heard == [f"begin {TASKS[0]}", False, f"begin {TASKS[1]}", 0, 1, True]
    assert listener.steps == EPISODES * 250
    assert returns_in(results) == returns_in(whole)
    assert [summary.task for summary in summaries] == list(TASKS)
    assert [summary.returns for summary in summaries] == returns_in(whole)
    assert [path.name for path in sorted(tmp_path.glob("evaluation*"))] == ["evaluation.json", "evaluation.jsonl"]


def test_finished_evaluations_are_repeated_only_with_again(tmp_path: Path) -> None:
    results = tmp_path / "evaluation.jsonl"
    evaluate_all(evaluations_in(results))
    before, listener = results.read_bytes(), Listener()
    evaluate_all(evaluations_in(results), progress=listener)
    assert (results.read_bytes(), listener.steps) == (before, 0)
    evaluate_all(evaluations_in(results)[:1], again=True, progress=listener)
    assert (len(read_records(results).records), listener.steps) == (3, 500)
    evaluate_all(evaluations_in(results, seed=3)[:1])
    assert len(read_records(results).records) == 4, "another seed is another evaluation"


def test_a_summary_has_what_another_process_appended_meanwhile(tmp_path: Path) -> None:
    results = tmp_path / "evaluation.jsonl"
    first, second = evaluations_in(results)

    class Meanwhile(EvaluationProgress):
        def on_episode(self, part: Part, index: int, episode: EpisodeBatch) -> None:
            if index == 0:
                evaluate_all([second])

    evaluate_all([first], progress=Meanwhile())
    assert len(json.loads(results.with_suffix(".json").read_text())["evaluations"]) == 2


def test_incomplete_results_are_completed(tmp_path: Path) -> None:
    """A kill while writing, or a line that a user removed."""
    results = tmp_path / "evaluation.jsonl"
    (evaluation, _) = evaluations_in(results, environments=3)
    evaluate_all([evaluation])
    whole = results.read_text().splitlines(keepends=True)
    results.write_text("".join(whole[:2]))
    (summary,) = evaluate_all([evaluation])
    assert summary.streams == 3
    assert len(read_records(results).records) == 5


def test_a_damaged_line_is_reported_and_measured_again(tmp_path: Path) -> None:
    results, link = tmp_path / "evaluation.jsonl", tmp_path / "link" / "evaluation.jsonl"
    evaluate_all(evaluations_in(results))
    whole = returns_in(results)
    lines = results.read_text().splitlines(keepends=True)
    results.write_text(lines[0].replace('"seed":0', '"seed":1') + lines[1])
    link.parent.mkdir()
    link.symlink_to(results)
    listener = Listener()
    evaluate_all(evaluations_in(link), progress=listener)
    assert [text for text in listener.messages if "damaged" in text] == [
        f"{link}, line 1: damaged or cut short, left out; missing results are measured again"
    ]
    assert link.is_symlink()
    assert returns_in(results) == whole[::-1]
    assert listener.heard[:4] == [f"begin {TASKS[0]}", 0, 1, True]
    evaluate_all(evaluations_in(link), progress=(listener := Listener()))
    assert not any("damaged" in text for text in listener.messages)


@pytest.mark.parametrize("place", ["folder.jsonl", "file/evaluation.jsonl"])
def test_unwritable_results_raise_before_any_rollout(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "file").write_text("")
    listener = Listener()
    with pytest.raises(UserError, match="cannot be written"):
        evaluate_all(evaluations_in(tmp_path / place), progress=listener)
    assert listener.heard == []


@pytest.mark.slow
def test_videos(tmp_path: Path) -> None:
    """Next to the results. Finished evaluations are not rolled out for videos."""
    results = tmp_path / "evaluation.jsonl"
    protocol, fast = Protocol(environments=2, episodes=EPISODES), VideoOptions(speed=50)
    evaluation = random_evaluation("cartpole_swingup", protocol, results=results)
    listener = Listener()
    evaluate_all([evaluation], video=fast, progress=listener)
    (message,) = listener.messages
    if message.startswith("no video"):
        assert "OpenGL" in message
        assert len(read_records(results).records) == 2, "the evaluation is complete without videos"
        pytest.skip(message)
    assert message == f"first.mp4, median.mp4, best.mp4: in {evaluation.videos}"
    assert sorted(path.name for path in evaluation.videos.iterdir()) == ["best.mp4", "first.mp4", "median.mp4"]
    again = Listener()
    evaluate_all([evaluation], video=fast, progress=again)
    assert (again.steps, str(evaluation.videos) in again.messages[0]) == (0, True)


def test_videos_show_the_first_the_median_and_the_best_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, EpisodeStates] = {}

    def write_videos(
        task: str, videos: dict[Path, list[list[EpisodeStates]]], *, speed: int, width: int, height: int
    ) -> list[Path]:
        assert (speed, width, height) == (1, 480, 360)
        shown.update({path.stem: states for path, [[states]] in videos.items()})
        return list(videos)

    monkeypatch.setattr(evaluate_module, "write_videos", write_videos)
    (evaluation, _) = evaluations_in(tmp_path / "evaluation.jsonl", environments=2)
    evaluate_all([evaluation], video=VideoOptions())
    returns = np.array(returns_in(evaluation.results))
    places = choose(returns)
    assert list(shown) == list(places) == ["first", "median", "best"]
    for label, (stream, index) in places.items():
        assert shown[label].rewards.sum() == pytest.approx(returns[stream, index])
        assert (shown[label].label, shown[label].physics.shape) == (label, (251, 18))


@pytest.mark.slow
def test_side_by_side_shows_the_median_context_next_to_its_control(
    tmp_path: Path, at_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[Path, list[list[EpisodeStates]]] = {}
    speeds = []

    def write_videos(
        task: str, videos: dict[Path, list[list[EpisodeStates]]], *, speed: int, **size: int
    ) -> list[Path]:
        shown.update(videos)
        speeds.append(speed)
        return list(videos)

    monkeypatch.setattr(evaluate_module, "write_videos", write_videos)
    protocol, results = Protocol(2, 2, control=True), tmp_path / "evaluation.jsonl"
    evaluation = policy_evaluation(load_policy(at_run), protocol, results=results)
    evaluate_all([evaluation], video=VideoOptions(side_by_side=True, format="gif", speed=3))
    (path,), (clips,) = shown, shown.values()
    assert (path, speeds) == (evaluation.videos / "side_by_side.gif", [3])
    returns = np.array(returns_in(results))
    contexts, controls = returns[:2], returns[2:]
    stream = contexts.mean(axis=1).argmin()  # the lower of two
    for clip, index in zip(clips, (0, 1), strict=True):
        assert [one.label for one in clip] == [
            f"{memory}, episode {index + 1} of 2" for memory in ("with memory", "memory cleared")
        ]
        expected = [contexts[stream, index], controls[stream, index]]
        assert [one.rewards.sum() for one in clip] == pytest.approx(expected)


@pytest.mark.slow
def test_without_opengl_the_evaluation_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "disabled")
    (evaluation, _), listener = evaluations_in(tmp_path / "evaluation.jsonl"), Listener()
    evaluate_all([evaluation], video=VideoOptions(), progress=listener)
    assert listener.messages[0].startswith("no video: ")
    assert len(read_records(evaluation.results).records) == 1
    assert not list(evaluation.videos.glob("*.mp4"))


STREAMS, LENGTH = 2, 250


class Counter(EvaluationProgress):
    """Keeps the first steps of each episode."""

    def __init__(self) -> None:
        self.starts, self.begun = [], []

    def on_episode(self, part: Part, index: int, episode: EpisodeBatch) -> None:
        self.starts.append(episode.physics[0])
        self.begun.append(episode.physics[:10])


@pytest.fixture(scope="module")
def evaluation(at_run: Path) -> Evaluation:
    protocol = Protocol(environments=STREAMS, episodes=EPISODES, control=True, prompt_trajectories=1)
    return policy_evaluation(load_policy(at_run), protocol)


@pytest.fixture(scope="module")
def whole(evaluation: Evaluation) -> tuple[list[EvaluationRecord], Counter]:
    """Return the records, and the first steps of each episode."""
    counter = Counter()
    return roll_out(evaluation, progress=counter), counter


def results_of(records: list[EvaluationRecord]) -> list[tuple]:
    return [(r.context, r.environment_seed, r.returns, r.steps_simulated, r.evaluation) for r in records]


def test_records_of_streams_and_control(evaluation: Evaluation, whole: tuple) -> None:
    whole, _ = whole
    seeds = [1_000_000, 1_000_002]
    assert [(r.context, r.environment_seed) for r in whole] == [(c, seed) for c in (True, False) for seed in seeds]
    streams, control = whole[:2], whole[2:]
    for one, other in zip(streams, control, strict=True):
        assert one.returns[0] == pytest.approx(other.returns[0], rel=1e-6), "same start, same memory"
        assert one.returns[1] != other.returns[1]
        assert one.steps_simulated == other.steps_simulated == EPISODES * LENGTH
    assert all(r.wall_seconds > 0 for r in whole)
    assert evaluation.steps == sum(r.steps_simulated for r in whole)
    assert [r.start_seeds for r in whole] == [(1_000_000, 1_000_001), (1_000_002, 1_000_003)] * 2


def test_starts_depend_on_the_total_of_episodes_only() -> None:
    """Streams of one, two and four episodes, with and without groups, start like a plain reset with the seed."""
    environment = make("jaco_reach_top_left", seed=0)
    expected = {seed: environment.reset(seed=seed)[1]["physics"].tobytes() for seed in range(70, 74)}
    for episodes in (1, 2, 4):
        evaluation = random_evaluation("jaco_reach_top_left", Protocol(4 // episodes, episodes, seed=70))
        counter = Counter()
        records = roll_out(evaluation, progress=counter, groups=min(2, 4 // episodes))
        begun = np.stack(counter.starts, axis=1).reshape(4, -1)  # stream by stream
        named = [seed for record in records for seed in record.start_seeds]
        assert {seed: start.tobytes() for seed, start in zip(named, begun, strict=True)} == expected


@pytest.mark.slow
def test_two_groups_give_the_episodes_of_one(evaluation: Evaluation, whole: tuple) -> None:
    """Only the first steps are compared: products of one row round differently, and contacts amplify the difference.

    Groups of a simulation without contacts: test_rollout.py.
    """
    (alone, expected), counter = whole, Counter()
    in_groups = roll_out(evaluation, progress=counter, groups=2)
    for one, other in zip(in_groups, alone, strict=True):
        assert (one.environment_seed, one.start_seeds) == (other.environment_seed, other.start_seeds)
    for index in (0, 2, 3):  # the second episode depends on the end of the first one
        np.testing.assert_allclose(counter.begun[index], expected.begun[index], rtol=1e-4, atol=1e-5)
    random = random_evaluation("jaco_reach_top_left", Protocol(environments=3))
    assert results_of(roll_out(random, groups=2)) == results_of(roll_out(random, groups=1))
