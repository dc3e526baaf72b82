"""TD3: networks, losses and updates against their formulas."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ringrl.config import ModelConfig, OptimiserConfig, TrainConfig
from ringrl.context import Context, Transitions
from ringrl.model import ActorCritic, TrainState, make_policy
from ringrl.model.agents.td3 import EXORL, LEARNED, MLP, REBRAC, TD3, NetworkStyle

OBSERVATION, ACTION, BATCH = 3, 2, 6


def make(seed: int = 3) -> ActorCritic:
    """Return a small actor-critic with large last layers and targets that differ from the learned networks."""
    config = ModelConfig(kind="td3_bc", layers=2, width=16)
    policy = make_policy(config, OBSERVATION, ACTION, seed)
    random = np.random.default_rng(seed)
    graph, params = nnx.split(policy)
    params = jax.tree.map(lambda x: x + 0.3 * random.normal(size=x.shape).astype(np.float32), params)
    return nnx.merge(graph, params)


@pytest.fixture
def batch() -> Transitions:
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    discount = np.linspace(0.5, 0.99, BATCH, dtype=np.float32)
    following = 4 * normal(BATCH, OBSERVATION)  # beyond the clip at times
    action = np.tanh(normal(BATCH, ACTION))
    return Transitions(normal(BATCH, OBSERVATION), action, normal(BATCH), discount, following)


def network(mlp: nnx.Module, x: np.ndarray, style: NetworkStyle = REBRAC) -> np.ndarray:
    """Apply a network in float64."""
    x = np.asarray(x, np.float64)
    for index, layer in enumerate(mlp.layers):
        x = x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)
        if style.norm == "every" or index == 0:
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        x = np.tanh(x) if style.norm == "first" and index == 0 else np.maximum(x, 0)
    return x @ np.asarray(mlp.last.kernel[...], np.float64) + np.asarray(mlp.last.bias[...], np.float64)


def inputs(observation: np.ndarray) -> np.ndarray:
    """Return the network inputs in float64."""
    return np.clip(np.asarray(observation, np.float64), -5, 5)


@pytest.mark.parametrize("style", [REBRAC, EXORL])
def test_networks_by_hand(style: NetworkStyle) -> None:
    mlp = MLP([3, 16, 16, 16, 2], style, nnx.Rngs(params=0))
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    np.testing.assert_allclose(mlp(x), network(mlp, x, style), rtol=1e-3, atol=1e-5)
    assert np.abs(mlp(x)).max() < 0.3, "the last layer starts near zero"


def test_inputs_are_clipped_observations(batch: Transitions) -> None:
    np.testing.assert_array_equal(make().inputs(batch.following), inputs(batch.following))
    assert np.abs(batch.following).max() > 5, "there is something to clip"


def test_target_by_hand(batch: Transitions) -> None:
    policy = make()
    noise = np.random.default_rng(1).normal(size=(BATCH, ACTION)).astype(np.float32)
    x = inputs(batch.following)
    free = np.tanh(network(policy.target_actor, x)) + noise
    assert (np.abs(free) > 1).any(), "there is something to clip"
    together = np.concatenate([x, np.clip(free, -1, 1)], -1)
    first, second = (network(critic, together)[:, 0] for critic in policy.target_critics)
    assert 0 < (first < second).sum() < BATCH, "each critic is the lower one somewhere"
    expected = batch.reward + batch.discount * np.minimum(first, second)
    np.testing.assert_allclose(policy.target_value(batch, jnp.asarray(noise)), expected, rtol=2e-4, atol=2e-4)


def test_losses_by_hand(batch: Transitions) -> None:
    policy = make()
    x = inputs(batch.observation)
    target = np.linspace(-1, 1, BATCH, dtype=np.float32)
    values = [network(critic, np.concatenate([x, batch.action], -1))[:, 0] for critic in policy.critics]
    expected = sum(np.square(value - target).mean() for value in values)
    np.testing.assert_allclose(policy.critic_loss(batch, jnp.asarray(target)), expected, rtol=1e-3)

    action = np.tanh(network(policy.actor, x))
    value = network(policy.critics[0], np.concatenate([x, action], -1))[:, 0]
    expected = -value.mean() / np.abs(value).mean() + 0.7 * np.square(action - batch.action).mean()
    np.testing.assert_allclose(policy.actor_loss(batch, 0.7), expected, rtol=1e-2, atol=1e-3)


def test_actor_gradient_stops_at_the_value_scale(batch: Transitions) -> None:
    """Otherwise a policy could lower its loss by making values small."""
    policy = make()
    graph, params = nnx.split(policy)
    scale = 1e-3 + jnp.abs(_first_values(policy, batch)).mean()
    found = jax.grad(lambda p: nnx.merge(graph, p).actor_loss(batch, 0.0))(params)
    expected = jax.grad(lambda p: -_first_values(nnx.merge(graph, p), batch).mean() / scale)(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def _first_values(policy: ActorCritic, batch: Transitions) -> jax.Array:
    x = policy.inputs(batch.observation)
    return policy.critics[0](jnp.concatenate([x, jnp.tanh(policy.actor(x))], -1))[:, 0]


def test_actions_use_the_target_actor(context: Callable[..., Context]) -> None:
    policy, steps = make(), context(time=3)
    x = inputs(steps.observation[:, -1])
    expected = np.tanh(network(policy.target_actor, x))
    current = jax.tree.map(lambda a: a[:, -1:], steps)
    found, memory = policy.act(None, current, policy.reset(2, 10))
    assert memory is None
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(policy.actions(steps)[:, -1], found, rtol=1e-5, atol=1e-6)
    assert np.abs(np.tanh(network(policy.actor, x)) - expected).max() > 0.01, "the two actors differ here"


def test_untrained_actions_are_near_zero_and_targets_equal_networks(batch: Transitions) -> None:
    policy = make_policy(ModelConfig(kind="td3_bc", layers=2, width=64), OBSERVATION, ACTION, 0)
    x = policy.inputs(batch.observation)
    assert np.abs(policy.actor(x)).max() < 0.3
    np.testing.assert_array_equal(policy.actor(x), policy.target_actor(x))
    first, second = (critic(jnp.concatenate([x, batch.action], -1)) for critic in policy.critics)
    assert np.abs(first - second).max() > 1e-3, "the critics are two"


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
    """Return random states and actions. `best_action` has the highest reward, and the mean action is 0."""
    random = np.random.default_rng(seed)
    observation, following = random.normal(size=(2, size, 3)).astype(np.float32)
    action = random.uniform(-1, 1, (size, 1)).astype(np.float32)
    reward = 1 - np.square(action[:, 0] - best_action(observation))
    return Transitions(observation, action, reward, np.full(size, 0.5, np.float32), following)


def start(config: TrainConfig, step: int = 0) -> tuple[TD3, TrainState]:
    policy = make_policy(config.model, 3, 1, config.seed)
    td3 = TD3(nnx.split(policy, nnx.Param)[0], config.optimiser, config.actor_critic, config.seed)
    return td3, td3.init(policy)._replace(step=jnp.array(step, jnp.int32))


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
    return jax.jit(start(NOISY)[0].update, donate_argnums=0)


def test_actor_and_targets_move_every_second_step_and_critics_always(step: Callable) -> None:
    _, state = start(NOISY)
    for number in range(4):
        before = numpy_of(state)
        state, metrics = step(state, make_batch(number))
        after = numpy_of(state)
        changed = {name for name in before if not equal(before[name], after[name])}
        assert changed == (set(before) if number % 2 == 0 else {"critics"})
        assert all(np.isfinite(value) for value in metrics.values())
        if number % 2 == 0:
            for name in LEARNED:
                expected = jax.tree.map(
                    lambda old, new: 0.995 * old + 0.005 * new, before[f"target_{name}"], after[name]
                )
                assert_close(after[f"target_{name}"], expected, atol=1e-6)
    assert int(state.step) == 4


@pytest.mark.parametrize(
    "number", [pytest.param(6, marks=pytest.mark.slow), 7], ids=["with the actor's update", "without"]
)
def test_critics_descend_towards_a_constant_target(step: Callable, number: int) -> None:
    """Gradient and optimiser update of the critics by hand. The noise depends on seed and step."""
    td3, state = start(NOISY, number)
    batch, graph = make_batch(0), td3.graph
    noise = np.clip(0.4 * jax.random.normal(jax.random.fold_in(jax.random.key(3), number), (128, 1)), -0.1, 0.1)
    assert (np.abs(noise) == np.float32(0.1)).any()
    target = np.asarray(nnx.merge(graph, state.params).target_value(batch, jnp.asarray(noise)))
    critics = state.params["critics"]
    gradients = jax.grad(
        lambda critics: nnx.merge(graph, state.params | {"critics": critics}).critic_loss(batch, jnp.asarray(target))
    )(critics)
    updates, _ = td3.optimisers["critics"].update(gradients, state.optimiser["critics"], critics)
    expected = jax.tree.map(np.array, optax.apply_updates(critics, updates))
    after, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradients), rtol=1e-4)
    np.testing.assert_allclose(metrics["value"], target.mean(), rtol=1e-4)
    assert_close(after.params["critics"], expected, atol=1e-4)


def test_actor_ascends_the_updated_critic(step: Callable) -> None:
    td3, state = start(NOISY, 6)
    batch, actor = make_batch(0), jax.tree.map(jnp.copy, state.params["actor"])
    optimiser = jax.tree.map(jnp.copy, state.optimiser["actor"])
    after, _ = step(state, batch)
    gradients = jax.grad(
        lambda actor: nnx.merge(td3.graph, after.params | {"actor": actor}).actor_loss(
            batch, NOISY.actor_critic.behaviour_cloning
        )
    )(actor)
    updates, _ = td3.optimisers["actor"].update(gradients, optimiser, actor)
    assert_close(after.params["actor"], optax.apply_updates(actor, updates), atol=1e-5)


def test_actor_schedule_ends_with_its_last_update() -> None:
    params = {"actor": {"w": jnp.ones((1, 1))}, "critics": {"w": jnp.ones((1, 1))}}
    settings = {"steps": 6, "warmup_steps": 0, "learning_rate": 0.1, "final_learning_rate": 0.0, "weight_decay": 0.0}
    config = NOISY.model_copy(update={"optimiser": OptimiserConfig.model_validate(settings)})
    moved = {}
    for name, optimiser in start(config)[0].optimisers.items():
        state, moved[name] = optimiser.init(params[name]), []
        for _ in range(7 if name == "critics" else 4):
            updates, state = optimiser.update({"w": jnp.ones((1, 1))}, state, params[name])
            moved[name].append(-float(updates["w"][0, 0]))
    np.testing.assert_allclose(moved["actor"], moved["critics"][::2], atol=1e-6)
    assert moved["actor"][0] == pytest.approx(0.1)
    assert moved["actor"][-1] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
def test_td3_finds_the_best_action_and_cloning_stays_near_the_data() -> None:
    """Expected value: .57 for the data's action, then .96 per step (1 without target noise), discounted by a half."""
    found, batch = {}, make_batch(999)
    for cloning in (0.0, 100.0):
        config = make_config(behaviour_cloning=cloning, target_rate=0.1)
        td3, state = start(config)
        step = jax.jit(td3.update, donate_argnums=0)
        for number in range(400):
            state, metrics = step(state, make_batch(number))
        trained = nnx.merge(td3.graph, state.params)
        found[cloning] = np.tanh(trained.target_actor(jnp.asarray(batch.observation)))[:, 0]
        if not cloning:
            assert float(metrics["value"]) == pytest.approx(0.57 + 0.5 * 0.96 / (1 - 0.5), abs=0.2)
    assert np.abs(found[0.0] - best_action(batch.observation)).mean() < 0.15
    assert np.abs(found[100.0]).mean() < 0.15 < np.abs(best_action(batch.observation)).mean()


def test_a_non_finite_step_changes_no_parameter(step: Callable) -> None:
    _, state = start(NOISY)
    before = numpy_of(state)
    batch = make_batch(0)
    state, metrics = step(state, batch._replace(reward=np.full_like(batch.reward, np.inf)))
    assert (int(metrics["skipped"]), int(state.step)) == (1, 1)
    assert equal(before, numpy_of(state))
    state, metrics = step(state._replace(step=jnp.array(2, jnp.int32)), batch)
    assert int(metrics["skipped"]) == 0
    assert not equal(before, numpy_of(state))
