"""One optimiser step on the imitation loss, as a pure function of state and batch."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ringrl.context import Context
from ringrl.model.parallel import Parallel

Tree = TypeVar("Tree")


class TrainState(NamedTuple):
    """Parameters, optimiser state and step count."""

    params: Any  # nested dict of float32 arrays
    optimiser: Any  # optax state
    step: jax.Array  # int32, steps taken


def initial_state(policy: nnx.Module, optimiser: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step."""
    params = nnx.to_pure_dict(nnx.state(policy, nnx.Param))
    return TrainState(params, optimiser.init(params), jnp.zeros((), jnp.int32))


def abstract_state(
    make_policy: Callable[[], nnx.Module], optimiser: optax.GradientTransformation, parallel: Parallel
) -> TrainState:
    """Return the shapes, dtypes and (with a mesh) shardings of `initial_state`, without allocating memory."""
    parameters = nnx.state(nnx.eval_shape(make_policy), nnx.Param)
    params = nnx.to_pure_dict(parameters)
    state = TrainState(params, jax.eval_shape(optimiser.init, params), jax.ShapeDtypeStruct((), jnp.int32))  # type: ignore[arg-type]
    if parallel.mesh is None:
        return state
    of_params = parallel.parameter_shardings(parameters)
    everywhere = parallel.sharding()
    of_optimiser = optax.tree.map_params(
        optimiser,
        lambda _, sharding: sharding,
        state.optimiser,
        of_params,
        transform_non_params=lambda _: everywhere,
    )
    shardings: Any = TrainState(of_params, of_optimiser, everywhere)  # type: ignore[arg-type]
    placed: TrainState = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, shardings
    )
    return placed


def sharded_initial_state(
    make_policy: Callable[[], nnx.Module], optimiser: optax.GradientTransformation, parallel: Parallel
) -> TrainState:
    """Return `initial_state`, with every array created in shards on the devices of the mesh."""
    if parallel.mesh is None:
        return initial_state(make_policy(), optimiser)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(make_policy, optimiser, parallel))
    return jax.jit(lambda: initial_state(make_policy(), optimiser), out_shardings=shardings)()


def with_params(graph: Any, params: Any) -> Any:
    """Return the policy of a graph definition with a nested dict of parameters."""
    return nnx.merge(graph, params)


def make_train_step(
    graph: Any,
    optimiser: optax.GradientTransformation,
    accumulation: int = 1,
) -> Callable[[TrainState, Context], tuple[TrainState, dict[str, jax.Array]]]:
    """Return a jitted step that donates the state. Metrics: loss, gradient_norm (before clipping) and skipped (0 or 1).

    The gradient of the whole batch is computed in `accumulation` parts, one after the other. If the loss or the
    gradient is not finite, the step is skipped: only step counts change.
    """

    def loss_of(params: Any, part: Context, weight: jax.Array) -> jax.Array:
        return with_params(graph, params).loss_sum(part) / weight

    def train_step(state: TrainState, batch: Context) -> tuple[TrainState, dict[str, jax.Array]]:
        weight = with_params(graph, state.params).loss_weight(batch)
        value_and_grad = jax.value_and_grad(loss_of)

        def add(total: Any, part: Context) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, value_and_grad(state.params, part, weight)), None

        if accumulation == 1:
            loss, gradients = value_and_grad(state.params, batch, weight)
        else:
            start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
            (loss, gradients), _ = jax.lax.scan(add, start, _parts(batch, accumulation))
        updates, optimiser_state = optimiser.update(gradients, state.optimiser, state.params)
        params, norm = optax.apply_updates(state.params, updates), optax.tree.norm(gradients)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        params, optimiser_state = accept(is_finite, (params, optimiser_state), (state.params, state.optimiser))
        metrics = {"loss": loss, "gradient_norm": norm, "skipped": 1 - is_finite}
        return TrainState(params, optimiser_state, state.step + 1), metrics

    return jax.jit(train_step, donate_argnums=0)


def accept(is_finite: jax.Array, new: Tree, old: Tree) -> Tree:
    """Return the new values if they are finite, else the old ones. Integer counts always advance."""
    choose = lambda x, y: jnp.where(is_finite, x, y) if jnp.issubdtype(x.dtype, jnp.inexact) else x  # noqa: E731
    kept: Tree = jax.tree.map(choose, new, old)
    return kept


def _parts(batch: Context, number: int) -> Context:
    """Reshape (B, ...) to (number, B / number, ...). Every device keeps its own contexts."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, number, *x.shape[1:]), 1, 0), batch)
