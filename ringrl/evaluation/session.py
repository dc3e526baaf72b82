"""Several evaluations, one after another: what is finished is not repeated, what was interrupted goes on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ringrl.errors import UserError
from ringrl.evaluation.episode import Episode
from ringrl.evaluation.journal import Journal
from ringrl.evaluation.play import Part, Plan, Watch, play
from ringrl.evaluation.records import (
    JOURNAL,
    VIDEOS,
    EvaluationRecord,
    append_records,
    check_writable,
    evaluation_name,
    read_records,
)
from ringrl.evaluation.summary import Summary, summarise, write_summary
from ringrl.evaluation.video import Recorder, VideoError, write_videos


@dataclass(frozen=True)
class Job:
    """A plan, and the results file (.jsonl) that its records go to."""

    plan: Plan
    results: Path

    @property
    def journal(self) -> Path:
        """Where its episodes stand until it is finished."""
        return _journals(self.results) / evaluation_name(self.plan.shared)

    @property
    def videos(self) -> Path:
        """Where its videos lie."""
        return self.results.with_suffix(VIDEOS) / evaluation_name(self.plan.shared)


class Audience(Watch):
    """Somebody who is told how the jobs go; this one does not care."""

    def begin(self, job: Job) -> None:
        """It is this one's turn."""

    def finish(self, job: Job, summary: Summary, *, rolled_out: bool) -> None:
        """Its results are there: `rolled_out` now, or known from before."""

    def remark(self, text: str) -> None:
        """One line that is worth knowing."""


def evaluate_all(
    jobs: Sequence[Job], *, again: bool = False, video: bool = False, audience: Audience | None = None
) -> list[Summary]:
    """Roll out every job whose results are not there yet; append them, and keep the summaries beside them up to date.

    What an interruption leaves in journals is used by the same jobs later, and removed once their results are written.

    Args:
        jobs: what.
        again: repeat those that are finished.
        video: also show the first, the median and the best episode of each job; where that cannot be done, say so.
        audience: who is told.

    Returns:
        One summary per job, finished before or now.

    Raises:
        UserError: a results file that cannot be read or written, or a job that another process is at.
    """
    audience = audience or Audience()
    for path in {job.results for job in jobs}:
        if path == _summaries(path):
            raise UserError(f"--output: {path} is where the summary would be; give a results file (.jsonl)")
        check_writable(path)
        for other in sorted(set(_found(path)) - {job.journal for job in jobs}):
            audience.remark(f"{other}: holds an interrupted evaluation under other settings, which is left as it is")
    return [_evaluate(job, again, video, audience) for job in jobs]


def _evaluate(job: Job, again: bool, video: bool, audience: Audience) -> Summary:
    audience.begin(job)
    known = _is_finished(job)
    if again or not known:
        watch = _Filmed(job.plan.episodes, audience) if video else audience
        with Journal(job.journal, job.plan.about) as journal:
            if known and journal.has(*job.plan.last):
                journal.clear()  # a kill left it when its results had been written
            append_records(job.results, play(job.plan, journal=journal, watch=watch))
            journal.remove()
        if isinstance(watch, _Filmed):
            _write_videos(job, watch.recorder, audience)
    elif job.journal.exists():
        with Journal(job.journal, job.plan.about) as journal:
            journal.remove()
    if video and known and not again:
        made = f"its videos are in {job.videos}" if job.videos.is_dir() else "without videos; add --again to make them"
        audience.remark(f"{job.results}: holds this evaluation, {made}")
    records = _records(job.results)
    write_summary(_summaries(job.results), records)
    found = _summary(job)
    assert found is not None, "its records have just been written"
    audience.finish(job, found, rolled_out=again or not known)
    return found


class _Filmed(Watch):
    """Tells somebody else, and keeps what videos are made of; the control is not shown."""

    def __init__(self, episodes: int, watch: Watch) -> None:
        self.recorder, self._watch = Recorder(episodes), watch

    def step(self, streams: int) -> None:
        self._watch.step(streams)

    def episode(self, part: Part, index: int, episode: Episode) -> None:
        if part == "context":
            self.recorder.add(episode.physics, episode.reward)
        self._watch.episode(part, index, episode)


def _write_videos(job: Job, recorder: Recorder, audience: Audience) -> None:
    recordings = {job.videos / f"{label}.mp4": recording for label, recording in recorder.recordings().items()}
    try:
        written = write_videos(job.plan.shared.task, recordings)
    except VideoError as error:
        audience.remark(str(error))
    else:
        audience.remark(f"{', '.join(path.name for path in written)}: in {job.videos}")


def _records(results: Path) -> tuple[EvaluationRecord, ...]:
    return read_records(results).records if results.exists() else ()


def _is_finished(job: Job) -> bool:
    """Whether the results hold every stream: of several lines a kill may have left the first ones."""
    found = {(r.context, r.environment_seed) for r in _records(job.results) if r.evaluation == _hash(job)}
    return found >= job.plan.streams


def _hash(job: Job) -> str | None:
    return job.plan.shared.evaluation


def _summary(job: Job) -> Summary | None:
    """Of the job's results; None where there are none."""
    found = summarise(r for r in _records(job.results) if r.evaluation == _hash(job))
    return found[0] if found else None


def _journals(results: Path) -> Path:
    return results.with_suffix(JOURNAL)


def _summaries(results: Path) -> Path:
    return results.with_suffix(".json")


def _found(results: Path) -> list[Path]:
    folder = _journals(results)
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
