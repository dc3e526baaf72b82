import dataclasses
from pathlib import Path

import numpy as np
import pytest

from ringrl.data.store import EpisodeStore, Provenance
from ringrl.data.store.format import recorded_arrays, reward_key
from ringrl.data.store.summary import describe
from ringrl.data.store.writer import create_store
from ringrl.envs import DOMAINS


def store_with_returns(path: Path, returns: list[float]) -> EpisodeStore:
    """Write a jaco store of 10-step episodes with the given returns for every task."""
    domain = DOMAINS["jaco"]
    with create_store(path, domain, domain.tasks, [10] * len(returns), source=Provenance("jaco/rnd.zip")) as writer:
        for value in returns:
            columns = recorded_arrays(domain).items()
            episode = {key: np.zeros((11, column.width), column.dtype) for key, column in columns}
            reward = np.full(11, value / 10, np.float32)
            reward[0] = 0
            writer.append(episode | {reward_key(task): reward for task in domain.tasks})
        writer.recorded_task = "jaco_reach_top_left"
    return EpisodeStore(path)


@pytest.fixture
def store(tmp_path) -> EpisodeStore:
    return store_with_returns(tmp_path / "jaco.h5", [0.0, 0.0, 0.0, 2.0, 10.0])


def test_text_has_one_line_per_fact_and_task(store):
    lines = describe(store).splitlines()
    assert max(map(len, lines)) <= 120 or len(str(store.path)) > 90
    text = "\n".join(lines)
    for fact in ["5 x 10 steps = 50 transitions", "jaco/rnd.zip", store.fingerprint, str(store.path)]:
        assert fact in text
    (row,) = [line for line in lines if line.startswith("jaco_reach_bottom_left")]
    assert row.split()[1:9] == ["0.0", "0.0", "0.0", "0.0", "2.0", "8.4", "10.0", "2.4"]
    assert row.endswith(f"  █   ▃{' ' * 18}▃")


def test_equal_returns_are_one_bar(tmp_path):
    text = describe(store_with_returns(tmp_path / "a.h5", [0.0, 0.0]))
    assert text.splitlines()[-1].count("█") == 1


def test_an_unknown_recorded_task_is_reported(tmp_path, store):
    with create_store(
        tmp_path / "a.h5", store.facts, store.facts.tasks, store.lengths, source=Provenance("x")
    ) as writer:
        for i in range(5):
            writer.append(store.episode(i))
    assert "no single task" in describe(EpisodeStore(tmp_path / "a.h5"))


def test_terminal_escapes_are_printed_as_text(tmp_path, store):
    hostile = dataclasses.replace(store.provenance, source="\x1b]0;owned\x07\n", subset="\x1b[2J")
    with create_store(tmp_path / "b.h5", DOMAINS["jaco"], store.tasks, store.lengths, source=hostile) as writer:
        for index in range(store.num_episodes):
            writer.append(store.episode(index))
    text = describe(EpisodeStore(tmp_path / "b.h5"))
    assert all(line.isprintable() for line in text.splitlines())
    assert r"\x1b]0;owned\x07\n" in text
