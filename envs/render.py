"""Rendering of states as images, and of episodes as mp4 files in another process: `python -m ringrl.envs.render`.

A graphics driver may crash, which must not affect the process that evaluates. Episodes are read as an .npz file from
standard input. If rendering fails, one line on standard output gives the reason.
"""

import atexit
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from traceback import format_exception_only

import imageio.v2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from ringrl.envs.domain import Camera, Domain
from ringrl.envs.registry import domain_of, load_simulation
from ringrl.envs.simulation import mujoco_gl
from ringrl.errors import UserError

WIDTH, HEIGHT = 480, 360  # pixels, by default
_TORSO = 1  # the first body after the world
_LEAST_RATE = 25  # frames per second
_SHADOWS = 1024  # pixels; with the models' 2048 a frame takes longer and looks the same
_HAZE = (0.2, 0.29, 0.4, 1.0)  # RGBA of the sky at the horizon
_BAND, _INK, _FAINT = (12, 18, 28, 190), (255, 255, 255), (158, 176, 196)  # RGB(A)

_Frame = UInt8[np.ndarray, "height width 3"]


class EpisodeRenderer:
    """A renderer of the states of one task, with its own simulation.

    Raises:
        UserError: the OpenGL backend in the environment variable MUJOCO_GL cannot be used.
    """

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
        self._font = ImageFont.load_default(size=0.62 * self._line)

    def close(self) -> None:
        """Release OpenGL."""
        self._renderer.close()

    def frames(
        self, label: str, physics: Float[np.ndarray, "steps+1 physics"], rewards: Float[np.ndarray, " steps"]
    ) -> Iterator[_Frame]:
        """Yield the frames of an episode: the states that `_stride` selects, and the last one."""
        returns = np.concatenate(([0.0], np.cumsum(rewards, dtype=np.float64)))
        for step in [*range(0, len(rewards), _stride(self._domain)), len(rewards)]:
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
            draw.text((x, y), text, fill=ink, anchor=anchor, font=self._font)
        return np.asarray(image)


@cache
def shared_renderer(task: str) -> EpisodeRenderer:
    """Return the renderer of a task that all environments of this process share until it ends.

    Separate renderers could not be closed safely: MuJoCo frees the objects of the current OpenGL context.
    """
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


def _stride(domain: Domain) -> int:
    """Return the number of steps between frames: the largest with at least 25 frames per second."""
    return max(1, int(1 / (_LEAST_RATE * domain.control_timestep) + 1e-9))


def main(arguments: list[str]) -> None:
    """Render the episodes on standard input. Arguments: task, width, height, and the file of each episode."""
    task, width, height, *paths = arguments
    with np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False) as archive:
        packed = dict(archive)
    domain = domain_of(task)
    rate = 1 / (_stride(domain) * domain.control_timestep)
    settings = {"fps": rate, "quality": 7, "macro_block_size": 2, "output_params": ["-movflags", "+faststart"]}
    with contextlib.closing(EpisodeRenderer(task, int(width), int(height))) as renderer:
        for index, path in enumerate(paths):
            label, physics, rewards = (packed[f"{index} {name}"] for name in ("label", "physics", "rewards"))
            with imageio.v2.get_writer(Path(path), format="FFMPEG", **settings) as writer:
                for frame in renderer.frames(str(label), physics, rewards):
                    writer.append_data(frame)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(error)
        sys.exit(2)
