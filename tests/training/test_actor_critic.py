"""TD3+BC's step: what it changes and what it leaves alone; whole runs and their resumption."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ringrl.config import OptimiserConfig, TrainConfig
from ringrl.context import Transitions
from ringrl.errors import UserError
from ringrl.model import ActorCritic, make_policy
from ringrl.training import load_policy, train
from ringrl.training.actor_critic import initial_actor_critic_state, make_actor_critic_step, make_optimisers
from ringrl.training.step import TrainState, with_params

HINDSIGHT = {"later": 0.3, "nearby": 0.3, "radius": 0.4, "distance_cost": 1.0}
LEARNED, TARGETS = ("actor", "critics"), ("target_actor", "target_critics")


def make_config(**actor_critic: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "data": "unused", "task": "unused", "run": "unused", "seed": 3,
            "model": {"kind": "td3_bc", "layers": 1, "width": 64},
            "optimiser": {"steps": 400, "warmup_steps": 0, "learning_rate": 0.003, "clip_norm": 100},
            "actor_critic": actor_critic,
        }
    )  # fmt: skip


NOISY = make_config(target_noise=0.4, target_noise_clip=0.1)


def best_action(observation: np.ndarray) -> np.ndarray:
    return np.tanh(observation[:, 0]) / 2


def make_batch(seed: int, size: int = 128) -> Transitions:
    """Random states and actions; the reward is highest for `best_action`, the data's actions are 0 on average."""
    random = np.random.default_rng(seed)
    observation, following = random.normal(size=(2, size, 3)).astype(np.float32)
    action = random.uniform(-1, 1, (size, 1)).astype(np.float32)
    reward = 1 - np.square(action[:, 0] - best_action(observation))
    return Transitions(observation, action, reward, np.full(size, 0.5, np.float32), following, np.empty((size, 0)))


def start(config: TrainConfig, step: int = 0) -> tuple[ActorCritic, TrainState]:
    policy = make_policy(config.model, 3, 1, config.seed)
    return policy, initial_actor_critic_state(policy, config)._replace(step=jnp.array(step, jnp.int32))


def numpy_of(state: TrainState) -> dict:
    return jax.tree.map(np.array, state.params)


def assert_close(found: object, expected: object, atol: float) -> None:
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


def equal(a: object, b: object) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def step() -> Callable:
    """The step of `NOISY`, compiled once."""
    return make_actor_critic_step(start(NOISY)[0], NOISY)


def test_the_actor_and_the_targets_move_every_second_step_and_the_critics_always(step: Callable) -> None:
    _, state = start(NOISY)
    for number in range(4):
        before = numpy_of(state)
        state, metrics = step(state, make_batch(number))
        after = numpy_of(state)
        changed = {name for name in before if not equal(before[name], after[name])}
        assert changed == ({*LEARNED, *TARGETS} if number % 2 == 0 else {"critics"})
        assert all(np.isfinite(value) for value in metrics.values())
        if number % 2 == 0:
            for name in LEARNED:
                expected = jax.tree.map(
                    lambda old, new: 0.995 * old + 0.005 * new, before[f"target_{name}"], after[name]
                )
                assert_close(after[f"target_{name}"], expected, atol=1e-6)
    assert int(state.step) == 4


@pytest.mark.parametrize("number", [6, 7], ids=["with the actor's update", "without"])
def test_the_critics_take_the_target_as_given_and_know_nothing_of_the_actors_update(
    step: Callable, number: int
) -> None:
    """Their gradient and their optimiser's update by hand; noise follows the seed and the step."""
    policy, state = start(NOISY, number)
    batch, graph = make_batch(0), nnx.split(policy, nnx.Param)[0]
    noise = np.clip(0.4 * jax.random.normal(jax.random.fold_in(jax.random.key(3), number), (128, 1)), -0.1, 0.1)
    assert (np.abs(noise) == np.float32(0.1)).any()
    target = np.asarray(with_params(graph, state.params).target_value(batch, jnp.asarray(noise)))
    critics = state.params["critics"]
    gradients = jax.grad(
        lambda critics: with_params(graph, state.params | {"critics": critics}).critic_loss(batch, jnp.asarray(target))
    )(critics)
    updates, _ = make_optimisers(NOISY)["critics"].update(gradients, state.optimiser["critics"], critics)
    expected = jax.tree.map(np.array, optax.apply_updates(critics, updates))
    after, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradients), rtol=1e-4)
    np.testing.assert_allclose(metrics["value"], target.mean(), rtol=1e-4)
    assert_close(after.params["critics"], expected, atol=1e-4)


