"""Transfers hide behind kernels in the compiler's schedule for TPUs (no TPU needed).

Needs libtpu in jax's version (`pip install "jax[tpu]"`); skipped without it.
"""

import importlib.util
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ringrl.attention import ring_attention, ring_order
from ringrl.attention.kernels import xla
from ringrl.attention.kernels.tuning import XlaBlocks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason=f'needs the TPU compiler: pip install "jax[tpu]=={jax.__version__}"',
)

TOPOLOGIES = ("v4:2x2x2", "v5p:2x2x2", "v5e:2x4", "v6e:2x4")
LOCAL_TOKENS, HEADS, HEAD_DIM = 2048, 4, 128
KERNELS = {"xla": " while(", "mosaic_tpu": 'custom_call_target="tpu_custom_call"'}
TRANSFERS = {"send": " collective-permute-start(", "receive": " collective-permute-done("}


class Program(NamedTuple):
    """A compiled ring: the steps of each loop with sends, its text and scratch memory."""

    loops: list[list[str]]
    text: str
    scratch: int


def steps_of(computation: str, implementation: str) -> list[str]:
    """Return sends, kernels and receives in scheduled order; positions and segments are "send integers" etc."""
    steps = []
    for line in computation.splitlines():
        for step, operation in (TRANSFERS | {"kernel": KERNELS[implementation]}).items():
            if operation in line:
                integers = " integers" if step != "kernel" and re.search(r"= \(?s32\[", line) else ""
                steps.append(step + integers)
    return steps


def loops_that_send(text: str, implementation: str) -> list[list[str]]:
    """Return the steps of every loop with sends."""
    inner = re.findall(r"^%[^\n]*\{\n(.*?)^\}", text, flags=re.MULTILINE | re.DOTALL)
    return [steps for steps in (steps_of(x, implementation) for x in inner) if "send" in steps]


def compile_for(
    topology: str, implementation: str = "mosaic_tpu", window: int | None = None, order: Callable = ring_order
) -> Program:
    """Compile forward and backward pass of a causal zigzag bfloat16 ring over all chips of a topology.

    With a window, queries also see a global prefix.
    """
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(order(devices)), ("seq",))
    shape = 1, LOCAL_TOKENS * len(devices), HEADS, HEAD_DIM
    sharding = NamedSharding(mesh, PartitionSpec(None, "seq"))
    q, ends = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding), None
    if window is not None:
        ends = jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=sharding)
    attend = partial(ring_attention, mesh=mesh, implementation=implementation, local_window_size=window)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, ends: jax.Array | None) -> tuple:
        o, backward = jax.vjp(partial(attend, global_prefix=ends), q, k, v)
        return o, backward(do)

    compiled = jax.jit(run).lower(q, q, q, q, ends).compile()
    text = compiled.as_text()
    assert "is_scheduled=true" in text
    return Program(loops_that_send(text, implementation), text, compiled.memory_analysis().temp_size_in_bytes)


@pytest.fixture(autouse=True)
def as_on_a_tpu(monkeypatch: pytest.MonkeyPatch, optimised: None) -> None:
    """Use the XLA kernel's TPU tiles on any platform, without queries to a metadata server."""
    monkeypatch.setattr(xla, "xla_blocks", lambda heads, *lengths: XlaBlocks(512, 512, heads))
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")


@pytest.mark.parametrize(("implementation", "window"), [("xla", None), ("mosaic_tpu", None), ("mosaic_tpu", 20)])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_kernels_run_during_sends(topology, implementation, window):
    check_hidden(compile_for(topology, implementation, window), implementation)


def check_hidden(program: Program, implementation: str = "mosaic_tpu") -> None:
    """In both loops all sends start before the last kernel (backward may have two), some before the first kernel, and
    all receives follow the last kernel. Nothing is gathered.
    """
    forward, backward = sorted(program.loops, key=len)
    for steps, arrays in ((forward, 1), (backward, 2)):
        kernels = [i for i, step in enumerate(steps) if step == "kernel"]
        sends = [i for i, step in enumerate(steps) if step.startswith("send")]
        receives = [i for i, step in enumerate(steps) if step.startswith("receive")]
        assert len(kernels) in ((1,) if implementation == "xla" else (arrays,))
        assert len(sends) == len(receives) == arrays + 1
        assert sends[0] < kernels[0]
        assert sends[-1] < kernels[-1] < receives[0]
    assert "all-gather" not in program.text


def test_scratch_memory_does_not_grow_from_8_to_64_chips():
    small, large = compile_for("v4:2x2x2"), compile_for("v4:4x4x4")
    assert large.loops == small.loops
    assert large.scratch <= 1.01 * small.scratch


def test_rings_of_64_chips_of_v5e_hide_their_hops_in_ring_order_alone():
    check_hidden(compile_for("v5e:8x8"))
    assert " collective-permute(" in compile_for("v5e:8x8", order=list).text  # synchronous
