"""Results made by hand, with known numbers."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from ringrl.evaluation.records import EvaluationRecord, append_records, data_records
from ringrl.training.budget import Budget

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
    """Lengths that differ by `step`, seeds that differ by 1, a control without memory, references, a dataset."""
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


def budget(length: int, seconds: float | None = 60.0) -> Budget:
    """Of runs with equal tokens, whose longer contexts take more operations."""
    return Budget(
        steps=100, batch_size=4, timesteps=400_000, tokens=1_600_000, flops=1e12 * length, seconds=seconds, devices=1
    )


def run_folder(run: Path, task: str, length: int, seed: int, layers: int) -> None:
    """As training leaves it, killed while it wrote a line."""
    run.mkdir(parents=True)
    settings = {"run": str(run), "task": task, "seed": seed, "context": {"trajectories": length}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {"model": {"layers": layers}}))
    entries = [{"step": step, "loss": 1 / step, "tokens_per_second": 1000.0 / length} for step in range(1, 101)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"step": 101, "lo')


def study(root: Path, seeds: int = 2, tasks=(TASK,), layers: int = 1) -> Path:
    """Run folders of two context lengths, with budgets and a control."""
    for task in tasks:
        for seed, length in ((seed, length) for seed in range(seeds) for length in (1, 2)):
            run = root / f"{task}_at_{length}_seed{seed}"
            run_folder(run, task, length, seed, layers)
            fields = {
                "task": task, "budget": budget(length), "checkpoint": str(run),
                "data_fingerprint": (task.encode().hex() * 9)[:64],
                "evaluation": f"{tasks.index(task)}{seed}{length}".ljust(64, "e"),
            }  # fmt: skip
            records = rollouts(length, seed, 400.0 + 100.0 * length + seed, gain=10.0, **fields)
            if length > 1:
                records += rollouts(length, seed, 390.0 + seed, context=False, **fields)
            append_records(run / "evaluation.jsonl", records)
    return root


@pytest.fixture(scope="session")
def make_study() -> Callable[..., Path]:
    return study


@pytest.fixture(scope="session")
def make_rollouts() -> Callable[..., list[EvaluationRecord]]:
    return rollouts


@pytest.fixture(scope="session")
def make_ablation() -> Callable[..., list[EvaluationRecord]]:
    return ablation


@pytest.fixture
def write_results(tmp_path: Path) -> Callable[[list[EvaluationRecord]], Path]:
    """Writes records to a results file and returns its path."""

    def write(records: list[EvaluationRecord], name: str = "results.jsonl") -> Path:
        append_records(tmp_path / name, records)
        return tmp_path / name

    return write
