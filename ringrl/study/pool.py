"""Processes that cells run in. One that dies takes its cell with it and no other; all end with the main process."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from ringrl.cores import available_cores
from ringrl.data.processes import end_with_parent

Task = Callable[[], Any]  # can be pickled, as what it returns


class Ended(NamedTuple):
    """A task that has come to its end."""

    number: int  # of the task, from 0
    result: Any
    death: str | None = None  # how its process died, in which case there is no result


class _Worker:
    def __init__(self, number: int, workers: int) -> None:
        context = multiprocessing.get_context("spawn")  # not forked: JAX's threads may hold locks at that moment
        self.pipe, inside = context.Pipe()
        self.process = context.Process(target=_serve, args=(inside, _cores(number, workers), workers), daemon=True)
        self.process.start()
        inside.close()
        self.index: int | None = None

    def give(self, index: int, task: Task) -> None:
        self.index = index
        with suppress(OSError):  # one that is dead is found out when it does not answer
            self.pipe.send(task)

    def take(self) -> Ended:
        index, self.index = self.index, None
        assert index is not None
        try:
            return Ended(index, self.pipe.recv())
        except (EOFError, OSError):
            self.process.join()
            return Ended(index, None, _death(self.process.exitcode or 0))


def run_all(tasks: Sequence[Task], workers: int, on_start: Callable[[int], None]) -> Iterator[Ended]:
    """Do all tasks, in their order, in so many processes at a time; yields each as it ends.

    Each of several processes has its share of the cores to itself.
    """
    waiting = list(range(len(tasks)))
    workers = min(workers, len(tasks))
    crew = [_Worker(number, workers) for number in range(workers)]
    try:
        while waiting or any(worker.index is not None for worker in crew):
            for number, worker in enumerate(crew):
                if worker.index is None and waiting:
                    if not worker.process.is_alive():
                        crew[number] = worker = _Worker(number, workers)
                    index = waiting.pop(0)
                    on_start(index)
                    worker.give(index, tasks[index])
            busy = [worker for worker in crew if worker.index is not None]
            ready = wait([worker.pipe for worker in busy])
            for worker in busy:
                if worker.pipe in ready:
                    yield worker.take()
    finally:
        for worker in crew:
            worker.process.kill()
            worker.process.join()


def _cores(number: int, workers: int) -> set[int]:
    """Of one worker; none where there are too few to share out."""
    if not hasattr(os, "sched_getaffinity") or not 1 < workers <= available_cores():
        return set()
    return set(sorted(os.sched_getaffinity(0))[number::workers])


def _serve(pipe: Connection, cores: set[int], workers: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then ends the workers
    threading.Thread(target=end_with_parent, daemon=True).start()
    if cores:
        os.sched_setaffinity(0, cores)
    if workers > 1:  # they share the accelerators' memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / workers:.3f}")
    with suppress(EOFError):
        while True:
            task: Task = pipe.recv()
            pipe.send(task())


def _death(code: int) -> str:
    if code >= 0:
        return f"its process ended with code {code}"
    name = signal.Signals(-code).name
    return f"its process was ended by {name}" + (" (often for want of memory)" if name == "SIGKILL" else "")
