"""How the numbers of a report were measured, read off the records themselves."""

from collections import defaultdict
from collections.abc import Iterable

from ringrl.evaluation.formatting import number
from ringrl.evaluation.protocol import NO_TARGET
from ringrl.evaluation.records import PROTOCOL, EvaluationRecord, Results
from ringrl.study.report_cells import BOOTSTRAP_SEED, RESAMPLES, Grid
from ringrl.study.report_starts import starts_facts

Fact = tuple[str, list[str]]  # what, and one line each


def provenance(records: Iterable[EvaluationRecord]) -> list[Fact]:
    """What a figure was made from: the commands, versions, data and seeds of its records."""
    records = list(records)
    found: list[Fact] = [
        ("Commands", _distinct(record.command for record in records)),
        ("Versions", _versions(records)),
        ("Dataset (SHA-256)", _per_task((record.task, record.data_fingerprint) for record in records)),
        ("Training seeds", _trained_with(records)),
        ("Environment seeds", _starts(records)),
    ]
    return [(name, [line for line in lines if line]) for name, lines in found if any(lines)]


def facts(results: Results, grid: Grid) -> list[Fact]:
    """Everything needed to judge or repeat the measurement; what no record tells is left out."""
    records = [record for record in grid.records if record.method != "data"]
    found: list[Fact] = [
        ("Evaluation protocol", [f"{PROTOCOL}: undiscounted returns of whole episodes, in dm_control"]),
        ("Target return", _targets(grid)),
        ("Training seeds", _trained_with(records)),
        ("Environment seeds", _starts(records)),
        ("Starts", starts_facts(grid)),
        ("Optimiser steps", [_numbers(record.steps_trained for record in records if record.steps_trained is not None)]),
        ("Dataset (SHA-256)", _per_task((record.task, record.data_fingerprint) for record in grid.records)),
        ("Checkpoints", _distinct(record.checkpoint_hash and record.checkpoint_hash[:12] for record in records)),
        ("Versions", _versions(grid.records)),
        ("Commands", _distinct(record.command for record in grid.records)),
        ("Statistics", [f"{RESAMPLES} bootstrap resamples, seed {BOOTSTRAP_SEED}"]),
        ("Results read", [f"{len(results.records)} records from {_files(len(results.sources))}"]),
        ("Left out", _left_out(results, grid)),
    ]
    return [(name, [line for line in lines if line]) for name, lines in found if any(lines)]


def _targets(grid: Grid) -> list[str]:
    targets: dict[str, set[str]] = defaultdict(set)
    for record in grid.records:
        if record.target_return is not None or record.target_policy not in (None, NO_TARGET):
            value = "none" if record.target_return is None else number(record.target_return)
            targets[record.task].add(f"{value} ({record.target_policy or 'chosen by hand'})")
    return [f"{task}: {', '.join(sorted(values))}" for task, values in sorted(targets.items())]


def _per_task(pairs: Iterable[tuple[str, str | None]]) -> list[str]:
    return sorted({f"{task}: {value}" for task, value in pairs if value})


def _versions(records: Iterable[EvaluationRecord]) -> list[str]:
    """One line per set of versions that was used; several mean that the results were not made alike."""
    sets = {tuple(sorted(record.versions.items())) for record in records if record.versions}
    return sorted(", ".join(f"{name} {version}" for name, version in versions) for versions in sets)


def _trained_with(records: Iterable[EvaluationRecord]) -> list[str]:
    return [_numbers(record.seed for record in records if record.steps_trained is not None)]


def _starts(records: Iterable[EvaluationRecord]) -> list[str]:
    """The seeds that starts were drawn with; of older results, those of the streams."""
    return [_numbers(seed for record in records for seed in record.start_seeds or (record.environment_seed,))]


def _distinct(values: Iterable[str | None]) -> list[str]:
    return sorted({value for value in values if value})


def _numbers(values: Iterable[int]) -> str:
    """Distinct integers, runs of them as "0 to 7"."""
    runs: list[list[int]] = []
    for value in sorted(set(values)):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _left_out(results: Results, grid: Grid) -> list[str]:
    lines = [f"{path.name}: its last line was cut off" for path in results.half_written]
    if grid.superseded:
        other = f", {grid.displaced} of them of another checkpoint" if grid.displaced else ""
        lines.append(f"{grid.superseded} older records of what was measured again later{other}")
    if grid.unmatched:
        lines.append(
            f"{grid.unmatched} control records whose rollouts are not there, or are of other starts or training seeds; "
            "no column or line shows them"
        )
    if grid.left_out:
        lines.append(f"{grid.left_out} streams whose first episode failed, and which have no return")
    return lines
