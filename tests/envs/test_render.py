import copy
import importlib.util
import subprocess
import sys
from types import ModuleType

import gymnasium
import imageio.v3
import numpy as np
import pytest

from ringrl.envs import make
from ringrl.errors import UserError


@pytest.fixture(scope="module")
def opengl():
    try:
        make("cartpole_swingup", render_mode="rgb_array").render()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def moviepy(monkeypatch):
    """moviepy, which encodes the frames of RecordVideo. A stand-in if it is not installed: it needs an old Pillow."""
    if importlib.util.find_spec("moviepy"):
        return

    class ImageSequenceClip:
        def __init__(self, frames, fps):
            self.frames, self.fps = frames, fps

        def write_videofile(self, path, logger):
            imageio.v3.imwrite(path, np.stack(self.frames), fps=self.fps, macro_block_size=2)

    for name in ("moviepy", "moviepy.video", "moviepy.video.io", "moviepy.video.io.ImageSequenceClip"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["moviepy.video.io.ImageSequenceClip"].ImageSequenceClip = ImageSequenceClip


def _difference(one, other):
    """Return the mean difference between frames, in grey levels."""
    return np.abs(np.asarray(one, int) - np.asarray(other, int)).mean()


def test_a_frame_shows_the_state_and_rendering_changes_nothing(opengl):
    rendered, plain = make("walker_walk", 0, render_mode="rgb_array"), make("walker_walk", 0)
    assert rendered.render().shape == (360, 480, 3)  # before the first episode, too
    np.testing.assert_array_equal(rendered.reset()[0], plain.reset()[0])
    first = rendered.render()
    assert first.dtype == np.uint8
    assert first.std(axis=(0, 1)).min() > 10
    for _ in range(4):
        one, two = rendered.step(np.ones(6)), plain.step(np.ones(6))
        np.testing.assert_array_equal(one[0], two[0])
        np.testing.assert_array_equal(one[4]["physics"], two[4]["physics"])
        last = rendered.render()
    assert _difference(first, last) > 1
    with copy.deepcopy(rendered) as copied:
        np.testing.assert_array_equal(copied.render(), last)
    assert _difference(make("cheetah_run", render_mode="rgb_array").render(), last) > 1
    np.testing.assert_array_equal(rendered.render(), last)  # after others have rendered, and one was closed


@pytest.mark.parametrize(
    "made",
    [pytest.param(make, marks=pytest.mark.slow), lambda task, **mode: gymnasium.make(f"ringrl/{task}-v0", **mode)],
)
def test_gymnasium_records_a_video_at_the_speed_of_the_simulation(made, tmp_path, moviepy, opengl):
    environment = made("jaco_reach_top_left", render_mode="rgb_array")
    folder, second = str(tmp_path / "v"), lambda episode: episode == 1
    recorder = gymnasium.wrappers.RecordVideo(environment, folder, episode_trigger=second)
    recorder.reset(seed=0)
    recorder.reset(seed=0)
    frames = [environment.render()]
    for _ in range(4):
        recorder.step(np.ones(9, np.float32))
        frames.append(environment.render())
    recorder.close()
    (path,) = (tmp_path / "v").iterdir()
    assert path.name == "rl-video-episode-1.mp4"
    assert imageio.v3.immeta(path)["fps"] == 25
    video = imageio.v3.imread(path)
    assert video.shape == (5, 360, 480, 3)
    assert _difference(video, frames) < 2.5  # lost in encoding
    assert _difference(video[0], video[4]) > 2.5


def test_errors_are_one_line(monkeypatch):
    with pytest.raises(UserError, match="walker_walk: cannot render; make the environment with render_mode='rgb_array"):
        make("walker_walk").render()
    with pytest.raises(UserError, match="walker_walk: render_mode is 'human', it must be 'rgb_array' or None"):
        make("walker_walk", render_mode="human")
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    with pytest.raises(UserError, match=r"no OpenGL to render with .MUJOCO_GL=nonsense: .*invalid value") as raised:
        make("quadruped_walk", render_mode="rgb_array").render()  # no other test has loaded its renderer
    assert "\n" not in str(raised.value)


def test_a_process_that_imported_mujoco_renders_and_ends_quietly(opengl):
    code = (
        "import os, mujoco; from ringrl.envs import make; one = make('cartpole_swingup', render_mode='rgb_array'); "
        "print(one.render().std() > 9, os.environ.get('MUJOCO_GL'))"  # it is not closed
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("True None\n", "")
