import dataclasses
import re

import pytest

from ringrl.planning.machines import GIB, find_machine
from ringrl.planning.memory import memory_of
from ringrl.planning.search import advise
from ringrl.planning.workload import Workload, find_model

MACHINE = find_machine("8xa100-40")


def plan_of(tokens, mesh, contexts=1, accumulation=1, **model):
    workload = Workload(find_model("7b"), tokens).with_settings("model", **model)
    workload = workload.with_settings("optimiser", batch_size=contexts, accumulation=accumulation)
    return workload.with_settings("mesh", **mesh)


def advice_of(workload, machine=MACHINE):
    return advise(workload, machine, memory_of(workload, "gpu").total)


def changes(workload, machine=MACHINE, *, enough):
    return [advice.change for advice in advice_of(workload, machine) if advice.is_enough == enough]


def test_sufficient_advice_fits_and_comes_first():
    for workload in (
        plan_of(2**19, {"seq": 8}, remat="none"),
        plan_of(2**14, {"fsdp": 8}, contexts=64, attention="vanilla"),
        plan_of(2**21, {"seq": 8}, dtype="float32"),
    ):
        found = advice_of(workload)
        flags = [advice.is_enough for advice in found]
        assert flags == sorted(flags, reverse=True)
        for advice in found:
            assert advice.is_enough == (advice.total <= MACHINE.device.memory)


def test_advice_equals_the_plan_of_the_changed_workload():
    workload = plan_of(2**17, {"seq": 8}, remat="none")
    found = {advice.change: advice.total for advice in advice_of(workload)}
    changed = workload.with_settings("model", remat="layers")
    assert found["--remat layers"] == pytest.approx(memory_of(changed, "gpu").total)


def test_remat_for_too_many_activations():
    assert {"--remat layers", "--remat full"} <= set(changes(plan_of(2**18, {"seq": 8}, remat="none"), enough=True))


def test_ring_for_too_many_logits():
    assert "--attention ring" in changes(plan_of(2**16, {"seq": 8}, attention="vanilla"), enough=True)
    assert "--attention blockwise" in changes(plan_of(2**14, {"fsdp": 8}, 8, attention="vanilla"), enough=True)


def test_no_advice_for_current_settings():
    text = " ".join(change.change for change in advice_of(plan_of(2**20, {"seq": 8}, remat="full")))
    assert not re.search("remat|attention|dtype|accumulation", text)


def test_accumulation_for_several_contexts():
    workload = plan_of(2**17, {"seq": 8}, contexts=4)
    assert "optimiser.accumulation: 4" in changes(workload, enough=True)
    done = workload.with_settings("optimiser", accumulation=4)
    assert memory_of(done, "gpu").total <= MACHINE.device.memory


def test_number_of_devices_is_the_smallest_sufficient():
    workload = plan_of(2**20, {"seq": 8})
    text = next(change for change in changes(workload, enough=True) if "devices" in change)
    assert text == "32 devices, --mesh.seq 32"
    wide = changes(plan_of(2**20, {"seq": 4, "tensor": 2}), enough=True)
    assert "64 devices, --mesh.tensor 2 --mesh.seq 32" in wide
    grouped = changes(plan_of(2**20, {"seq": 8, "ulysses": 4}, strategy="ulysses_ring"), enough=True)
    assert any(re.fullmatch(r"\d+ devices, --mesh.seq \d+ --mesh.ulysses 4", change) for change in grouped)
    fitting = [
        memory_of(workload.with_settings("mesh", seq=n), "gpu").total <= MACHINE.device.memory for n in (8, 16, 32)
    ]
    assert fitting == [False, False, True]


def test_no_devices_if_logits_of_one_device_are_too_large():
    """The logits of a context are on one device; fsdp divides only the parameters."""
    hopeless = dataclasses.replace(MACHINE, device=dataclasses.replace(MACHINE.device, memory=0.01 * GIB))
    workload = plan_of(2**20, {"seq": 8})
    assert not any(advice.is_enough for advice in advice_of(workload, hopeless))


def test_advice_respects_the_tile_limit_of_the_tpu_kernel():
    """Memory is sufficient, so changes that save memory do not help."""
    machine = find_machine("tpu-v5p-32")
    workload = Workload(find_model("350m"), 2**23).with_settings("mesh", seq=16)
    total = memory_of(workload, "tpu").total
    assert total < machine.device.memory
    assert [advice.change for advice in advise(workload, machine, total) if advice.is_enough] == [
        "32 devices, --mesh.seq 32"
    ]


def test_all_changes_together():
    tight = dataclasses.replace(MACHINE, device=dataclasses.replace(MACHINE.device, memory=25 * GIB))
    workload = plan_of(2**18, {"seq": 8}, contexts=2, remat="none", dtype="float32", attention="memory_efficient")
    found = {advice.change: advice for advice in advice_of(workload, tight)}
    together = workload.with_settings("model", remat="full", dtype="bfloat16", attention="ring")
    together = together.with_settings("optimiser", accumulation=2)
    assert found["all changes above"].total == pytest.approx(memory_of(together, "gpu").total)


def test_error_of_the_formula_is_kept():
    workload = plan_of(2**18, {"seq": 8}, remat="none")
    formula = memory_of(workload, "gpu").total
    plain, more = (
        {advice.change: advice.total for advice in advise(workload, MACHINE, total)}
        for total in (formula, formula + GIB)
    )
    assert more["--remat layers"] == pytest.approx(plain["--remat layers"] + GIB)


def test_error_of_the_formula_is_divided_over_more_devices():
    workload = plan_of(2**20, {"seq": 8})
    on_32 = memory_of(workload.with_settings("mesh", seq=32), "gpu").total
    found = advise(workload, MACHINE, memory_of(workload, "gpu").total + 4 * GIB)
    devices = next(advice for advice in found if "32 devices" in advice.change)
    assert devices.total == pytest.approx(on_32 + GIB)
