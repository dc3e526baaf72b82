import dataclasses

import jax
import pytest

from ringrl.planning.ahead_of_time import abstract_step
from ringrl.planning.machines import Rates, custom_machine, find_machine
from ringrl.planning.roofline import ATTAINED, WITHOUT_KERNEL, Attained, attained_by, step_time
from ringrl.planning.workload import Workload, find_model
from ringrl.training.budget import forward_flops, step_flops


def seven_billion(tokens, mesh, **model):
    workload = Workload(find_model("7b"), tokens)
    return workload.with_settings("model", **model).with_settings("mesh", **mesh)


def test_attention_is_quadratic_and_matrices_are_linear():
    machine = find_machine("tpu-v4-16")
    short, long = (step_time(seven_billion(n, {"seq": 8}), machine) for n in (2**17, 2**18))
    assert long.attention == pytest.approx(4 * short.attention)
    assert long.matrices == pytest.approx(2 * short.matrices)


def test_mfu_of_matrices_with_recomputation():
    """Attention over 64 tokens is negligible. Of a layer's 24 h^2 operations the last 8 h^2 are not recomputed."""
    machine, workload = find_machine("1xh200"), seven_billion(64, {})
    machine = dataclasses.replace(machine, device=dataclasses.replace(machine.device, bandwidth=1e18))
    assert step_time(workload, machine).mfu == pytest.approx(ATTAINED.matrices * 3 / (3 + 16 / 24), rel=0.01)
    plain = workload.with_settings("model", remat="none")
    assert step_time(plain, machine).mfu == pytest.approx(ATTAINED.matrices, rel=0.01)
    in_blocks = plain.with_settings("model", block_tokens=16)
    assert step_time(in_blocks, machine).mfu == pytest.approx(ATTAINED.matrices * 3 / (3 + 8 / 24), rel=0.01)


@pytest.mark.slow
def test_recomputation_equals_the_compiled_program(make):
    """One layer, with negligible attention over 64 tokens."""

    def operations(remat):
        workload = make(64, layers=1, width=512, heads=8, kv_heads=8, remat=remat)
        step = abstract_step(workload, jax.devices()[:1])
        return step.function.lower(step.state, step.batch).cost_analysis()["flops"] / forward_flops(workload.model, 64)

    assert operations("layers") - operations("none") == pytest.approx(16 / 24, rel=0.05)


def test_operations_and_mfu_equal_those_of_training():
    workload, machine = seven_billion(2**18, {"seq": 8}), find_machine("8xh200")
    time = step_time(workload, machine)
    assert time.model_flops == step_flops(workload.model, 2**18, 1)
    assert time.mfu == pytest.approx(time.model_flops / time.total / (8 * 989e12))
    assert 0 < time.mfu < ATTAINED.matrices


def test_hops_hide_with_long_chunks_and_fast_links():
    machine = find_machine("32xa100")
    short, long = (step_time(seven_billion(n, {"seq": 32}), machine) for n in (2**14, 2**21))
    assert short.ring > 0
    assert long.ring == 0
    one_host = step_time(seven_billion(2**14, {"seq": 32}), dataclasses.replace(machine, network=None))
    assert one_host.ring < short.ring


def test_exposed_hops():
    machine, workload = find_machine("tpu-v5e-256"), seven_billion(2**21, {"seq": 256})
    hidden, exposed = (step_time(workload, machine, hops_hide=hide) for hide in (True, False))
    numbers = 2 * 32 * 4096 * 2**13 * 255  # keys and values of 32 layers, 8,192 tokens, 255 hops
    assert hidden.ring == 0
    assert exposed.ring == pytest.approx(numbers * (2 + 2 + 4) / (machine.device.link * ATTAINED.links))
    assert exposed.total > hidden.total


def test_time_is_inverse_to_the_devices():
    few, many = (
        step_time(seven_billion(2**22, {"seq": devices}), find_machine(f"tpu-v4-{2 * devices}")) for devices in (8, 64)
    )
    assert few.total == pytest.approx(8 * many.total, rel=0.02)


