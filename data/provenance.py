"""Where a store's episodes come from and what was done to them on the way."""

import dataclasses
import json
import os
import time
from importlib.metadata import version
from typing import Literal, Self, get_args

from ringrl import __version__
from ringrl.errors import UserError

Relabelling = Literal["control_aware", "exorl_compat"]
"""How rewards are computed: by the action that led to the state, or, as ExoRL's own code does, by a control of zero."""

Rewards = Relabelling | Literal["recorded"]
"""How the rewards of a store came about: those of episodes from elsewhere stay as recorded."""

REWARDS: tuple[Rewards, ...] = (*get_args(Relabelling), "recorded")

NAMED_SKIPPED = 5  # damaged episodes that a store names; the rest is counted


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What is written into a store beside its episodes, and shown on its card.

    Attributes:
        source: the end of the archive's path, "walker/rnd.zip".
        source_bytes: size of the zip file, or of all episode files of a folder.
        source_sha256: sha256 over the archive's list of episodes: path, size and, in a zip file, CRC of each.
        relabelling: see `Rewards`.
        subset: which of the archive's episodes were taken, in words.
        num_skipped: damaged episodes among them that were left out.
        skipped: the first few of those, each with its reason.
        created: day of the import (UTC), "2026-11-21"; SOURCE_DATE_EPOCH in the environment sets another.
        created_by: versions of what made it, "ringrl 0.1.0, mujoco 3.17.0".
    """

    source: str
    source_bytes: int = 0
    source_sha256: str = ""
    relabelling: Rewards = "control_aware"
    subset: str = "all episodes"
    num_skipped: int = 0
    skipped: tuple[str, ...] = ()
    created: str = dataclasses.field(default_factory=lambda: _today())
    created_by: str = dataclasses.field(default_factory=lambda: makers())

    def to_json(self) -> str:
        """One line of ASCII."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote; ValueError or TypeError if it is anything else."""
        values = json.loads(text)
        if not isinstance(values["skipped"], list) or not all(isinstance(reason, str) for reason in values["skipped"]):
            raise ValueError("skipped is no list of texts")
        values["skipped"] = tuple(values["skipped"])
        provenance = cls(**values)
        if len(values) != len(dataclasses.fields(cls)) or min(provenance.num_skipped, provenance.source_bytes) < 0:
            raise ValueError("no whole provenance")
        for field in dataclasses.fields(cls):
            default = field.default if field.default is not dataclasses.MISSING else ""
            if type(getattr(provenance, field.name)) is not type(default):
                raise ValueError(f"{field.name} is not a {type(default).__name__}")
        if provenance.relabelling not in REWARDS:
            raise ValueError(f"unknown relabelling {provenance.relabelling}")
        return provenance


def makers() -> str:
    """The versions of what decides the content of a store."""
    return f"ringrl {__version__}, mujoco {version('mujoco')}"


def _today() -> str:
    given = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        return time.strftime("%Y-%m-%d", time.gmtime(int(given) if given else None))
    except (ValueError, OverflowError, OSError) as error:
        raise UserError(f"SOURCE_DATE_EPOCH: {given} is no number of seconds since 1970; unset it") from error
