"""The command line: the commands, how their flags are read, and one line for every error a user can cause."""

import ast
import inspect
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cyclopts

import ringrl
from ringrl.errors import UserError, printable, user_message
from ringrl.files import expanded
from ringrl.signals import Stopped, handled, stop

COMMANDS = {  # module of this package and function
    "data download": "data:download",
    "data import": "data:import_",
    "data info": "data:info",
    "data collect": "data:collect",
    "data export": "data:export",
    "train": "train:train",
    "evaluate": "evaluate:evaluate",
    "ablate": "study:ablate",
    "report": "study:report",
    "plan": "plan:plan",
    "demo": "study:demo",
    "doctor": "doctor:doctor",
}

# JAX's defaults, for environment variables that would otherwise change its results or make it fail.
JAX_DEFAULTS = {
    "JAX_ENABLE_X64": "0", "JAX_NUMPY_DTYPE_PROMOTION": "standard", "JAX_NUMPY_RANK_PROMOTION": "allow",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. An error that the user can correct ends in one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # characters that the terminal's encoding lacks print as "?"
    os.environ.update(JAX_DEFAULTS)
    # Processes of a command would import a signal.py of the current folder instead of Python's.
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        _run(list(sys.argv[1:] if arguments is None else arguments))
    except OSError:
        _flush("\n")  # fails, and exits, if standard output caused the error
        raise
    finally:
        _flush("")


def _run(arguments: list[str]) -> None:
    """Run one command and turn its errors into one line."""
    for name in ("absl", "asyncio"):  # orbax logs tracebacks of errors that end in one line here
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with handled(stop):
            command, bound = parse(arguments)
            command(*bound.args, **bound.kwargs)
    except KeyboardInterrupt as error:
        kept = "no store was written" if arguments[:2] == ["data", "import"] else "finished work is kept"
        print(f"ringrl: stopped; {kept}", file=sys.stderr)
        sys.exit(128 + (error.number if isinstance(error, Stopped) else signal.SIGINT))
    except Exception as error:
        import pydantic

        from ringrl.config_files import one_line

        message = one_line(error) if isinstance(error, pydantic.ValidationError) else user_message(error)
        if message is None:
            raise
        _fail(message)


def parse(arguments: list[str]) -> tuple[Callable[..., Any], inspect.BoundArguments]:
    """Return the function of a command and its arguments; raise UserError for a usage error."""
    arguments = [*arguments[:-1], "--help"] if arguments[-1:] == ["help"] and len(arguments) < 3 else arguments
    if arguments[:1] == ["train"]:  # --resume without a value gets an empty one, which the parser needs
        pairs = zip(arguments, [*arguments[1:], "--"], strict=True)
        arguments = ["--resume=" if one == "--resume" and after[:2] == "--" else one for one, after in pairs]
    try:
        command, bound, _ = build_app(arguments).parse_args(arguments, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        from ringrl.cli.flags import usage_line

        raise UserError(f"{usage_line(error)} (see {_help_of(arguments)})") from error
    bound.arguments |= {name: _expanded(value) for name, value in bound.arguments.items()}
    return command, bound


def _expanded(value: Any) -> Any:
    """Return the value of a flag with `~` and `$NAME` replaced if it holds paths."""
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    return expanded(value) if isinstance(value, Path) else value


def build_app(arguments: list[str]) -> cyclopts.App:
    """Return the commands. A command's module is imported when the command is used."""
    is_listing = not {*arguments} - {"data", "-h", "--help"}
    rules = cyclopts.Parameter(
        consume_multiple=True, allow_repeating=False, negative_iterable=(), negative_none=(), validator=_check_size,
        show_default=lambda value: "none" if value == () else value,
    )  # fmt: skip
    app = cyclopts.App(
        "ringrl", help=ringrl.__doc__, version=ringrl.__version__, default_parameter=rules, config=_complete
    )
    data = cyclopts.App("data", help="Download, import, describe, collect and export datasets.", sort_key=0)
    app.command(data)
    for order, (name, place) in enumerate(COMMANDS.items(), start=1):
        module, _, function = place.partition(":")
        parent = data if name.startswith("data ") else app
        summary = _summary(module, function) if is_listing else None
        parent.command(f"ringrl.cli.{place}", name=name.split()[-1], help=summary, sort_key=order)
    return app


def _summary(module: str, function: str) -> str:
    """Return the first line of a command's docstring. Importing the module would take most of --help's time."""
    source = ast.parse(Path(__file__).with_name(f"{module}.py").read_text("utf-8"))
    (found,) = (node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == function)
    return str(ast.get_docstring(found)).splitlines()[0]


def _check_size(_: object, value: object) -> None:
    """Raise ValueError for an integer that arrays and counters cannot hold. Seeds have limits of their own."""
    if isinstance(value, int) and value >= 2**63:
        raise ValueError(f"expected less than 2^63, got {value}")


def _complete(app: cyclopts.App, commands: tuple[str, ...], arguments: cyclopts.ArgumentCollection) -> None:
    """Add the settings of --config and --method to the flags of `ringrl train`. Called by the parser."""
    if commands == ("train",):
        from ringrl.cli.train import add_settings

        add_settings(app, commands, arguments)


def _help_of(arguments: list[str]) -> str:
    name = " ".join(arguments[:2] if arguments[:1] == ["data"] else arguments[:1])
    return f"ringrl {name} --help" if name in COMMANDS else "ringrl --help"


def _flush(last: str) -> None:
    """Flush standard output. If that fails, exit without the traceback that Python would print."""
    try:
        print(end=last, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes the rest when it exits
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)  # the exit code of other programs after `| head`
        _fail(f"standard output: cannot be written ({error.strerror}); free some space, or redirect it elsewhere")


def _fail(message: str) -> None:
    print(f"ringrl: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(2)
