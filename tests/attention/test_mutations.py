"""Four mutations of mutations.py are detected, and all mutations still apply to the code."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.usefixtures("eight_devices")


@pytest.fixture(scope="module")
def mutations() -> ModuleType:
    specification = importlib.util.spec_from_file_location("mutations", Path(__file__).with_name("mutations.py"))
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    [
        "gradients_do_not_come_home", "cotangent_of_the_log_sum_exp_dropped", "positions_stay_behind_in_backward",
        "tiles_of_the_shortest_prefix_not_masked",
    ],
)  # fmt: skip
def test_mutation_is_detected(name, mutations):
    assert mutations.notice(name, mutations.load("test_ring"), mutations.load("conftest"))


def test_every_mutation_applies(mutations, tmp_path):
    for name in mutations.MUTATIONS:
        mutations.mutate(name, tmp_path)


def test_mutation_that_does_not_apply_raises(mutations, tmp_path, monkeypatch):
    monkeypatch.setitem(mutations.MUTATIONS, "gone", mutations.Mutation("ring.py", "no such text", ""))
    with pytest.raises(ValueError, match="gone: its text was found 0 times"):
        mutations.mutate("gone", tmp_path)
