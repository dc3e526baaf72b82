"""The words of the command that runs."""

import shlex
import sys

from ringrl.config import Section, SlurmConfig
from ringrl.errors import UserError


def command_line() -> str:
    """As it could be typed again."""
    return shlex.join(["ringrl", *sys.argv[1:]])


def given_flags(group: str, section: Section) -> str:
    """The flags of a group that are given another value than their default, as they are typed; empty if none is."""
    default = type(section)()
    names = [name for name in type(section).model_fields if getattr(section, name) != getattr(default, name)]
    return ", ".join(f"--{group}.{name.replace('_', '-')}" for name in names)


def check_launcher(launcher: str, slurm: SlurmConfig) -> None:
    """UserError where something is asked of SLURM that will not be asked: the work would be done here."""
    if launcher != "slurm" and (flags := given_flags("slurm", slurm)):
        raise UserError(f"{flags}: heeded only with --launcher slurm; give that too, or leave this out")