def test_the_actors_schedule_ends_with_its_last_update() -> None:
    params = {"actor": {"w": jnp.ones((1, 1))}, "critics": {"w": jnp.ones((1, 1))}}
    settings = {"steps": 6, "warmup_steps": 0, "learning_rate": 0.1, "final_learning_rate": 0.0, "weight_decay": 0.0}
    config = NOISY.model_copy(update={"optimiser": OptimiserConfig.model_validate(settings)})
    moved = {}
    for name, optimiser in make_optimisers(config).items():
        state, moved[name] = optimiser.init(params[name]), []
        for _ in range(7 if name == "critics" else 4):
            updates, state = optimiser.update({"w": jnp.ones((1, 1))}, state, params[name])
            moved[name].append(-float(updates["w"][0, 0]))
    np.testing.assert_allclose(moved["actor"], moved["critics"][::2], atol=1e-6)
    assert moved["actor"][0] == pytest.approx(0.1)
    assert moved["actor"][-1] == pytest.approx(0.0, abs=1e-6)


def test_it_finds_each_states_best_action_and_cloning_holds_it_to_the_datas() -> None:
    """Values: .57 on average for the data's action, then 1 for ever (.96 with target noise), halved at each step."""
    found, batch = {}, make_batch(999)
    for cloning in (0.0, 100.0):
        config = make_config(behaviour_cloning=cloning, target_rate=0.1)
        policy, state = start(config)
        step = make_actor_critic_step(policy, config)
        for number in range(400):
            state, metrics = step(state, make_batch(number))
        trained = with_params(nnx.split(policy, nnx.Param)[0], state.params)
        found[cloning] = np.tanh(trained.target_actor(jnp.asarray(batch.observation)))[:, 0]
        if not cloning:
            assert float(metrics["value"]) == pytest.approx(0.57 + 0.5 * 0.96 / (1 - 0.5), abs=0.2)
    assert np.abs(found[0.0] - best_action(batch.observation)).mean() < 0.15
    assert np.abs(found[100.0]).mean() < 0.15 < np.abs(best_action(batch.observation)).mean()


@pytest.fixture
def small(tiny: TrainConfig) -> TrainConfig:
    """`tiny` as an actor-critic with goals in hindsight: fourteen steps, a checkpoint at every fourth."""
    values = tiny.model_dump() | {"actor_critic": {"n_step": 2, "hindsight": HINDSIGHT}}
    values["model"] |= {"kind": "td3_bc"}
    values["optimiser"] |= {"batch_size": 16}
    return TrainConfig.model_validate(values)


def numbers(run: Path) -> list[dict[str, float]]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if "per_second" not in name} for entry in entries]


def test_a_resumed_run_is_bit_identical(small: TrainConfig) -> None:
    train(small, quiet=True)
    expected, policy = numbers(small.run), load_policy(small.run)
    assert [entry["step"] for entry in expected] == list(range(1, 15))
    shutil.rmtree(small.run / "checkpoints" / "14")  # as if killed after step 12 was saved
    train(small, resume=True, quiet=True)
    assert numbers(small.run) == expected
    assert load_policy(small.run).parameter_hash == policy.parameter_hash
    assert policy.policy.goal.place == (-0.09, 0.09, 0.001)
    other = policy.towards("jaco_reach_bottom_right")
    assert (other.goal.place, policy.policy.goal.place) == ((0.09, -0.09, 0.001), (-0.09, 0.09, 0.001))


def test_a_domain_without_places_to_reach_takes_no_hindsight(small: TrainConfig, tmp_path: Path) -> None:
    from ringrl.data.collect import collect
    from ringrl.data.importer import import_archive

    collect("cartpole_swingup", tmp_path / "collected", episodes=2, seed=0)
    store = import_archive(tmp_path / "collected", tmp_path / "cartpole.h5", "cartpole")
    config = small.model_copy(update={"data": store.path, "task": "cartpole_swingup"})
    with pytest.raises(UserError, match=r"actor_critic\.hindsight: cartpole_swingup has no goal position"):
        train(config, quiet=True)
    assert not config.run.exists()
    plain = config.model_copy(update={"actor_critic": type(config.actor_critic)()})
    train(plain, quiet=True)
    assert load_policy(plain.run).step == 14


def test_a_step_that_is_not_finite_changes_no_parameter(step: Callable) -> None:
    _, state = start(NOISY)
    before = numpy_of(state)
    batch = make_batch(0)
    state, metrics = step(state, batch._replace(reward=np.full_like(batch.reward, np.inf)))
    assert (int(metrics["skipped"]), int(state.step)) == (1, 1)
    assert equal(before, numpy_of(state))
    state, metrics = step(state._replace(step=jnp.array(2, jnp.int32)), batch)
    assert int(metrics["skipped"]) == 0
    assert not equal(before, numpy_of(state))
