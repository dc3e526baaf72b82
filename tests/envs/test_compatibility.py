import os
import subprocess
import sys

import pytest

from ringrl.envs.compatibility import is_compatible


@pytest.mark.parametrize(
    ("version", "compatible"),
    [
        ("3.17.0", True), ("3.17", True), ("3.20.1", True), ("3.17.0.dev1", True), ("3.100.0", True),
        ("3.16.9", False), ("2.3.7", False), ("4.0.0", False), ("4.0.0rc1", False), ("10.0.0", False), ("", False),
    ],
)  # fmt: skip
def test_which_versions_work(version, compatible):
    assert is_compatible(version) == compatible


@pytest.mark.parametrize("version", ["4.0.0", "3.9.0"])
def test_import_names_the_fix_for_an_incompatible_mujoco(version, tmp_path):
    # Metadata of another MuJoCo in front of the installed one, as a plain `pip install dm_control` leaves it.
    folder = tmp_path / f"mujoco-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mujoco\nVersion: {version}\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", "import ringrl.envs"], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert f"UserError: MuJoCo {version} is installed" in result.stderr
    assert "pip install 'mujoco>=3.17,<4'" in result.stderr


def test_import_is_light():
    program = (
        "import sys, ringrl.envs\n"
        "heavy = {'dm_control', 'mujoco', 'OpenGL', 'glfw', 'jax'} & {name.split('.')[0] for name in sys.modules}\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_environments_leave_opengl_alone_and_print_nothing():
    program = (
        "import os, sys, ringrl.envs\n"
        "for task in ('cheetah_run', 'jaco_reach_top_left'): ringrl.envs.make(task, 0).reset()\n"
        "assert 'OpenGL' not in sys.modules and 'glfw' not in sys.modules and 'MUJOCO_GL' not in os.environ\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
