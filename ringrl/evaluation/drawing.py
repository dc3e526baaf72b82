"""Drawing episodes as mp4, in a process of its own: `python -m ringrl.evaluation.drawing`, which `video` starts.

MuJoCo chooses its OpenGL when it is first imported, and a driver may crash; neither should concern the process that
evaluates. Recordings come in as an .npz file on standard input; one line on standard output says why there is no video.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from traceback import format_exception_only
from types import MappingProxyType
from typing import TYPE_CHECKING

import imageio.v2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from ringrl.envs.domain import Domain, domain_of
from ringrl.errors import UserError
from ringrl.evaluation.video import Recording, part_of

if TYPE_CHECKING:
    from mujoco import Renderer

    from ringrl.envs.simulation import Simulation

_TORSO = 1  # the first body after the world
_LEAST_RATE = 25  # pictures per second
_SHADOWS = 1024  # pixels; with the models' 2048 a frame takes longer and looks the same
_HAZE = (0.2, 0.29, 0.4, 1.0)  # RGBA; the sky at the horizon
_BAND, _INK, _FAINT = (12, 18, 28), (255, 255, 255), (158, 176, 196)  # RGB


@dataclass(frozen=True)
class View:
    """Where the camera stands.

    Attributes:
        center: what it looks at, metres.
        distance: from there, metres.
        azimuth: of its gaze, degrees; 90 looks along y, with x to the right.
        elevation: of its gaze, degrees; -90 looks down.
        follows: how many horizontal coordinates of the centre are those of the body's centre of mass instead.
    """

    center: tuple[float, float, float]
    distance: float
    azimuth: float = 90.0
    elevation: float = -10.0
    follows: int = 0


VIEWS = MappingProxyType(
    {
        "walker": View(center=(0, 0, 0.85), distance=3.2, follows=1),
        "cheetah": View(center=(0, 0, 0.5), distance=2.8, follows=1),
        "cartpole": View(center=(0, 0, 0.95), distance=3.9, elevation=-5),
        "jaco": View(center=(0, 0.12, 0.2), distance=1.25, azimuth=110, elevation=-35),
        "quadruped": View(center=(0, 0, 0.6), distance=4.5, azimuth=115, elevation=-22, follows=2),
        "point_mass_maze": View(center=(0, 0, 0), distance=0.86, elevation=-90),
    }
)
"""Domain name -> its view."""


def open_renderer(task: str, width: int, height: int) -> "tuple[Simulation, Renderer]":
    """A task's simulation and what draws it. MuJoCo must not have been imported in this process.

    Raises:
        UserError: OpenGL cannot be used as the environment variable MUJOCO_GL says.
    """
    choice = os.environ["MUJOCO_GL"]
    try:
        import mujoco

        mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 1, 1).close()
    except Exception as error:  # whatever the library and its driver raise
        reason = " ".join("".join(format_exception_only(error)).split())
        raise UserError(
            f"no OpenGL to draw with (MUJOCO_GL={choice}: {reason}); install one (Debian: apt install libegl1 "
            "libgl1-mesa-dri) or choose another: MUJOCO_GL=egl, osmesa or glfw"
        ) from error
    del os.environ["MUJOCO_GL"]  # dm_control, imported next, needs none
    from ringrl.envs.simulation import load_simulation

    simulation = load_simulation(task)
    visual = simulation.model.vis
    visual.global_.offwidth, visual.global_.offheight = width, height
    visual.quality.shadowsize = _SHADOWS
    visual.rgba.haze = _HAZE
    if VIEWS[simulation.domain.name].follows:  # the floor is drawn without an end, as it is simulated
        simulation.model.geom_size[simulation.model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE, :2] = 0
    renderer = mujoco.Renderer(simulation.model, height, width)
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False  # of the floor: slow, and it distracts
    return simulation, renderer


def every(domain: Domain) -> int:
    """Every how many steps there is a picture: as seldom as gives 25 a second."""
    return max(1, int(1 / (_LEAST_RATE * domain.control_timestep) + 1e-9))


def frames_per_second(domain: Domain) -> float:
    """Pictures per second, with which a video runs as fast as the simulated time: 25, the walker's 40."""
    return 1 / (every(domain) * domain.control_timestep)


