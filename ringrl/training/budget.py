"""Training cost of a checkpoint (steps, tokens, FLOPs, seconds), in the same units for every method."""

import json
from pathlib import Path
from typing import ClassVar, NamedTuple

from pydantic import Field

from ringrl.config import ModelConfig, Section, TrainConfig
from ringrl.data import EpisodeStore
from ringrl.envs import domain_of, is_foreign
from ringrl.model.tokens import TOKEN_SETS
from ringrl.training.checkpoints import EarlyStopping, RunInfo


class Budget(Section):
    """Training cost of a checkpoint, counted from the first step of its run."""

    largest: ClassVar[int] = 2**63 - 1

    steps: int = Field(ge=0)
    """Optimiser steps, with those after the best checkpoint if that one was chosen."""
    converged: bool = False
    """Whether training ended because the held-out loss no longer fell (see `TrainConfig.stop_after`)."""
    batch_size: int = Field(ge=1)
    """Contexts per step (transitions per step for td3_bc)."""
    timesteps: int = Field(ge=0)
    """Timesteps of data in all batches, with repetitions and the padding of shorter episodes."""
    transitions: int | None = Field(None, ge=1)
    """Distinct transitions in the data; None if unknown."""
    tokens: int = Field(ge=0)
    """Tokens of these timesteps; one per timestep for a model that sees one observation at a time."""
    flops: float | None = Field(None, ge=0)
    """Operations of the transformer blocks (see `step_flops`); None for other models."""
    seconds: float | None = Field(None, ge=0)
    """Wall-clock time with compilation and waiting, without work that a kill undid; None if the log is incomplete."""
    devices: int = Field(1, ge=1)
    """Devices used (by the last start, if the run was resumed on others)."""


class StepCost(NamedTuple):
    """Cost of one optimiser step."""

    timesteps: int  # of data, with padding
    tokens: int
    flops: float | None  # see `Budget`


def longest_episode(config: TrainConfig) -> int:
    """Return the steps of the longest episode of a run's data. ExoRL's episodes are as long as their domain's."""
    if is_foreign(config.task):
        return int(EpisodeStore(config.data).lengths.max())
    return domain_of(config.task).episode_length


def step_cost(config: TrainConfig, episode_length: int) -> StepCost:
    """Return the cost of one optimiser step on data whose episodes have this many steps."""
    batch_size, family = config.optimiser.batch_size, config.model.family
    per_row = 1 if family.source == "transitions" else config.context.steps(episode_length)
    tokens_per_row = per_row * (TOKEN_SETS[config.model.token_set].size if family.has_context else 1)
    flops = step_flops(config.model, tokens_per_row, batch_size, config.context.trajectories)
    return StepCost(batch_size * per_row, batch_size * tokens_per_row, flops)


def forward_flops(config: ModelConfig, tokens: int, trajectories: int | None = None) -> float:
    """Return the floating point operations of the transformer blocks over one context of S = `tokens`.

    Keys that an episode window hides are counted unless the number of (equally long) trajectories is given.

    Per layer of width h with as many key heads as query heads and a feed-forward layer four times as wide, this is
    24 S h^2 for the matrices (2310.01889, appendix D) and 4 h for each visible pair of tokens. The paper counts S^2
    pairs, but a causal mask hides half of them. Token embeddings, action head, softmax and norms are not counted, nor
    is the recomputation by remat.
    """
    width = config.width
    key_value = width * config.kv_heads // config.heads
    matrices = 2 * width * (2 * width + 2 * key_value + 2 * config.feed_forward * width)
    pairs = config.layers * tokens**2 / 2
    if trajectories is not None:
        own, size = tokens / trajectories, TOKEN_SETS[config.token_set].size
        seen = [own if steps is None else min(own, steps * size) for steps in config.windows]
        pairs = sum(trajectories * (window * own - window**2 / 2) + (tokens**2 - tokens * own) / 2 for window in seen)
    return float(config.layers * tokens * matrices + 4 * width * pairs)


def step_flops(config: ModelConfig, tokens: int, contexts: int, trajectories: int | None = None) -> float | None:
    """Return the operations of one optimiser step: forward and twice as much backward. None without a context."""
    return 3 * contexts * forward_flops(config, tokens, trajectories) if config.family.has_context else None


def budget(info: RunInfo, step: int, run: Path) -> Budget:
    """Return the budget of a run's checkpoint at `step`. The seconds are those of metrics.jsonl in the run's folder."""
    config = info.config
    cost = step_cost(config, info.normalisation.episode_length)
    return Budget(
        steps=step,
        converged=EarlyStopping.saved(run, step).has_converged(config),
        batch_size=config.optimiser.batch_size,
        timesteps=step * cost.timesteps,
        transitions=info.transitions,
        tokens=step * cost.tokens,
        flops=None if cost.flops is None else step * cost.flops,
        seconds=_seconds(run / "metrics.jsonl", step),
        devices=config.mesh.devices,
    )


def _seconds(log: Path, step: int) -> float | None:
    """Return the sum over the steps up to `step`; None if one of them is missing."""
    try:
        entries = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
        seconds = [1 / entry["steps_per_second"] for entry in entries if entry["step"] <= step]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sum(seconds) if len(seconds) == step else None
