"""Evaluations: rollouts, results files and videos. Finished evaluations are not repeated."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import jax
import numpy as np

from ringrl.envs import make_vec
from ringrl.errors import UserError
from ringrl.evaluation.policy import TrainedPolicy
from ringrl.evaluation.progress import EvaluationProgress
from ringrl.evaluation.protocol import Evaluation, Part, Protocol, policy_evaluation
from ringrl.evaluation.records import (
    EvaluationRecord,
    append_records,
    check_writable,
    read_records,
    remove_damaged_lines,
)
from ringrl.evaluation.rollout import EpisodeBatch, Group, rollout
from ringrl.evaluation.scores import EvaluationSummary, summarise, write_summary
from ringrl.evaluation.video import Clips, EpisodeStates, VideoError, VideoOptions, check_video, choose, write_videos

_Kept = dict[tuple[Part, int], EpisodeBatch]  # by part and index
_MEMORIES: dict[Part, str] = {"context": "with memory", "control": "memory cleared"}


def evaluate_policy(
    trained: TrainedPolicy,
    protocol: Protocol,
    *,
    task: str | None = None,
    data: Path | None = None,
    command: str | None = None,
    progress: EvaluationProgress | None = None,
) -> list[EvaluationRecord]:
    """Roll out a policy as `roll_out` does. See `policy_evaluation` for arguments and errors. Nothing is written."""
    return roll_out(policy_evaluation(trained, protocol, task=task, data=data, command=command), progress=progress)


def evaluate_all(
    evaluations: Sequence[Evaluation],
    *,
    again: bool = False,
    video: VideoOptions | None = None,
    progress: EvaluationProgress | None = None,
) -> list[EvaluationSummary]:
    """Roll out each evaluation whose results file does not contain its records yet, and append them.

    The summary next to each results file (.json) is updated after every evaluation. Returns one summary per evaluation.
    With `again`, finished evaluations are repeated. If a video cannot be written, a message gives the reason.

    UserError if a results file cannot be read or written, or if a package is missing that writes videos.
    """
    if video:
        check_video()
    progress = progress or EvaluationProgress()
    paths = dict.fromkeys(evaluation.results for evaluation in evaluations)
    known = {path: _open_results(path, progress) for path in paths}
    return [_evaluate(one, known[one.results], again, video, progress) for one in evaluations]


def roll_out(
    evaluation: Evaluation,
    *,
    progress: EvaluationProgress | None = None,
    groups: int | None = None,
    kept: _Kept | None = None,
) -> list[EvaluationRecord]:
    """Roll out an evaluation and return one record per stream, then one per control stream.

    Args:
      evaluation: the streams and their policy.
      progress: callbacks.
      groups: groups of environments that take turns. None: two with an accelerator, one without.
      kept: is filled with all episodes.
    """
    progress = progress or EvaluationProgress()
    if groups is None:
        groups = 1 if jax.default_backend() == "cpu" else min(2, evaluation.protocol.environments)
    task, seeds, timeout = evaluation.template.task, evaluation.seeds, evaluation.protocol.step_timeout
    made = [
        Group(evaluation.make_actor(int(part[0])), make_vec(task, len(part), seeds[part, 0].tolist(), timeout=timeout))
        for part in np.array_split(np.arange(len(seeds)), groups)
    ]
    try:
        found = [_roll_out_part(evaluation, part, made, kept, progress) for part in evaluation.parts]
        return [record for records in found for record in records]
    finally:
        for group in made:
            for line in getattr(group.environments, "failures", ()):
                progress.on_message(line)
            group.environments.close()


def _open_results(path: Path, progress: EvaluationProgress) -> list[EvaluationRecord]:
    """Check that a results file can be written, and return its records."""
    if path.suffix != ".jsonl":
        raise UserError(f"--output: {path} is not a results file; give a name that ends in .jsonl")
    check_writable(path)
    if not path.exists():
        return []
    known = read_records(path)
    for note in known.notes:
        progress.on_message(f"{note}; missing results are measured again")
    if known.notes:
        remove_damaged_lines(path)
    return list(known.records)


def _evaluate(
    evaluation: Evaluation,
    known: list[EvaluationRecord],
    again: bool,
    video: VideoOptions | None,
    progress: EvaluationProgress,
) -> EvaluationSummary:
    """Roll out an evaluation unless it is finished; updates `known`, the records of its results file."""
    progress.on_begin(evaluation)
    finished = evaluation.is_finished(known)
    if again or not finished:
        _roll_out_and_append(evaluation, video, progress)
    elif video:
        found = (evaluation.videos / video.files[-1]).is_file()
        made = f"videos in {evaluation.videos}" if found else "no such videos; --again makes them"
        progress.on_message(f"{evaluation.results}: contains this evaluation; {made}")
    known[:] = read_records(evaluation.results).records  # other processes may have appended, too
    write_summary(evaluation.results.with_suffix(".json"), known)
    (summary,) = summarise(evaluation.own(known))
    progress.on_finish(evaluation, summary, rolled_out=again or not finished)
    return summary


def _roll_out_and_append(evaluation: Evaluation, video: VideoOptions | None, progress: EvaluationProgress) -> None:
    episodes = _Kept() if video else None
    records = roll_out(evaluation, progress=progress, kept=episodes)
    append_records(evaluation.results, records)
    if video and episodes is not None:
        shown = _clips(records, episodes, video.side_by_side)
        videos = {evaluation.videos / f"{label}.{video.format}": clips for label, clips in shown.items()}
        try:
            written = write_videos(evaluation.template.task, videos, speed=video.speed, **video.size)
            progress.on_message(f"{', '.join(path.name for path in written)}: in {evaluation.videos}")
        except VideoError as error:
            progress.on_message(str(error))


def _clips(records: Sequence[EvaluationRecord], episodes: _Kept, side_by_side: bool) -> dict[str, Clips]:
    """Return the clips of each video by its label: of the first, the median and the best episode.

    Side by side: the first, the middle and the last episode of the context of median mean return, each next to the
    control.
    """
    returns = np.array([record.returns for record in records if record.context], np.float64)  # None becomes NaN

    def states(label: str, part: Part, stream: int, index: int) -> EpisodeStates:
        episode = episodes[part, index]
        return EpisodeStates(label, episode.physics[:, stream], episode.reward[:, stream])

    if not side_by_side:
        return {label: [[states(label, "context", *place)]] for label, place in choose(returns).items()}
    n = returns.shape[1]
    stream, _ = choose(returns.mean(axis=1, keepdims=True)).get("median", (0, 0))
    clips = [
        [
            states(f"{memory}, episode {index + 1} of {n}", part, stream, index)
            for part, memory in _MEMORIES.items()
            if (part, index) in episodes
        ]
        for index in sorted({0, n // 2, n - 1})
    ]
    return {"side_by_side": clips}


def _roll_out_part(
    evaluation: Evaluation, part: Part, groups: Sequence[Group], kept: _Kept | None, progress: EvaluationProgress
) -> list[EvaluationRecord]:
    """Roll out the streams or the control. Each episode of the control is a rollout of its own."""
    seeds, n = evaluation.seeds, evaluation.protocol.episodes
    done: list[EpisodeBatch] = []

    def keep(episode: EpisodeBatch) -> None:
        progress.on_episode(part, len(done), episode)
        if kept is not None:
            kept[part, len(done)] = episode
        done.append(replace(episode, physics=episode.physics[:0].copy()))  # physics takes most of the memory

    for own in [seeds] if part == "context" else np.split(seeds, n, axis=1):
        rollout(
            groups,
            evaluation.normalisation,
            seeds=own,
            target_return=evaluation.template.target_return,
            trajectories=evaluation.trajectories,
            prompt=evaluation.prompt,
            most_steps=evaluation.most_steps,
            on_step=progress.on_step,
            on_episode=keep,
        )
    return _records(evaluation, part, done)


def _records(evaluation: Evaluation, part: Part, episodes: Sequence[EpisodeBatch]) -> list[EvaluationRecord]:
    """Return one record per stream."""
    returns, steps, lengths, terminated = (
        np.stack([getattr(episode, name) for episode in episodes], axis=1)
        for name in ("returns", "steps", "length", "terminated")
    )
    failed = np.logical_or.accumulate(np.isnan(returns), axis=1)  # a stream of the control ends at its first failure
    before = np.pad(~failed, ((0, 0), (1, 0)), constant_values=True)[:, :-1]
    ends = evaluation.most_steps is not None
    return [
        EvaluationRecord.model_validate(
            dict(evaluation.template)
            | {
                "context": part == "context",
                "environment_seed": seeds[0],
                "start_seeds": seeds,
                "returns": tuple(None if bad else float(value) for value, bad in zip(row, failed[index], strict=True)),
                "lengths": tuple((lengths[index] * ~failed[index]).tolist()) if ends else (),
                "terminated": tuple((terminated[index] & ~failed[index]).tolist()) if ends else (),
                "steps_simulated": int(steps[index] @ before[index]),
                "wall_seconds": sum(episode.seconds for episode in episodes),
                "created": datetime.now(UTC),
            }
        )
        for index, (row, seeds) in enumerate(zip(returns, evaluation.seeds.tolist(), strict=True))
    ]
