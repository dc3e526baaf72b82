"""Three broken rings of mutations.py, which tries them all, and that none of its texts has gone out of date."""

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
    ["gradients_do_not_come_home", "cotangent_of_the_log_sum_exp_dropped", "positions_stay_behind_in_backward"],
)
def test_a_broken_ring_is_noticed(name, mutations):
    assert mutations.notice(name, mutations.load("test_ring"), mutations.load("conftest"))


def test_every_mutation_still_finds_its_text(mutations, tmp_path):
    for name in mutations.MUTATIONS:
        mutations.mutate(name, tmp_path)


def test_a_mutation_without_its_text_is_an_error(mutations, tmp_path, monkeypatch):
    monkeypatch.setitem(mutations.MUTATIONS, "gone", mutations.Mutation("ring.py", "no such text", ""))
    with pytest.raises(ValueError, match="gone: its text was found 0 times"):
        mutations.mutate("gone", tmp_path)
