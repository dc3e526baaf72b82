"""Mutations of mutations.py are detected, and all of them still apply to the code."""

import pytest

from tests.attention import mutations

pytestmark = pytest.mark.usefixtures("eight_devices")

QUICK = ("gradients_do_not_come_home", "cotangent_of_the_log_sum_exp_dropped")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in mutations.MUTATIONS]
)
def test_mutation_is_detected(name):
    assert mutations.notice(name, mutations.load("test_ring"), mutations.load("conftest"))


def test_every_mutation_applies(tmp_path):
    for name in mutations.MUTATIONS:
        mutations.mutate(name, tmp_path)


def test_mutation_that_does_not_apply_raises(tmp_path, monkeypatch):
    monkeypatch.setitem(mutations.MUTATIONS, "gone", mutations.Mutation("ring.py", "no such text", ""))
    with pytest.raises(ValueError, match="gone: its text was found 0 times"):
        mutations.mutate("gone", tmp_path)
