"""Plans for TPUs (no TPU needed).

Needs libtpu in jax's version (`pip install "jax[tpu]"`); skipped without it.
"""

import importlib.util

import jax
import pytest

from ringrl.planning import ahead_of_time
from ringrl.planning.ahead_of_time import compile_step, devices_of, fits, waits_for_hops
from ringrl.planning.machines import find_machine
from ringrl.planning.memory import memory_of
from ringrl.planning.workload import Workload, find_model
from tests.planning.schedule import read_schedule

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason=f'needs the TPU compiler: pip install "jax[tpu]=={jax.__version__}"',
)


def seven_billion(local_tokens, devices, layers=4):
    workload = Workload(find_model("7b"), local_tokens * devices)
    return workload.with_settings("mesh", seq=devices).with_settings("model", layers=layers)


@pytest.mark.parametrize("name", ["tpu-v4-16", "tpu-v5p-16", "tpu-v5e-8", "tpu-v6e-8"])
def test_formula_is_within_10_percent_and_transfers_hide(name, monkeypatch):
    machine, workload = find_machine(name), seven_billion(8192, 8)
    texts = []
    monkeypatch.setattr(ahead_of_time, "waits_for_hops", lambda text: texts.append(text) or waits_for_hops(text))
    compiled = compile_step(workload, machine)
    assert fits(compiled, machine)
    assert memory_of(workload, "tpu").total == pytest.approx(compiled.total, rel=0.1)
    assert not compiled.waits_for_hops
    schedule = read_schedule(texts[0])
    assert schedule.around_ring == schedule.around_ring_hidden == 3


@pytest.mark.parametrize("name", ["tpu-v4-16", "tpu-v5e-8"])
def test_step_that_does_not_fit_has_the_compilers_total(name):
    machine, workload = find_machine(name), seven_billion(2**18, 8, layers=32)
    compiled = compile_step(workload, machine)
    assert not fits(compiled, machine)
    assert "exceeds available HBM" in (compiled.refusal or "")
    assert compiled.total > machine.device.memory
    assert memory_of(workload, "tpu").total == pytest.approx(compiled.total, rel=0.3)


def test_tile_limit_is_reported():
    machine, workload = find_machine("tpu-v5p-16"), seven_billion(2**19, 8)
    compiled = compile_step(workload, machine)
    assert "more tiles than" in (compiled.refusal or "")
    assert not fits(compiled, machine)


@pytest.mark.parametrize(("name", "devices"), [("tpu-v4-1024", 512), ("tpu-v5e-256", 256), ("tpu-v6e-64", 64)])
def test_topologies_have_the_devices_of_the_table(name, devices):
    found = devices_of(find_machine(name))
    assert len(found) == devices == find_machine(name).devices
    assert found[0].device_kind == find_machine(name).device.device_kind
