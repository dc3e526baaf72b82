"""The command line: which commands there are, how their flags are read and how errors are told."""

import difflib
import functools
import inspect
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pydantic
import tyro

import ringrl
from ringrl.cli.data import data_collect, data_download, data_export, data_import, data_info, data_merge
from ringrl.cli.evaluate import evaluate
from ringrl.cli.flags import parse
from ringrl.cli.plan import plan
from ringrl.cli.report import report
from ringrl.cli.run import train
from ringrl.cli.study import ablate, demo
from ringrl.config import TrainConfig, merged, one_line, read_yaml
from ringrl.errors import UserError, user_message
from ringrl.methods import METHODS

COMMANDS: dict[str, Callable[..., None]] = {
    "data download": data_download,
    "data import": data_import,
    "data info": data_info,
    "data merge": data_merge,
    "data collect": data_collect,
    "data export": data_export,
    "plan": plan,
    "train": train,
    "evaluate": evaluate,
    "ablate": ablate,
    "report": report,
    "demo": demo,
}
HELP = ("-h", "--help", "help")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Errors that the user can mend end in one line and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where it cannot show a bar or a line, "?" does
    try:
        _run_and_tell(list(sys.argv[1:] if arguments is None else arguments))
    except OSError:
        _write_out("\n")  # ends it, if standard output is what failed; if not, an empty line does no harm
        raise
    finally:
        _write_out("")


def _run_and_tell(arguments: list[str]) -> None:
    """One command, and what the user is told of its end."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs a traceback of what is told here in one line
    if getattr(sys.unraisablehook, "func", None) is not _without_echoes:
        sys.unraisablehook = functools.partial(_without_echoes, sys.unraisablehook)
    try:
        _run(arguments)
    except KeyboardInterrupt:
        print("ringrl: stopped; what was finished is kept", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        said = one_line(error) if isinstance(error, pydantic.ValidationError) else user_message(error)
        if said is None:
            raise
        _fail(said)


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in HELP:
        print("\n".join([str(ringrl.__doc__), *_summaries(""), "", "Each has --help with units and defaults."]))
        return
    if arguments[0] == "data" and (len(arguments) == 1 or arguments[1] in HELP):
        print("\n".join([str(ringrl.cli.data.__doc__), "", *_summaries("data "), "", "Each has --help."]))
        return
    if arguments == ["--version"]:
        print(ringrl.__version__)
        return
    words = 2 if arguments[0] == "data" else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=3, cutoff=0.4) or list(COMMANDS)
        raise UserError(f"no command {name!r}; did you mean {' or '.join(near)}? (ringrl --help lists all)")
    command = COMMANDS[name]
    parse(name, rest, _with_settings(rest) if command is train else command)()


def _summaries(beginning: str) -> list[str]:
    """A line for each command whose name begins so."""
    firsts = {name: str(command.__doc__).splitlines()[0] for name, command in COMMANDS.items()}
    width = max(map(len, firsts))
    return [f"  ringrl {name:<{width}}  {first}" for name, first in firsts.items() if name.startswith(beginning)]


def _with_settings(arguments: list[str]) -> Callable[..., None]:
    """`train` with the settings of a --config file, and over them those of a --method, as the defaults of its flags."""
    files, methods = _given(arguments, "--config"), _given(arguments, "--method")
    values = read_yaml(Path(files[-1])) if files else {}
    if methods and methods[-1] in METHODS:  # of others, the parser says what is wrong
        try:
            values = merged(values, METHODS[methods[-1]].settings or {})
        except UserError as error:
            raise UserError(f"{files[-1]}: {error}") from error
    required: dict[str, Any] = {"data": Path(), "task": "", "run": Path()}
    try:
        whole = TrainConfig.model_validate(required | values)
    except pydantic.ValidationError as error:
        raise UserError(f"{(files or ['--method'])[-1]}: {one_line(error)}") from error
    default = whole.model_copy(update={name: tyro.MISSING for name in required if name not in values})

    @functools.wraps(train)
    def command(**flags: Any) -> None:
        train(**flags)

    signature = inspect.signature(train)
    parameters = [p.replace(default=default) if p.name == "settings" else p for p in signature.parameters.values()]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return command


def _given(arguments: list[str], flag: str) -> list[str]:
    """What is given with a flag, as `--flag value` or `--flag=value`."""
    pairs = pairwise([*arguments, ""])
    return [b if a == flag else a.removeprefix(f"{flag}=") for a, b in pairs if f"{a}=".startswith(f"{flag}=")]


def _without_echoes(say: Callable[[Any], object], ignored: Any) -> None:
    """But for what tensorstore's threads say, once for each array, when orbax has gone after the first failed write."""
    if str(ignored.exc_value) != "Event loop is closed":
        say(ignored)


def _write_out(last: str) -> None:
    """What was printed goes to standard output; where that cannot be written, Python would end with a traceback."""
    try:
        print(end=last, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python writes out the rest as it ends
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)  # `| head` has seen enough: as a shell tells of any other program's end
        _fail(f"standard output: cannot be written ({error.strerror}); free some space, or send it elsewhere")


def _fail(message: str) -> None:
    print(f"ringrl: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
