import subprocess
import sys
from functools import partial

import imageio.v3
import numpy as np
import pytest
from PIL import Image

from ringrl.envs import DOMAINS, domain_of, make
from ringrl.errors import UserError
from ringrl.evaluation import Protocol, evaluate_all, random_evaluation
from ringrl.evaluation.video import EpisodeStates, VideoError, VideoOptions, choose, write_videos

slow = partial(pytest.param, marks=pytest.mark.slow)
_WIDTH, _HEIGHT = 240, 180  # pixels
_LINE = 14  # pixels, height of the text above and below
_TASKS = [task for domain in DOMAINS.values() for task in domain.tasks[: 2 if domain.tasks[0].endswith("left") else 1]]


@pytest.fixture(scope="module")
def opengl():
    try:
        write_videos("cartpole_swingup", {})
    except VideoError as error:
        pytest.skip(str(error))


def _episode(task, steps, label="best"):
    """Return an episode with full actions."""
    environment = make(task, seed=0)
    environment.reset()
    results = [environment.step(np.ones(domain_of(task).action_size)) for _ in range(steps)]
    physics = [environment.reset(seed=0)[1]["physics"], *(info["physics"] for *_, info in results)]
    return EpisodeStates(label, np.stack(physics), np.array([reward for _, reward, *_ in results]))


def _draw(task, episode, path):
    """Return the frames (N, height, width, 3) as signed integers, and the frames per second."""
    assert write_videos(task, {path: [[episode]]}, width=_WIDTH, height=_HEIGHT) == [path]
    return imageio.v3.imread(path).astype(int), imageio.v3.immeta(path)["fps"]


@pytest.mark.parametrize(
    "task",
    [task if task == "jaco_reach_top_left" else slow(task) for task in _TASKS],
)
def test_every_domain_is_rendered_at_the_speed_of_its_simulation(task, tmp_path, opengl):
    domain = domain_of(task)
    every = {"walker": 1, "cheetah": 4, "cartpole": 4, "jaco": 1, "quadruped": 2, "point_mass_maze": 2}[domain.name]
    frames, rate = _draw(task, _episode(task, 4 * every + 1), tmp_path / "best.mp4")
    assert frames.shape == (6, _HEIGHT, _WIDTH, 3)  # the last step always has a frame
    assert rate == pytest.approx(1 / (every * domain.control_timestep))
    scenes = frames[:, _LINE + 4 : -_LINE - 4]
    assert scenes[0].std(axis=(0, 1)).min() > 10
    moving = np.abs(scenes[4] - scenes[0]).max(axis=-1) > 40
    assert 4 < moving.sum() < 0.5 * moving.size
    if "reach" in task:
        red, green, blue = np.moveaxis(scenes[0], -1, 0)
        goal = (red > 70) & (red > 1.6 * green) & (red > 1.3 * blue)
        assert goal.sum() > 8
        assert (np.nonzero(goal)[1].mean() < _WIDTH / 2) == task.endswith("left")
    assert list(tmp_path.iterdir()) == [tmp_path / "best.mp4"]


@pytest.mark.slow
@pytest.mark.parametrize("domain", ["walker", "quadruped"])
def test_the_camera_follows_over_an_infinite_floor(domain, tmp_path, opengl):
    task = DOMAINS[domain].tasks[0]
    episode = _episode(task, 1)
    episode.physics[:] = episode.physics[0]
    episode.physics[1, {"walker": 1, "quadruped": 0}[domain]] -= 40.5  # metres, along x
    frames, _ = _draw(task, episode, tmp_path / "best.mp4")
    red, blue = frames[..., 0], frames[..., 2]
    body = (red > blue + 40)[:, _LINE:-_LINE]  # the only thing that is not blue
    assert body[0].sum() > 100
    assert (body[0] != body[1]).mean() < 0.01
    floor = frames[:, -2 * _LINE : -_LINE]
    assert floor.std(axis=(1, 2)).min() > 9  # squares are visible in both frames
    assert (np.abs(floor[1] - floor[0]).max(axis=-1) > 15).mean() > 0.03  # and move


