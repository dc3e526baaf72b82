"""The process outside: it runs one of several training processes and tells in one line how that ended.

JAX ends a process whose peers are lost by SIGABRT, from a thread of its own and with a page of C++ stack; and while
processes meet, it holds Python still. So the work is done in a child, whose C++ messages are kept until they matter.
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
from ringrl.data.processes import end_with_parent
from ringrl.errors import UserError
from ringrl.training import distributed
from ringrl.training.distributed import INTERRUPTED, LOST, USERS_TO_MEND, say

KEPT = 16_384  # bytes of the child's last messages


def run_supervised(work: Callable[[], object], config: DistributedConfig) -> int:
    """Do `work` (which can be pickled) as one of several processes; returns the number of this one.

    Raises:
      SystemExit: it failed, here or elsewhere, which has been said in one line. Codes: 2, for the user to mend; 75, a
        process is lost or never came (start the same again, with --resume); 130, interrupted; 1, a defect, with its
        traceback; 128 + n, this process was ended by signal n.
    """
    context = multiprocessing.get_context("spawn")
    (messages, speaker), (met, meeting) = context.Pipe(duplex=False), context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(work, config, speaker, meeting))
    child.start()
    speaker.close()
    meeting.close()
    try:
        with _passing_on_signals(child):
            last = _last_words(messages)
            child.join()
    finally:
        child.kill()
    try:
        index, count = met.recv()
    except EOFError:
        index = count = None
    code = child.exitcode or 0
    if code == 0:
        return int(index)
    line, code = _explain(code, last, index, count, config)
    if code not in (LOST, USERS_TO_MEND, INTERRUPTED):
        sys.stderr.write(last)
    if line:
        say(line)
    raise SystemExit(code)


def _explain(code: int, last: str, index: int | None, count: int | None, config: DistributedConfig) -> tuple[str, int]:
    """What to say of a child's end (nothing where it has spoken for itself), and the code to exit with."""
    if code > 0:
        return "", code
    if code == -signal.SIGABRT and index is None:
        place = config.coordinator or "the coordinator"
        return (
            f"not all {config.processes or ''} processes met at {place} within {config.start_timeout} s; see that each "
            "is started and reaches it, or give more --distributed.start-timeout",
            LOST,
        )
    if code == -signal.SIGABRT and "oordination service" in last:
        missed = re.search(r"stopped sending heartbeats\):\s*([\d,\s]+)", last)
        if missed:
            who = "process " + ", ".join(re.findall(r"\d+", missed[1]))
        else:
            who = "process 0, which coordinates," if index else "another process"
        return f"{who} of {count} is gone; start all again, with --resume", LOST
    name = signal.Signals(-code).name
    return f"process {index} of {count} was ended by {name} (SIGKILL: often for want of memory)", 128 - code


def _last_words(messages: Connection) -> str:
    """The end of what arrives until the child closes its side."""
    last = b""
    while chunk := os.read(messages.fileno(), KEPT):
        last = (last + chunk)[-KEPT:]
    return last.decode(errors="replace")


@contextmanager
def _passing_on_signals(child: SpawnProcess) -> Iterator[None]:
    """What is to stop this process stops the child, which then ends in its own order."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        if child.pid is not None:
            os.kill(child.pid, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _work(work: Callable[[], object], config: DistributedConfig, speaker: Connection, meeting: Connection) -> None:
    """The child."""
    os.setsid()  # so that signals of the terminal come once, passed on
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even where a shell in the background has it ignored
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # by which SLURM asks the process outside to queue the job again
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    for number in (1, 2):  # what is left to C++
        os.dup2(speaker.fileno(), number)
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        distributed.join(config)
    except UserError as error:
        say(str(error))
        os._exit(USERS_TO_MEND)
    meeting.send(distributed.place())
    distributed.run_to_the_end(work, config)
