"""Worker processes that start without inherited state and end with the process that started them, and their number."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.queues import SimpleQueue
from typing import Any

from ringrl.errors import UserError, brief, user_message
from ringrl.signals import STOPPING


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def worker_processes(
    number: int, start: Callable[..., object], arguments: tuple[Any, ...], what: str
) -> Iterator[Executor]:
    """Yield an executor of `number` processes. Each process first calls `start(*arguments)`.

    When the block ends, work that has not begun is cancelled and the processes end. `what` names the work in the error.

    Raises:
        UserError: the processes could not start, or one died from lack of memory.
    """
    # A forked process could inherit a lock that a thread of JAX holds.
    context = multiprocessing.get_context("spawn")
    pool = None
    try:
        try:
            reports = context.SimpleQueue()
            pool = ProcessPoolExecutor(number, context, initializer=_start, initargs=(reports, start, arguments))
            for _ in range(number):
                pool.submit(int)  # starts a process
        except OSError as error:
            raise UserError(
                f"worker processes of the {what} cannot start ({error.strerror or error}): check /dev/shm, ulimit -n "
                "and ulimit -u, or use one worker (--workers 1)"
            ) from error
        yield pool
    except BrokenProcessPool as error:
        for process in multiprocessing.active_children():
            process.kill()  # the executor waits for the others, which ignore its SIGTERM
        if not reports.empty():
            raise UserError(f"a worker process of the {what} could not start: {reports.get()}") from error
        raise UserError(
            f"a worker process of the {what} died: memory is short, or it could not import your script. Use one worker "
            f"(--workers 1), or save the script as a file and start the {what} under `if __name__ == '__main__':`"
        ) from error
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _start(reports: "SimpleQueue[str]", start: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    follow_parent()
    try:
        start(*arguments)
    except Exception as error:
        reports.put(user_message(error) or f"{type(error).__name__}: {brief(error)}")
        os._exit(1)


def follow_parent() -> None:
    """Let this worker process ignore signals to stop, which the parent receives, too, and end when the parent ends."""
    for number in (signal.SIGINT, *STOPPING):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
