"""Attention inside the layers of Flax, and without the rest of RingRL."""

import inspect
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from ringrl.attention import as_attention_fn, attention, ring_attention, ring_attention_shard


def layer(attention_fn=None, **options) -> nnx.MultiHeadAttention:
    chosen = {} if attention_fn is None else {"attention_fn": attention_fn}
    return nnx.MultiHeadAttention(
        num_heads=2, in_features=8, qkv_features=16, decode=False, rngs=nnx.Rngs(0), **chosen, **options
    )


@pytest.mark.slow
def test_equals_flax_with_a_causal_mask():
    x = jax.random.normal(jax.random.key(1), (2, 12, 8))
    mask = nnx.make_causal_mask(jnp.ones((2, 12)))
    ours = layer(as_attention_fn(partial(attention, is_causal=True)))
    flax = layer()
    np.testing.assert_allclose(ours(x), flax(x, mask=mask), rtol=1e-5, atol=1e-5)
    gradient_of = nnx.grad(lambda module, mask: jnp.square(module(x, mask=mask)).sum())
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), gradient_of(ours, None), gradient_of(flax, mask)
    )


def test_mask_and_dropout_raise():
    x = jnp.ones((1, 4, 8))
    attention_fn = as_attention_fn(attention)
    with pytest.raises(ValueError, match=r"^mask: "):
        layer(attention_fn)(x, mask=nnx.make_causal_mask(jnp.ones((1, 4))))
    with pytest.raises(ValueError, match=r"^dropout_rate: "):
        layer(attention_fn, dropout_rate=0.5, deterministic=False)(x, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_equals_linen(dtype):
    """Every argument that linen passes: mask, dtype, precision, dropout and its random key, softmax in float32."""
    x = jax.random.normal(jax.random.key(1), (2, 12, 8))
    options = {"num_heads": 2, "dtype": dtype, "precision": "highest", "force_fp32_for_softmax": True}
    options |= {"dropout_rate": 0.5, "deterministic": True}
    flax = linen.MultiHeadDotProductAttention(**options)
    ours = linen.MultiHeadDotProductAttention(**options, attention_fn=as_attention_fn(attention))
    parameters = flax.init(jax.random.key(0), x)
    expected = flax.apply(parameters, x, mask=linen.make_causal_mask(jnp.ones((2, 12))))
    got = ours.apply(parameters, x)
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(np.float32(got), np.float32(expected), atol=1e-5 if dtype is None else 0.02)
    with pytest.raises(ValueError, match=r"^mask: "):
        ours.apply(parameters, x, mask=linen.make_causal_mask(jnp.ones((2, 12))))


@pytest.mark.slow
def test_cross_attention():
    x, memory = (jax.random.normal(jax.random.key(n), (2, n, 8)) for n in (5, 12))
    ours, flax = layer(as_attention_fn(partial(attention, is_causal=False))), layer()
    np.testing.assert_allclose(ours(x, memory), flax(x, memory), rtol=1e-5, atol=1e-5)


ALONE = """
import importlib.metadata, re, sys

needed, todo = set(), ["jax", "jaxlib", "numpy", "jaxtyping"]
while todo:
    name = re.sub("[-_.]+", "-", todo.pop()).lower()
    if name not in needed:
        needed.add(name)
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        todo += [re.match("[A-Za-z0-9_.-]+", one)[0] for one in requires if "extra ==" not in one]
owners = importlib.metadata.packages_distributions()
absent = {
    module for module, names in owners.items()
    if module != "ringrl" and not {re.sub("[-_.]+", "-", name).lower() for name in names} & needed
}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import jax, jax.numpy as jnp, jaxtyping
known = set(sys.modules)
import ringrl.attention as a
own = ("ringrl", "jax", *sys.stdlib_module_names)
assert not {name for name in set(sys.modules) - known if name.split(".")[0] not in own or "pallas" in name}
assert {"flax", "optax", "gymnasium", "h5py"} <= absent
x = jnp.ones((1, 8, 2, 4))
mesh = jax.sharding.Mesh(jax.devices(), ("seq",))
jax.jit(jax.grad(lambda x: a.ring_attention(x, x, x, mesh=mesh).sum()))(x)
a.decode_attention(x[:, :1], x, x, length=8)
a.as_attention_fn(a.attention)(x, x, x)
"""


def test_runs_where_only_jax_numpy_and_jaxtyping_are_installed():
    """All other packages are hidden. The import takes 0.03 s, because it imports nothing more, above all no Pallas."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("function", "own"), [(ring_attention, {"mesh": None}), (ring_attention_shard, {"axis_name": "seq"})]
)
def test_rings_list_and_check_the_keywords_of_attention(function, own):
    assert set(inspect.signature(attention).parameters) <= set(inspect.signature(function).parameters)
    x = jnp.ones((1, 8, 2, 4))
    with pytest.raises(TypeError, match=rf"^{function.__name__}: got an unexpected keyword argument 'causal'$"):
        function(x, x, x, **own, causal=True)
