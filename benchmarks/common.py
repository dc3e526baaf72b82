"""Shared by the benchmarks: arguments, errors in one line, results as JSON and SVG, and processes with host devices."""

import argparse
import functools
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CALL = """
import json, os, runpy, sys
file, name, arguments = sys.argv[1:]
sys.path.insert(0, os.path.dirname(file))
print(json.dumps(runpy.run_path(file)[name](*json.loads(arguments))))
"""


def positive(text: str) -> int:
    """Parse a whole number from 1 on, as a type of argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the script's docstring as help and the option --json."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    return parser


def one_line_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a script's `main` to report user errors in one line with exit code 2, as `ringrl` does."""

    @functools.wraps(main)
    def script(arguments: Sequence[str] | None = None) -> None:
        import pydantic  # attention_cpu.py also runs without RingRL

        from ringrl.config_files import one_line
        from ringrl.errors import UserError

        try:
            main(arguments)
        except (UserError, pydantic.ValidationError) as error:
            message = one_line(error) if isinstance(error, pydantic.ValidationError) else str(error)
            print(f"{Path(inspect.getfile(main)).name}: {message}", file=sys.stderr)
            sys.exit(2)

    return script


def in_process(function: Callable[..., Any], *arguments: object, devices: int, python: str = sys.executable) -> Any:
    """Call a function of a script in a new process, since JAX fixes the number of host devices when it starts.

    Args:
      function: defined at the top level of a script; its arguments and result are JSON.
      devices: host devices of the process.
      python: the interpreter.

    Raises:
      SystemExit: the call failed, with the last line of its output, or the interpreter does not run.
    """
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    command = [python, "-c", CALL, inspect.getfile(function), function.__name__, json.dumps(arguments)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    except OSError as error:
        raise SystemExit(f"{python}: cannot be run ({error.strerror})") from None
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise SystemExit(f"{function.__name__}{arguments}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def median_seconds(call: Callable[[], Any], runs: int) -> float:
    """Return the median time of a call after one warm-up call; one run is enough if it takes over ten seconds."""
    seconds: list[float] = []
    for _ in range(1 + runs):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 2 and seconds[-1] > 10:
            break
    return statistics.median(seconds[1:])


def save_json(results: Any, path: Path | None) -> None:
    """Write results as JSON if a path is given."""
    if path is not None:
        path.write_text(json.dumps(results, indent=1))


def save_svg(figure: "Figure", path: Path) -> None:
    """Write a figure as SVG with text as text, and identical bytes for identical figures."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ringrl"}):
        figure.savefig(path)
