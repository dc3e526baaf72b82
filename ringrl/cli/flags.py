"""Checks of a command's flags, and one line for every usage error."""

import difflib
import inspect
import itertools
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import cyclopts
import pydantic

from ringrl.config import Section, SlurmConfig, TrainConfig
from ringrl.config_files import problems
from ringrl.errors import UserError

KINDS = {int: "an integer", float: "a number"}


def grouped(section: type[Section]) -> type[Section]:
    """Let --help show the flags of a section under the first sentence of its docstring."""
    title = str(section.__doc__).partition(". ")[0].removesuffix(".")
    return cyclopts.Parameter(group=cyclopts.Group.create_ordered(title))(section)


for _section in Section.__subclasses__():
    if _section is not TrainConfig:
        grouped(_section)


def check_flags(tokens: Sequence[str], arguments: cyclopts.ArgumentCollection) -> None:
    """Raise UserError listing missing, unknown and wrong flags, and lists given twice, not only the first."""
    flags = [argument for argument in arguments if argument.parse and not argument.children]
    missing = [argument.name for argument in flags if argument.required and not argument.has_tokens]
    wrong = []
    if missing:
        listed = " and ".join(filter(None, (", ".join(missing[:-1]), missing[-1])))
        wrong = [f"{listed} {'are' if len(missing) > 1 else 'is'} needed"]
    names = [name for argument in flags for name in argument.names if name.startswith("--")]
    before = dict[str, str]()
    for index, token in enumerate(itertools.takewhile(lambda token: token != "--", tokens)):
        name, sign, value = token.partition("=")
        if not token.startswith("--"):
            continue
        if (found := _flag(name, flags)) is None:
            near = difflib.get_close_matches(name, names, n=1)
            wrong.append(f"{name}: no such flag" + "".join(f"; did you mean {flag}?" for flag in near))
            continue
        count, is_list = found.token_count()
        value = value if sign else " ".join(tokens[index + 1 : index + 1 + count]) or name
        if not is_list and before.setdefault(found.name, value) != value:  # the parser keeps the last one only
            wrong.append(f"{found.name} is given twice: {before[found.name]} and {value}; keep one")
    for argument in flags:
        wrong.extend(_wrong_values(argument))
    if wrong:
        raise UserError("; ".join(wrong).replace("?;", "?"))


def _flag(name: str, flags: list[cyclopts.Argument]) -> cyclopts.Argument | None:
    try:
        return cyclopts.ArgumentCollection(flags).match(name)[0]
    except ValueError:
        return None


def _wrong_values(argument: cyclopts.Argument) -> Iterator[str]:
    """Yield what is wrong with the values of one flag."""
    given = [token for token in argument.tokens if token.source == "cli" and token.implicit_value is cyclopts.UNSET]
    if sum(token.index == 0 for token in given) > 1 and given[0].keyword:
        flag = argument.name
        yield f"{flag}: given twice; give all values after one flag: {flag} A B"
    for token in given:
        flag, choices, kind = token.keyword or argument.name, argument.get_choices(), argument.resolved_hint
        if choices and token.value not in choices:
            yield f"{flag}: unknown value {token.value!r}; choose one of {', '.join(choices)}"
        elif kind in KINDS and not _is_number(kind, token.value):
            yield f"{flag}: expected {KINDS[kind]}, got {token.value!r}"
        elif kind is int and int(token.value) > (most := 2 ** (63 if flag.endswith("seed") else 31) - 1):
            yield f"{flag}: expected at most {most}, got {token.value!r}"


def _is_number(kind: type, value: str) -> bool:
    try:
        kind(value)
    except ValueError:
        return False
    return True


def usage_line(error: cyclopts.CycloptsError) -> str:
    """Return what is wrong and where, for an error of the parser."""
    argument, cause = error.argument, error.__cause__
    if isinstance(error, cyclopts.UnknownCommandError) and error.app and error.unused_tokens:
        names = [name for name in error.app if not name.startswith("-")]
        near = difflib.get_close_matches(error.unused_tokens[0], names, n=3, cutoff=0.4) or names
        prefix = " ".join((*(error.command_chain or ()), ""))
        choices = " or ".join(prefix + name for name in near)
        return f"no command {prefix + error.unused_tokens[0]!r}; did you mean {choices}?"
    if isinstance(error, cyclopts.MissingArgumentError) and argument:
        count, _ = argument.token_count()
        return f"{error.keyword or argument.name}: needs {f'{count} values' if count > 1 else 'a value'}"
    if isinstance(cause, pydantic.ValidationError) and argument:
        section = argument.name.strip("-*")
        named = [(".".join(filter(None, (section, name))).replace("_", "-"), text) for name, text in problems(cause)]
        # Without the place of a value in a list, "--model.episode-window.0".
        return "; ".join(f"--{re.sub(r'[.][0-9]+$', '', flag)}: {text}" if flag else text for flag, text in named)
    if isinstance(error, cyclopts.UnusedCliTokensError | cyclopts.UnknownOptionError) and error.unused_tokens:
        return f"{error.unused_tokens[0]}: unexpected argument; remove it"
    return str(error)


def command_line() -> str:
    """Return the running command as a user would type it."""
    return shlex.join(["ringrl", *sys.argv[1:]])


def given_flags(group: str, section: Section) -> str:
    """Return the flags of a section that differ from their defaults, joined by commas; empty if none does."""
    default = type(section)()
    names = [name for name in type(section).model_fields if getattr(section, name) != getattr(default, name)]
    return ", ".join(f"--{group}.{name.replace('_', '-')}" for name in names)


def reject_flags(command: Callable[..., None], values: Mapping[str, object], why: str, *, used: set[str]) -> None:
    """Raise UserError listing the given flags that have no effect.

    Args:
        command: the function of the command.
        values: the values of its parameters. A flag with its default value counts as not given.
        why: the text after the flags in the message.
        used: names of the parameters that have an effect.
    """
    parameters = inspect.signature(command).parameters.values()
    given = [each.name for each in parameters if each.name not in used and values[each.name] != each.default]
    if given:
        raise UserError(f"{', '.join('--' + name.replace('_', '-') for name in given)}: {why}")


def check_launcher(launcher: str, slurm: SlurmConfig) -> None:
    """Raise UserError for SLURM flags without --launcher slurm: the work would run on this machine."""
    if launcher != "slurm" and (flags := given_flags("slurm", slurm)):
        raise UserError(f"{flags}: used only with --launcher slurm; add that flag, or remove this one")
