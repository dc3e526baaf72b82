"""The choice of kernels by device, dtype, head_dim and length."""

import logging
import re
import subprocess
import sys
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from ringrl.attention import attention, kernels, ring_attention
from ringrl.attention.kernels.tuning import xla_blocks
from ringrl.attention.mask import Options, Rule


class Device(NamedTuple):
    platform: str
    device_kind: str


CPU, TPU = Device("cpu", "cpu"), Device("tpu", "TPU v5 lite")
H200, A100 = Device("gpu", "NVIDIA H200"), Device("gpu", "NVIDIA A100-SXM4-80GB")
OPTIONS = Options(Rule(), 0.1)


def queries(dtype: str = "bfloat16", head_dim: int = 128) -> jax.Array:
    return jax.ShapeDtypeStruct((1, 8, 2, head_dim), dtype)


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    kernels._warn_once.cache_clear()


@pytest.mark.parametrize(
    ("device", "kernel"),
    [
        (CPU, "xla"),
        (TPU, "mosaic_tpu"),
        (H200, "mosaic_gpu"),
        (Device("cuda", "NVIDIA H100 80GB HBM3"), "mosaic_gpu"),
        (Device("gpu", "NVIDIA GH200 480GB"), "mosaic_gpu"),
        (A100, "xla"),
        (Device("gpu", "NVIDIA GeForce RTX 2000"), "xla"),
    ],
)
def test_kernel_of_a_device(device, kernel):
    assert kernels.with_kernel(OPTIONS, None, queries(), device).implementation == kernel
    assert kernels.with_kernel(OPTIONS, "xla", queries(), device).implementation == "xla"


@pytest.mark.parametrize(
    ("device", "q", "reason"),
    [
        (H200, queries("float32"), "float32"),
        (H200, queries(head_dim=80), "head_dim of 64 or 128, not 80"),
        (TPU, queries("float16"), "float16"),
        (TPU, queries(head_dim=512), "head_dim 512"),
        (A100, queries(), "no kernel for NVIDIA A100"),
    ],
)
def test_fallback_is_logged_once_and_a_named_kernel_raises(device, q, reason, caplog):
    with caplog.at_level(logging.WARNING, "ringrl.attention"):
        for _ in range(3):
            assert kernels.with_kernel(OPTIONS, None, q, device).implementation == "xla"
    assert len(caplog.records) == 1
    assert reason in caplog.text
    if device is not A100:
        with pytest.raises(ValueError, match=f"^implementation: .*{reason}"):
            kernels.with_kernel(OPTIONS, kernels.native_to(device), q, device)


def test_cpu_logs_nothing(caplog):
    kernels.with_kernel(OPTIONS, None, queries("float32"), CPU)
    assert not caplog.records


@pytest.mark.parametrize("name", ["mosaic_tpu", "mosaic_gpu"])
def test_kernel_of_another_device_raises(name):
    q = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=f"^implementation: '{name}' does not run on cpu; use 'xla'"):
        attention(q, q, q, implementation=name)


def test_pallas_is_imported_lazily():
    code = "import sys, ringrl.attention; sys.exit('jax.experimental.pallas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


TPU_V5P = AbstractDevice(device_kind="TPU v5p", num_cores=1, platform="tpu")


@pytest.mark.parametrize("strategy", ["ulysses", "all_gather", "ring"])
def test_too_long_sequences_on_a_tpu_fall_back_to_xla(strategy, caplog):
    """Forward and backward pass fall back without a named kernel; a named kernel raises."""
    mesh = AbstractMesh((8,), ("seq",), axis_types=(AxisType.Auto,), abstract_device=TPU_V5P)
    x = jax.ShapeDtypeStruct((1, 2**20, 8, 128), jnp.bfloat16)

    def gradients(implementation):
        attend = partial(ring_attention, mesh=mesh, strategy=strategy, implementation=implementation)
        return jax.eval_shape(jax.grad(lambda q, k, v: attend(q, k, v).sum().astype(jnp.float32), (0, 1, 2)), x, x, x)

    with jax.sharding.use_abstract_mesh(mesh), caplog.at_level("WARNING", "ringrl.attention"):
        assert [g.shape for g in gradients(None)] == [x.shape] * 3
        if strategy == "ring":
            assert not caplog.messages, "the blocks of a hop are short"
            return
        assert len(caplog.messages) == 1
        assert re.search(
            "falls back to plain XLA: q, k: 1 x .* queries and 1048576 keys per device", caplog.messages[0]
        )
        with pytest.raises(ValueError, match="exceed the 131072 pairs"):
            gradients("mosaic_tpu")


@pytest.mark.parametrize("length", [1, 7, 136, 544, 1000, 1999, 4000, 16_000])
@pytest.mark.parametrize("heads", [1, 8])
def test_tiles_on_a_cpu_divide_the_sequence_evenly(length, heads, monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    blocks = xla_blocks(heads, length, length)
    for size in blocks[:2]:
        tiles = -(-length // size)
        assert size <= 512
        assert tiles * size - length < tiles * (8 if size < 256 else 64), "no tile is mostly padding"
        assert tiles >= 4 or length <= 512
