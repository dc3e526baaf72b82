import dataclasses
import math

import pytest

from ringrl.attention.strategy import link_of
from ringrl.errors import UserError
from ringrl.planning.machines import GIB, SLICES, find_machine, gib


@pytest.mark.parametrize(
    ("name", "devices", "gib"),
    [
        ("tpu-v3-512", 512, 16),  # named by cores; a core is a device
        ("tpu-v4-1024", 512, 30.75),  # named by cores; a device has two
        ("tpu-v5p-512", 256, 95.74),
        ("tpu-v5e-256", 256, 15.75),  # named by chips
        ("tpu-v6e-64", 64, 31.25),
        ("8xa100-40", 8, 38),
        ("32xA100", 32, 76),
    ],
)
def test_devices_and_memory_of_machines(name, devices, gib):
    machine = find_machine(name)
    assert machine.devices == devices
    assert machine.device.memory == pytest.approx(gib * GIB)


def test_topologies_have_the_named_number_of_chips():
    for generation, slices in SLICES.items():
        for size, topology in slices.items():
            chips = math.prod(int(side) for side in topology.split("x"))
            assert find_machine(f"TPU-{generation}-{size}").topology == f"{generation}:{topology}"
            assert chips == (size if generation in ("v5e", "v6e") else size // 2)


def test_both_names_of_a_tpu_generation_have_equal_rates():
    for names in (("TPU v5", "TPU v5p"), ("TPU v5 lite", "TPU v5e"), ("TPU v6 lite", "TPU v6e")):
        assert link_of(names[0]) == link_of(names[1])
    assert link_of("TPU v5") != link_of("TPU v5e")


def test_network_limits_rings_over_several_hosts():
    assert find_machine("8xa100").hop(8) == 300e9
    assert find_machine("6xa100").hop(6) == 300e9
    assert find_machine("32xa100").hop(32) == 25e9
    assert find_machine("32xa100").hop(8) == find_machine("32xa100").hop(4) == 300e9  # each ring on one host
    assert find_machine("24xa100").hop(6) == 25e9  # the second ring has devices 6 to 11
    assert find_machine("tpu-v4-512").hop(256) == 50e9


def test_collective_over_hosts_uses_all_network_cards():
    machine = find_machine("32xa100")
    assert machine.collective(32) == 8 * 25e9
    assert machine.collective(8) == 300e9
    assert machine.collective(32, stride=2) == 4 * 25e9
    assert machine.collective(32, stride=16) == 25e9
    assert find_machine("32xh200").collective(32) == 8 * 50e9  # no faster than a link:
    assert dataclasses.replace(machine, network=100e9).collective(32) == 300e9


@pytest.mark.parametrize("name", ["tpu-v4-500", "8xb200", "0xa100", "99999999xa100", "cpu-0", "tpu", "", "8x"])
def test_unknown_machines_raise_with_all_names(name):
    with pytest.raises(UserError, match=r"tpu-v3-8|32|128.*8xa100; cpu-8.*or a file of"):
        find_machine(name)


def test_a_machine_in_a_file(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("{devices: 4, memory: 24, tflops: 100, bandwidth: 900, link: 32}")
    machine = find_machine(str(path))
    assert (machine.devices, machine.device.memory, machine.device.flops) == (4, 24 * GIB, 1e14)
    assert (machine.device.bandwidth, machine.device.link, machine.topology) == (9e11, 3.2e10, None)


def test_format_bytes():
    assert gib(1.5 * GIB) == "1.50 GiB"
    assert gib(2**20) == "1.00 MiB"
