"""Which recipe belongs to which domain."""

from ringrl.data.collect.maze import maze_recipe
from ringrl.data.collect.reach import reach_recipe
from ringrl.data.collect.recipe import Recipe
from ringrl.data.collect.sinusoid import sinusoid_recipe
from ringrl.data.collect.swing_up import swing_up_recipe
from ringrl.envs import domain_of


def recipe_of(task: str) -> Recipe:
    """The recipe for a task's domain; it serves every task of the domain, since the search follows the task's reward.

    Raises:
        UserError: unknown task.
    """
    recipes = {
        "walker": sinusoid_recipe(action_size=6, frequency=1.0),
        "cheetah": sinusoid_recipe(action_size=6, frequency=2.0),
        "cartpole": swing_up_recipe(),
        "jaco": reach_recipe(),
        # Half of the quadruped's episodes start on its back, and sinusoids do not turn it over.
        "quadruped": sinusoid_recipe(action_size=12, frequency=1.0),
        "point_mass_maze": maze_recipe(),
    }
    return recipes[domain_of(task).name]
