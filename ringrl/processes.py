"""Worker processes that start without inherited state and end with the process that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from ringrl.errors import UserError
from ringrl.signals import STOPPING, ignore


@contextmanager
def worker_processes(
    number: int, start: Callable[..., object], arguments: tuple[Any, ...], what: str
) -> Iterator[Executor]:
    """Yield an executor of `number` processes. Each process first calls `start(*arguments)`.

    When the block ends, work that has not begun is cancelled and the processes end. `what` names the work in the error.

    Raises:
        UserError: a process died, from lack of memory or because it could not start.
    """
    # A forked process could inherit a lock that a thread of JAX holds.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(number, context, initializer=_start, initargs=(start, arguments))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process of the {what} died: use fewer if memory is short (--workers 1 starts none), "
            f"and in a script of your own start the {what} under `if __name__ == '__main__':`"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(start: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    ignore((signal.SIGINT, *STOPPING))  # they end the main process, which ends the workers
    threading.Thread(target=end_with_parent, daemon=True).start()
    start(*arguments)


def end_with_parent() -> None:
    """Wait until the parent process ends, then exit. Run this in a thread: a killed parent then leaves no workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
