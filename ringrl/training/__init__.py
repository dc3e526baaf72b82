"""Training: mesh, optimiser, step, loop and checkpoints."""

from ringrl.training.checkpoints import read_info
from ringrl.training.loop import train

__all__ = ["read_info", "train"]
