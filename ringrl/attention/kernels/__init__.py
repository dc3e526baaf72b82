"""Block computations under one contract (contract.py), and which of them computes what.

forward(inputs, options, start) -> Partial: attention over the keys of `inputs` and those that `start` has seen
backward(inputs, options, cotangents, dq) -> Gradients: of these keys, and of the queries through them, added to `dq`
unsupported(dtype, head_dim, options) -> what of this the kernel does not take, in one sentence, or None
too_many(inputs, options) -> the same of the lengths of a call that it takes otherwise
"""

import dataclasses
import functools
import logging
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ringrl.attention.contract import Cotangents, Gradients, Inputs, Partial
from ringrl.attention.device import Device
from ringrl.attention.kernels import xla
from ringrl.attention.options import Options

IMPLEMENTATIONS = ("xla", "mosaic_tpu", "mosaic_gpu")


class Kernel(NamedTuple):
    """The functions above."""

    forward: Callable[..., Partial]
    backward: Callable[..., Gradients]
    unsupported: Callable[[jnp.dtype, int, Options], str | None]
    too_many: Callable[[Inputs, Options], str | None] = lambda *_: None


def kernel_named(name: str) -> Kernel:
    """Those in Pallas are imported when first asked for: it takes a while."""
    if name == "mosaic_tpu":
        from ringrl.attention.kernels import mosaic_tpu, mosaic_tpu_backward, mosaic_tpu_tiles

        limits = mosaic_tpu_tiles.unsupported, mosaic_tpu_tiles.too_many
        return Kernel(mosaic_tpu.forward, mosaic_tpu_backward.backward, *limits)
    if name == "mosaic_gpu":
        from ringrl.attention.kernels import hopper, mosaic_gpu, mosaic_gpu_backward

        return Kernel(mosaic_gpu.forward, mosaic_gpu_backward.backward, hopper.unsupported)
    return Kernel(xla.forward, xla.backward, lambda *_: None)


def forward(inputs: Inputs, options: Options, start: Partial | None = None) -> Partial:
    """By the kernel that `options` name."""
    return _kernel(inputs, options).forward(inputs, options, start)


def backward(inputs: Inputs, options: Options, cotangents: Cotangents, dq: jax.Array | None = None) -> Gradients:
    """By the kernel that `options` name."""
    return _kernel(inputs, options).backward(inputs, options, cotangents, dq)


def _kernel(inputs: Inputs, options: Options) -> Kernel:
    """What `options` name, or, unless it was asked for, "xla" for what is too long for it."""
    kernel = kernel_named(options.implementation)
    if options.is_asked_for or (reason := kernel.too_many(inputs, options)) is None:
        return kernel
    _say_once(f"attention falls back to plain XLA: {reason}")
    return kernel_named("xla")


def native_to(device: Device) -> str:
    """The implementation made for a device: "xla" where there is none."""
    if device.platform == "tpu":
        return "mosaic_tpu"
    if device.platform in ("gpu", "cuda") and re.search(r"\bG?H(20|100|200|800)\b", device.device_kind):
        return "mosaic_gpu"
    return "xla"


def with_kernel(options: Options, implementation: str | None, q: jax.Array, device: Device) -> Options:
    """`options` with the kernel asked for, or with the best for the device that takes queries like `q` (..., head_dim).

    What is asked for by name and cannot be done is a ValueError. What is not asked for falls to "xla" where the
    device's own kernel does not take it, or has none although it is an accelerator, and is logged, once.
    """
    native = native_to(device)
    if implementation is not None and implementation not in (native, "xla"):
        raise ValueError(f"implementation: {implementation!r} does not run on {device.device_kind}; use {native!r}")
    chosen = implementation or native
    reason = kernel_named(chosen).unsupported(q.dtype, q.shape[-1], options)
    if reason is not None and implementation is not None:
        raise ValueError(f"implementation: {reason}; use 'xla'")
    if reason is None and implementation is None and chosen == "xla" and device.platform != "cpu":
        reason = f"there is no kernel for {device.device_kind}"
    if reason is not None:
        _say_once(f"attention falls back to plain XLA: {reason}")
        chosen = "xla"
    return dataclasses.replace(options, implementation=chosen, is_asked_for=implementation is not None)


@functools.cache
def _say_once(message: str) -> None:
    logging.getLogger("ringrl.attention").warning(message)
