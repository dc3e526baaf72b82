"""One episode of a controller, under noise, as ExoRL would have recorded it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64

from ringrl.data.collect.noise import coloured_noise
from ringrl.data.collect.recipe import Recipe

if TYPE_CHECKING:
    from ringrl.envs.simulation import Simulation


@dataclass(frozen=True)
class Plan:
    """All that decides an episode: whoever records it, wherever and whenever, records the same.

    Attributes:
        index: the episode's number in the collection.
        seed: the collection's seed.
        parameters: those of the controller.
        noise_limit: the largest share of noise in the actions, in [0, 1].
    """

    index: int
    seed: int
    parameters: Float64[np.ndarray, " parameters"]
    noise_limit: float

    @property
    def start_seed(self) -> int:
        """`ringrl.envs.make(task, start_seed)` starts its first episode in the same state."""
        return int(np.random.default_rng((self.seed, 2, self.index)).integers(2**32))


def record_episode(simulation: Simulation, recipe: Recipe, plan: Plan) -> dict[str, np.ndarray]:
    """Run an episode and return ExoRL's arrays of T+1 rows.

    observation (T+1, O), action (T+1, A), reward (T+1, 1 or one column per recorded task) and discount (T+1, 1)
    float32, physics (T+1, P) float64; row t is the state s_t with the action and the reward that led to it, row 0 the
    start with zeros for both.
    """
    domain = simulation.domain
    steps = domain.episode_length
    random = np.random.default_rng((plan.seed, 0, plan.index))
    simulation.reset(np.random.RandomState(plan.start_seed))
    share = random.uniform(0, plan.noise_limit)
    noise = share * coloured_noise(random, steps, domain.action_size, exponent=random.uniform(0, 2))
    controller = recipe.controller(simulation, plan.parameters)

    observation = np.empty((steps + 1, domain.observation_size), np.float32)
    physics = np.empty((steps + 1, domain.physics_size), np.float64)
    action = np.zeros((steps + 1, domain.action_size), np.float32)
    sensors = []
    observation[0], physics[0] = simulation.observation(), simulation.physics_state()
    for step in range(steps):
        wanted = (1 - share) * np.clip(controller(step), -1, 1) + noise[step]
        action[step + 1] = np.clip(wanted, -1, 1)
        simulation.step(action[step + 1])
        observation[step + 1], physics[step + 1] = simulation.observation(), simulation.physics_state()
        sensors.append(simulation.sensors())

    tasks = domain.recorded_tasks(simulation.task)
    reward = np.zeros((steps + 1, len(tasks)), np.float32)
    for column, task in enumerate(tasks):
        reward[1:, column] = simulation.reward(task, np.stack(sensors), action[1:])
    discount = np.ones((steps + 1, 1), np.float32)
    return {"observation": observation, "action": action, "reward": reward, "discount": discount, "physics": physics}
