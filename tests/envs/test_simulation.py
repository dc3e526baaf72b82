"""The MuJoCo version, light imports, and stacked states."""

import os
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest

from ringrl.envs import load_simulation
from ringrl.envs.simulation import StackedData, check_mujoco
from ringrl.errors import UserError


@pytest.mark.parametrize(
    ("version", "compatible"),
    [
        ("3.17.0", True), ("3.17", True), ("3.20.1", True), ("3.17.0.dev1", True), ("3.100.0", True),
        ("3.16.9", False), ("2.3.7", False), ("4.0.0", False), ("4.0.0rc1", False), ("10.0.0", False), ("", False),
    ],
)  # fmt: skip
def test_compatible_versions(version, compatible, monkeypatch):
    monkeypatch.setattr("ringrl.envs.simulation.metadata.version", lambda name: version)
    with nullcontext() if compatible else pytest.raises(UserError, match=r"the environments need >=3\.17,<4"):
        check_mujoco()


@pytest.mark.parametrize("version", ["4.0.0", "3.9.0"])
def test_import_names_the_fix_for_an_incompatible_mujoco(version, tmp_path):
    # Metadata of another MuJoCo before the installed one, as after a plain `pip install dm_control`.
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
        "import sys, ringrl.envs, ringrl.envs.simulation, ringrl.envs.walker\n"
        "heavy = {'mujoco', 'OpenGL', 'glfw', 'jax'} & {name.split('.')[0] for name in sys.modules}\n"
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


def test_arrays_are_stacked_and_do_not_change_until_renewed():
    simulations = [load_simulation("cheetah_run") for _ in range(3)]
    for seed, simulation in enumerate(simulations):
        simulation.reset(np.random.RandomState(seed))
    stacked = StackedData([simulation.data for simulation in simulations])
    for name in ("qpos", "act", "xmat"):
        expected = np.stack([getattr(simulation.data, name) for simulation in simulations])
        np.testing.assert_array_equal(getattr(stacked, name), expected)

    before = stacked.qpos.copy()
    for simulation in simulations:
        simulation.step(np.ones(6))
    np.testing.assert_array_equal(stacked.qpos, before)
    stacked.renew()
    np.testing.assert_array_equal(stacked.qpos, [simulation.data.qpos for simulation in simulations])


def test_reading_stacked_states_adds_the_leading_axis():
    for task in ("walker_walk", "cheetah_run", "cartpole_balance", "jaco_reach_top_left", "quadruped_run"):
        simulation = load_simulation(task)
        simulation.reset(np.random.RandomState(0))
        stacked = StackedData([simulation.data, simulation.data])
        np.testing.assert_array_equal(simulation.read_observation(stacked), [simulation.observation()] * 2)
        np.testing.assert_array_equal(simulation.read_sensors(stacked), [simulation.sensors()] * 2)
        np.testing.assert_array_equal(simulation.read_physics(stacked), [simulation.physics_state()] * 2)
