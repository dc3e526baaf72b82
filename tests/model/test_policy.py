from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ringrl.attention import to_layout
from ringrl.config import ModelConfig
from ringrl.model import TOKEN_SETS, make_policy
from ringrl.model.heads import BINS, LOG_STD_RANGE, BinsHead, GaussianHead, MSEHead, make_head

STEPS = 6
slow = partial(pytest.param, marks=pytest.mark.slow)
# Tokens of one kind before the state, and all tokens as one.
SETS = [name if name in ("at5", "fused1") else slow(name) for name in TOKEN_SETS]
KNOWN_LATER = ("action", "reward", "completion")  # the action of step t must not depend on these values of step t


@pytest.mark.parametrize("token_set", TOKEN_SETS)
def test_action_dependencies(token_set, policy, context, changed, quick):
    """An action depends on R_t, s_t and the tokens of earlier steps, and not on a_t, r_t, d_t or later steps."""
    made, whole = policy(token_set=token_set, layers=1), context(STEPS)
    graph, state = nnx.split(made)
    run = quick(lambda context: nnx.merge(graph, state).actions(context))
    before = np.asarray(run(whole))
    shown = set(TOKEN_SETS[token_set].before + TOKEN_SETS[token_set].after)
    shown = shown if "fused" not in shown else {"return_to_go", "observation", *KNOWN_LATER}
    for name in ("return_to_go", "observation", *KNOWN_LATER):
        for t in range(STEPS):
            difference = np.abs(np.asarray(run(changed(whole, name, t))) - before).max((0, 2))
            first = t + 1 if name in KNOWN_LATER else t
            assert (difference[:first] == 0).all(), f"{name} of step {t} is seen too early"
            assert ((difference[first:] > 0) == (name in shown)).all(), f"{name} of step {t}"


