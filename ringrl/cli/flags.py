"""A command's flags, and one line for what is wrong with them, which the parser says in a box of many.

It says it as text alone, so text is what is read here. Of words that are not known, all are told as they stand.
"""

import contextlib
import difflib
import functools
import io
import re
from collections.abc import Callable
from typing import Any

import pydantic
import tyro

from ringrl.config import problems
from ringrl.errors import UserError


def parse(name: str, arguments: list[str], command: Callable[..., None]) -> Callable[[], None]:
    """The command with its flags filled in; UserError names those that are wrong."""

    @functools.wraps(command)
    def bind(*values: Any, **flags: Any) -> Callable[[], None]:
        return functools.partial(command, *values, **flags)

    read = functools.partial(tyro.cli, bind, prog=f"ringrl {name}", config=(tyro.conf.FlagCreatePairsOff,))
    _refuse_lost_values(arguments, read)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return read(args=arguments)
    except pydantic.ValidationError as error:  # of settings that stand at the top
        wrong = _wrong_settings("", error)
    except SystemExit as stop:
        if not stop.code:
            raise
        box = re.sub(r"[─│╭╮╰╯├┤]|-{4,}", " ", said.getvalue())
        text = re.sub(r" For full helptext.*", "", " ".join(box.split()))
        section, refused = re.search(r"Error parsing (?:settings\.)?([\w.-]+):", text), _refusal(stop)
        wrong = _wrong_settings(section[1], refused) if section and refused else _one_line(text)
    raise UserError(f"{wrong} (ringrl {name} --help tells more)")


def _refuse_lost_values(arguments: list[str], read: Callable[..., object]) -> None:
    """UserError for a flag of several values that is there twice: the parser would keep those of the last alone."""
    given = [word.partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--")]
    twice = [flag for flag in given if given.count(flag) > 1]
    if not twice:
        return
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        read(args=["--help"])
    for flag in twice:
        if f"{flag} [" in shown.getvalue():  # --tasks [STR [STR ...]]
            raise UserError(f"{flag}: is there twice; give all its values after one another: {flag} A B")


def _refusal(stop: BaseException) -> pydantic.ValidationError | None:
    """Why the parser stopped, where it was for a section of settings."""
    error: BaseException | None = stop
    while error is not None and not isinstance(error, pydantic.ValidationError):
        error = error.__context__
    return error


def _wrong_settings(section: str, error: pydantic.ValidationError) -> str:
    """As flags of that section, "model" for example."""
    named = ((".".join(filter(None, (section, name))).replace("_", "-"), words) for name, words in problems(error))
    return "; ".join(f"--{flag}: {words}" if flag else words for flag, words in named)


def _one_line(text: str) -> str:
    """What the text of a box comes to."""
    needed = re.findall(r"(?:Missing from [^:]*:|\(required\)) (--[\w.-]+|[A-Z]+\b)", text)
    unknown = re.search(r"Unrecognized options: (.*?)(?: Perhaps you meant:| Arguments similar to|$)", text)
    if needed or unknown:
        listed = " and ".join(filter(None, (", ".join(needed[:-1]), *needed[-1:])))
        parts = [f"{listed} {'are' if len(needed) > 1 else 'is'} needed"] if needed else []
        return "; ".join([*parts, *(_unknown(unknown[1], text) if unknown else ())]).replace("?;", "?")
    if found := re.search(r"invalid choice ('.*') for argument '(.*?)'\. Expected one of \((.*)\)", text):
        choices = re.findall(r"'(.*?)'", found[3])
        if "None" in choices:  # which the parser puts in, and then it has them in no order
            choices = sorted(set(choices) - {"None"})
        return f"{found[2]}: there is no {found[1]}; choose one of {', '.join(choices)}"
    if found := re.search(r"Missing value for argument '(.*?)'\. Expected (\d+)", text):
        return f"{found[1]}: needs {'a value' if found[2] == '1' else f'{found[2]} values'}"
    kind_of_value = r"Argument helptext: \S+ (?:\{None\}\|)?(\{.*?\}|\S+)"
    if found := re.search(rf"Error parsing (\S+): (.*?) (?:Got errors: .*)?{kind_of_value}", text):
        flag, why, kind = found.groups()
        value = re.search(r"(?:base 10: |to float: |from \[)('[^']*')(?:\.|\]|$)", why)
        return f"{flag}: expected {kind.strip('{}')}, got {value[1]}" if value else f"{flag}: {why}"
    return text


def _unknown(tokens: str, text: str) -> list[str]:
    """Of each flag that there is not, the nearest that the text names; values that follow them are left out."""
    words = re.split(r",? ", tokens)
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    near = {flag: difflib.get_close_matches(flag, set(re.findall(r"--[\w.-]+", text)) - {*flags}, 1) for flag in flags}
    told = [f"{flag}: there is no such flag" + "".join(f"; did you mean {n}?" for n in near[flag]) for flag in flags]
    return told or [f"{' '.join(words)}: is one word too many"]
