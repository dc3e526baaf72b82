"""Videos of an evaluation: the choice of the episodes to show, and their files (see `ringrl.envs.render`)."""

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from ringrl.envs import domain_of, is_foreign
from ringrl.errors import UserError, require


class VideoError(UserError):
    """A video could not be written. The results of the evaluation are complete without it."""


class VideoOptions(NamedTuple):
    """The videos of an evaluation."""

    side_by_side: bool = False  # instead of single episodes, one context next to its control
    format: Literal["mp4", "gif", "apng"] = "mp4"
    speed: int = 1  # multiple of the simulated time

    @property
    def files(self) -> list[str]:
        """Return the names of the files."""
        labels = ["side_by_side"] if self.side_by_side else ["first", "median", "best"]
        return [f"{label}.{self.format}" for label in labels]

    @property
    def size(self) -> dict[str, int]:
        """Return width and height of an episode in pixels. Images are smaller, because they compress less."""
        return {"width": 480, "height": 360} if self.format == "mp4" else {"width": 320, "height": 240}


class EpisodeStates(NamedTuple):
    """An episode to be rendered. The video ends before the first state that is not finite."""

    label: str  # text in every frame, "best"
    physics: Float[np.ndarray, "steps+1 physics"]
    rewards: Float[np.ndarray, " steps"]


Clips = Sequence[Sequence[EpisodeStates]]
"""A video: one clip after another, with the episodes of a clip next to each other."""


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


def check_video() -> None:
    """Raise UserError if a package is missing that writes videos."""
    require("video", "video", "imageio_ffmpeg")


def write_videos(
    task: str,
    videos: Mapping[Path, Clips],
    *,
    width: int = 480,
    height: int = 360,
    speed: int = 1,
) -> list[Path]:
    """Write videos at a multiple of the speed of the simulated time, and return the paths.

    An episode has `width` x `height` pixels, both even. The name of a file ends in .mp4, .gif or .apng. A file replaces
    an older one only when all files are whole. MUJOCO_GL selects the OpenGL library, on Linux EGL by default. Without
    videos, this only checks that rendering works.

    VideoError if OpenGL is missing or a file cannot be written. UserError for an unknown or another package's task.
    """
    if is_foreign(task):
        raise UserError(f"{task}: is drawn by its own package; leave videos out")
    domain_of(task)
    check_video()
    if bad := [path for path in videos if path.suffix not in (".mp4", ".gif", ".apng")]:
        raise UserError(f"{bad[0]}: unknown video format; give a name that ends in .mp4, .gif or .apng")
    # The end of the hidden names selects the encoder.
    partial = {path.with_name(f".{path.name}.partial{path.suffix}"): path for path in videos}
    command = [sys.executable, "-P", "-m", "ringrl.envs.render", task, str(width), str(height), str(speed)]
    command += [str(path.absolute()) for path in partial]
    modules = os.pathsep.join(filter(None, sys.path))  # same modules as in this process, not from the working folder
    environment = os.environ | {"PYTHONPATH": modules}
    try:
        for path in videos:
            path.parent.mkdir(parents=True, exist_ok=True)
        packed = pickle.dumps([[[_finite(one) for one in clip] for clip in clips] for clips in videos.values()])
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
    return list(videos)


def _finite(episode: EpisodeStates) -> tuple[str, np.ndarray, np.ndarray]:
    """Return an episode up to its first state that is not finite."""
    broken = ~np.isfinite(episode.physics).all(axis=1)
    states = int(broken.argmax()) if broken.any() else len(episode.physics)
    return episode.label, episode.physics[:states], episode.rewards[: max(0, states - 1)]


def _reason(result: "subprocess.CompletedProcess[bytes]") -> str:
    """Return in one line why rendering failed: the output of the process, or how it ended."""
    output, errors = (text.decode(errors="replace").strip().splitlines() for text in (result.stdout, result.stderr))
    if output:
        return output[-1]
    ended = f"was killed by signal {-result.returncode}" if result.returncode < 0 else "failed"
    return f"the rendering process {ended} ({errors[-1] if errors else 'without output'})"
