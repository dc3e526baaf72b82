"""Worker processes that start without inherited state and end with the process that started them."""

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
from ringrl.signals import STOPPING, ignore


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
    ignore((signal.SIGINT, *STOPPING))  # they end the main process, which ends the workers
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        start(*arguments)
    except Exception as error:
        reports.put(user_message(error) or f"{type(error).__name__}: {brief(error)}")
        os._exit(1)


def end_with_parent() -> None:
    """Wait until the parent process ends, then exit. Run this in a thread: a killed parent then leaves no workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
