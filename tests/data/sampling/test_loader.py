import json
import threading
import time

import numpy as np
import pytest

from ringrl.data.sampling.batches import READ_AHEAD, iterate_batches
from ringrl.errors import UserError


class Source:
    """A source whose batch is the step number. Reading fails from step `broken` on."""

    def __init__(self, broken: int = 1_000) -> None:
        self.asked: list[int] = []
        self.threads: set[int] = set()
        self.broken = broken

    def batch(self, step: int) -> dict[str, np.ndarray]:
        self.asked.append(step)
        self.threads.add(threading.get_ident())
        if step >= self.broken:
            raise UserError(f"step {step}: gone")
        return {"step": np.full(3, step)}


def steps(batches) -> list[int]:
    return [int(batch["step"][0]) for batch in batches]


def test_every_step_comes_once_in_order():
    source = Source()
    assert steps(iterate_batches(source, 20)) == list(range(20)) == source.asked


@pytest.mark.parametrize("taken", [0, 1, 7, 19, 20])
def test_a_state_that_was_saved_as_json_resumes(taken):
    batches = iterate_batches(Source(), 20)
    assert steps(next(batches) for _ in range(taken)) == list(range(taken))
    state = json.loads(json.dumps(batches.get_state()))
    batches.close()
    source = Source()
    resumed = iterate_batches(source, 20)
    resumed.set_state(state)
    assert steps(resumed) == list(range(taken, 20)) == source.asked, "nothing that came before is made again"


def test_a_state_beyond_the_last_step_is_rejected():
    with pytest.raises(IndexError):
        iterate_batches(Source(), 20).set_state({"next_index": 21})


def test_a_few_batches_are_read_ahead_in_the_background():
    source = Source()
    batches = iterate_batches(source, 100)
    next(batches)
    deadline = time.monotonic() + 30
    while len(source.asked) < 1 + READ_AHEAD:
        assert time.monotonic() < deadline, "nothing is read ahead"
        time.sleep(0.001)
    time.sleep(0.05)
    assert source.asked == list(range(1 + READ_AHEAD))
    assert threading.get_ident() not in source.threads
    batches.close()


def test_errors_in_the_background_are_raised_at_their_batch():
    batches = iterate_batches(Source(broken=2), 10)
    assert steps([next(batches), next(batches)]) == [0, 1]
    with pytest.raises(UserError, match="step 2: gone"):
        next(batches)
    batches.close()
