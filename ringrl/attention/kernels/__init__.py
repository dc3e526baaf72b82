"""Attention kernels with one contract (contract.py), and the choice between them.

forward(inputs, options, start) -> Partial: attention over the keys of `inputs`, continued from `start`
backward(inputs, options, cotangents, dq) -> Gradients: gradients of the keys; gradients of the queries added to `dq`
unsupported(dtype, head_dim, options) -> one sentence about an unsupported argument, or None
too_many(inputs, options) -> one sentence about lengths beyond the kernel's limit, or None
"""

import dataclasses
import functools
import logging
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ringrl.attention.contract import NO_TERMS, Cotangents, Gradients, Inputs, Partial, Terms
from ringrl.attention.kernels import autodiff, check, xla
from ringrl.attention.mask import Options
from ringrl.attention.strategy import DeviceKind

IMPLEMENTATIONS = ("xla", "mosaic_tpu", "mosaic_gpu", "cudnn", "autodiff")

HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")
OTHERS_SINCE_AMPERE = re.compile(
    r"\b(A[1-9]\d{0,2}[GX]?|L(2|4|20|40S?)|G?B(10|100|200|300)|(?<!Quadro )RTX (A|PRO |(?!20[678]0))\d{3,4})\b"
)


class Kernel(NamedTuple):
    """The functions of a kernel, see above."""

    forward: Callable[..., Partial]
    backward: Callable[..., Gradients]
    unsupported: Callable[[jnp.dtype, int, Options], str | None]
    too_many: Callable[[Inputs, Options], str | None] = lambda *_: None


def kernel_named(name: str) -> Kernel:
    """Return the kernel of a name. Pallas kernels are imported on first use, because the import is slow."""
    if name == "mosaic_tpu":
        from ringrl.attention.kernels import mosaic_tpu, mosaic_tpu_tiles

        limits = mosaic_tpu_tiles.unsupported, mosaic_tpu_tiles.too_many
        return Kernel(mosaic_tpu.forward, mosaic_tpu.backward, *limits)
    if name == "mosaic_gpu":
        from ringrl.attention.kernels import hopper, mosaic_gpu

        return Kernel(mosaic_gpu.forward, mosaic_gpu.backward, hopper.unsupported)
    if name == "cudnn":
        from ringrl.attention.kernels import cudnn

        return Kernel(cudnn.forward, cudnn.backward, cudnn.unsupported)
    if name == "autodiff":
        return Kernel(autodiff.forward, xla.backward, lambda *_: None)  # JAX differentiates the forward pass instead
    return Kernel(xla.forward, xla.backward, lambda *_: None)


def forward(inputs: Inputs, options: Options, start: Partial | None = None) -> Partial:
    """Run the forward pass of the kernel named in `options`."""
    return _kernel(inputs, options).forward(inputs, options, start)


def backward(inputs: Inputs, options: Options, cotangents: Cotangents, dq: jax.Array | None = None) -> Gradients:
    """Run the backward pass of the kernel named in `options`."""
    return _kernel(inputs, options).backward(inputs, options, cotangents, dq)


def _kernel(inputs: Inputs, options: Options) -> Kernel:
    """Return the kernel of `options`, or "xla" if the inputs are too long and the user named no kernel."""
    kernel = kernel_named(options.implementation)
    if options.is_explicit or (reason := kernel.too_many(inputs, options)) is None:
        return kernel
    _warn_once(f"attention falls back to plain XLA: {reason}")
    return kernel_named("xla")


def native_to(device: DeviceKind) -> str:
    """Return the implementation for a device, "xla" by default."""
    if device.platform == "tpu":
        return "mosaic_tpu"
    if device.platform in ("gpu", "cuda"):
        if HOPPER.search(device.device_kind):
            return "mosaic_gpu"
        if OTHERS_SINCE_AMPERE.search(device.device_kind):
            return "cudnn"
    return "xla"


def with_kernel(
    options: Options, implementation: str | None, q: jax.Array, device: DeviceKind, terms: Terms = NO_TERMS
) -> Options:
    """Return `options` with the named kernel, or with the best kernel for the device and queries `q` (..., head_dim).

    A named kernel that is unknown or does not support the call raises ValueError. Without a name, such calls use "xla",
    as do all calls if the kernel fails its check (check.py). Fallbacks are logged once.
    """
    native, has_terms = native_to(device), any(x is not None for x in terms)
    if implementation is not None:
        others = ("cudnn",) if native == "mosaic_gpu" else ()
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation: {implementation!r} is unknown; use one of {(None, *IMPLEMENTATIONS)}")
        if implementation not in (native, "xla", "autodiff", *others):
            raise ValueError(f"implementation: {implementation!r} does not run on {device.device_kind}; use {native!r}")
        if has_terms and implementation != "autodiff":
            raise ValueError(
                f"implementation: {implementation!r} takes neither alibi_slopes nor a traced logits_soft_cap; use None "
                'or "autodiff"'
            )
        if reason := kernel_named(implementation).unsupported(q.dtype, q.shape[-1], options):
            raise ValueError(f"implementation: {reason}; use 'xla'")
        return dataclasses.replace(options, implementation=implementation, is_explicit=True)
    if has_terms:
        return dataclasses.replace(options, implementation="autodiff", is_explicit=False)
    if native == "xla":
        reason = None if device.platform == "cpu" else f"there is no kernel for {device.device_kind}"
    elif (reason := kernel_named(native).unsupported(q.dtype, q.shape[-1], options)) is None:
        options = dataclasses.replace(options, implementation=native)
        reason = check.failure(kernel_named(native), options, q.dtype, q.shape[-1], device)
    if reason is not None:
        _warn_once(f"attention falls back to plain XLA: {reason}")
    return dataclasses.replace(options, implementation="xla" if reason else native, is_explicit=False)


@functools.cache
def _warn_once(message: str) -> None:
    logging.getLogger("ringrl.attention").warning(message)
