"""Several processes as one run: how they find each other, agree on what they do, and end together.

A process that fails leaves word with JAX's coordination service, which process 0 keeps, and all others end with the
same word. One that vanishes without a word is missed by that service (`ringrl.training.supervisor` tells of it).
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax

from ringrl.config import DistributedConfig
from ringrl.errors import UserError, brief, what_to_mend

PATIENCE_MS = 600_000  # for one that is slow; one that is lost is missed sooner
LINGER = 2.0  # seconds that process 0, which keeps the service, waits for the others to hear the last word
STOP = "ringrl/stop"
FAILED, USERS_TO_MEND, LOST, INTERRUPTED = 1, 2, 75, 130  # exit codes; 75 is "try again" in sysexits.h


def is_wanted(config: DistributedConfig) -> bool:
    """Whether this process is one of several. Asks nothing of a network: a plain run must not wait for others."""
    if config.enabled != "auto":
        return config.enabled == "on"
    return config.coordinator is not None or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1  # which srun says


def join(config: DistributedConfig) -> None:
    """Meet the other processes; must come before any other use of JAX.

    Those that do not all meet in time are ended by JAX with SIGABRT.

    Raises:
      UserError: no word of where to meet, or no such place.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    told = config.coordinator is not None
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.processes,
            config.process,
            cluster_detection_method="deactivate" if told else None,
            initialization_timeout=config.start_timeout,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
        )
    except Exception as error:  # each cluster that JAX knows fails in its own way
        where = f"coordinator {config.coordinator}" if told else "enabled on"
        raise UserError(
            f"--distributed.{where}: the processes cannot meet ({brief(error)}); "
            "give --distributed.coordinator HOST:PORT, processes and process"
        ) from error


def run_to_the_end(work: Callable[[], object], config: DistributedConfig) -> NoReturn:
    """Do this process's part and exit: 0 when all are done, or with the code of what went wrong, here or elsewhere.

    What went wrong here is printed as one line, and told to all others.
    """
    threading.Thread(target=_end_with_the_others, daemon=True).start()
    try:
        work()
        wait_for_all("end")
    except KeyboardInterrupt:
        _end("was interrupted", INTERRUPTED, "stopped; what was finished is kept")
    except Exception as error:
        if said := what_to_mend(error):
            _end(f"stopped: {said}", USERS_TO_MEND, said)
        if _is_from_the_runtime(error):  # the first sign of a process that is lost, which will be named soon
            time.sleep(config.heartbeat_timeout + 5)
        traceback.print_exc()
        _end(f"failed ({brief(error)})", FAILED)
    _exit(0)


def place() -> tuple[int, int]:
    """This process's number, from 0, and how many there are; does not wake the devices, as jax.process_index does."""
    from jax._src.distributed import global_state  # JAX has no public name for it, nor for its key-value store

    return global_state.process_id, global_state.num_processes


def is_first() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return place()[0] == 0


def check_platform() -> None:
    """UserError where JAX cannot use the devices that JAX_PLATFORMS asks for."""
    try:
        jax.process_count()
    except (RuntimeError, AssertionError) as error:  # the latter of a platform that is known and not installed
        raise UserError(
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: JAX cannot use it here "
            f"({brief(error) or 'there is none'}); unset it, or install what it needs (ringrl[cuda] or ringrl[tpu])"
        ) from error


def check_met() -> None:
    """UserError where JAX sees the devices of other hosts (as on a TPU pod) with which this process has not met."""
    check_platform()
    if jax.process_count() > place()[1]:
        raise UserError(
            f"the devices belong to {jax.process_count()} hosts, which have not met; "
            "start the same command on each, with --distributed.enabled on"
        )


def wait_for_all(what: str) -> None:
    """Wait until every process has come to this point. `what` names it, once in a run."""
    if place()[1] > 1:
        _client().wait_at_barrier(f"ringrl/{what}", PATIENCE_MS)


def first_then_others(work: Callable[[], object], visible: Path) -> None:
    """Process 0 does the work, and the others go on when it is done and the file that it made is visible to them.

    Raises:
      UserError: the file is not there, so that the processes have no folder in common.
    """
    if is_first():
        work()
    wait_for_all("first")
    deadline = time.monotonic() + 30  # a network's file system may show it late
    while not visible.exists():
        if time.monotonic() > deadline:
            raise UserError(f"{visible}: was made by process 0 and is not here; give a --run that all hosts share")
        time.sleep(0.5)


def agree(what: str, settings: Mapping[str, object]) -> None:
    """Compare settings with process 0's, and go on when all have. `what` names the comparison, once in a run.

    Raises:
      UserError: names each setting that differs.
    """
    index, count = place()
    if count == 1:
        return
    mine = {name: str(value) for name, value in settings.items()}
    if index == 0:
        _client().key_value_set(f"ringrl/{what}", json.dumps(mine))
    theirs = json.loads(_client().blocking_key_value_get(f"ringrl/{what}", PATIENCE_MS))
    differing = [
        f"{name} is {mine.get(name)}, and {theirs.get(name)} in process 0"
        for name in sorted({*mine, *theirs})
        if mine.get(name) != theirs.get(name)
    ]
    if differing:
        raise UserError(f"process {index} of {count}: {'; '.join(differing)}; start all with the same command")
    wait_for_all(f"agreed on {what}")


def _end_with_the_others() -> None:
    """Wait for the word of a process that fails. Where the service itself is gone, JAX ends this process."""
    try:
        word = json.loads(_client().blocking_key_value_get(STOP, 2**40))
    except Exception:
        return
    index, count = place()
    if word["process"] != index:
        _exit(word["code"], f"process {word['process']} of {count} {word['what']}")


def _end(what: str, code: int, line: str = "") -> NoReturn:
    """Say so here and to the others, and exit. JAX's own exit would wait for all others first."""
    if line:
        say(line)
    with contextlib.suppress(Exception):  # another was first, or the service is gone; the line above is what counts
        _client().key_value_set(STOP, json.dumps({"process": place()[0], "what": what, "code": code}))
    _exit(code)


def _exit(code: int, last_line: str = "") -> NoReturn:
    sys.stdout.flush()
    if is_first():
        time.sleep(LINGER)
    if last_line:
        say(last_line)
    os._exit(code)


def say(line: str) -> None:
    """Print what the user is to know."""
    print(f"ringrl: {' '.join(line.split())}", file=sys.stderr, flush=True)


def _is_from_the_runtime(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _client() -> Any:
    from jax._src.distributed import global_state

    return global_state.client
