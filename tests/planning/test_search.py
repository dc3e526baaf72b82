import pytest

from ringrl.errors import UserError
from ringrl.planning.machines import find_machine
from ringrl.planning.memory import memory_of
from ringrl.planning.roofline import step_time
from ringrl.planning.search import best_meshes, meshes
from ringrl.planning.workload import Workload, find_model


def shape(name, tokens, contexts=1):
    return Workload(find_model(name), tokens).with_settings("optimiser", batch_size=contexts)


def test_meshes_use_all_devices_and_divide():
    found = list(meshes(shape("7b", 2**14, contexts=4), 16))
    assert len(found) == len({repr(each.config.mesh) for each in found}) > 10
    for each in found:
        assert each.config.mesh.devices == 16
        each.check()
    assert all(each.config.mesh.data * each.config.mesh.fsdp <= 4 for each in found)


def test_best_mesh_is_the_fastest_that_fits():
    machine = find_machine("8xa100-40")
    found = best_meshes(shape("7b", 2**14, contexts=8), machine)
    fitting = [memory_of(each, "gpu").total <= machine.device.memory for each in found]
    assert fitting == sorted(fitting, reverse=True)
    times = [step_time(each, machine).total for each, is_fitting in zip(found, fitting, strict=True) if is_fitting]
    assert times == sorted(times)
    assert fitting[0]
    assert not fitting[-1]


def test_one_long_context_uses_the_ring():
    assert best_meshes(shape("7b", 2**23), find_machine("tpu-v4-512"))[0].config.mesh.seq == 256


def test_error_without_a_mesh_suggests_changes():
    with pytest.raises(
        UserError, match=r"no mesh of 8 devices divides 1 context\(s\) of 1001 tokens.*multiple of 64, other"
    ):
        best_meshes(shape("7b", 1001), find_machine("8xa100"))
    with pytest.raises(UserError, match=r"use other --contexts or another number of devices"):
        best_meshes(shape("7b", 7 * 8192), find_machine("7xa100"))
    with pytest.raises(UserError, match=r"with strategy ulysses; use --strategy ring, other --contexts or another"):
        best_meshes(shape("7b", 2**20).with_settings("model", strategy="ulysses"), find_machine("64xa100"))
    assert best_meshes(shape("7b", 1024), find_machine("8xa100"))
    assert best_meshes(shape("7b", 8192, contexts=7), find_machine("7xa100"))


@pytest.mark.parametrize(("devices", "number"), [(1, 1), (4, 10), (64, 84)])
def test_meshes_are_all_factorisations(devices, number):
    """With 64 contexts, heads and units, every product of four axes divides."""
    workload = shape("7b", 2**20, contexts=64).with_settings("model", heads=64, kv_heads=64)
    assert len({repr(each.config.mesh) for each in meshes(workload, devices)}) == number
