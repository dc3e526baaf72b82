"""Domains and tasks by name, their sizes, random returns and cameras."""

import numpy as np
import pytest
from dm_control import manipulation, suite

from ringrl.envs import DOMAINS, TASKS, domain_named, domain_of
from ringrl.errors import UserError


def test_every_task_belongs_to_its_domain():
    assert len(TASKS) == len(set(TASKS)) == 24
    for task in TASKS:
        domain = domain_of(task)
        assert task in domain.tasks
        assert task.startswith(domain.name + "_")
        assert domain is DOMAINS[domain.name] is domain_named(domain.name)


def test_widths_and_lengths_are_those_of_exorl():
    # observation, action, physics, T, control timestep
    assert {
        name: (d.observation_size, d.action_size, d.physics_size, d.episode_length, d.control_timestep)
        for name, d in DOMAINS.items()
    } == {
        "walker": (24, 6, 18, 1000, 0.025),
        "cheetah": (17, 6, 18, 1000, 0.01),
        "cartpole": (5, 1, 4, 1000, 0.01),
        "jaco": (42, 9, 18, 250, 0.04),
        "quadruped": (78, 12, 57, 1000, 0.02),
        "point_mass_maze": (4, 2, 4, 1000, 0.02),
    }


def test_every_domain_has_a_camera_and_the_random_returns_of_its_tasks():
    for domain in DOMAINS.values():
        assert domain.camera is not None
        assert set(domain.random_returns) == set(domain.tasks)


def test_every_task_has_a_reward_in_words_and_every_observation_its_parts():
    for domain in DOMAINS.values():
        assert tuple(domain.rewards) == domain.tasks
        assert sum(domain.observation.values()) == domain.observation_size


@pytest.mark.parametrize(
    ("domain", "load"),
    [
        ("walker", lambda: suite.load("walker", "walk")),
        ("cheetah", lambda: suite.load("cheetah", "run")),
        ("cartpole", lambda: suite.load("cartpole", "balance")),
        ("quadruped", lambda: suite.load("quadruped", "walk")),
        ("jaco", lambda: manipulation.load("reach_site_features")),
    ],
)
def test_parts_of_observations_end_where_those_of_dm_control_end(domain, load):
    specification = load().observation_spec()
    widths = [np.prod(spec.shape, dtype=int) for name, spec in specification.items() if name != "target_position"]
    ends = np.cumsum(list(DOMAINS[domain].observation.values()))
    assert sum(widths) == ends[-1]
    assert {*np.cumsum(widths)} <= {*ends}


def test_only_the_maze_records_all_its_tasks_at_once():
    recorded = {name: domain.recorded_tasks(domain.tasks[1]) for name, domain in DOMAINS.items()}
    assert recorded.pop("point_mass_maze") == DOMAINS["point_mass_maze"].tasks
    assert recorded == {name: (DOMAINS[name].tasks[1],) for name in recorded}


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("walker_wlak", "walker_walk"),
        ("Cheetah_Run", "cheetah_run"),
        ("jaco_reach", "jaco_reach_top_left"),
        ("point_mass_maze", "point_mass_maze_reach_top_left"),
        ("walker", "walker_stand"),
        ("something", "cartpole_swingup"),  # nothing is near: all are listed
    ],
)
def test_unknown_task_lists_the_near_ones(wrong, near):
    with pytest.raises(UserError, match=f"unknown task '{wrong}'.*{near}") as caught:
        domain_of(wrong)
    assert "\n" not in str(caught.value)


def test_unknown_domain_lists_the_near_ones():
    with pytest.raises(UserError, match="unknown domain 'wlaker'; did you mean walker"):
        domain_named("wlaker")
