from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from ringrl.config import ModelConfig
from ringrl.context import Context, Outcome
from ringrl.model import Policy, make_policy
from ringrl.model.parallel import ONE_DEVICE, Parallel

OBSERVATION, ACTION = 3, 2


def before(outcome: Outcome) -> Outcome:
    """Return the outcome of each step's predecessor, for steps in time order."""
    return jax.tree.map(lambda x: np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], axis=1), outcome)


@pytest.fixture(scope="session")
def changed() -> Callable[[Context, str, int], Context]:
    """(context, field, t) -> the context with 1 added to that field of step t, in `previous` too."""

    def change(context: Context, name: str, t: int) -> Context:
        x = np.array(getattr(context, name))
        x[:, t] += 1
        context = context._replace(**{name: x})
        return context._replace(previous=before(Outcome(*(getattr(context, field) for field in Outcome._fields))))

    return change


@pytest.fixture(scope="session")
def context() -> Callable[..., Context]:
    """(time, batch=2, steps per trajectory=4) -> a random context."""

    def make(time: int, batch: int = 2, length: int = 4, seed: int = 0) -> Context:
        random = np.random.default_rng(seed)
        normal = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
        index = np.tile(np.arange(time, dtype=np.int32), (batch, 1))
        observation = normal(batch, time, OBSERVATION)
        outcome = Outcome(np.tanh(normal(batch, time, ACTION)), normal(batch, time), normal(batch, time))
        return Context(
            observation=observation,
            return_to_go=normal(batch, time),
            timestep=index % length,
            trajectory=index // length,
            position=index,
            start=index - index % length,
            weight=np.ones((batch, time), np.float32),
            previous=before(outcome),
            **outcome._asdict(),
        )

    return make


@pytest.fixture(scope="session")
def policy() -> Callable[..., Policy]:
    """(**settings) -> a tiny policy with perturbed parameters: biases are not zero, norm scales not one."""

    def make(parallel: Parallel = ONE_DEVICE, **settings: object) -> Policy:
        small = {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1}
        made = make_policy(ModelConfig.model_validate(small | settings), OBSERVATION, ACTION, 1, parallel=parallel)
        random = np.random.default_rng(2)
        graph, params, rest = nnx.split(made, nnx.Param, ...)
        params = jax.tree.map(lambda x: x + 0.2 * random.normal(size=x.shape).astype(np.float32), params)
        return nnx.merge(graph, params, rest)

    return make


@pytest.fixture(scope="session")
def quick() -> Callable[..., Callable]:
    """jax.jit with fewer compiler optimisations."""
    return partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="session")
def actions(quick) -> Callable[[Policy, Context], np.ndarray]:
    """Return the actions of the full forward pass (B, T, A)."""

    def run(policy: Policy, context: Context) -> np.ndarray:
        graph, state = nnx.split(policy)
        return np.asarray(quick(lambda state, context: nnx.merge(graph, state).actions(context))(state, context))

    return run
