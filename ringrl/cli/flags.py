"""Checks of a command's flags, and one line for every usage error."""

import inspect
import re
import shlex
import sys
from collections.abc import Callable, Mapping

import cyclopts
import pydantic

from ringrl.config import Section, TrainConfig
from ringrl.config_files import problems
from ringrl.errors import UserError

for _section in Section.__subclasses__():
    if _section is not TrainConfig:  # --help shows the flags of a section under the first sentence of its docstring
        _title = str(_section.__doc__).partition(". ")[0].removesuffix(".")
        cyclopts.Parameter(group=cyclopts.Group.create_ordered(_title))(_section)


def usage_line(error: cyclopts.CycloptsError) -> str:
    """Return what is wrong and where, for an error of the parser."""
    argument, cause = error.argument, error.__cause__
    if isinstance(cause, pydantic.ValidationError) and argument:
        # A missing setting is reported for another flag of its section.
        parts = argument.name.strip("-*").split(".")
        section = ".".join(parts[: len(parts) - len(argument.keys)])
        named = [(".".join(filter(None, (section, name))).replace("_", "-"), text) for name, text in problems(cause)]
        # Without the place of a value in a list, "--model.episode-window.0".
        return "; ".join(f"--{re.sub(r'[.][0-9]+$', '', flag)}: {text}" if flag else text for flag, text in named)
    return str(error)


def command_line() -> str:
    """Return the running command as a user would type it."""
    return shlex.join(["ringrl", *sys.argv[1:]])


def environment_task(text: str) -> str:
    """Return the task of a Gymnasium environment that a user names: "Hopper-v5", or "module:Name-v0".

    A module is imported first, also from the working folder, so that it can register the environment. Raise UserError
    if the module cannot be imported, or if the name is not that of an environment.
    """
    from ringrl.envs import foreign_task, import_environments

    text = text.removeprefix("gymnasium:")
    if named := re.fullmatch(r"([\w.]+):(.+)", text):
        module, text = named.groups()
        try:
            import_environments(module)
        except UserError as error:
            raise UserError(f"--environment: {error}") from error
    return foreign_task(text)


def reject_flags(command: Callable[..., None], values: Mapping[str, object], why: str, *, used: set[str]) -> None:
    """Raise UserError, which ends with `why`, for given flags outside `used`. A default value counts as not given."""
    parameters = inspect.signature(command).parameters.values()
    given = [each.name for each in parameters if each.name not in used and values[each.name] != each.default]
    if given:
        raise UserError(f"{', '.join('--' + name.replace('_', '-') for name in given)}: {why}")
