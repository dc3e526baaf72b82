"""The static options of one attention call, as every kernel takes them."""

import dataclasses

from ringrl.attention.mask import Rule


@dataclasses.dataclass(frozen=True)
class Options:
    """Static options of one attention call, as every kernel takes them.

    `scale` multiplies the logits before the optional soft cap. The kernel chooses its tile sizes if `block_q` and
    `block_k` are None. `implementation` names the kernel (kernels/__init__.py); `is_asked_for` forbids a fallback.
    """

    rule: Rule
    scale: float
    logits_soft_cap: float | None = None
    block_q: int | None = None
    block_k: int | None = None
    implementation: str = "xla"
    is_asked_for: bool = True
