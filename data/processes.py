"""Worker processes that start clean and end with the process that started them."""

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


@contextmanager
def worker_processes(
    number: int, start: Callable[..., None], arguments: tuple[Any, ...], what: str
) -> Iterator[Executor]:
    """A number of processes, each of which first calls `start(*arguments)`; `what` names their work in the error.

    When the block ends, work that has not begun is dropped and the processes end.

    Raises:
        UserError: a process died, for want of memory or because it could not start.
    """
    # Not forked: JAX's threads may hold locks at that moment.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(number, context, initializer=_start, initargs=(start, arguments))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process of the {what} died: use fewer if memory is short (--workers 1 needs no other), "
            f"and in a script of your own start the {what} under `if __name__ == '__main__':`"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then ends the workers
    threading.Thread(target=end_with_parent, daemon=True).start()
    start(*arguments)


def end_with_parent() -> None:
    """For a thread of a worker: without it, one whose parent was killed would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
