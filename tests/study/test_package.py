"""What `ringrl.study` offers by itself."""

import subprocess
import sys

import pytest

from ringrl import study


def test_what_users_look_for_is_there() -> None:
    for name in study.__all__:
        found = getattr(study, name)
        assert found.__name__ == name
        assert found.__doc__
    with pytest.raises(AttributeError, match=r"^module 'ringrl.study' has no attribute 'nothing'"):
        study.nothing  # noqa: B018


def test_by_itself_it_imports_nothing_heavy() -> None:
    heavy = {"jax", "mujoco", "pandas", "altair", "scipy", "h5py"}
    code = f"import ringrl.study, sys; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
