from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from ringrl.config import ModelConfig
from ringrl.context import Context
from ringrl.model import Policy, make_policy

OBSERVATION, ACTION = 3, 2


@pytest.fixture(scope="session")
def context() -> Callable[..., Context]:
    """(time, batch=2, steps per trajectory=4) -> a random context."""

    def make(time: int, batch: int = 2, length: int = 4, seed: int = 0) -> Context:
        random = np.random.default_rng(seed)
        normal = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
        index = np.tile(np.arange(time, dtype=np.int32), (batch, 1))
        return Context(
            observation=normal(batch, time, OBSERVATION),
            action=np.tanh(normal(batch, time, ACTION)),
            reward=normal(batch, time),
            return_to_go=normal(batch, time),
            completion=normal(batch, time),
            timestep=index % length,
            trajectory=index // length,
        )

    return make


@pytest.fixture(scope="session")
def policy() -> Callable[..., Policy]:
    """(**settings) -> a tiny policy with parameters unlike their first values: biases are not zero, norms not one."""

    def make(**settings: object) -> Policy:
        small = {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1}
        made = make_policy(ModelConfig.model_validate(small | settings), OBSERVATION, ACTION, seed=1)
        random = np.random.default_rng(2)
        graph, params, rest = nnx.split(made, nnx.Param, ...)
        params = jax.tree.map(lambda x: x + 0.2 * random.normal(size=x.shape).astype(np.float32), params)
        return nnx.merge(graph, params, rest)

    return make


@pytest.fixture(scope="session")
def quick() -> Callable[..., Callable]:
    """jax.jit, compiled in half the time: the same mathematics."""
    return partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="session")
def actions(quick) -> Callable[[Policy, Context], np.ndarray]:
    """The actions of the full forward pass, (B, T, A)."""

    def run(policy: Policy, context: Context) -> np.ndarray:
        graph, state = nnx.split(policy)
        return np.asarray(quick(lambda state, context: nnx.merge(graph, state).actions(context))(state, context))

    return run
