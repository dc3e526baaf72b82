import os

import jax
import jax.numpy as jnp
import pytest

from ringrl.planning import machines
from ringrl.planning.machines import find_machine, measure_host
from ringrl.planning.roofline import attained_by, step_time
from ringrl.planning.workload import Workload, find_model

pytestmark = pytest.mark.usefixtures("eight_devices")  # fixes the number of host devices


@pytest.fixture
def small(monkeypatch):
    """Small products, since the test checks only the counts of operations."""
    monkeypatch.setattr(machines, "ROWS", 256)
    monkeypatch.setattr(machines, "TOKENS", 256)
    monkeypatch.setattr(machines, "NUMBERS", 2**16)
    monkeypatch.setattr(
        machines, "seconds_on", lambda devices, function, *arguments: (jax.eval_shape(function, *arguments), 0.5)[1]
    )
    return find_model("small").model


def test_rates_per_device(small):
    machine = measure_host(find_machine("cpu-8"), small)
    width, count = small.width, len(jax.local_devices(backend="cpu"))  # all devices at once
    assert machine.device.flops == pytest.approx(count * 2 * 256 * width * 4 * width / 0.5 / 8)
    assert machine.device.bandwidth == pytest.approx(count * 2 * 4 * 2**16 / 0.5 / 8)
    assert machine.measured is not None
    forward = 2 * 2 * (256 * 256 / 2) * width  # two products, causal half, all heads
    assert machine.measured * machine.device.flops == pytest.approx(count * 3.5 * forward / 0.5 / 8)


def test_memory_per_device(small, monkeypatch, tmp_path):
    monkeypatch.setattr(machines, "CGROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert measure_host(find_machine("cpu-4"), small).device.memory == whole / 4
    (tmp_path / "memory.max").write_text("4096\n")
    assert measure_host(find_machine("cpu-4"), small).device.memory == 1024


def test_estimate_uses_measured_rates(small):
    workload = Workload(find_model("small"), 1024).with_settings("mesh", seq=8)
    machine = measure_host(find_machine("cpu-8"), small)
    assert attained_by(workload, machine).attention == machine.measured
    slow = machine.device.flops
    assert step_time(workload, machine).mfu * slow == pytest.approx(
        step_time(workload, machine).model_flops / 8 / step_time(workload, machine).total
    )


def test_seconds_exclude_compilation():
    x = jnp.ones((8, 8, 8))  # eight devices at most
    calls = []
    assert machines.seconds_on(jax.devices("cpu")[:8], lambda x: (calls.append(1), x @ x)[1], x) > 0
    assert len(calls) == 1  # traced once
