"""Training: mesh, optimiser, step, loop and checkpoints."""

from ringrl.training.checkpoints import TrainedPolicy, load_policy, read_info
from ringrl.training.loop import train

__all__ = ["TrainedPolicy", "load_policy", "read_info", "train"]
