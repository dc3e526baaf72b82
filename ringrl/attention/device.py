"""The device of a computation."""

from typing import Protocol

import jax


class Device(Protocol):
    """A jax.Device or a jax.sharding.AbstractDevice."""

    platform: str
    device_kind: str


def device_of(x: jax.Array) -> Device:
    """Return the kind of device that computes with `x`: of the surrounding mesh, of `x`, or the default device."""
    around = jax.sharding.get_abstract_mesh().abstract_device
    if around is not None:
        return around
    if not isinstance(x, jax.core.Tracer) and isinstance(x, jax.Array):
        return next(iter(x.devices()))
    return jax.local_devices()[0]
