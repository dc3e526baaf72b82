"""The attention kernel of a device."""

import dataclasses

import jax.numpy as jnp

from ringrl.attention.kernels import kernel_named, native_to
from ringrl.attention.mask import Options, Rule
from ringrl.config import ModelConfig
from ringrl.planning.machines import Device


@dataclasses.dataclass
class _Kind:
    """The attributes of a jax.Device that select a kernel."""

    platform: str
    device_kind: str


def kernel_of(model: ModelConfig, device: Device) -> str:
    """Return the kernel name (ringrl/attention/kernels); "xla" for vanilla and unsupported devices, dtypes or heads."""
    head_dim = model.width // model.heads
    if model.attention == "vanilla":
        return "xla"
    native = native_to(_Kind(device.platform, device.kind))
    options = Options(Rule(is_causal=True), head_dim**-0.5)
    refused = kernel_named(native).unsupported(jnp.dtype(model.dtype), head_dim, options)
    return native if refused is None else "xla"
