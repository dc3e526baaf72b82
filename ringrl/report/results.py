"""Evaluation results as one pandas DataFrame, and the rules that decide which of them count."""

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from ringrl.errors import UserError, printable
from ringrl.evaluation.formatting import all_digits
from ringrl.evaluation.records import DATA, PROMPT_ONLY, EvaluationRecord, default_recipe, read_records
from ringrl.methods import title_of

CELL = ["task", "method", "train_trajectories", "prompt_trajectories", "test_trajectories"]
"""Columns that name one point of a chart: a method on a task at one context length."""
RUN = [*CELL, "seed"]
"""Columns that name one training run of a cell."""
TRAINING = ["task", "method", "train_trajectories", "seed"]
"""Columns that name one training run, however it was rolled out."""
UNPROMPTED = ["task", "method", "train_trajectories", "test_trajectories"]
"""Columns that name a cell apart from its prompt."""

CONTEXT_KINDS = ("context", "prompt control")
"""Values of "kind" with a context. A prompt control is a rollout after a changed prompt, or of a baseline made of the
prompt alone. It is not a point of a curve."""

LENGTH_SETTINGS = ("optimiser.steps", "optimiser.batch_size")
"""Settings that follow from the context length if the budget is fixed."""

_COPIED = (
    "task", "prompt_trajectories", "prompt_control", "test_trajectories", "seed", "environment_seed", "prompt_seed",
    "token_set", "device", "target_policy", "target_return", "train_task", "steps_trained", "checkpoint",
    "checkpoint_hash", "configuration_hash", "data_fingerprint", "command", "created", "evaluation",
    "reference_returns",
)  # fmt: skip
_PER_EPISODE = {
    "return": "float64",
    "episode": "int64",
    "start": "object",
    "episode_steps": "Int64",
    "terminated": "bool",
}
_BUDGET = ("steps", "converged", "timesteps", "tokens", "flops", "seconds", "devices")

Settings = Mapping[str, str]


def read_results(paths: str | Path | Sequence[str | Path]) -> pd.DataFrame:
    """Return evaluation results as one table with a row per episode.

    The rules that decide which results count are applied here:

    - The newest of repeated measurements counts. All results of a training run come from the checkpoint that was
      evaluated last.
    - A variant of an ablation plan is a separate method, whose name includes the variant's name.
    - Other runs of one method whose settings differ are different methods. Settings that follow from the context length
      (steps, batch size) do not separate runs.
    - A control (memory reset before each episode) counts only if it covers the same seeds and starts as its rollout. An
      episode that failed in either of the two counts in neither.

    Columns:

    - `task`; `method`, a name unique in the table; `kind`: "context", "reference" (method without context) or "data"
      (episode of the dataset)
    - `train_trajectories` per training context, 0 for methods without context; `test_trajectories`, episodes per
      rollout; `prompt_trajectories`, dataset trajectories before the first episode
    - `seed` of training; `memory`, False for the control; `stream`, the starts of the rollout; `episode`, from 1;
      `start`, the start of this episode; `return`, NaN if the episode failed; `episode_steps`, missing if it failed or
      if all episodes have the task's length; `terminated`
    - `counts`: whether reports include the episode; `paired`: whether the episode has a return with and without memory
    - `run`: the training run, equal in all rows that share its checkpoint
    - `steps`, `converged`, `timesteps`, `tokens`, `flops`, `seconds`, `devices`: training cost (see `Budget`)
    - `settings`: settings of the run that are not defaults, as JSON; `versions`, as JSON; and the fields of
      `EvaluationRecord` of the same name.

    `attrs["left_out"]` lists what was left out and why, `attrs["sources"]` the files.

    Args:
        paths: results files, or folders that are searched for *.jsonl and *.jsonl.gz.

    Raises:
        UserError: there are no results, a file cannot be read, or one task has results from several datasets.
    """
    read = read_records(paths)
    if not read.records:
        places = ", ".join(str(path) for path in ([paths] if isinstance(paths, Path) else paths)) or "an empty list"
        raise UserError(f"no results in {places}; run `ringrl evaluate` first, or give the folder of its results")
    results = tabulate(read.records)
    results.attrs["sources"] = [str(path) for path in read.sources]
    results.attrs["left_out"] += read.notes
    return results


