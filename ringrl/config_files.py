"""Settings as text: YAML files, and validation errors as one line."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import yaml

from ringrl.config import Section
from ringrl.errors import UserError

_EXPECTED = {  # by pydantic's error type, where its own message uses Python's names
    "string_type": "text (put it in quotes)",
    "path_type": "a path (put it in quotes)",
    "tuple_type": "a list, for example [1, 2]",
    "model_type": "settings by name, for example {name: value}",
}


def problems(error: pydantic.ValidationError) -> list[tuple[str, str]]:
    """Return pairs of a setting's name and its error message. The name is empty if several settings are involved."""
    return [(".".join(map(str, p["loc"])), _message(p)) for p in error.errors()]


def _message(problem: Mapping[str, Any]) -> str:
    kind, message = problem["type"], str(problem["msg"])
    if kind == "missing":
        return "is required"
    if kind in _EXPECTED or message.startswith("Input should be "):
        expected = _EXPECTED.get(kind, message.removeprefix("Input should be "))
        return f"expected {expected}, got {str(problem['input'])[:100]!r}"
    return message.removeprefix("Value error, ")


def one_line(error: pydantic.ValidationError) -> str:
    """Return all error messages as one line."""
    return "; ".join(f"{name}: {message}" if name else message for name, message in problems(error))


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and words (1e6 is a number; 010, 1:30 and yes are not 8, 90 and true), and no dates.

    Duplicate keys are errors. PyYAML would silently keep the last one.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {twice[0]}", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that a reader of YAML 1.1 or 1.2 would take for something else: a run named 08 or 1e6."""


_Loader.yaml_implicit_resolvers = {}  # without YAML 1.1's
_NUMBER = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("merge", "<<", "<"),
    ("null", "~|null|Null|NULL|", ("~", "n", "N", "")),
    ("int", "[-+]?[0-9]{1,300}|0x[0-9a-fA-F]{1,300}", "-+0123456789"),
    ("float", _NUMBER, "-+0123456789."),
):
    for _either in (_Loader, _Dumper):
        _either.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor(
    "tag:yaml.org,2002:int", lambda _, node: int(node.value, 16 if node.value.startswith("0x") else 10)
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raise UserError if the file is missing, empty, not YAML or not a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.load(text, _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError, AttributeError, LookupError) as error:
        raise UserError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: {'is empty' if values is None else 'is not a mapping'}; give settings by name")
    return dict(values)


def merged(below: Mapping[str, Any], above: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Return nested settings in which the values of `above` replace those of `below`.

    Raise UserError, with `section` before the name, if `below` has a plain value where `above` has a section.
    """
    whole = dict(below)
    for name, value in above.items():
        if isinstance(value, Mapping):
            under = whole.get(name)
            if not isinstance(under, Mapping | None):
                raise UserError(f"{section}{name}: expected settings by name, got {under!r}")
            value = merged(under or {}, value, f"{section}{name}.")
        whole[name] = value
    return whole


def nested(name: str, value: Any) -> dict[str, Any]:
    """Return the settings {model: {layers: 2}} for the name model.layers and the value 2."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return dict(value)


def to_yaml(settings: Section | Mapping[str, Any]) -> str:
    """Return settings as YAML, in their own order."""
    values = settings.model_dump(mode="json") if isinstance(settings, Section) else dict(settings)
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False))