def test_step_return_and_label_are_rendered(tmp_path, monkeypatch, opengl):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imageio.py").write_text("raise RuntimeError('imported from the working folder')")
    still = np.zeros((2, 4))
    paths = {
        tmp_path / "folder" / "0.mp4": [[EpisodeStates("best", still, np.array([0.0]))]],
        tmp_path / "folder" / "1.mp4": [[EpisodeStates("best", still, np.array([888.8]))]],
        tmp_path / "folder" / "2.mp4": [[EpisodeStates("first", still, np.array([0.0]))]],
    }
    assert write_videos("cartpole_swingup", paths, width=_WIDTH, height=_HEIGHT) == list(paths)
    poor, rich, other = (imageio.v3.imread(path).astype(int) for path in paths)

    def changed(one, another):
        above, scene, below = np.split(np.abs(one - another).max(axis=-1) > 60, [_LINE, -_LINE])
        assert not scene.any()
        return tuple(bool(half.any()) for band in (above, below) for half in np.split(band, 2, axis=1))

    assert changed(poor[0], rich[0]) == (False, False, False, False)  # nothing is earned before the first step
    assert changed(poor[1], rich[1]) == (False, False, False, True)
    assert changed(poor[0], poor[1]) == (False, False, True, False)
    assert changed(poor[1], other[1]) == (False, True, False, False)
    assert (poor[0, :_LINE, : _WIDTH // 2] > 200).any()  # the task


@pytest.mark.slow
def test_a_video_ends_before_a_state_that_is_not_finite(tmp_path, opengl):
    episode = _episode("cheetah_run", 12)
    episode.physics[9:] = np.nan
    frames, _ = _draw("cheetah_run", episode, tmp_path / "first.mp4")
    assert len(frames) == 3  # states 0, 4 and 8


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("MUJOCO_GL", "glfw", "MUJOCO_GL=glfw"),  # without a display
        slow("MUJOCO_GL", "nonsense", "invalid value"),
        slow("MUJOCO_GL", "disabled", "MUJOCO_GL=disabled"),
        slow("MUJOCO_EGL_DEVICE_ID", "77", "MUJOCO_EGL_DEVICE_ID"),
        ("PYOPENGL_PLATFORM", "osmesa", "MUJOCO_GL=egl"),
    ],
)
def test_without_opengl_the_error_is_one_line(variable, value, reason, tmp_path, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    clips = [[EpisodeStates("best", np.zeros((2, 4)), np.zeros(1))]]
    with pytest.raises(VideoError, match=rf"^no video: no OpenGL to render with.*{reason}.*install one.*") as raised:
        write_videos("cartpole_swingup", {tmp_path / "best.mp4": clips})
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_an_older_video_stays_when_a_new_one_fails(tmp_path, monkeypatch, opengl):
    path = tmp_path / "best.mp4"
    path.write_text("older")
    episode = EpisodeStates("best", np.zeros((2, 4)), np.zeros(1))
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nowhere"))
    with pytest.raises(VideoError, match=r"no video: the rendering process failed .*nowhere"):
        write_videos("cartpole_swingup", {path: [[episode]]})
    assert [(file, file.read_text()) for file in tmp_path.iterdir()] == [(path, "older")]
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
    folder = tmp_path / "folder.mp4"
    folder.mkdir()
    with pytest.raises(VideoError, match=r"no video: .*folder[.]mp4: Is a directory; choose another folder"):
        write_videos("cartpole_swingup", {folder: [[episode]]})
    assert sorted(tmp_path.iterdir()) == [path, folder]
    with pytest.raises(VideoError, match=r"no video: .*best\.mp4: .*; choose another folder"):
        write_videos("cartpole_swingup", {path / "best.mp4": [[episode]]})
    with pytest.raises(UserError, match=r"best[.]avi: unknown video format; give a name that ends in [.]mp4, "):
        write_videos("cartpole_swingup", {path.with_suffix(".avi"): [[episode]]})
    with pytest.raises(UserError, match="unknown task"):
        write_videos("cartpole_dance", {path: [[episode]]})


def test_episodes_are_shown_next_to_and_after_each_other(tmp_path, opengl):
    task = "cartpole_swingup"
    width, height = 96, 72
    long, short = _episode(task, 50), _episode(task, 20, "short")
    files = {
        tmp_path / "single.apng": [[long]],
        tmp_path / "both.apng": [[long, short], [short, long]],
        tmp_path / "both.gif": [[long, short], [short, long]],
    }
    write_videos(task, files, width=width, height=height, speed=2)
    single, both, gif = (imageio.v3.imread(path, plugin="pillow").astype(int)[..., :3] for path in files)
    assert single.shape == (4, height, width, 3)  # states 0, 20, 40 and 50
    images = [Image.open(path) for path in (tmp_path / "both.apng", tmp_path / "both.gif")]
    for image in images:
        durations = []
        for index in range(image.n_frames):
            image.seek(index)
            durations.append(image.info["duration"])
        assert (image.info["loop"], durations) == (0, [100, 100, 100, 1100] * 2)  # each clip ends with a second of rest
    left, right = both[:, :, :width], both[:, :, width:]
    assert np.array_equal(left[:4], single)
    assert np.array_equal(right[4:], single)
    assert np.array_equal(right[1], right[3])  # the shorter episode stays at its end
    assert not np.array_equal(right[0], right[1])
    assert np.abs(gif - both).mean() < 4


def test_a_missing_package_is_named_before_anything_is_rolled_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    line = r"video: needs imageio_ffmpeg; install it with: pip install 'ringrl\[video\]'"
    with pytest.raises(UserError, match=line):
        write_videos("cartpole_swingup", {})
    evaluation = random_evaluation("cartpole_swingup", Protocol(), results=tmp_path / "random.jsonl")
    with pytest.raises(UserError, match=line):
        evaluate_all([evaluation], video=VideoOptions())
    assert list(tmp_path.iterdir()) == []


def test_the_evaluating_process_does_not_import_mujoco_and_images_need_no_package_for_videos():
    code = "import ringrl.evaluation.video, sys; assert not {'mujoco', 'OpenGL', 'PIL', 'imageio'} & set(sys.modules);"
    code += "sys.modules |= dict.fromkeys(['imageio', 'imageio_ffmpeg', 'PIL']); import ringrl.envs.render"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_choosing():
    assert choose(np.array([[3.0, 9.0], [5.0, 1.0]])) == {"first": (0, 0), "median": (0, 0), "best": (0, 1)}
    assert choose(np.array([[1.0], [7.0], [4.0]])) == {"first": (0, 0), "median": (2, 0), "best": (1, 0)}
    assert choose(np.array([[np.nan, 2.0], [2.0, np.inf]])) == {"first": (0, 0), "median": (1, 0), "best": (1, 0)}
    assert choose(np.zeros((3, 1))) == {"first": (0, 0), "median": (1, 0), "best": (0, 0)}
    assert choose(np.full((2, 2), np.nan)) == {"first": (0, 0)}