def tabulate(records: Sequence[EvaluationRecord]) -> pd.DataFrame:
    """Return records as the table that `read_results` describes. UserError if one task has several datasets."""
    newest, displaced = _newest(records)
    _check_datasets(newest)
    separating = _separating_settings(newest)
    variants = [_variant(record, separating[_family(record)]) for record in newest]
    shown = {variant for record, variant in zip(newest, variants, strict=True) if record.context and record.finished}
    names = {variant: _name(variant, {*shown, variant}) for variant in set(variants)}
    taken = Counter(names.values())
    for variant, name in names.items():  # "at" with the token set dt3, and a variant named dt3
        if variant.name and taken[name] > 1:
            names[variant] = f"{name} (variant {variant.name})"
    rows = [
        _row(record, variant, names[variant])
        for record, variant in zip(newest, variants, strict=True)
        if record.context or variant.kind in CONTEXT_KINDS  # without a context, the control repeats the rollout
    ]
    results = pd.DataFrame(rows).explode([*_PER_EPISODE], ignore_index=True).astype(_PER_EPISODE)
    results = _mark_pairs(results).sort_values([*RUN, "memory", "stream", "episode"], ignore_index=True)
    results.attrs = {"left_out": _left_out(results, len(records) - len(newest), displaced, newest), "sources": []}
    return results


class _Variant(NamedTuple):
    """The properties that separate the methods of a report, apart from the lengths of contexts and prompts."""

    method: str
    kind: str
    token_set: str = ""
    target: str = ""
    train_task: str = ""  # if it is not the task itself
    prompt: str = ""  # how the prompt was changed as a control
    settings: tuple[tuple[str, str], ...] = ()  # settings that differ between runs of one task, method and length
    name: str = ""  # in an ablation plan


def is_control(control: str, variant: str) -> bool:
    """Return whether a prompt control belongs to a variant, given the column "variant" of both."""
    changed, own = (_Variant(*json.loads(text)) for text in (control, variant))
    if changed.method in PROMPT_ONLY:
        return (changed.name, changed.train_task) == (own.name, own.train_task)
    return changed._replace(kind=own.kind, prompt=own.prompt) == own


def _row(record: EvaluationRecord, variant: _Variant, name: str) -> dict[str, Any]:
    lengths = record.train_trajectories, record.prompt_trajectories, record.test_trajectories
    unknown = f"unknown run {json.dumps([*variant, record.task, *lengths])}"
    budget, starts = record.budget, [f"{seed}:{index}" for seed, index in record.starts]
    return {column: _shown(column, getattr(record, column)) for column in _COPIED} | {
        "method": name,
        "kind": variant.kind,
        "variant": json.dumps(variant),
        "family": variant.method,
        "train_trajectories": (record.train_trajectories or 0) if variant.kind in CONTEXT_KINDS else 0,
        "memory": record.context,
        "run": f"{record.checkpoint_hash or unknown}#{record.seed}",
        "stream": f"{record.prompt_seed}/{' '.join(starts)}",
        "return": [float("nan") if value is None else value for value in record.returns],
        "episode": list(range(1, 1 + record.test_trajectories)),
        "start": starts,
        "episode_steps": [steps or None for steps in record.lengths or [0] * record.test_trajectories],
        "terminated": list(record.terminated or [False] * record.test_trajectories),
        "start_seeds": list(record.start_seeds or (record.environment_seed,)),
        "settings": json.dumps(record.settings or {}),
        "versions": json.dumps(record.versions),
        **{column: getattr(budget, column, None) for column in _BUDGET},
    }


def _shown(column: str, value: Any) -> Any:
    """Return a value with printable text: control characters crash the process that draws the charts."""
    return printable(value) if isinstance(value, str) and column != "checkpoint" else value  # a path is not shown


def _mark_pairs(results: pd.DataFrame) -> pd.DataFrame:
    """Add the columns `paired`, `counts` and `matched` (the control has the seeds and starts of its rollout)."""
    finite, cells, runs = results["return"].notna(), [results[name] for name in CELL], [results[name] for name in RUN]
    streams = [*runs, results["stream"]]
    sides = results["memory"].where(finite).groupby([*streams, results["episode"]]).transform("nunique")
    paired = finite & sides.eq(2)
    has_both = results["memory"].groupby(streams).transform("nunique").eq(2)
    same_streams = has_both.groupby(cells).transform("all")
    unpaired_run = results["memory"] & finite & ~paired.groupby(runs).transform("any")
    matched = same_streams & ~unpaired_run.groupby(cells).transform("any")
    counts = finite & paired.where(matched, results["memory"])
    return results.assign(paired=paired, counts=counts, matched=matched)


def _newest(records: Sequence[EvaluationRecord]) -> tuple[list[EvaluationRecord], int]:
    """Return the newest record of each stream, and the number of older records from another checkpoint."""
    in_time = sorted(records, key=lambda record: record.created)
    latest: dict[tuple[object, ...], EvaluationRecord] = {}
    displaced = 0
    for record in in_time:
        older = latest.get(_identity(record))
        displaced += older is not None and older.checkpoint_hash != record.checkpoint_hash
        latest[_identity(record)] = record
    checkpoint = {_training(record): record.checkpoint_hash for record in in_time}
    kept = [record for record in latest.values() if checkpoint[_training(record)] == record.checkpoint_hash]
    return kept, displaced + len(latest) - len(kept)


