"""RingRL: long-context sequence modelling for offline reinforcement learning in JAX."""

import importlib
from typing import Any

__version__ = "0.1.0"

_PACKAGES = (
    "attention", "collect", "config", "config_files", "configs", "context", "data", "envs", "errors", "evaluation",
    "methods", "model", "planning", "report", "study", "training",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a package when it is first used, so that `import ringrl` is quick and `ringrl.envs` works."""
    if name == "train":
        return importlib.import_module("ringrl.training").train
    if name in _PACKAGES:
        return importlib.import_module(f"ringrl.{name}")
    raise AttributeError(f"module 'ringrl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["__version__", "train", *_PACKAGES]
