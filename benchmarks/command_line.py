"""What the command lines of the scripts have in common."""

import argparse
import functools
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class Main(Protocol):
    """What a script is started by."""

    def __call__(self, arguments: Sequence[str] | None = None) -> None: ...


def positive(text: str) -> int:
    """A whole number from 1 on, as a type of argparse's arguments."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)


def told_in_one_line(main: Main) -> Main:
    """A script whose users are told of their mistakes in one line, with exit code 2, as `ringrl` does."""

    @functools.wraps(main)
    def script(arguments: Sequence[str] | None = None) -> None:
        import pydantic  # here, since attention_cpu.py is also run where there is no RingRL

        from ringrl.config import one_line
        from ringrl.errors import UserError

        try:
            main(arguments)
        except (UserError, pydantic.ValidationError) as error:
            said = one_line(error) if isinstance(error, pydantic.ValidationError) else str(error)
            print(f"{Path(inspect.getfile(main)).name}: {said}", file=sys.stderr)
            sys.exit(2)

    return script
