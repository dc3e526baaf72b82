"""The states of several simulations of one model, read as if they were one."""

from collections.abc import Sequence
from typing import Any

import numpy as np


class StackedData:
    """Several MjData of one model: each of their arrays, `stacked.qpos` for one, stacked over a leading axis.

    An array is copied when it is first asked for and stays as it is until `renew`.
    """

    def __init__(self, datas: Sequence[Any]) -> None:
        self._datas = datas
        self._views: dict[str, list[np.ndarray]] = {}
        self._copies: dict[str, np.ndarray] = {}

    def renew(self) -> None:
        """Let the next reads see what the states have become."""
        self._copies.clear()

    def __getattr__(self, name: str) -> np.ndarray:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._copies:
            if name not in self._views:  # the arrays of an MjData stay where they are in memory
                self._views[name] = [getattr(data, name)[None] for data in self._datas]
            self._copies[name] = np.concatenate(self._views[name])
        return self._copies[name]
