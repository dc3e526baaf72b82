"""The words of the command that runs."""

import shlex
import sys


def command_line() -> str:
    """As it could be typed again."""
    return shlex.join(["ringrl", *sys.argv[1:]])