@pytest.mark.parametrize(
    ("first", "token_set"),
    [one if one[1] in ("at5", "fused1") else slow(*one) for one in enumerate(TOKEN_SETS)],
)
def test_episode_window(first, token_set, policy, context, changed, quick):
    """An action depends on the window of its own trajectory, once more for each layer, and on all earlier ones.

    Every window occurs with two token sets, and with both kinds of attention.
    """
    steps, length = 10, 4
    whole = context(steps, length=length)
    windows_of_sets = ([0], [2], [None], [1, 1], [0, 3]), ([1], [3], [9], [2, 2], [1, None])
    for index, windows in enumerate(windows_of_sets[first % 2]):
        attention = ("vanilla", "ring")[(first // 2 + index) % 2]
        made = policy(token_set=token_set, attention=attention, layers=len(windows), episode_window=windows)
        graph, state = nnx.split(made)
        run = quick(lambda context, graph=graph, state=state: nnx.merge(graph, state).actions(context))
        before = np.asarray(run(whole))
        reach = sum(steps if window is None else max(window - 1, 0) for window in windows)
        for u in range(steps):
            difference = np.abs(np.asarray(run(changed(whole, "observation", u))) - before).max((0, 2))
            t = np.arange(steps)
            is_earlier, is_near = (
                u // length < t // length,
                (t - u >= 0) & (t - u <= reach) & (u // length == t // length),
            )
            np.testing.assert_array_equal(difference > 0, is_earlier | is_near, err_msg=f"{windows}, step {u}")


@pytest.mark.parametrize("token_set", SETS)
def test_hidden_inputs(token_set, policy, context, changed, quick):
    whole = context(STEPS)
    for setting, name in (("past_actions", "action"), ("past_rewards", "reward")):
        if name == "reward" and token_set == "dt3":
            continue  # has no rewards
        graph, state = nnx.split(policy(token_set=token_set, **{setting: "off"}))
        run = quick(lambda context, graph=graph, state=state: nnx.merge(graph, state).actions(context))
        before = np.asarray(run(whole))
        np.testing.assert_array_equal(run(changed(whole, name, 1)), before)
        assert (np.asarray(run(changed(whole, "observation", 1))) != before).any()


# Kinds and heads are separate modules.
KINDS_AND_HEADS = [("transformer", "mse"), ("behaviour_cloning", "gaussian"), ("transformer", "bins")]


@pytest.mark.parametrize(("kind", "head"), [*KINDS_AND_HEADS[:2], slow(*KINDS_AND_HEADS[2])])
def test_loss_on_all_and_on_the_last_trajectory(kind, head, policy, context, quick):
    """The last trajectories differ in length: the loss is a mean over steps, not over contexts."""
    whole = context(STEPS, length=4)
    whole.trajectory[1] = [0, 0, 0, 0, 0, 1]
    for loss_on in ("all", "last"):
        made = policy(kind=kind, action_head=head, loss_on=loss_on, layers=1)
        graph, state = nnx.split(made)
        both = quick(lambda s, c, graph=graph: (nnx.merge(graph, s).loss(c), nnx.merge(graph, s).features(c)))
        found, features = both(state, whole)
        per_step = np.asarray(made.head.loss(features, jnp.asarray(whole.action)))
        chosen = [per_step[0, 4], per_step[0, 5], per_step[1, 5]] if loss_on == "last" else per_step.ravel()
        np.testing.assert_allclose(found, np.mean(chosen), rtol=1e-5)
        assert found.shape == ()


@pytest.mark.parametrize(
    ("kind", "loss_on"),
    [
        ("transformer", "all"),
        ("behaviour_cloning", "last"),
        slow("transformer", "last"),
        slow("behaviour_cloning", "all"),
    ],
)
def test_padding_changes_neither_loss_nor_actions(kind, loss_on, policy, context, quick):
    """The second context is two steps shorter. Values of padding do not matter."""
    made = policy(kind=kind, loss_on=loss_on, layers=1)
    graph, state = nnx.split(made)
    run = quick(lambda c: (nnx.merge(graph, state).loss(c), nnx.merge(graph, state).actions(c)))
    whole = context(STEPS, length=2)
    whole.weight[1, 4:] = 0
    whole.trajectory[1, 4:] = 0
    loss, found = run(whole)
    parts = [whole, jax.tree.map(lambda x: x[1:, :4], whole)]
    per_step = [
        np.asarray(made.head.loss(made.features(part), jnp.asarray(part.action)))[row]
        for part, row in zip(parts, (0, 0), strict=True)
    ]
    chosen = [x[-2:] for x in per_step] if loss_on == "last" else per_step
    np.testing.assert_allclose(loss, np.concatenate(chosen).mean(), rtol=1e-5)
    other = whole._replace(action=whole.action.copy(), observation=whole.observation.copy())
    other.action[1, 4:], other.observation[1, 4:] = 0.5, -3
    other_loss, other_found = run(other)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    np.testing.assert_array_equal(other_found[1, :4], found[1, :4])


@pytest.mark.parametrize("token_set", ["at5", *(slow(name) for name in TOKEN_SETS if name != "at5")])
def test_permuted_steps_give_the_same_loss_and_actions(token_set, policy, context, quick):
    """Positions define the time order of permuted steps."""
    whole = context(8, length=3)
    settings = {"loss_on": "last", "timestep_embedding": True, "episode_window": [2, None]}
    graph, state = nnx.split(policy(token_set=token_set, **settings))
    run = quick(lambda c: (nnx.merge(graph, state).loss(c), nnx.merge(graph, state).actions(c)))
    loss, found = run(whole)
    for layout in ("striped", "zigzag"):
        moved_loss, moved = run(jax.tree.map(lambda x, layout=layout: to_layout(x, layout, 4), whole))
        np.testing.assert_allclose(moved_loss, loss, rtol=1e-5)
        np.testing.assert_allclose(moved, to_layout(found, layout, 4), rtol=1e-5, atol=1e-5)
        assert np.abs(moved - found).max() > 0.05


def test_mean_squared_error_by_hand():
    head = MSEHead(4, 2, nnx.Rngs(params=0))
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    action = np.random.default_rng(1).uniform(-1, 1, (3, 2)).astype(np.float32)
    mean = np.tanh(x @ np.asarray(head.linear.kernel[...]) + np.asarray(head.linear.bias[...]))
    np.testing.assert_allclose(head.action(x), mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(head.loss(x, action), ((mean - action) ** 2).mean(-1), rtol=1e-5)


def test_gaussian_by_hand():
    head = GaussianHead(4, 2, nnx.Rngs(params=0))
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    action = np.random.default_rng(1).uniform(-1, 1, (3, 2)).astype(np.float32)
    out = x @ np.asarray(head.linear.kernel[...]) + np.asarray(head.linear.bias[...])
    low, high = LOG_STD_RANGE
    mean, std = np.tanh(out[:, :2]), np.exp(low + (high - low) / (1 + np.exp(-out[:, 2:])))
    density = np.exp(-((action - mean) ** 2) / (2 * std**2)) / (std * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(head.action(x), mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(head.loss(x, action), -np.log(density).mean(-1), rtol=1e-4)
    huge = 1e4 * np.ones((1, 4), np.float32)
    assert np.isfinite(head.loss(huge, action[:1])).all()


def test_bins_by_hand():
    head = BinsHead(4, 2, nnx.Rngs(params=0))
    x = np.random.default_rng(0).normal(size=(3, 4))
    kernel, bias = (np.asarray(y[...], np.float64) for y in (head.linear.kernel, head.linear.bias))
    logits = (x @ kernel + bias).reshape(3, 2, BINS)
    values = np.linspace(-1, 1, BINS)
    log_share = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    action = np.array([[-1.0, 0.2], [1.0, 0.13], [-0.37, 0.0]])
    for i, j in np.ndindex(3, 2):
        below = min(int((action[i, j] + 1) / 0.1 + 1e-9), BINS - 2)
        upper = (action[i, j] - values[below]) / 0.1
        expected = -(1 - upper) * log_share[i, j, below] - upper * log_share[i, j, below + 1]
        one = np.full(2, action[i, j], np.float32)
        found = np.asarray(head.loss(x.astype(np.float32), np.broadcast_to(one, (3, 2))))[i]
        other = -np.interp(action[i, j], values, log_share[i, 1 - j])
        np.testing.assert_allclose(found, (expected + other) / 2, rtol=1e-4)
        best = logits[i, j].argmax()
        near = slice(max(best - 1, 0), best + 2)
        share = np.exp(log_share[i, j, near])
        mode = np.asarray(head.action(x.astype(np.float32)))[i, j]
        np.testing.assert_allclose(mode, (share * values[near]).sum() / share.sum(), rtol=1e-4, atol=1e-6)
    mean_head = BinsHead(4, 2, nnx.Rngs(params=0), "mean")
    nnx.update(mean_head, nnx.state(head))
    mean = (np.exp(log_share) * values).sum(-1)
    np.testing.assert_allclose(mean_head.action(x.astype(np.float32)), mean, rtol=1e-4, atol=1e-6)
    assert np.isfinite(head.loss(1e4 * np.ones((1, 4), np.float32), action[:1])).all()


def test_bins_choose_a_mode_where_squared_error_averages():
    """Actions of bimodal data without informative features."""
    sides = np.tile([[-0.8], [-0.8], [-0.8], [0.7], [0.7]], (8, 1)).astype(np.float32)
    x, found = np.ones((len(sides), 4), np.float32), {}
    for kind, *choice in ((MSEHead,), (BinsHead, "mode"), (BinsHead, "mean")):
        graph, state = nnx.split(kind(4, 1, nnx.Rngs(params=0), *choice))
        step = jax.jit(jax.grad(lambda s, graph=graph: nnx.merge(graph, s).loss(x, sides).mean()))
        for _ in range(300):
            state = jax.tree.map(lambda p, g: p - 0.1 * g, state, step(state))
        found[kind, *choice] = float(nnx.merge(graph, state).action(x[:1])[0, 0])
    assert found[MSEHead,] == pytest.approx(-0.2, abs=0.02)
    assert found[BinsHead, "mode"] == pytest.approx(-0.8, abs=0.05)
    assert found[BinsHead, "mean"] == pytest.approx(-0.2, abs=0.02)


def test_the_settings_choose_the_action_of_bins():
    x = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    chosen = {}
    for choice in ("mode", "mean"):
        made = make_head(ModelConfig(width=16, action_head="bins", action_choice=choice), 2, nnx.Rngs(params=0))
        chosen[choice] = made.action(x)
        np.testing.assert_array_equal(chosen[choice], BinsHead(16, 2, nnx.Rngs(params=0), choice).action(x))
    assert np.abs(chosen["mode"] - chosen["mean"]).max() > 0.1


def test_behaviour_cloning_uses_the_observation_only(policy, context, changed):
    made, whole = policy(kind="behaviour_cloning"), context(STEPS)
    before = np.asarray(made.actions(whole))
    for name in ("return_to_go", *KNOWN_LATER):
        np.testing.assert_array_equal(made.actions(changed(whole, name, 2)), before)
    after = np.asarray(made.actions(changed(whole, "observation", 2)))
    moved = np.abs(after - before).max((0, 2)) > 0
    assert moved.tolist() == [t == 2 for t in range(STEPS)]
    backwards = jax.tree.map(lambda x: x[:, ::-1], whole)
    np.testing.assert_allclose(made.actions(backwards)[:, ::-1], before, rtol=1e-5, atol=1e-6)
    memory = made.reset(2, 100)
    for t in range(STEPS):
        step = jax.tree.map(lambda x, t=t: x[:, t : t + 1], whole)
        action, memory = made.act(None if t == 0 else step, step, memory)
        np.testing.assert_allclose(action, before[:, t], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "head"), KINDS_AND_HEADS)
def test_actions_stay_within_their_range(kind, head, policy, context, actions):
    wild = context(4)._replace(observation=1e3 * context(4).observation)
    actions = actions(policy(kind=kind, action_head=head, layers=1), wild)
    assert actions.shape == (2, 4, 2)
    assert actions.dtype == np.float32
    assert np.isfinite(actions).all()
    assert np.abs(actions).max() <= 1


@pytest.mark.parametrize("kind", ["transformer", "behaviour_cloning"])
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(kind, policy, context, quick):
    whole = context(STEPS)
    settings = {"kind": kind, "layers": 1, "timestep_embedding": True, "trajectory_embedding": True}
    exact, rough = policy(**settings), policy(**settings, dtype="bfloat16")
    graph, params = nnx.split(rough, nnx.Param)
    loss, gradients = quick(jax.value_and_grad(lambda p: nnx.merge(graph, p).loss(whole)))(params)
    assert {x.dtype for x in jax.tree.leaves((params, gradients))} == {jnp.dtype(jnp.float32)}
    assert loss.dtype == jnp.float32
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
    precise = quick(exact.loss)(whole)
    np.testing.assert_allclose(loss, precise, rtol=0.05)
    assert float(loss) != float(precise), "nothing was computed in bfloat16"


def test_parameters_follow_the_seed():
    config = ModelConfig(layers=1, width=16)

    def parameters(seed: int) -> list[np.ndarray]:
        return [np.asarray(x) for x in jax.tree.leaves(nnx.state(make_policy(config, 3, 2, seed), nnx.Param))]

    for a, b in zip(parameters(0), parameters(0), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(parameters(0), parameters(1), strict=True))


def test_wrong_heads_are_named():
    for settings, name in (({"heads": 3}, "heads"), ({"kv_heads": 3, "heads": 4}, "kv_heads"), ({"width": 6}, "width")):
        with pytest.raises(ValueError, match=name):
            ModelConfig.model_validate({"width": 128} | settings)
