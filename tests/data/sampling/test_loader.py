import json
import threading
import time

import numpy as np
import pytest

from ringrl.data.sampling.batches import READ_AHEAD, iterate_batches
from ringrl.errors import UserError


class Source:
    """Batches that say which step they are of; steps from `broken` on cannot be read."""

    steps_per_batch = 1

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
def test_it_goes_on_from_a_state_that_went_through_json(taken):
    batches = iterate_batches(Source(), 20)
    assert steps(next(batches) for _ in range(taken)) == list(range(taken))
    state = json.loads(json.dumps(batches.get_state()))
    batches.close()
    source = Source()
    resumed = iterate_batches(source, 20)
    resumed.set_state(state)
    assert steps(resumed) == list(range(taken, 20)) == source.asked, "nothing that came before is made again"


def test_a_state_beyond_the_last_step_is_refused():
    with pytest.raises(IndexError):
        iterate_batches(Source(), 20).set_state({"next_index": 21})


def test_it_reads_ahead_in_the_background_but_not_far():
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


def test_what_goes_wrong_in_the_background_is_raised_where_the_batch_is_used():
    batches = iterate_batches(Source(broken=2), 10)
    assert steps([next(batches), next(batches)]) == [0, 1]
    with pytest.raises(UserError, match="step 2: gone"):
        next(batches)
    batches.close()
