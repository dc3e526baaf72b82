"""The Hopper kernels compile ahead of time for an H200 (no GPU needed), also inside shard_map. No values are tested.

Needs the CUDA plugin in jax's version (`pip install "jax[cuda13]"`); skipped without it.
"""

import importlib.util
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ringrl.attention.contract import Cotangents, Gradients, Inputs, Partial
from ringrl.attention.kernels.mosaic_gpu import backward, forward
from ringrl.attention.mask import Options, Rule, Side

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda13") is None
    or importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason=f'needs the CUDA compiler: pip install "jax[cuda13]=={jax.__version__}"',
)

H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  l2_cache_size: 52428800 memory_bandwidth: 4800000000000 device_memory_size: 150754820096
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""
SPECS = {  # specifications of a ring's shard: the token axis is sharded
    "rows": PartitionSpec(None, "seq"),
    "kv": PartitionSpec(None, None, "seq"),
}


@pytest.fixture(scope="module", autouse=True)
def gpus_are_of_cuda() -> Iterator[None]:
    """Let JAX treat "gpu" as CUDA without a GPU."""
    from jax._src import xla_bridge

    with pytest.MonkeyPatch.context() as patch:
        original = xla_bridge.canonicalize_platform
        patch.setattr(xla_bridge, "canonicalize_platform", lambda name: "cuda" if name == "gpu" else original(name))
        yield


def compile_ring_step(
    devices: int, options: Options, shape: tuple[int, ...], keys: int, dtype: str, *, has_prefix: bool = False
) -> str:
    """Compile two hops of a forward pass and one backward step (B, Hkv, G, S, D) for H200s."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology=f"1x1x{devices}")
    mesh = Mesh(np.array(topology.devices), ("seq",))
    batch, kv_heads, groups, queries, head_dim = shape

    def step(inputs: Inputs, do: jax.Array) -> tuple[Partial, Gradients]:
        part = forward(inputs, options)
        part = forward(inputs, options, part)
        delta = (part.o * do.astype(jnp.float32)).sum(-1)
        return part, backward(inputs, options, Cotangents(do, part.lse, delta))

    def argument(kind: str, dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, SPECS[kind]))

    q = argument("rows", dtype, batch * kv_heads, groups * queries, head_dim)
    kv = argument("kv", dtype, batch * kv_heads, 2, keys, head_dim)
    queries, keys = (Side(*[argument("rows", "int32", batch, tokens)] * 2) for tokens in (queries, keys))
    queries = queries._replace(prefix=queries.positions if has_prefix else None)
    rows = SPECS["rows"]
    run = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(Inputs(rows, SPECS["kv"], rows, rows), rows),
        out_specs=(Partial(rows, rows), Gradients(rows, SPECS["kv"])),
    )
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    abstract = AbstractMesh((devices,), ("seq",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(abstract):
        traced = jax.jit(run).trace(Inputs(q, kv, queries, keys), q)
        return traced.lower(lowering_platforms=("cuda",)).compile().as_text()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("rule", "has_prefix"),
    [(Rule(), False), (Rule(is_causal=False, window=(500, 100)), False), (Rule(window=(20, 0)), True)],
    ids=["causal", "window", "prefix"],
)
def test_compiles(rule, has_prefix, dtype, head_dim):
    """Odd lengths, S != K, two query heads per key head, a different soft cap per dtype."""
    options = Options(rule, head_dim**-0.5, 30.0 if dtype == "float16" else None)
    text = compile_ring_step(1, options, (2, 2, 2, 777, head_dim), 1100, dtype, has_prefix=has_prefix)
    assert text.count('custom_call_target="mosaic_gpu') == 4


def test_compiles_inside_shard_map():
    text = compile_ring_step(8, Options(Rule(), 0.1), (1, 2, 1, 8 * 1024, 128), 8 * 1024, "bfloat16")
    assert text.count('custom_call_target="mosaic_gpu') == 4
