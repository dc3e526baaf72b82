"""Command lines of the benchmark scripts."""

import argparse
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def positive(text: str) -> int:
    """Return a whole number from 1 on; a type for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)


def told_in_one_line(main: Callable[..., None]) -> Callable[..., None]:
    """Print errors that the user can correct as one line and exit with code 2, as `ringrl` does."""

    @functools.wraps(main)
    def script(arguments: Sequence[str] | None = None) -> None:
        import pydantic  # here, since attention_cpu.py also runs without RingRL

        from ringrl.config import one_line
        from ringrl.errors import UserError

        try:
            main(arguments)
        except (UserError, pydantic.ValidationError) as error:
            message = one_line(error) if isinstance(error, pydantic.ValidationError) else str(error)
            print(f"{Path(inspect.getfile(main)).name}: {message}", file=sys.stderr)
            sys.exit(2)

    return script
