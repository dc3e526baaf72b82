"""What training a policy took: told alike for all methods, so that what is compared can be seen to be comparable."""

import json
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from ringrl.config import Section, TrainConfig
from ringrl.model.tokens import TOKEN_SETS
from ringrl.training.checkpoints import RunInfo
from ringrl.training.throughput import step_flops


class Budget(Section):
    """Of a checkpoint, from the run's first step on."""

    steps: int = Field(ge=0)
    """Optimiser steps."""
    batch_size: int = Field(ge=1)
    """Contexts per step; transitions per step for td3_bc."""
    timesteps: int = Field(ge=0)
    """Timesteps of data that went into these steps, counted as often as they came (with the padding of shorter
    episodes)."""
    transitions: int | None = Field(None, ge=1)
    """Different ones that there were to draw; None: a run from before this was told."""
    tokens: int = Field(ge=0)
    """What the model saw of these timesteps: one each, where it sees one at a time."""
    flops: float | None = Field(None, ge=0)
    """Operations of the transformer's blocks (see `step_flops`); None for other models, whose are not counted."""
    seconds: float | None = Field(None, ge=0)
    """By the clock, with compilation and waiting, without what a kill undid; None where the log does not say."""
    devices: int = Field(1, ge=1)
    """That these seconds were spent on (of the last start, where a run was resumed on others)."""


class StepCost(NamedTuple):
    """Of one optimiser step."""

    timesteps: int  # of data, with padding
    tokens: int  # that the model sees of them
    flops: float | None  # see `Budget`


def step_cost(config: TrainConfig, episode_length: int) -> StepCost:
    """What one optimiser step takes, where the data's episodes have so many steps."""
    batch_size, family = config.optimiser.batch_size, config.model.family
    per_row = 1 if family.source == "transitions" else config.context.trajectories * episode_length
    tokens_per_row = per_row * (TOKEN_SETS[config.model.token_set].size if family.has_context else 1)
    flops = step_flops(config.model, tokens_per_row, batch_size)
    return StepCost(batch_size * per_row, batch_size * tokens_per_row, flops)


def budget(info: RunInfo, step: int, run: Path | None = None) -> Budget:
    """The budget of a run's checkpoint.

    Args:
        info: what the checkpoint says beside its arrays.
        step: of the checkpoint.
        run: folder whose metrics.jsonl tells the seconds; without it they are left out.
    """
    config = info.config
    cost = step_cost(config, info.normalisation.episode_length)
    return Budget(
        steps=step,
        batch_size=config.optimiser.batch_size,
        timesteps=step * cost.timesteps,
        transitions=info.transitions,
        tokens=step * cost.tokens,
        flops=None if cost.flops is None else step * cost.flops,
        seconds=None if run is None else _seconds(run / "metrics.jsonl", step),
        devices=config.mesh.devices,
    )


def _seconds(log: Path, step: int) -> float | None:
    """Sum over the steps up to `step`; None where one of them is missing, or was logged before this was told."""
    try:
        entries = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    except (OSError, ValueError):
        return None
    seconds = [1 / x["steps_per_second"] for x in entries if "steps_per_second" in x and x["step"] <= step]
    return sum(seconds) if len(seconds) == step else None
