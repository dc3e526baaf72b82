"""Videos of an evaluation: which episodes are shown, their states kept while it runs, and mp4 files made of them.

Nothing here imports MuJoCo or OpenGL. What does draws in a process of its own, see `drawing`.
"""

import io
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ringrl.envs import domain_of
from ringrl.errors import UserError

_OPENGL = "egl" if sys.platform == "linux" else "glfw"  # where MUJOCO_GL does not say: on Linux it needs no display


class VideoError(UserError):
    """No video could be made. What was measured is whole without it."""


class Recording(NamedTuple):
    """An episode to be shown.

    Attributes:
        label: what it is, "best"; drawn into every picture.
        physics: the states 0 to T, (T + 1, P); those from the first on that is not finite are left out.
        rewards: those of the T steps.
    """

    label: str
    physics: Float[np.ndarray, "steps+1 physics"]
    rewards: Float[np.ndarray, " steps"]


def choose(returns: Float[np.ndarray, "environments episodes"]) -> dict[str, tuple[int, int]]:
    """Which episodes to show: label -> (environment, episode).

    The first is the first of environment 0. The median has the middle return, the lower of two; the best the highest.
    Of equal returns the earlier episode counts as the lower for the median and wins the best; a return that is not
    finite is neither.
    """
    environments = len(returns)
    in_time = returns.T.ravel()  # episode after episode
    ranked = _ranked(in_time)
    chosen = {"first": 0}
    if len(ranked):
        best = ranked[in_time[ranked] == in_time[ranked[-1]]][0]
        chosen |= {"median": int(ranked[(len(ranked) - 1) // 2]), "best": int(best)}
    return {label: (index % environments, index // environments) for label, index in chosen.items()}


class Recorder:
    """Keeps the states of the episodes that `choose` may still choose, while an evaluation runs.

    An episode is dropped as soon as the episodes to come cannot make it the median any more, and it is neither the
    first nor the best so far. Memory: 4 (T + 1) (P + 1) bytes an episode, for at most half of all, plus two: 24 MB for
    64 environments with 10 episodes of the walker each. At the end three are left.

    Args:
        episodes: per environment.
    """

    def __init__(self, episodes: int) -> None:
        self._episodes = episodes
        self._returns: list[np.ndarray] = []
        self._kept: dict[tuple[int, int], Recording] = {}

    def add(
        self,
        physics: Float[np.ndarray, "steps+1 environments physics"],
        rewards: Float[np.ndarray, "steps environments"],
    ) -> None:
        """The next episode has ended in all environments; it went through these states."""
        episode = len(self._returns)
        self._returns.append(rewards.sum(axis=0))
        kept = self._may_be_chosen()
        self._kept = {place: recording for place, recording in self._kept.items() if place in kept}
        for environment, last in kept:
            if last == episode:
                states, earned = (x[:, environment].astype(np.float32) for x in (physics, rewards))
                self._kept[environment, episode] = Recording("", states, earned)

    def recordings(self) -> dict[str, Recording]:
        """The first, the median and the best of the episodes that have ended, by these labels; none before any has."""
        if not self._returns:
            return {}
        chosen = choose(np.stack(self._returns, axis=1))
        return {label: self._kept[place]._replace(label=label) for label, place in chosen.items()}

    def _may_be_chosen(self) -> set[tuple[int, int]]:
        """(environment, episode) of those that have ended and that may be the first, the median or the best of all."""
        returns = np.stack(self._returns, axis=1)
        environments, ended = returns.shape
        ranked = _ranked(returns.T.ravel())
        to_come = (self._episodes - ended) * environments
        # Each episode to come raises the middle rank by a half, and a rank by one or not at all.
        highest = (len(ranked) + to_come - 1) // 2
        middle = ranked[max(0, highest - to_come) : highest + 1]
        places = {(int(index) % environments, int(index) // environments) for index in middle}
        return places | set(choose(returns).values())


def write_videos(task: str, recordings: Mapping[Path, Recording], *, width: int = 480, height: int = 360) -> list[Path]:
    """Write each recording as an mp4 file to its path, at the speed of the simulated time; returns the paths.

    Each file appears whole or not at all, in place of an older one. It is drawn by another process, through EGL on
    Linux, or as the environment variable MUJOCO_GL says. Without recordings, this only finds out whether it could.

    Args:
        task: whose goal is shown.
        recordings: of one task, by the path of the file.
        width, height: of the picture in pixels; even.

    Raises:
        VideoError: there is no OpenGL or no place for the file; the message says which and what to do.
        UserError: unknown task.
    """
    domain_of(task)
    paths = list(recordings)
    command = [sys.executable, "-P", "-m", "ringrl.evaluation.drawing", task, str(width), str(height)]
    command += [str(path.absolute()) for path in paths]
    modules = os.pathsep.join(filter(None, sys.path))  # the same as here, and none from the working folder
    environment = {"MUJOCO_GL": _OPENGL} | os.environ | {"PYTHONPATH": modules}
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VideoError(f"no video: {error.filename}: {error.strerror}; choose another folder") from None
    packed = _packed(list(recordings.values()))
    try:
        result = subprocess.run(command, input=packed, capture_output=True, env=environment, check=False)
    finally:
        for path in paths:
            part_of(path).unlink(missing_ok=True)
    if result.returncode:
        raise VideoError(f"no video: {_reason(result)}")
    return paths


def part_of(path: Path) -> Path:
    """The hidden name under which the video at `path` is written; the encoder goes by its ending."""
    return path.with_name(f".{path.name}.partial.mp4")


def _ranked(returns: Float[np.ndarray, " episodes"]) -> np.ndarray:
    """The episodes with a finite return, the lowest first; of equal ones the earlier first."""
    ranked = np.argsort(returns, kind="stable")
    return ranked[np.isfinite(returns[ranked])]


def _packed(recordings: list[Recording]) -> bytes:
    """Recordings as an .npz file."""
    arrays: dict[str, Any] = {}
    for index, (label, physics, rewards) in enumerate(recordings):
        broken = ~np.isfinite(physics).all(axis=1)
        states = int(broken.argmax()) if broken.any() else len(physics)
        cut = Recording(label, physics[:states], rewards[: max(0, states - 1)])
        arrays |= {f"{index} {field}": np.asarray(value) for field, value in cut._asdict().items()}
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _reason(result: "subprocess.CompletedProcess[bytes]") -> str:
    """Why nothing was drawn, in one line: what the process printed, or how it ended."""
    said, complained = (text.decode(errors="replace").strip().splitlines() for text in (result.stdout, result.stderr))
    if said:
        return said[-1]
    ended = f"was killed by signal {-result.returncode}" if result.returncode < 0 else "failed"
    return f"the drawing process {ended} ({complained[-1] if complained else 'without a word'})"
