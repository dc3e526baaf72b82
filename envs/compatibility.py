"""Which MuJoCo works here, asked of the installed packages' metadata so that nothing heavy is imported."""

import re
from importlib import metadata

from ringrl.errors import UserError

_FIX = "run: pip install 'mujoco>=3.17,<4'"


def is_compatible(version: str) -> bool:
    """Whether this MuJoCo version is at least 3.17 and below 4."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and (3, 17) <= (int(numbers[1]), int(numbers[2])) < (4, 0)


def check_mujoco() -> None:
    """Refuse a MuJoCo that the environments cannot run on.

    A plain `pip install dm_control` brings MuJoCo 4, with which dm_control 1.0 breaks at the first model it loads, and
    not before: hence the check when `ringrl.envs` is imported.

    Raises:
        UserError: MuJoCo is missing or not >=3.17,<4; the message names the command that mends it.
    """
    try:
        version = metadata.version("mujoco")
    except metadata.PackageNotFoundError:
        raise UserError(f"MuJoCo is not installed, and the environments need it; {_FIX}") from None
    if not is_compatible(version):
        raise UserError(f"MuJoCo {version} is installed, but the environments need >=3.17,<4; {_FIX}")
