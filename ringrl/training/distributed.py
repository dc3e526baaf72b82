"""Several processes as one run: connecting, agreeing on the settings, and ending together.

A process that fails stores a message in JAX's coordination service, which runs in process 0. All other processes read
the message and end with the same exit code. The service also detects processes that vanish, and ends the others.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jax
from jax._src.distributed import global_state  # neither the index nor the key-value store has a public name
from jax.experimental import multihost_utils

from ringrl.config import DistributedConfig
from ringrl.errors import UserError, brief, user_message
from ringrl.signals import STOPPING, Stopped, handled

WAIT_MS = 600_000  # longest wait for a slow process; a lost one is detected earlier
LINGER = 2.0  # seconds that process 0, which runs the service, waits until the others have read the last message
STOP = "ringrl/stop"
FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130  # exit codes


def is_wanted(config: DistributedConfig) -> bool:
    """Return whether this process is one of several. Uses no network, so that a plain run never waits."""
    if config.enabled != "auto":
        return config.enabled == "on"
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")  # of srun
    return config.coordinator is not None or (tasks.isdecimal() and int(tasks) > 1)


def join(config: DistributedConfig) -> None:
    """Connect to the other processes. Must run before any other use of JAX.

    Raise UserError if there is no coordinator. JAX ends this process with SIGABRT if not all processes connect in time.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    is_given = config.coordinator is not None
    try:
        with handled(signal.SIG_DFL, (signal.SIGINT,)):  # JAX blocks Python while processes connect
            jax.distributed.initialize(
                config.coordinator,
                config.processes,
                config.process,
                cluster_detection_method="deactivate" if is_given else None,
                initialization_timeout=config.start_timeout,
                heartbeat_timeout_seconds=config.heartbeat_timeout,
            )
    except Exception as error:  # each kind of cluster raises its own exception
        flag = f"coordinator {config.coordinator}" if is_given else f"enabled {config.enabled}"
        raise UserError(
            f"--distributed.{flag}: the processes cannot connect ({brief(error)}); "
            "give --distributed.coordinator HOST:PORT, processes and process, or train alone: --distributed.enabled off"
        ) from error


def run_to_the_end(work: Callable[[], object], config: DistributedConfig) -> NoReturn:
    """Join the others, do this process's work and exit: with 0 when all are done, else with the code of a failure.

    A failure of this process is printed as one line and reported to the others. If a process is lost, JAX ends the
    others with SIGABRT and messages of its own. Raise UserError as `join` does.
    """
    join(config)
    threading.Thread(target=_end_with_the_others, daemon=True).start()
    try:
        work()
        wait_for_all("end")
    except KeyboardInterrupt:
        _end("was interrupted", INTERRUPTED, "stopped; finished work is kept")
    except Exception as error:
        if message := user_message(error):
            _end(f"stopped: {message}", USER_ERROR, message)
        traceback.print_exc()
        _end(f"failed ({brief(error)})", FAILED)
    _exit(0)


def place() -> tuple[int, int]:
    """Return this process's index and the number of processes, without initialising the devices."""
    return global_state.process_id, global_state.num_processes


def is_first() -> bool:
    """Return whether this is process 0, which writes files and prints for all."""
    return place()[0] == 0


def check_platform() -> None:
    """Raise UserError if JAX cannot use the devices that JAX_PLATFORMS names."""
    try:
        jax.process_count()
    except (RuntimeError, AssertionError) as error:  # AssertionError: the platform is known but not installed
        raise UserError(
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: JAX cannot use it here "
            f"({brief(error) or 'no such device'}); unset it, or install what it needs (ringrl[cuda] or ringrl[tpu])"
        ) from error


def check_connected() -> None:
    """Raise UserError if JAX sees devices of other hosts (as on a TPU pod) that this process is not connected to."""
    check_platform()
    if jax.process_count() > place()[1]:
        raise UserError(
            f"the devices belong to {jax.process_count()} hosts that are not connected; "
            "start the same command on each, with --distributed.enabled on"
        )


def wait_for_all(point: str) -> None:
    """Wait until every process has reached this point, whose name may be used once per run."""
    if place()[1] > 1:
        _client().wait_at_barrier(f"ringrl/{point}", WAIT_MS)


def first_then_others(work: Callable[[], object], visible: Path) -> None:
    """Run `work` in process 0, then continue in all processes once they see the file that it made.

    Raise UserError if the file does not appear, because the processes share no folder.
    """
    if is_first():
        work()
    wait_for_all("first")
    deadline = time.monotonic() + 30  # network file systems may show the file late
    while not visible.exists():
        if time.monotonic() > deadline:
            raise UserError(f"{visible}: process 0 wrote it, but it is missing here; give a --run that all hosts share")
        time.sleep(0.5)


def agree(name: str, settings: Mapping[str, object]) -> None:
    """Raise UserError if settings differ from process 0's. Waits for all; each `name` may be used once per run."""
    index, count = place()
    if count == 1:
        return
    own = {name: str(value) for name, value in settings.items()}
    if index == 0:
        _client().key_value_set(f"ringrl/{name}", json.dumps(own))
    first = json.loads(_client().blocking_key_value_get(f"ringrl/{name}", WAIT_MS))
    names = (name for name in sorted({*own, *first}) if own.get(name) != first.get(name))
    differing = [f"{name} is {own.get(name)}, but {first.get(name)} in process 0" for name in names]
    if differing:
        raise UserError(f"process {index} of {count}: {'; '.join(differing)}; start all with the same command")
    wait_for_all(f"agreed on {name}")


class StopRequest:
    """A request by a signal to stop the run, which then finishes its step and saves."""

    signal = "SIGTERM"
    is_set = False

    def after(self, step: int) -> bool:
        """Return whether this step is the last. A signal to one process stops all of them after the same step."""
        return self.is_set if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn a signal to stop (from `kill`, a closing terminal or a scheduler) into a StopRequest inside the block."""
    stop = StopRequest()
    if jax.process_count() > 1:  # JAX handles SIGTERM itself
        others = tuple(number for number in STOPPING if number != signal.SIGTERM)
        with handled(lambda number, frame: os.kill(os.getpid(), signal.SIGTERM), others):
            yield stop
        return

    def set_stop(number: int, frame: FrameType | None) -> None:
        if stop.is_set:  # twice: the step takes too long
            raise Stopped(number)
        stop.signal, stop.is_set = signal.Signals(number).name, True

    with handled(set_stop):
        yield stop


def print_line(line: str) -> None:
    """Print a message for the user to standard error."""
    print(f"ringrl: {' '.join(line.split())}", file=sys.stderr, flush=True)


def _end_with_the_others() -> None:
    """Wait for the message of a failing process, then exit. If the service is lost, JAX ends this process."""
    try:
        message = json.loads(_client().blocking_key_value_get(STOP, 2**40))
    except Exception:
        return
    index, count = place()
    if message["process"] != index:
        _exit(message["code"], f"process {message['process']} of {count} {message['what']}")


def _end(what: str, code: int, line: str = "") -> NoReturn:
    """Print the line, report the failure to the other processes, and exit. JAX's own exit would wait for them."""
    if line:
        print_line(line)
    with contextlib.suppress(Exception):  # another process was first, or the service is lost
        _client().key_value_set(STOP, json.dumps({"process": place()[0], "what": what, "code": code}))
    _exit(code)


def _exit(code: int, last_line: str = "") -> NoReturn:
    sys.stdout.flush()
    if is_first():
        time.sleep(LINGER)
    if last_line:
        print_line(last_line)
    os._exit(code)


def _client() -> Any:
    return global_state.client
