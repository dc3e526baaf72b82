"""What tells the methods of a report apart, and what they are called."""

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ringrl.evaluation.formatting import all_digits
from ringrl.evaluation.records import DATA, EvaluationRecord, default_recipe
from ringrl.methods import METHODS

_NAMES = {name: method.title for name, method in METHODS.items()} | {
    "td3+her": "TD3 with hindsight goals",
    "td3+bc+her": "TD3+BC with hindsight goals",
    DATA: "Dataset",
}
OF_THE_LENGTH = ("optimiser.steps", "optimiser.batch_size")  # what a budget makes of the length of the context
_CONTEXT_FREE = ("random", "bc")
_UNKNOWN: Mapping[str, str] = MappingProxyType({"settings": "unknown"})  # of results from before they were told


@dataclass(frozen=True, order=True)
class Variant:
    """A method as it is told apart in the report."""

    method: str
    token_set: str = ""
    target_policy: str = ""
    prompt: int = 0  # dataset trajectories before the first episode
    train_task: str = ""  # where it is another one
    cache: str = ""  # dtype of keys and values, where it is not the policy's
    context_free: bool = False  # its returns are levels to compare with, not points of a curve
    settings: tuple[tuple[str, str], ...] = ()  # in which runs of one task, method and length differ


class Variants:
    """The variants among some records.

    A Decision Transformer is an Agentic Transformer of one trajectory per context: where everything else is the same,
    it is the first point of that curve and no method of its own.
    """

    def __init__(self, records: Collection[EvaluationRecord]) -> None:
        self._telling = _telling(records)
        self._usual = usual_settings()
        self._agentic = {
            (record.task, self._own(record), settings_of_any_length(record))
            for record in records
            if record.method.startswith("at")
        }

    def of(self, record: EvaluationRecord) -> Variant:
        """The variant that a record belongs to."""
        variant = self._own(record)
        if record.train_trajectories == 1:
            agentic = dataclasses.replace(variant, method=_agentic(record.method))
            if (record.task, agentic, settings_of_any_length(record)) in self._agentic:
                return agentic
        return variant

    def _own(self, record: EvaluationRecord) -> Variant:
        known = settings_of(record)
        settings = tuple(
            (name, known.get(name, self._usual.get(name, ""))) for name in sorted(self._telling[_family(record)])
        )
        train_task = record.train_task or ""
        if record.method in _CONTEXT_FREE or record.train_trajectories is None:
            return Variant(record.method, train_task=train_task, context_free=True, settings=settings)
        target = record.target_policy or ""
        if record.target_return is not None and target in ("", "given"):
            target = f"given {all_digits(record.target_return)}"
        prompt, cache = record.prompt_trajectories, record.cache_dtype or ""
        return Variant(record.method, record.token_set or "", target, prompt, train_task, cache, settings=settings)


def usual_settings() -> Mapping[str, str]:
    """What holds of a setting that a record does not name."""
    return {**default_recipe(), "settings": "known"}


def settings_of(record: EvaluationRecord) -> Mapping[str, str]:
    """Of its run, those that are not at their defaults."""
    return _UNKNOWN if record.settings is None and record.method not in ("random", DATA) else record.settings or {}


def settings_of_any_length(record: EvaluationRecord) -> frozenset[tuple[str, str]]:
    """The same, but for what a budget makes of the length of the context."""
    return frozenset((name, value) for name, value in settings_of(record).items() if name not in OF_THE_LENGTH)


def name_of(variant: Variant, others: Collection[Variant]) -> str:
    """A variant's name, with what else tells it apart from others, those of other methods among them."""
    others = [other for other in others if other.method == variant.method]
    method, _, tasks = variant.method.partition("-")
    parts = [_NAMES.get(variant.method, variant.method)]
    if tasks.endswith("tasks"):
        parts = [_NAMES.get(method, method), f"{tasks.removesuffix('tasks')} tasks in turn"]
    elif variant.method.startswith("bc-"):
        parts = [_NAMES["bc"], f"best {variant.method.removeprefix('bc-')}"]
    if len({other.token_set for other in others}) > 1:
        parts.append(variant.token_set or "no token set")
    if len({other.target_policy for other in others}) > 1:
        parts.append(f"target {variant.target_policy or 'unknown'}")
    if variant.prompt:
        parts.append(f"prompted with {variant.prompt}")
    if variant.cache:
        parts.append(f"cache in {variant.cache}")
    if variant.train_task:
        parts.append(f"trained on {variant.train_task}")
    for setting, value in variant.settings:
        if len({dict(other.settings).get(setting) for other in others}) > 1:
            parts.append(f"{setting} {value}")
    return ", ".join(parts)


def _family(record: EvaluationRecord) -> tuple[str, str]:
    """Task and method, where a Decision Transformer is an Agentic one."""
    return record.task, _agentic(record.method)


def _agentic(method: str) -> str:
    """The name of a Decision Transformer as an Agentic one; "dt-2tasks" has two tasks that took turns."""
    return f"at{method.removeprefix('dt')}" if method == "dt" or method.startswith("dt-") else method


def _telling(records: Collection[EvaluationRecord]) -> Mapping[tuple[str, str], set[str]]:
    """The settings by which runs have to be told apart: all else that results tell of them is the same.

    What goes with the length is no part of it, but where nothing else tells them apart.
    """
    alike: dict[tuple[object, ...], list[Mapping[str, str]]] = defaultdict(list)
    for record in records:
        place = (*_family(record), record.token_set, record.train_trajectories, record.train_task)
        alike[place].append(dict(settings_of_any_length(record)))
        alike[(*place, settings_of_any_length(record))].append(settings_of(record))
    telling: dict[tuple[str, str], set[str]] = defaultdict(set)
    for (task, method, *_), settings in alike.items():
        names = {name for one in settings for name in one}
        telling[str(task), str(method)] |= {name for name in names if len({one.get(name) for one in settings}) > 1}
    return telling
