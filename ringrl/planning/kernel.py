"""Which kernel of attention the devices of a machine run."""

import dataclasses

import jax.numpy as jnp

from ringrl.attention.kernels import kernel_named, native_to
from ringrl.attention.mask import Rule
from ringrl.attention.options import Options
from ringrl.config import ModelConfig
from ringrl.planning.machines import Device


@dataclasses.dataclass
class _Kind:
    """What attention asks of a device."""

    platform: str
    device_kind: str


def kernel_of(model: ModelConfig, device: Device) -> str:
    """Its name (ringrl/attention/kernels): "xla" where there is none for this device, dtype or head, and of vanilla."""
    head_dim = model.width // model.heads
    if model.attention == "vanilla":
        return "xla"
    native = native_to(_Kind(device.platform, device.kind))
    options = Options(Rule(is_causal=True), head_dim**-0.5)
    refused = kernel_named(native).unsupported(jnp.dtype(model.dtype), head_dim, options)
    return native if refused is None else "xla"
