"""A script's own work in a process with as many host devices as it needs, which are fixed when JAX starts."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def in_process(command: Sequence[object], devices: int, what: str, python: str = sys.executable) -> Any:
    """What the last line of the command's output says, as JSON; if it fails, `what` and its last word end the script.

    Args:
        command: the script, and its arguments.
        devices: host devices of the process.
        what: is measured there, for the message.
        python: whose packages it has.
    """
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run([python, *map(str, command)], env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1]
        raise SystemExit(f"{what}: {last}")
    return json.loads(done.stdout.splitlines()[-1])
