"""The settings of a run that decide what is learned, in short: by them runs of one method are told apart."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ringrl.config import TrainConfig
from ringrl.data.digest import json_digest
from ringrl.training.run_folder import flat

# Names, places and devices, what results tell by themselves, and what computes the same in another way.
_APART = (
    "data", "task", "run", "seed", "checkpoint_every", "keep_checkpoints", "log_every", "log",
    "model.token_set", "model.attention", "model.block_tokens", "model.remat",
    "optimiser.accumulation",
)  # fmt: skip
OF_THE_LENGTH = ("optimiser.steps", "optimiser.batch_size")  # what a budget makes of the length of the context


def recipe(config: TrainConfig) -> dict[str, str]:
    """Setting ("context.order") -> value, of those that are not at their defaults and that the kind of model heeds."""
    usual, family = default_recipe(), config.model.family
    used = {name: value for name, value in _settings(config).items() if value != usual[name] and family.uses(name)}
    if family.has_context:
        used.pop("context.trajectories", None)  # results state it in a field of its own
    return used


def configuration_hash(config: TrainConfig) -> str:
    """SHA-256 of all settings."""
    return json_digest(config.model_dump(mode="json"))


def default_recipe() -> Mapping[str, str]:
    """The defaults of all such settings."""
    return _settings(TrainConfig(data=Path(), task="", run=Path()))


def _settings(config: TrainConfig) -> dict[str, str]:
    values: dict[str, Any] = flat(config.model_dump(mode="json"))
    return {name: _shown(value) for name, value in values.items() if not _is_apart(name)}


def _is_apart(name: str) -> bool:
    return name in _APART or name.startswith("mesh.")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
