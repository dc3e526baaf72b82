"""The static options of one attention call, as every kernel takes them."""

import dataclasses

from ringrl.attention.mask import Rule


@dataclasses.dataclass(frozen=True)
class Options:
    """`scale` multiplies the logits before the optional soft cap; None leaves the size of its tiles to the kernel.

    `implementation` names the kernel (kernels/__init__.py), and `is_asked_for` says that no other will do.
    """

    rule: Rule
    scale: float
    logits_soft_cap: float | None = None
    block_q: int | None = None
    block_k: int | None = None
    implementation: str = "xla"
    is_asked_for: bool = True
