"""Which device a computation is for."""

from typing import Protocol

import jax


class Device(Protocol):
    """A jax.Device or a jax.sharding.AbstractDevice."""

    platform: str
    device_kind: str


def device_of(x: jax.Array) -> Device:
    """The kind of device that what is computed from `x` is for: of the mesh around, its own, or the default one."""
    around = jax.sharding.get_abstract_mesh().abstract_device
    if around is not None:
        return around
    if not isinstance(x, jax.core.Tracer) and isinstance(x, jax.Array):
        return next(iter(x.devices()))
    return jax.local_devices()[0]
