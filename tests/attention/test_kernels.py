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
T4 = Device("gpu", "Tesla T4")
SINCE_AMPERE = (
    "A10G", "A2", "A40", "A800-SXM4-80GB", "L4", "L40S", "B200", "GB200", "GB10", "GeForce RTX 3090",
    "GeForce RTX 4060 Ti", "GeForce RTX 5090 D", "RTX A6000", "RTX A500 Laptop GPU", "RTX 2000 Ada Generation",
    "RTX PRO 6000 Blackwell Workstation Edition",
)  # fmt: skip
OTHERS = (
    "NVIDIA GeForce RTX 2080 Ti", "Quadro RTX 6000", "NVIDIA TITAN RTX", "Tesla V100-SXM2-16GB", "Tesla P40",
    "NVIDIA T1000", "AMD Instinct MI300X", "NVIDIA GeForce GTX 1080",
)  # fmt: skip
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
        (A100, "cudnn"),
        *((Device("cuda", f"NVIDIA {kind}"), "cudnn") for kind in SINCE_AMPERE),
        *((Device("gpu", kind), "xla") for kind in OTHERS),
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
        (A100, queries("float32"), "cuDNN supports bfloat16 and float16, not float32"),
        (A100, queries(head_dim=256), "head_dim that is a multiple of 8 up to 128, not 256"),
        (T4, queries(), "no kernel for Tesla T4"),
    ],
)
def test_fallback_is_logged_once_and_a_named_kernel_raises(device, q, reason, caplog):
    with caplog.at_level(logging.WARNING, "ringrl.attention"):
        for _ in range(3):
            assert kernels.with_kernel(OPTIONS, None, q, device).implementation == "xla"
    assert len(caplog.records) == 1
    assert reason in caplog.text
    if device is not T4:
        with pytest.raises(ValueError, match=f"^implementation: .*{reason}"):
            kernels.with_kernel(OPTIONS, kernels.native_to(device), q, device)


def test_hopper_takes_cudnn_by_name():
    assert kernels.with_kernel(OPTIONS, "cudnn", queries(), H200).implementation == "cudnn"
    with pytest.raises(ValueError, match="does not run on NVIDIA A100-SXM4-80GB; use 'cudnn'"):
        kernels.with_kernel(OPTIONS, "mosaic_gpu", queries(), A100)


def test_cpu_logs_nothing(caplog):
    kernels.with_kernel(OPTIONS, None, queries("float32"), CPU)
    assert not caplog.records


@pytest.mark.parametrize("name", ["mosaic_tpu", "mosaic_gpu", "cudnn"])
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
