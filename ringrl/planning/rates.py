"""Numbers that describe a machine, given by a user or measured by `ringrl doctor`. Imports no JAX."""

from pydantic import Field

from ringrl.config import Section


class Rates(Section):
    """A machine described by numbers (--machine custom)."""

    devices: int = Field(8, ge=1, le=2**16)
    """Number of devices."""
    memory: float = Field(gt=0)
    """Memory per device that a program may use, in GiB."""
    tflops: float = Field(gt=0)
    """bfloat16 speed of a device, in 10^12 operations per second."""
    bandwidth: float = Field(gt=0)
    """Memory bandwidth of a device, in 10^9 bytes per second."""
    link: float = Field(gt=0)
    """Bandwidth to a neighbouring device, one way, in 10^9 bytes per second."""
    attention: float | None = Field(None, gt=0)
    """Measured speed of attention, in 10^12 operations per second. The other numbers are then measured, too."""
