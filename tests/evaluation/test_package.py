"""What `ringrl.evaluation` offers by itself."""

import subprocess
import sys

import pytest

from ringrl import evaluation


def test_what_users_look_for_is_there() -> None:
    for name in evaluation.__all__:
        found = getattr(evaluation, name)
        assert found.__name__ == name
        assert found.__doc__
    with pytest.raises(AttributeError, match=r"^module 'ringrl.evaluation' has no attribute 'nothing'"):
        evaluation.nothing  # noqa: B018


def test_by_itself_it_imports_nothing_heavy() -> None:
    code = (
        "import ringrl.evaluation, sys; assert not {'jax', 'mujoco', 'matplotlib', 'scipy', 'h5py'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
