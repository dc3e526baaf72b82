import numpy as np

from ringrl.envs.simulation import load_simulation
from ringrl.envs.stacked import StackedData


def test_arrays_are_stacked_and_stay_until_renewed():
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


def test_what_is_read_has_the_leading_axis():
    for task in ("walker_walk", "cheetah_run", "cartpole_balance", "jaco_reach_top_left", "quadruped_run"):
        simulation = load_simulation(task)
        simulation.reset(np.random.RandomState(0))
        stacked = StackedData([simulation.data, simulation.data])
        np.testing.assert_array_equal(simulation.read_observation(stacked), [simulation.observation()] * 2)
        np.testing.assert_array_equal(simulation.read_sensors(stacked), [simulation.sensors()] * 2)
        np.testing.assert_array_equal(simulation.read_physics(stacked), [simulation.physics_state()] * 2)
