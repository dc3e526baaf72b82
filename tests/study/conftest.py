"""Made-up results with known numbers, and plans of tiny cells."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from ringrl.evaluation.records import EvaluationRecord, append_records, data_records

TASK = "cartpole_swingup"
FINGERPRINT = "3f9a7c0be51d" * 5


def rollouts(length: int, seed: int, level: float, *, gain: float = 0.0, **changes) -> list[EvaluationRecord]:
    """Two streams of one run: the episodes return level, level + gain, level + 2 gain, ..., in the second 2 more."""
    values = {
        "task": TASK, "method": "at", "token_set": "ring4", "train_trajectories": length, "test_trajectories": length,
        "seed": seed, "target_return": 869.0, "target_policy": "data_best", "steps_trained": 2000,
        "data_fingerprint": FINGERPRINT, "versions": {"jax": "0.10.2"}, "command": "ringrl ablate plan.yaml",
    }  # fmt: skip
    return [
        EvaluationRecord(
            **{**values, **changes},
            environment_seed=stream,
            returns=tuple(level + 2.0 * stream + gain * episode for episode in range(length)),
        )
        for stream in range(2)
    ]


def ablation(task: str = TASK, seeds: int = 5, step: float = 100.0, lengths=(1, 2, 4)) -> list[EvaluationRecord]:
    """Context lengths in turn, `step` apart; seeds 1 apart; a control without memory; references; a dataset."""
    records = []
    for seed in range(seeds):
        for index, length in enumerate(lengths):
            level = 400.0 + step * index + seed
            records += rollouts(length, seed, level, gain=10.0, task=task)
            if length > 1:
                records += rollouts(length, seed, 390.0 + seed, context=False, task=task)
        for method, level in (("random", 27.0), ("bc", 330.0)):
            records += rollouts(
                1, seed, level + seed, method=method, task=task, token_set=None, train_trajectories=None,
                target_return=None, target_policy=None,
            )  # fmt: skip
    fingerprint = FINGERPRINT if task == TASK else f"{task}{FINGERPRINT}"
    records = [record.model_copy(update={"data_fingerprint": fingerprint}) for record in records]
    return records + data_records(task, np.linspace(0, 800, 101), data_fingerprint=fingerprint, versions={})


@pytest.fixture
def make_rollouts() -> Callable[..., list[EvaluationRecord]]:
    return rollouts


@pytest.fixture
def make_ablation() -> Callable[..., list[EvaluationRecord]]:
    return ablation


@pytest.fixture
def write_results(tmp_path: Path) -> Callable[[list[EvaluationRecord]], Path]:
    """Writes records to a results file and returns its path."""

    def write(records: list[EvaluationRecord], name: str = "results.jsonl") -> Path:
        append_records(tmp_path / name, records)
        return tmp_path / name

    return write


@pytest.fixture
def write_plan(tmp_path: Path) -> Callable[..., Path]:
    """Writes a plan for a store and returns its path; what is None is left out."""

    def write(store: Path, **changes: object) -> Path:
        plan = {
            "data": str(store), "task": "jaco_reach_top_left", "output": str(tmp_path / "runs"), "trajectories": [1, 2],
            "seeds": [0], "trajectories_per_batch": 2, "environments": 2,
            "settings": {"model": {"layers": 1, "width": 16, "token_set": "fused1"}, "optimiser": {"steps": 3}},
        } | changes  # fmt: skip
        path = tmp_path / "plan.yaml"
        kept = {name: value for name, value in plan.items() if value is not None}
        path.write_text(yaml.safe_dump(kept, sort_keys=False))
        return path

    return write