def test_rings_within_a_host_do_not_use_the_network():
    machine = find_machine("32xh200")
    inside = seven_billion(512, {"fsdp": 4, "seq": 8}).with_settings("optimiser", batch_size=4)
    alone = dataclasses.replace(machine, network=None)
    assert step_time(inside, machine).ring == step_time(inside, alone).ring > 0
    assert step_time(inside, machine).parameters > step_time(inside, alone).parameters  # gathered from all hosts


def test_vanilla_computes_hidden_logits_without_a_kernel():
    machine = find_machine("8xh200")
    ring, vanilla = (
        step_time(seven_billion(2**14, {"seq": 8}, attention=kind, remat="none"), machine)
        for kind in ("ring", "vanilla")
    )
    slower = ATTAINED.attention / WITHOUT_KERNEL
    assert vanilla.attention == pytest.approx(slower * ring.attention * (4 + 8) / (2 + 7))
    assert vanilla.ring > 0  # keys and values are gathered first


@pytest.mark.parametrize(
    ("machine", "model", "matrices", "attention"),
    [
        ("tpu-v4-16", {}, 0.7, 0.5),
        ("tpu-v4-16", {"dtype": "float32"}, 0.7, 0.5 / 6),
        ("tpu-v4-16", {"heads": 8}, 0.7, 0.15),  # heads of 512 features
        ("8xh200", {}, 0.7, 0.5),
        ("tpu-v4-16", {"heads": 8, "dtype": "float32"}, 0.7, 0.5 / 6),
        ("8xh200", {"dtype": "float32"}, 0.35, 0.5 / 15),
        ("8xh200", {"dtype": "float32", "attention": "vanilla", "remat": "none"}, 0.35, 0.15),
        ("8xa100", {}, 0.7, 0.5),
        ("8xa100", {"heads": 16}, 0.7, 0.15),  # heads of 256 features
    ],
)
def test_attained_shares_depend_on_kernel_and_dtype(machine, model, matrices, attention):
    model = model | ({"kv_heads": model["heads"]} if "heads" in model else {})
    found = attained_by(seven_billion(2**14, {"seq": 8}, **model), find_machine(machine))
    assert (found.matrices, found.attention) == pytest.approx((matrices, attention))


@pytest.mark.parametrize("kind", ["ring", "memory_efficient"])
def test_full_remat_repeats_attention_and_its_transfers(kind):
    """Two products of nine forward, and the hops of the forward pass, run once more."""
    short, machine = seven_billion(2**11, {"seq": 8}, attention=kind), find_machine("8xh200")
    layers, full = (step_time(short.with_settings("model", remat=remat), machine) for remat in ("layers", "full"))
    assert full.attention == pytest.approx(layers.attention * 11 / 9)
    assert layers.ring > 0
    forward = 2 / (2 + 6)  # bytes per number: bfloat16 forward, bfloat16 and float32 gradients backward
    if kind == "memory_efficient":
        assert full.ring == pytest.approx(layers.ring * (1 + forward))
    assert layers.ring < full.ring < layers.ring * 1.5


def test_measured_rates_are_used_as_they_are():
    rates = Rates(devices=8, memory=80, tflops=300, bandwidth=2000, link=200, attention=120)
    assert attained_by(seven_billion(2**14, {"seq": 8}), custom_machine(rates, "own")) == Attained(1.0, 0.4, 1.0, 1.0)


@pytest.mark.parametrize("kind", ["ring", "memory_efficient"])
def test_contiguous_layout_waits_for_the_last_device(kind):
    machine = find_machine("tpu-v4-16")
    zigzag, contiguous = (
        step_time(seven_billion(2**20, {"seq": 8, "layout": layout}, attention=kind), machine)
        for layout in ("zigzag", "contiguous")
    )
    assert contiguous.attention == pytest.approx(zigzag.attention * 2 * 7.5 / 8)  # 7.5 blocks instead of 8 halves


