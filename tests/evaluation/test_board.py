"""What is shown while evaluations go on, and at their end."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ringrl.evaluation.board import Board, final_table
from ringrl.evaluation.episode import Episode
from ringrl.evaluation.protocol import Protocol, plan_random
from ringrl.evaluation.records import EvaluationRecord
from ringrl.evaluation.session import Job
from ringrl.evaluation.summary import summarise

TASKS = ("jaco_reach_top_left", "walker_walk")


def episode(*returns: float) -> Episode:
    steps, streams = 250, len(returns)
    reward = np.tile(np.array(returns) / steps, (steps, 1))
    nothing = np.zeros((steps + 1, streams, 0))
    return Episode(nothing.astype(np.float32), nothing[1:].astype(np.float32), reward, nothing, 1.0)


@pytest.fixture
def jobs() -> list[Job]:
    protocol = Protocol(environments=2, episodes=3)
    return [Job(plan_random(task, protocol), Path("evaluation.jsonl")) for task in TASKS]


def shown(table: object, width: int = 100) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return text.getvalue()


def found(job: Job, returns: tuple[float | None, ...]) -> list[EvaluationRecord]:
    return [job.plan.shared.model_copy(update={"returns": returns, "environment_seed": seed}) for seed in range(2)]


def test_the_table_fills_in_as_episodes_end(jobs: list[Job]) -> None:
    text = io.StringIO()
    board = Board(jobs, Console(file=text, width=100, force_terminal=True))
    with board:
        assert shown(board.table()).count("waiting") >= 2
        board.begin(jobs[0])
        for _ in range(250):
            board.step(2)
        board.episode("context", 0, episode(100.0, 300.0))
        first = shown(board.table())
        assert "200" in first
        assert "1/3" in first
        board.episode("context", 1, episode(50.0, np.nan))
        second = shown(board.table())
        assert "200 50.0" in second
        assert "2/3" in second
        (line,) = [row for row in second.splitlines() if TASKS[0] in row]
        assert line.split()[-3] == "1", "failed episodes are counted"
        assert line.split()[-1].startswith("0:00:")
    assert "episode 1 of 3" not in text.getvalue()


def test_plain_lines_where_there_is_no_terminal(jobs: list[Job]) -> None:
    text = io.StringIO()
    with Board(jobs, Console(file=text, width=100)) as board:
        board.begin(jobs[0])
        board.step(2)
        board.episode("context", 0, episode(100.0, 300.0))
        board.episode("control", 2, episode(np.nan, np.nan))
        (summary,) = summarise(found(jobs[0], (1.0, 2.0, 3.0)))
        board.finish(jobs[0], summary, rolled_out=False)
    first, second, third = text.getvalue().splitlines()
    assert first.startswith("jaco_reach_top_left, random: episode 1 of 3: mean return 200.0 of 2 streams, ")
    assert "episode 3 of 3 of the control: no stream finished it" in second
    assert "evaluation.jsonl holds this very evaluation already; --again repeats it" in third
    assert "\x1b" not in text.getvalue()


def test_an_interruption_says_how_to_go_on(jobs: list[Job]) -> None:
    text = io.StringIO()

    def watched() -> None:
        with Board(jobs, Console(file=text, width=100)) as board:
            board.begin(jobs[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watched()
    assert "the same command goes on" in text.getvalue()


def test_the_final_table_fits_80_columns(jobs: list[Job]) -> None:
    records = [
        record.model_copy(update={"context": context, "method": "at"})
        for job in jobs
        for context, returns in ((True, (120.0, None, None)), (False, (510.0, 620.0, 730.0)))
        for record in found(job, returns)
    ]
    text = shown(final_table(summarise(records)), width=80)
    assert "…" not in text
    assert all(task in text for task in TASKS)
    (line,) = [row for row in text.splitlines() if row.strip().startswith("at") and "(9)" in row]
    assert line.split() == [
        "at",
        "2",
        "x",
        "3",
        "120",
        "(9)",
        "\N{EN DASH}",
        "120",
        "(9)",
        "120",
        "(9)",
        "510",  # of the one episode that the rollout has too
        "(49)",
        "4",
    ]
