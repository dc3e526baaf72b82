"""Origin of the results: commands, versions, and run folders with their training logs."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pydantic

from ringrl.config import TrainConfig
from ringrl.config_files import read_yaml
from ringrl.errors import UserError, printable
from ringrl.evaluation.formatting import number
from ringrl.evaluation.records import PROTOCOL, recipe
from ringrl.evaluation.statistics import BOOTSTRAP_SEED, RESAMPLES
from ringrl.evaluation.target import NO_TARGET
from ringrl.files import without_crc
from ringrl.report.results import TRAINING

POINTS = 50  # of a learning curve
_FEW = 4  # numbers that are listed
MEMORY = "peak_memory_bytes"  # its name in metrics.jsonl
_LOGGED = ["step", "loss", "validation_loss", "tokens_per_second", MEMORY]

Fact = tuple[str, list[str]]  # a heading and its lines


def facts(results: pd.DataFrame) -> list[Fact]:
    """Return the conditions of the measurement, to judge or repeat it. Facts that no record has are left out."""
    policies = results[results["kind"] != "data"]
    trained = policies[policies["steps_trained"].notna()]
    versions = sorted(results["versions"].unique())
    found: list[Fact] = [
        ("Evaluation protocol", [f"{PROTOCOL}: undiscounted returns of whole episodes"]),
        ("Target return", _targets(policies)),
        ("Training seeds", [_ranges(trained["seed"])]),
        ("Environment seeds", [_ranges(seed for seeds in policies["start_seeds"] for seed in seeds)]),
        ("Optimiser steps", [_ranges(trained["steps_trained"].astype(int))]),
        ("Dataset (SHA-256)", _distinct(results["task"] + ": " + results["data_fingerprint"])),
        ("Checkpoints", _distinct(results["checkpoint_hash"].str[:12])),
        ("Versions", [", ".join(map(" ".join, sorted(json.loads(one).items()))) for one in versions]),
        ("Commands", _distinct(results["command"])),
        ("Statistics", [f"{RESAMPLES} bootstrap resamples, seed {BOOTSTRAP_SEED}"]),
        ("Results files", _distinct(results.attrs["sources"])),
        ("Left out", list(results.attrs["left_out"])),
    ]
    return [(name, [printable(line) for line in lines if line]) for name, lines in found if any(lines)]


def _targets(policies: pd.DataFrame) -> list[str]:
    lines = set()
    for _, row in policies.drop_duplicates(["task", "target_return", "target_policy"]).iterrows():
        has_target = pd.notna(row["target_return"])
        policy = row["target_policy"] if pd.notna(row["target_policy"]) else None
        if has_target or policy not in (None, NO_TARGET):
            value = number(row["target_return"]) if has_target else "none"
            lines.add(f"{row['task']}: {value} ({policy or 'given'})")
    return sorted(lines)


def _distinct(values: Iterable[Any]) -> list[str]:
    return sorted({value for value in values if isinstance(value, str)})


def _ranges(values: Iterable[int]) -> str:
    """Return distinct integers as text: a few of them, or the ends and the number of many."""
    found = sorted({int(value) for value in values})
    few = ", ".join(map(str, found))
    return few if len(found) <= _FEW else f"{found[0]} to {found[-1]} ({len(found)} different)"


def training_runs(results: pd.DataFrame) -> pd.DataFrame:
    """Return the training runs whose folders were found, one row per run folder.

    Columns: task, method, train_trajectories, seed, folder, steps, losses and held_out (arrays, NaN where a loss is not
    finite or absent), tokens_per_second (median over steps) and peak_memory (bytes per device), NaN if there is none.
    """
    next_to_results = sorted({Path(source).parent for source in results.attrs["sources"]})
    rows: dict[Path, list[Any]] = {}
    with_run = results[results["checkpoint"].notna() & (results["kind"] != "data")]
    for _, row in with_run.drop_duplicates(["task", "method", "checkpoint", "configuration_hash"]).iterrows():
        folder = run_folder(row, next_to_results)
        if folder is None or folder.resolve() in rows:
            continue
        log = pd.DataFrame(_entries(folder / "metrics.jsonl"), columns=_LOGGED, dtype=np.float64)
        log = log.replace([np.inf, -np.inf], np.nan)
        if len(log):
            arrays = [log[name].to_numpy() for name in ("step", "loss", "validation_loss")]
            summaries = log["tokens_per_second"].median(), log[MEMORY].max()
            rows[folder.resolve()] = [*row[TRAINING], folder, *arrays, *summaries]
    own = ["folder", "steps", "losses", "held_out", "tokens_per_second", "peak_memory"]
    return pd.DataFrame(list(rows.values()), columns=[*TRAINING, *own])


def training_losses(runs: pd.DataFrame, points: int = POINTS) -> pd.DataFrame:
    """Return learning curves of at most `points` points; each point is the mean of a stretch of steps.

    Columns: task, method, train_trajectories, seed, run, held_out (whether the loss is of held-out episodes), step,
    loss and not_finite (number of training steps without a finite loss).
    """
    parts = []
    for index, run in runs.iterrows():
        not_finite = int(np.isnan(run["losses"]).sum())
        for held_out, losses in enumerate([run["losses"], run["held_out"]]):
            finite = np.flatnonzero(np.isfinite(losses))
            stretches = [part for part in np.array_split(finite, min(points, len(finite)) or 1) if len(part)]
            means = [(run["steps"][part].mean(), losses[part].mean()) for part in stretches]
            part = pd.DataFrame(means, columns=["step", "loss"], dtype=np.float64)
            parts.append(part.assign(**run[TRAINING], run=index, held_out=bool(held_out), not_finite=not_finite))
    columns = [*TRAINING, "run", "held_out", "step", "loss", "not_finite"]
    found = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)
    return found.astype({"held_out": bool})


def run_folder(row: pd.Series, next_to_results: Sequence[Path]) -> Path | None:
    """Return the folder of a run, next to its results or at the recorded path, if its configuration fits; else None."""
    recorded = Path(str(row["checkpoint"]))
    for folder in [*(place for place in next_to_results if place.name == recorded.name), recorded]:
        try:
            if (folder / "metrics.jsonl").is_file() and _fits(read_yaml(folder / "config.yaml"), row):
                return folder
        except (UserError, OSError):
            continue
    return None


def _fits(config: dict[str, Any], row: pd.Series) -> bool:
    """Whether a configuration may belong to a run. If this version rejects it, its settings are not compared."""
    settings = json.loads(row["settings"])
    with suppress(pydantic.ValidationError):
        if settings != recipe(TrainConfig.from_saved(config)):
            return False
    context = config.get("context") or {}
    length = context.get("trajectories")
    train_task = row["train_task"] if isinstance(row["train_task"], str) else row["task"]
    if train_task not in (config.get("task"), *(context.get("other_tasks") or ())):
        return False
    return config.get("seed", 0) == row["seed"] and length == (row["train_trajectories"] or length)


def _entries(path: Path) -> Iterator[dict[str, float]]:
    """Yield the entries of metrics.jsonl. A damaged line is left out."""
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(without_crc(line))
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int | float):
            yield {name: value for name, value in entry.items() if isinstance(value, int | float)}
