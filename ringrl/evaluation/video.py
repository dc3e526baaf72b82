"""Videos of an evaluation: the choice of the episodes to show, and mp4 files.

This module imports neither MuJoCo nor OpenGL. `ringrl.envs.render` renders in another process, because a crash of a
graphics driver must not end the evaluation.
"""

import io
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ringrl.envs import domain_of
from ringrl.errors import UserError


class VideoError(UserError):
    """A video could not be written. The results of the evaluation are complete without it."""


class EpisodeStates(NamedTuple):
    """An episode to be rendered. The video ends before the first state that is not finite."""

    label: str  # text in every frame, "best"
    physics: Float[np.ndarray, "steps+1 physics"]
    rewards: Float[np.ndarray, " steps"]


def choose(returns: Float[np.ndarray, "environments episodes"]) -> dict[str, tuple[int, int]]:
    """Choose the episodes to show: label -> (environment, episode).

    "first" is the first episode of environment 0, "median" has the median return (the lower of two), "best" the best.
    Of equal returns, the earlier episode ranks lower for the median and is the best. Returns that are not finite are
    ignored.
    """
    environments = len(returns)
    in_time = returns.T.ravel()  # episode after episode
    ranked = np.argsort(in_time, kind="stable")
    ranked = ranked[np.isfinite(in_time[ranked])]
    chosen = {"first": 0}
    if len(ranked):
        best = ranked[in_time[ranked] == in_time[ranked[-1]]][0]
        chosen |= {"median": int(ranked[(len(ranked) - 1) // 2]), "best": int(best)}
    return {label: (index % environments, index // environments) for label, index in chosen.items()}


def write_videos(
    task: str, episodes: Mapping[Path, EpisodeStates], *, width: int = 480, height: int = 360
) -> list[Path]:
    """Write each episode as an mp4 file at the speed of the simulated time, and return the paths.

    A file replaces an older one only when all files are whole. MUJOCO_GL selects the OpenGL library, on Linux EGL by
    default. Without episodes, this only checks that rendering works. Frames are `width` x `height` pixels, both even.

    Raises:
        VideoError: OpenGL is missing, or a file cannot be written.
        UserError: the task is unknown.
    """
    domain_of(task)
    # The hidden names end in .mp4, which selects the encoder.
    partial = {path.with_name(f".{path.name}.partial.mp4"): path for path in episodes}
    command = [sys.executable, "-P", "-m", "ringrl.envs.render", task, str(width), str(height)]
    command += [str(path.absolute()) for path in partial]
    modules = os.pathsep.join(filter(None, sys.path))  # same modules as in this process, not from the working folder
    environment = os.environ | {"PYTHONPATH": modules}
    try:
        for path in episodes:
            path.parent.mkdir(parents=True, exist_ok=True)
        packed = _packed(list(episodes.values()))
        result = subprocess.run(command, input=packed, capture_output=True, env=environment, check=False)
        if result.returncode:
            raise VideoError(f"no video: {_reason(result)}")
        for hidden, path in partial.items():
            hidden.replace(path)
    except OSError as error:
        name = error.filename2 or error.filename
        raise VideoError(f"no video: {name}: {error.strerror}; choose another folder") from None
    finally:
        for hidden in partial:
            with suppress(OSError):
                hidden.unlink()
    return list(episodes)


def _packed(episodes: list[EpisodeStates]) -> bytes:
    """Pack episodes, up to their first state that is not finite, as an .npz file."""
    arrays: dict[str, Any] = {}
    for index, (label, physics, rewards) in enumerate(episodes):
        broken = ~np.isfinite(physics).all(axis=1)
        states = int(broken.argmax()) if broken.any() else len(physics)
        cut = {"label": label, "physics": physics[:states], "rewards": rewards[: max(0, states - 1)]}
        arrays |= {f"{index} {name}": np.asarray(value) for name, value in cut.items()}
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _reason(result: "subprocess.CompletedProcess[bytes]") -> str:
    """Return in one line why rendering failed: the output of the process, or how it ended."""
    output, errors = (text.decode(errors="replace").strip().splitlines() for text in (result.stdout, result.stderr))
    if output:
        return output[-1]
    ended = f"was killed by signal {-result.returncode}" if result.returncode < 0 else "failed"
    return f"the rendering process {ended} ({errors[-1] if errors else 'without output'})"
