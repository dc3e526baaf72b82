"""Draws the pictures of the tasks' pages: python docs/draw_tasks.py [TASK ...] (20 seconds per task; needs OpenGL)

Each picture is the state in the middle of the best 20 steps of some scripted episodes.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from ringrl.collect import collect
from ringrl.envs import TASKS, domain_of
from ringrl.envs.render import EpisodeRenderer

IMAGES = Path(__file__).parent / "images" / "tasks"
EPISODES, STEPS = 50, 20


def best_state(task: str) -> np.ndarray:
    """Return a physics state in which the task is being done."""
    column = domain_of(task).recorded_tasks(task).index(task)
    best, state = -1.0, np.empty(0)
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(collect(task, Path(folder) / "data", episodes=EPISODES, seed=0).glob("buffer/*.npz")):
            with np.load(path) as episode:
                rewards = episode["reward"].reshape(len(episode["reward"]), -1)[:, column]
                means = np.convolve(rewards, np.full(STEPS, 1 / STEPS), "valid")
                if means.max() > best:
                    best, state = means.max(), episode["physics"][means.argmax() + STEPS // 2]
    return state


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name in sys.argv[1:] or TASKS:
        renderer = EpisodeRenderer(name, 800, 600)
        picture = Image.fromarray(renderer.scene(best_state(name)))
        picture.resize((400, 300), Image.Resampling.LANCZOS).save(IMAGES / f"{name}.jpg", quality=75, optimize=True)
        renderer.close()