def steps_shown(domain: Domain, steps: int) -> list[int]:
    """The states with a picture, of those numbered 0 to `steps`: every so many, and the last."""
    return [*range(0, steps, every(domain)), steps]


class Painter:
    """Draws the states of one task, with the words that belong to them."""

    def __init__(self, task: str, width: int, height: int) -> None:
        self._task, self._domain = task, domain_of(task)
        self._simulation, self._renderer = open_renderer(task, width, height)
        self._line = max(14, height // 15)  # pixels of a line of text
        self._font = ImageFont.load_default(size=0.62 * self._line)

    def close(self) -> None:
        """Free what OpenGL holds, which is too late when the process ends."""
        self._renderer.close()

    def frames(self, recording: Recording) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
        """The pictures of a recording, at `frames_per_second` of its domain."""
        returns = np.concatenate(([0.0], np.cumsum(recording.rewards, dtype=np.float64)))
        for step in steps_shown(self._domain, len(recording.rewards)):
            yield self._words(self._scene(recording.physics[step]), recording.label, step, returns[step])

    def _scene(self, physics: np.ndarray) -> UInt8[np.ndarray, "height width 3"]:
        """The simulation in this state, (P,)."""
        import mujoco

        simulation, view = self._simulation, VIEWS[self._domain.name]
        simulation.set_physics_state(np.asarray(physics, np.float64))
        mujoco.mj_forward(simulation.model, simulation.data)
        camera = mujoco.MjvCamera()
        camera.lookat[:] = view.center
        camera.lookat[: view.follows] = simulation.data.subtree_com[_TORSO, : view.follows]
        camera.distance, camera.azimuth, camera.elevation = view.distance, view.azimuth, view.elevation
        self._renderer.update_scene(simulation.data, camera)
        return self._renderer.render()

    def _words(self, picture: np.ndarray, label: str, step: int, earned: float) -> UInt8[np.ndarray, "height width 3"]:
        """Task and label above; step and return so far below, each number in a place of its own."""
        image = Image.fromarray(picture)
        draw, line = ImageDraw.Draw(image, "RGBA"), self._line
        width, height = image.size
        above, below, margin = line // 2, height - line // 2, line // 2
        for top in (0, height - line):
            draw.rectangle((0, top, width, top + line), fill=(*_BAND, 190))
        for x, y, anchor, words, ink in (
            (margin, above, "lm", self._task, _INK),
            (width - margin, above, "rm", label, _FAINT),
            (margin, below, "lm", "step", _FAINT),
            (margin + 4.5 * line, below, "rm", f"{step}", _INK),
            (width - margin - 5.5 * line, below, "lm", "return", _FAINT),
            (width - margin, below, "rm", f"{earned:.1f}", _INK),
        ):
            draw.text((x, y), words, fill=ink, anchor=anchor, font=self._font)
        return np.asarray(image)


def write_video(path: Path, frames: Iterator[UInt8[np.ndarray, "height width 3"]], rate: float) -> None:
    """Encode frames, `rate` a second, as the mp4 file at `path`."""
    settings = {"fps": rate, "quality": 7, "macro_block_size": 2, "output_params": ["-movflags", "+faststart"]}
    with imageio.v2.get_writer(path, format="FFMPEG", **settings) as writer:
        for frame in frames:
            writer.append_data(frame)


def main(arguments: list[str]) -> None:
    """Draw the recordings on standard input: task, width, height, then the file to write for each."""
    task, width, height, *paths = arguments
    with np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False) as archive:
        packed = dict(archive)
    rate = frames_per_second(domain_of(task))
    with contextlib.closing(Painter(task, int(width), int(height))) as painter:
        for index, path in enumerate(map(Path, paths)):
            label, physics, rewards = (packed[f"{index} {field}"] for field in Recording._fields)
            write_video(part_of(path), painter.frames(Recording(str(label), physics, rewards)), rate)
            part_of(path).replace(path)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(error)
        sys.exit(2)
