"""Several evaluations: finished ones are not repeated, and those that failed to finish leave what they have."""

import json
import shutil
from pathlib import Path

import pytest

from ringrl.errors import UserError
from ringrl.evaluation.episode import Episode
from ringrl.evaluation.play import Part
from ringrl.evaluation.protocol import Protocol, plan_random
from ringrl.evaluation.records import read_records
from ringrl.evaluation.session import Audience, Job, evaluate_all
from ringrl.evaluation.summary import Summary

TASKS = ("jaco_reach_top_left", "jaco_reach_top_right")
EPISODES = 2


class Listener(Audience):
    """Writes everything down, and interrupts once it has heard of so many episodes."""

    def __init__(self, after: int | None = None) -> None:
        self.after, self.heard, self.steps, self.remarks = after, [], 0, []

    def begin(self, job: Job) -> None:
        self.heard.append(f"begin {job.plan.shared.task}")

    def step(self, streams: int) -> None:
        self.steps += streams

    def episode(self, part: Part, index: int, episode: Episode) -> None:
        self.heard.append(index)
        if [type(word) for word in self.heard].count(int) == self.after:
            raise KeyboardInterrupt

    def finish(self, job: Job, summary: Summary, *, rolled_out: bool) -> None:
        self.heard.append(rolled_out)

    def remark(self, text: str) -> None:
        self.remarks.append(text)


def jobs_in(results: Path, **changes: object) -> list[Job]:
    protocol = Protocol(**({"environments": 1, "episodes": EPISODES} | changes))
    return [Job(plan_random(task, protocol), results) for task in TASKS]


def returns_in(results: Path) -> list[tuple]:
    return [record.returns for record in read_records(results).records]


def test_what_was_finished_is_kept_and_what_was_begun_goes_on(tmp_path: Path) -> None:
    whole, results = tmp_path / "whole" / "evaluation.jsonl", tmp_path / "evaluation.jsonl"
    evaluate_all(jobs_in(whole))
    with pytest.raises(KeyboardInterrupt):
        evaluate_all(jobs_in(results), audience=Listener(after=3))
    assert len(read_records(results).records) == 1, "the first task is finished"
    assert len(json.loads(results.with_suffix(".json").read_text())["evaluations"]) == 1
    (journal,) = results.with_suffix(".journal").iterdir()
    assert journal.name.startswith(TASKS[1])

    listener = Listener()
    summaries = evaluate_all(jobs_in(results), audience=listener)
    assert listener.heard == [f"begin {TASKS[0]}", False, f"begin {TASKS[1]}", 0, 1, True]
    assert listener.steps == 250
    assert returns_in(results) == returns_in(whole)
    assert [summary.task for summary in summaries] == list(TASKS)
    assert [summary.returns for summary in summaries] == returns_in(whole)
    assert not results.with_suffix(".journal").exists()
    assert [path.name for path in sorted(tmp_path.glob("evaluation*"))] == ["evaluation.json", "evaluation.jsonl"]


def test_repeated_only_when_asked(tmp_path: Path) -> None:
    results = tmp_path / "evaluation.jsonl"
    evaluate_all(jobs_in(results))
    before, listener = results.read_bytes(), Listener()
    evaluate_all(jobs_in(results), audience=listener)
    assert (results.read_bytes(), listener.steps) == (before, 0)
    evaluate_all(jobs_in(results)[:1], again=True, audience=listener)
    assert (len(read_records(results).records), listener.steps) == (3, 500)
    evaluate_all(jobs_in(results, seed=3)[:1])
    assert len(read_records(results).records) == 4, "another seed is another evaluation"


def test_results_of_which_lines_are_missing_are_completed(tmp_path: Path) -> None:
    """A kill in the middle of writing, or a line that somebody removed."""
    results = tmp_path / "evaluation.jsonl"
    (job, _) = jobs_in(results, environments=3)
    evaluate_all([job])
    whole = results.read_text().splitlines(keepends=True)
    results.write_text("".join(whole[:2]))
    (summary,) = evaluate_all([job])
    assert summary.streams == 3
    assert len(read_records(results).records) == 5


def test_a_journal_that_outlived_its_results_is_removed_and_not_repeated_from(tmp_path: Path) -> None:
    results = tmp_path / "evaluation.jsonl"
    (job, _) = jobs_in(results)
    with pytest.raises(KeyboardInterrupt):
        evaluate_all([job], audience=Listener(after=EPISODES))
    left = tmp_path / "left"
    shutil.copytree(job.journal, left)
    evaluate_all([job])
    shutil.copytree(left, job.journal)
    listener = Listener()
    evaluate_all([job], again=True, audience=listener)
    assert listener.steps == 500, "it is rolled out, not taken from the journal"
    shutil.copytree(left, job.journal)
    evaluate_all([job], audience=listener)
    assert listener.steps == 500
    assert not job.journal.exists()


def test_a_journal_of_other_settings_is_named_and_left(tmp_path: Path) -> None:
    results = tmp_path / "evaluation.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate_all(jobs_in(results), audience=Listener(after=1))
    (journal,) = results.with_suffix(".journal").iterdir()
    listener = Listener()
    evaluate_all(jobs_in(results, seed=3)[:1], audience=listener)
    assert any(str(journal) in remark and "left as it is" in remark for remark in listener.remarks)
    assert (journal / "context_00000.npz").exists()


@pytest.mark.parametrize("place", ["folder", "file/evaluation.jsonl"])
def test_results_that_cannot_be_written_are_found_out_first(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    listener = Listener()
    with pytest.raises(UserError, match="cannot be written"):
        evaluate_all(jobs_in(tmp_path / place), audience=listener)
    assert listener.heard == []


def test_videos_of_what_was_rolled_out(tmp_path: Path) -> None:
    """Beside the results, of an evaluation that was interrupted too; what is finished is not rolled out for them."""
    results = tmp_path / "evaluation.jsonl"
    job = Job(plan_random("cartpole_swingup", Protocol(environments=2, episodes=EPISODES)), results)
    listener = Listener(after=1)
    with pytest.raises(KeyboardInterrupt):
        evaluate_all([job], audience=listener)
    evaluate_all([job], video=True, audience=listener)
    (remark,) = listener.remarks
    if remark.startswith("no video"):
        assert "OpenGL" in remark
        assert len(read_records(results).records) == 2, "the evaluation went on without"
        pytest.skip(remark)
    assert remark == f"first.mp4, median.mp4, best.mp4: in {job.videos}"
    assert sorted(path.name for path in job.videos.iterdir()) == ["best.mp4", "first.mp4", "median.mp4"]
    again = Listener()
    evaluate_all([job], video=True, audience=again)
    assert (again.steps, str(job.videos) in again.remarks[0]) == (0, True)


def test_where_no_video_can_be_made_the_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "disabled")
    (job, _), listener = jobs_in(tmp_path / "evaluation.jsonl"), Listener()
    evaluate_all([job], video=True, audience=listener)
    assert listener.remarks[0].startswith("no video: ")
    assert len(read_records(job.results).records) == 1
    assert not list(job.videos.glob("*.mp4"))
