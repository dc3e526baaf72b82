"""Rendering of states as images, and of episodes as videos in another process: `python -m ringrl.envs.render`.

A crash of a graphics driver must not affect the process that evaluates. That process writes pickled episodes to the
standard input: for each video a list of clips, each a list of (label, physics, rewards). If rendering fails, one line
on standard output gives the reason.
"""

import atexit
import contextlib
import importlib
import os
import pickle
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from traceback import format_exception_only
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from ringrl.envs.domain import Camera
from ringrl.envs.registry import domain_of, load_simulation
from ringrl.envs.simulation import mujoco_gl
from ringrl.errors import UserError

WIDTH, HEIGHT = 480, 360  # pixels, by default
_TORSO = 1  # the first body after the world
_LEAST_RATES = {".mp4": 25, ".gif": 10, ".apng": 10}  # frames per second; images do not compress motion
_PILLOW = {".gif": "GIF", ".apng": "PNG"}  # names of formats
_COLOURS = 128  # of a GIF
_SHADOWS = 1024  # pixels; with the models' 2048 a frame takes longer and looks the same
_HAZE = (0.2, 0.29, 0.4, 1.0)  # RGBA of the sky at the horizon
_BAND, _INK, _FAINT = (12, 18, 28, 190), (255, 255, 255), (158, 176, 196)  # RGB(A)

_Frame = UInt8[np.ndarray, "height width 3"]


class EpisodeRenderer:
    """A renderer of the states of one task, with its own simulation. UserError if OpenGL cannot be used."""

    def __init__(self, task: str, width: int = WIDTH, height: int = HEIGHT) -> None:
        self._task, self._domain = task, domain_of(task)
        self._camera = self._domain.camera or Camera(center=(0, 0, 0), distance=3)
        self._simulation = load_simulation(task)
        _load_opengl()
        import mujoco

        model = self._simulation.model
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height
        model.vis.quality.shadowsize, model.vis.rgba.haze = _SHADOWS, _HAZE
        if self._camera.follows:  # size 0 renders an infinite floor, as it is simulated
            model.geom_size[model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE, :2] = 0
        self._renderer = mujoco.Renderer(model, height, width)
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False  # slow, and distracts
        self._line = max(14, height // 15)  # pixels of a line of text

    def close(self) -> None:
        """Release OpenGL."""
        self._renderer.close()

    def frames(
        self,
        stride: int,
        label: str,
        physics: Float[np.ndarray, "time_plus_1 physics"],
        rewards: Float[np.ndarray, " time"],
    ) -> Iterator[_Frame]:
        """Yield the frames of an episode: every state number `stride`, and the last one."""
        returns = np.concatenate(([0.0], np.cumsum(rewards, dtype=np.float64)))
        for step in [*range(0, len(rewards), stride), len(rewards)]:
            yield self._caption(self.scene(physics[step]), label, step, returns[step])

    def scene(self, physics: Float[np.ndarray, " physics"]) -> _Frame:
        """Return the frame of a state, without a caption."""
        import mujoco

        simulation, view = self._simulation, self._camera
        simulation.set_physics_state(np.asarray(physics, np.float64))
        mujoco.mj_forward(simulation.model, simulation.data)
        camera = mujoco.MjvCamera()
        camera.lookat[:] = view.center
        camera.lookat[: view.follows] = simulation.data.subtree_com[_TORSO, : view.follows]
        camera.distance, camera.azimuth, camera.elevation = view.distance, view.azimuth, view.elevation
        self._renderer.update_scene(simulation.data, camera)
        return self._renderer.render()

    def _caption(self, frame: _Frame, label: str, step: int, earned: float) -> _Frame:
        """Draw task and label at the top, step and return so far at the bottom."""
        from PIL import Image, ImageDraw

        image = Image.fromarray(frame)
        draw, line = ImageDraw.Draw(image, "RGBA"), self._line
        width, height = image.size
        above = margin = line // 2
        below = height - margin
        for top in (0, height - line):
            draw.rectangle((0, top, width, top + line), fill=_BAND)
        for x, y, anchor, text, ink in (
            (margin, above, "lm", self._task, _INK),
            (width - margin, above, "rm", label, _FAINT),
            (margin, below, "lm", "step", _FAINT),
            (margin + 4.5 * line, below, "rm", f"{step}", _INK),
            (width - margin - 5.5 * line, below, "lm", "return", _FAINT),
            (width - margin, below, "rm", f"{earned:.1f}", _INK),
        ):
            draw.text((x, y), text, fill=ink, anchor=anchor, font=_font(0.62 * line))
        return np.asarray(image)


@cache
def shared_renderer(task: str) -> EpisodeRenderer:
    """Return the renderer that all environments of a task share, because MuJoCo cannot close one of several."""
    renderer = EpisodeRenderer(task)
    atexit.register(renderer.close)  # before EGL's own exit, after which closing fails
    return renderer


def _load_opengl() -> None:
    """Load the OpenGL library of the environment variable MUJOCO_GL, by default EGL on Linux, and open it once."""
    chosen = os.environ.get("MUJOCO_GL") or ("egl" if sys.platform == "linux" else "glfw")  # EGL needs no display
    try:
        import mujoco
        from mujoco.rendering.classic import gl_context

        # MuJoCo chooses the library on import, and a simulation has imported MuJoCo without a library.
        with mujoco_gl(chosen):
            importlib.reload(gl_context)
        mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 1, 1).close()
    except Exception as error:  # whatever the library and its driver raise
        reason = " ".join("".join(format_exception_only(error)).split())
        raise UserError(
            f"no OpenGL to render with (MUJOCO_GL={chosen}: {reason}); install one (Debian: apt install libegl1 "
            "libgl1-mesa-dri) or choose another: MUJOCO_GL=egl, osmesa or glfw"
        ) from error