def _training(record: EvaluationRecord) -> tuple[object, ...]:
    """Return the properties that identify a training run."""
    return (
        record.train_task or record.task, record.method, record.token_set, record.train_trajectories, record.seed,
        record.data_fingerprint, record.variant, frozenset((record.settings or {}).items()),
    )  # fmt: skip


def _identity(record: EvaluationRecord) -> tuple[object, ...]:
    """Return the properties that identify a stream of episodes."""
    target = () if record.train_trajectories is None else (record.target_policy, record.target_return)
    prompt = record.prompt_trajectories, record.prompt_seed, record.prompt_control
    stream = record.test_trajectories, record.context, record.environment_seed
    return (*_training(record), record.task, target, *prompt, *stream)


def _check_datasets(records: Iterable[EvaluationRecord]) -> None:
    fingerprints: dict[str, set[str]] = defaultdict(set)
    for record in records:
        if record.data_fingerprint:
            fingerprints[record.task].add(record.data_fingerprint[:12])
    for task, found in sorted(fingerprints.items()):
        if len(found) > 1:
            names = " and ".join(sorted(found))
            raise UserError(f"{task}: the results come from different datasets ({names}); make one report for each")


def _left_out(results: pd.DataFrame, superseded: int, displaced: int, records: Sequence[EvaluationRecord]) -> list[str]:
    lines = []
    if superseded:
        other = f", {displaced} of them of another checkpoint" if displaced else ""
        lines.append(f"{superseded} older records that were measured again later{other}")
    control = results[~results["memory"] & ~results["matched"] & results["return"].notna()]
    if unmatched := len(control.drop_duplicates([*RUN, "stream"])):
        lines.append(f"{unmatched} control records whose rollouts are missing, or have other starts or training seeds")
    if failed := sum(not record.finished for record in records):
        lines.append(f"{failed} streams without a return: their first episode failed")
    return lines


def settings_of_any_length(settings: Settings) -> Settings:
    """Return the settings without those that follow from the context length."""
    return {name: value for name, value in settings.items() if name not in LENGTH_SETTINGS}


def _variant(record: EvaluationRecord, separating: Collection[str]) -> _Variant:
    known = default_recipe() | (record.settings or {}) if separating else {}
    settings = tuple((name, known.get(name, "")) for name in sorted(separating))
    train_task, name = record.train_task or "", record.variant or ""
    if record.method == DATA:
        return _Variant(DATA, "data")
    if record.method in ("random", "bc") or (record.train_trajectories is None and record.method not in PROMPT_ONLY):
        return _Variant(record.method, "reference", train_task=train_task, settings=settings, name=name)
    target = record.target_policy or ""
    if record.target_return is not None and target in ("", "given"):
        target = f"given {all_digits(record.target_return)}"
    kind = "prompt control" if record.prompt_control or record.method in PROMPT_ONLY else "context"
    own = record.token_set or "", target, train_task, record.prompt_control or ""
    return _Variant(record.method, kind, *own, settings, name)


def _separating_settings(records: Sequence[EvaluationRecord]) -> Mapping[tuple[str, ...], set[str]]:
    """Return family -> settings that separate otherwise equal runs. LENGTH_SETTINGS do so only if nothing else does."""
    groups: dict[tuple[object, ...], list[Settings]] = defaultdict(list)
    for record in records:
        place = _family(record), record.token_set, record.train_trajectories, record.train_task
        fixed = settings_of_any_length(record.settings or {})
        groups[place].append(fixed)
        groups[(*place, frozenset(fixed.items()))].append(record.settings or {})
    found: dict[Any, set[str]] = defaultdict(set)
    for (family, *_), settings in groups.items():
        names = {name for one in settings for name in one}
        found[family] |= {name for name in names if len({one.get(name) for one in settings}) > 1}
    return found


def _family(record: EvaluationRecord) -> tuple[str, ...]:
    return record.task, record.method, record.variant or ""


def _name(variant: _Variant, all_variants: Collection[_Variant]) -> str:
    """Return the name of a variant, with the properties that separate it from other variants of its method."""
    others = [other for other in all_variants if (other.method, other.name) == (variant.method, variant.name)]
    parts = ["Dataset" if variant.method == DATA else title_of(variant.method)]
    if variant.name:
        parts.append(variant.name)
    if len({other.token_set for other in others}) > 1:
        parts.append(variant.token_set or "no token set")
    if len({other.target for other in others}) > 1:
        parts.append(f"target {variant.target or 'unknown'}")
    if variant.prompt:
        parts.append(f"prompt {variant.prompt}")
    if variant.train_task:
        parts.append(f"trained on {variant.train_task}")
    for setting, value in variant.settings:
        if len({dict(other.settings).get(setting) for other in others}) > 1:
            parts.append(f"{setting} {value}")
    return printable(", ".join(parts))