def test_all_to_alls_are_exposed():
    """Ulysses exchanges q, k, v and the output in three passes, at a quarter of the link rate on a torus."""
    for machine, share in ((find_machine("tpu-v4-16"), 0.25), (find_machine("8xh200"), 1.0)):
        time = step_time(seven_billion(2**17, {"seq": 8, "layout": "contiguous"}, strategy="ulysses"), machine)
        numbers = 4 * 32 * 2**14 * 4096 * 7 / 8
        assert time.ring == pytest.approx(3 * numbers * 2 / (machine.device.link * share * ATTAINED.links))
        assert time.attention == step_time(seven_billion(2**17, {"seq": 8}), machine).attention, (
            "balanced in any layout"
        )
        few = step_time(seven_billion(2**17, {"seq": 8}, strategy="ulysses", kv_heads=1), machine)
        assert few.ring == pytest.approx(time.ring * (2 * 32 + 2 * 8) / (4 * 32)), "a key head on every device"
        gathered, blockwise = (
            step_time(seven_billion(2**17, {"seq": 8}, **model), machine)
            for model in ({"strategy": "all_gather"}, {"attention": "blockwise"})
        )
        assert gathered == blockwise


def test_groups_of_a_ring_exchange_heads_and_make_fewer_hops():
    machine, ring = find_machine("8xh200"), seven_billion(2**17, {"seq": 8})
    grouped = seven_billion(2**17, {"seq": 8, "ulysses": 4}, strategy="ulysses_ring")
    within = seven_billion(2**17, {"seq": 4, "data": 2}, strategy="ulysses")  # the same numbers per device
    within = within.with_settings("optimiser", batch_size=2).with_tokens(2**16)
    one_hop, seven_hops = (step_time(x, machine, hops_hide=False).ring for x in (grouped, ring))
    assert one_hop == pytest.approx(seven_hops / 7 + step_time(within, machine).ring)
    few, within = (x.with_settings("model", kv_heads=2) for x in (grouped, within))  # each device sends one of two
    few_hops = step_time(few, machine, hops_hide=False).ring - step_time(within, machine).ring
    assert few_hops == pytest.approx(seven_hops / 7 * 4 / 32), (
        "32 key heads of a device's tokens, or one of its group's"
    )


def test_contiguous_groups_wait_for_the_last_group():
    machine, mesh = find_machine("tpu-v4-16"), {"seq": 8, "ulysses": 4}
    zigzag, contiguous = (
        step_time(seven_billion(2**20, {**mesh, "layout": layout}, strategy="ulysses_ring"), machine).attention
        for layout in ("zigzag", "contiguous")
    )
    assert contiguous == pytest.approx(zigzag * 2 * 1.5 / 2)  # 1.5 blocks instead of 2 halves


@pytest.mark.parametrize(("name", "gain"), [("tpu-v5e-256", 2), ("256xh200", 1)])
def test_two_directions_use_both_links_of_a_torus(name, gain):
    one, two = (
        step_time(seven_billion(2**16, {"seq": 256}, bidirectional=both), find_machine(name), hops_hide=False)
        for both in (False, True)
    )
    assert one.ring == pytest.approx(gain * two.ring)


def test_all_reduces_over_tensor_and_data_only():
    machine = find_machine("8xa100")
    assert step_time(seven_billion(2**14, {"seq": 8}), machine).sums == 0
    assert step_time(seven_billion(2**14, {"seq": 4, "tensor": 2}), machine).sums > 0


def test_memory_traffic_of_a_short_step():
    """A step of 64 tokens still reads and writes the whole state."""
    machine, workload = find_machine("1xh200"), seven_billion(64, {})
    time = step_time(workload, machine)
    assert time.memory > time.matrices + time.attention
    assert time.total >= 32 * workload.parameters.total / (4800e9 * ATTAINED.memory)
