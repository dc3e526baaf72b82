"""The TPU kernels compile ahead of time with the tile sizes of the table (no TPU needed).

Needs libtpu in jax's version (`pip install "jax[tpu]"`); skipped without it.
"""

import importlib.util
from collections.abc import Iterator
from functools import partial

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ringrl.attention.contract import Cotangents, Inputs, Partial
from ringrl.attention.kernels import mosaic_tpu
from ringrl.attention.mask import Options, Rule, Side

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason=f'needs the TPU compiler: pip install "jax[tpu]=={jax.__version__}"',
)

TOPOLOGIES = ("v4:2x2x1", "v5p:2x2x1", "v5e:2x2", "v6e:2x2")
KERNELS = {"forward": 1, "backward": 2}
SETTINGS = {  # head_dim, rule, soft cap, query heads per key head, tokens, whether queries have a global prefix
    "window": (64, Rule(False, (700, 90)), 30.0, 1, 1500, False),
    "causal": (128, Rule(True), None, 8, 2048, False),
    "full": (256, Rule(False), 20.0, 2, 2048, False),
    "prefix": (128, Rule(True, (20, 0)), None, 8, 2048, True),
}


@pytest.fixture(autouse=True)
def no_question_to_a_metadata_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")


def compile_for(topology: str, dtype: str, setting: str) -> Iterator[str]:
    """Return the compiled text of forward and backward pass inside shard_map with check_vma."""
    head_dim, rule, cap, groups, tokens, has_prefix = SETTINGS[setting]
    options = Options(rule, head_dim**-0.5, cap)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    assert (devices[0].device_kind == "TPU v6 lite") == topology.startswith("v6e"), "tuning.py names v6e so"
    mesh, spec = Mesh(np.array(devices[:2]), ("data",)), PartitionSpec("data")

    def array(*shape: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    integers = (array(2, tokens, dtype="int32"), array(2, tokens + 128, dtype="int32"))
    queries, keys = (Side(x, x) for x in integers)
    queries = queries._replace(prefix=integers[0] if has_prefix else None)
    inputs = Inputs(array(4, groups * tokens, head_dim), array(4, 2, tokens + 128, head_dim), queries, keys)
    seen = Partial(array(*inputs.q.shape, dtype="float32"), array(*inputs.q.shape[:2], dtype="float32"))
    forward = partial(mosaic_tpu.forward, options=options)
    backward = partial(mosaic_tpu.backward, options=options)
    calls = (
        (lambda inputs, seen: forward(inputs, start=seen), (inputs, seen)),
        (lambda inputs, known: backward(inputs, cotangents=known), (inputs, Cotangents(inputs.q, seen.lse, seen.lse))),
    )
    for function, arguments in calls:
        mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec)
        yield jax.jit(mapped).lower(*arguments).compile().as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_kernels_compile(topology, setting, dtype):
    texts = list(compile_for(topology, dtype, setting))
    assert [text.count('custom_call_target="tpu_custom_call"') for text in texts] == list(KERNELS.values())
