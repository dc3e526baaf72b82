"""A trace of a few steps, for JAX's profiler (TensorBoard, Perfetto, xprof)."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

FIRST, LAST = 4, 6  # steps of this start of the run; those before compile and warm up


@dataclasses.dataclass
class Profiler:
    """Traces steps FIRST to LAST into a folder; nothing where there is none."""

    folder: Path | None
    is_tracing: bool = False

    def before(self, step: int, state: Any) -> None:
        """To be called before a step, counted from 1 as the run was started or resumed, with what the last one gave."""
        if self.folder is not None and step in (FIRST, LAST + 1):
            jax.block_until_ready(state)
            self.close()
            if step == FIRST:
                jax.profiler.start_trace(self.folder)
                self.is_tracing = True

    def close(self) -> None:
        """Write what was traced."""
        if self.is_tracing:
            jax.profiler.stop_trace()
            self.is_tracing = False
