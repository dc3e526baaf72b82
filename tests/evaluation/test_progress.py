"""The table and the lines that show the progress of evaluations, and the final table."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ringrl.evaluation import Evaluation, EvaluationRecord, Protocol, random_evaluation
from ringrl.evaluation.progress import ProgressLines, final_table
from ringrl.evaluation.rollout import EpisodeBatch
from ringrl.evaluation.scores import summarise

TASKS = ("jaco_reach_top_left", "walker_walk")


def episode(*returns: float) -> EpisodeBatch:
    steps, streams = 250, len(returns)
    reward = np.tile(np.array(returns) / steps, (steps, 1))
    nothing = np.zeros((steps + 1, streams, 0))
    ends = np.full(streams, steps), np.zeros(streams, bool)
    return EpisodeBatch(reward, nothing, *ends, 1.0)


@pytest.fixture
def evaluations() -> list[Evaluation]:
    protocol = Protocol(environments=2, episodes=3)
    return [random_evaluation(task, protocol, results=Path("evaluation.jsonl")) for task in TASKS]


def shown(table: object, width: int = 100) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return text.getvalue()


def found(evaluation: Evaluation, returns: tuple[float | None, ...]) -> list[EvaluationRecord]:
    return [evaluation.template.model_copy(update={"returns": returns, "environment_seed": seed}) for seed in range(2)]


def test_without_a_terminal_a_long_episode_prints_lines(
    evaluations: list[Evaluation], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, clock = io.StringIO(), iter(range(0, 100_000, 10))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    with ProgressLines(Console(file=text, width=100)) as progress:
        progress.on_begin(evaluations[0])
        for _ in range(20):
            progress.on_step(2)
    lines = text.getvalue().splitlines()
    assert len(lines) >= 4
    assert "of 1,500 steps" in lines[0]


def test_a_terminal_shows_the_steps(evaluations: list[Evaluation]) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with ProgressLines(console) as progress:
        progress.on_begin(evaluations[0])
        progress.on_step(2)
        assert "jaco_reach_top_left, Random policy: 2 of 1,500 steps, " in shown(progress)
        progress.on_episode("context", 0, episode(100.0, np.nan))
        assert "500 of 1,500 steps" in shown(progress)
    assert "episode 1 of 3: mean return 100.0 of 1 streams" in console.file.getvalue()


def test_plain_lines_without_a_terminal(evaluations: list[Evaluation]) -> None:
    text = io.StringIO()
    with ProgressLines(Console(file=text, width=100)) as progress:
        progress.on_begin(evaluations[0])
        progress.on_step(2)
        progress.on_episode("context", 0, episode(100.0, 300.0))
        progress.on_episode("control", 2, episode(np.nan, np.nan))
        (summary,) = summarise(found(evaluations[0], (1.0, 2.0, 3.0)))
        progress.on_finish(evaluations[0], summary, rolled_out=False)
    first, second, third = text.getvalue().splitlines()
    assert first.startswith("jaco_reach_top_left, Random policy: episode 1 of 3: mean return 200.0 of 2 streams, ")
    assert "episode 3 of 3 of the control: every stream failed" in second
    assert "evaluation.jsonl contains this evaluation; --again repeats it" in third
    assert "\x1b" not in text.getvalue()


def test_an_interruption_prints_how_to_resume(evaluations: list[Evaluation]) -> None:
    text = io.StringIO()

    def watched() -> None:
        with ProgressLines(Console(file=text, width=100)) as progress:
            progress.on_begin(evaluations[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watched()
    assert "the same command keeps finished evaluations" in text.getvalue()


def test_the_final_table_fits_80_columns(evaluations: list[Evaluation]) -> None:
    about = {"method": "at", "train_trajectories": 1, "checkpoint": "runs/one", "target_return": 150.0}
    records = [
        record.model_copy(update={"context": context, **about})
        for evaluation in evaluations
        for context, returns in ((True, (120.0, None, None)), (False, (510.0, 620.0, 730.0)))
        for record in found(evaluation, returns)
    ]  # fmt: skip
    text = shown(final_table(summarise(records), {TASKS[0]: 90.0}), width=80)
    assert "…" not in text
    assert all(task in text for task in TASKS)
    assert "Agentic" in text
    assert text.count("Random policy") == len(TASKS)
    (data,) = [row.split() for row in text.splitlines() if "Dataset, all episodes" in row]
    assert data[3] == "90.0"
    measured = summarise([record for evaluation in evaluations for record in found(evaluation, (1.0, 2.0, 3.0))])
    assert shown(final_table(measured, {})).count("Random policy") == len(TASKS), "not next to the known return"
    assert "No memory: the mean" in text
    assert "No memory: the mean" not in shown(final_table(measured, {}))
    prompted = [
        record.model_copy(update={"prompt_trajectories": 3, "prompt_control": "shuffled"}) for record in records
    ]
    assert "after a prompt of 3 (shuffled)" in shown(final_table(summarise(prompted), {}))
    # The episodes that failed in the streams are left out of the control.
    (line,) = [row for row in text.splitlines() if row.strip().startswith("one") and "(9)" in row]
    expected = ["one", "150", "2", "x", "3", "120", "(9)", "\N{EN DASH}", "510", "(49)", "4"]
    assert line.split() == expected