@cache
def _font(size: float) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _clips(renderer: EpisodeRenderer, clips: Iterable[list[Any]], stride: int, pause: int) -> Iterator[_Frame]:
    """Yield clips one after another, with the episodes of a clip next to each other and a pause after each clip."""
    for clip in clips:
        last: list[_Frame] = []
        for panels in zip_longest(*(renderer.frames(stride, *episode) for episode in clip)):
            last = [old if new is None else new for old, new in zip_longest(last, panels)]
            yield np.concatenate(last, axis=1)
        yield from [np.concatenate(last, axis=1)] * (pause * (len(clip) > 1))


def _write(path: Path, frames: Iterator[_Frame], rate: float) -> None:
    """Write frames as the format that the file's name ends in: mp4, gif or apng."""
    if path.suffix == ".mp4":
        import imageio.v2

        settings = {"fps": rate, "quality": 7, "macro_block_size": 2, "output_params": ["-movflags", "+faststart"]}
        with imageio.v2.get_writer(path, format="FFMPEG", **settings) as writer:
            for frame in frames:
                writer.append_data(frame)
        return
    from PIL import Image

    first = Image.fromarray(next(frames))
    pictures: Iterator[Image.Image] = chain([first], map(Image.fromarray, frames))
    if path.suffix == ".gif":  # one palette and no dithering, so that what does not move is not stored again
        palette = first.quantize(_COLOURS, Image.Quantize.FASTOCTREE)
        pictures = (picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures)
    start, *others = pictures
    start.save(path, _PILLOW[path.suffix], save_all=True, append_images=others, duration=1000 / rate, loop=0)


def main(arguments: list[str]) -> None:
    """Render the videos on standard input. Arguments: task, width, height, speed, and the file of each video."""
    task, width, height, speed, *paths = arguments
    step = domain_of(task).control_timestep
    with contextlib.closing(EpisodeRenderer(task, int(width), int(height))) as renderer:
        for path, clips in zip(map(Path, paths), pickle.load(sys.stdin.buffer), strict=True):
            # The largest stride with the least rate, at this speed.
            stride = max(1, int(int(speed) / (_LEAST_RATES[path.suffix] * step) + 1e-9))
            rate = int(speed) / (stride * step)
            _write(path, _clips(renderer, clips, stride, round(rate)), rate)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(error)
        sys.exit(2)
