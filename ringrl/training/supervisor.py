"""The parent of a training process in a distributed run. It reports in one line how the child ended.

JAX ends a process that has lost its peers with SIGABRT and a C++ stack trace, and blocks Python while processes
connect. So training runs in a child process. Its C++ messages are kept and printed only if needed.
"""

import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import FrameType

from ringrl.config import DistributedConfig
from ringrl.errors import UserError
from ringrl.processes import end_with_parent
from ringrl.signals import STOPPING, handled, ignore
from ringrl.training import distributed
from ringrl.training.distributed import INTERRUPTED, LOST, USER_ERROR, print_line

ALONE = "--distributed.enabled off"
KEPT = 16_384  # bytes of the child's last messages


def run_supervised(work: Callable[[], object], config: DistributedConfig) -> int:
    """Do `work` (which can be pickled) as one of several processes. Return the index of this process.

    Raises:
      SystemExit: a process failed, which has been reported in one line. Exit codes: 2, the user can correct it; 75, a
        process is lost or never connected (start all again, with --resume); 130, interrupted; 1, a bug, with its
        traceback; 128 + n, signal n ended this process.
    """
    if config.enabled == "auto" and config.coordinator is None and os.environ.get("SLURM_PROCID", "0") == "0":
        tasks = distributed.tasks_of_srun()
        print_line(f"srun started {tasks} tasks, waiting for all to connect; to train in this one alone: {ALONE}")
    context = multiprocessing.get_context("spawn")
    (messages, messages_of_child), (joined, joined_of_child) = context.Pipe(duplex=False), context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(work, config, messages_of_child, joined_of_child))
    with _started(child):
        messages_of_child.close()
        joined_of_child.close()
        end = b""
        while chunk := os.read(messages.fileno(), KEPT):
            end = (end + chunk)[-KEPT:]
        child.join()
    try:
        index, count = joined.recv()
    except EOFError:
        index = count = None
    code = child.exitcode or 0
    if code == 0:
        return int(index)
    last = end.decode(errors="replace")
    line, code = _explain(code, last, index, count, config)
    if code not in (LOST, USER_ERROR, INTERRUPTED):
        sys.stderr.write(last)
    if line:
        print_line(line)
    raise SystemExit(code)


def _explain(code: int, last: str, index: int | None, count: int | None, config: DistributedConfig) -> tuple[str, int]:
    """Return the message for a child's end (empty if the child has printed one) and the exit code."""
    if code > 0:
        return "", code
    if code == -signal.SIGABRT and index is None:
        address = config.coordinator or "the coordinator"
        return (
            f"not all {config.processes or ''} processes connected to {address} within {config.start_timeout} s; check "
            f"that each was started and can reach it, raise --distributed.start-timeout, or train alone: {ALONE}",
            LOST,
        )
    if code == -signal.SIGABRT and "oordination service" in last:
        missed = re.search(r"stopped sending heartbeats\):\s*([\d,\s]+)", last)
        if missed:
            who = "process " + ", ".join(re.findall(r"\d+", missed[1]))
        else:
            who = "process 0, the coordinator," if index else "another process"
        return f"{who} of {count} is lost; start all again, with --resume", LOST
    name = signal.Signals(-code).name
    who = "the training process" if index is None else f"process {index} of {count}"
    return f"{who} was ended by {name} (SIGKILL: often out of memory)", 128 - code


@contextmanager
def _started(child: SpawnProcess) -> Iterator[None]:
    """Start the child, and kill it at the end of the block.

    The child receives SIGINT as it is and every other stop signal as SIGTERM. It then ends in order.
    """
    early = list[int]()  # signals that arrive before the child has an id

    def forward(number: int, frame: FrameType | None = None) -> None:
        if child.pid is None:
            early.append(number)
        else:
            os.kill(child.pid, number if number == signal.SIGINT else signal.SIGTERM)

    with handled(forward, (signal.SIGINT, *STOPPING)):
        child.start()
        try:
            for number in early:
                forward(number)
            yield
        finally:
            child.kill()


def _work(work: Callable[[], object], config: DistributedConfig, messages: Connection, joined: Connection) -> None:
    """Run in the child."""
    os.setsid()  # a terminal's signals then arrive once, forwarded
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background processes with SIGINT ignored
    ignore((signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2))  # SLURM sends them to all; the parent decides
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    for number in (1, 2):  # from here on, only C++ writes to these
        os.dup2(messages.fileno(), number)
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        distributed.join(config)
    except UserError as error:
        print_line(str(error))
        os._exit(USER_ERROR)
    joined.send(distributed.place())
    distributed.run_to_the_end(work, config)
