from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import pytest

from ringrl.attention.definition import definition

Arrays = dict[str, np.ndarray]
QUICK = {"xla_backend_optimization_level": 0}  # compiles twice as fast


@pytest.fixture(scope="session")
def quick() -> Callable[..., Callable]:
    """Return a jax.jit that compiles twice as fast."""
    return partial(jax.jit, compiler_options=QUICK)


def random_arrays(batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int, seed: int = 0) -> Arrays:
    """Return random q, k, v and cotangents do, dlse; float32."""
    random = np.random.default_rng(seed)
    shapes = dict.fromkeys(("q", "do"), (batch, tokens, heads, head_dim))
    shapes |= dict.fromkeys(("k", "v"), (batch, tokens, kv_heads, head_dim)) | {"dlse": (batch, tokens, heads)}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="session")
def draw() -> Callable[..., Arrays]:
    return random_arrays


@pytest.fixture(scope="session")
def oracle() -> Callable[..., Arrays]:
    return definition
