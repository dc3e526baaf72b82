import dataclasses

import jax
import pytest

from ringrl.cli import main
from ringrl.planning.ahead_of_time import Compiled, why_not
from ringrl.planning.machines import GIB, find_machine
from ringrl.planning.plan import describe, make_plan
from ringrl.planning.workload import find_model


def plan(*arguments):
    main(["plan", *arguments])


@pytest.fixture
def made(monkeypatch):
    """The plans that the command makes."""
    found = []
    monkeypatch.setattr(
        "ringrl.planning.plan.make_plan", lambda *given, **named: found.append(make_plan(*given, **named)) or found[-1]
    )
    return found


def test_plan_from_the_formula(capsys):
    plan("--model", "7b", "--machine", "8xa100", "--tokens", "256k")
    text = capsys.readouterr().out
    assert "from the formula: there is no ahead-of-time compiler for 8xa100" in text
    for part in ("parameters", "optimiser", "activations", "scratch", "total", "MFU", "assumed"):
        assert part in text
    assert "\nfits, with " in text
    assert "longest context that fits on this mesh: " in text


def test_plan_that_does_not_fit_gives_the_excess_and_advice(capsys, made):
    plan("--model", "7b", "--machine", "8xa100-40", "--tokens", "128k", "--remat", "none", "--mesh.seq", "8")
    text, (found,) = capsys.readouterr().out, made
    assert not found.fits
    excess = found.total - found.machine.device.memory
    assert f"does not fit: {excess / 2**30:.2f} GiB too much per device" in text
    assert "\n  enough: --remat layers" in text
    assert 0 < found.longest < 2**17
    assert found.compiled is None


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.slow
def test_plan_from_the_compiler(capsys, tmp_path, made):
    """The configuration of a run on host devices; the search skips meshes that do not divide."""
    config = tmp_path / "config.yaml"
    config.write_text(
        "model: {token_set: fused1, layers: 1, width: 64, heads: 1, kv_heads: 1}\noptimiser: {batch_size: 1}"
    )
    plan("--model", str(config), "--machine", "cpu-8", "--tokens", "1024", "--method", "compiler")
    text, (found,) = capsys.readouterr().out, made
    assert "from the compiler (" in text
    assert "corrected by the compiler" in text
    assert found.total == found.compiled.total
    assert found.fits
    assert found.workload.config.mesh.seq == 8


def test_longest_context_is_corrected_by_the_compiled_total():
    """Bytes that the formula misses shorten the context like a smaller memory."""
    machine, missed = find_machine("8xa100"), 8 * GIB
    made = make_plan(find_model("7b"), machine, 2**17, method="formula")
    compiled = Compiled(0.0, 0.0, 0.0, made.formula.total + missed, None, False, 0.0)
    device = dataclasses.replace(machine.device, memory=machine.device.memory - missed)
    smaller = dataclasses.replace(made, machine=dataclasses.replace(machine, device=device))
    assert 0 < dataclasses.replace(made, compiled=compiled).longest == smaller.longest < made.longest
    refused = compiled._replace(total=float("nan"), refusal="no kernel")
    assert "corrected by the compiler" in describe(dataclasses.replace(made, compiled=compiled))
    assert "corrected by the compiler" not in describe(dataclasses.replace(made, compiled=refused))


def test_chosen_mesh_has_the_requested_layout(made):
    plan("--model", "7b", "--machine", "8xa100", "--tokens", "128k", "--mesh.layout", "contiguous")
    assert made[0].workload.config.mesh.layout == "contiguous"


def test_given_mesh_keeps_the_layout_of_the_configuration(tmp_path, made):
    config = tmp_path / "config.yaml"
    config.write_text("model: {width: 256, heads: 4}\nmesh: {layout: contiguous}\noptimiser: {batch_size: 1}")
    plan("--model", str(config), "--machine", "8xa100", "--tokens", "128k", "--mesh.seq", "8")
    assert made[0].workload.config.mesh.layout == "contiguous"


def test_mesh_of_the_configuration_has_no_effect_on_one_device(tmp_path, made):
    config = tmp_path / "config.yaml"
    config.write_text("model: {width: 256, heads: 4, strategy: ulysses_ring}\nmesh: {seq: 4, ulysses: 2}")
    plan("--model", str(config), "--machine", "1xa100", "--tokens", "4k")
    assert made[0].workload.config.mesh.devices == 1


def test_the_search_forms_groups(made):
    plan("--model", "7b", "--machine", "16xh100", "--tokens", "256k", "--strategy", "ulysses_ring")
    assert made[0].workload.mesh_in_words == "seq 16 (groups of 2)"


def test_gpu_plan_gives_the_memory_fraction(capsys):
    plan("--model", "7b", "--machine", "8xa100", "--tokens", "128k")
    assert "76.00 GiB each (with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in capsys.readouterr().out


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.slow
def test_too_many_host_devices(capsys):
    assert len(jax.devices()) < 64  # the number is fixed now
    plan("--model", "tiny", "--machine", "cpu-64", "--tokens", "1024", "--contexts", "1")
    assert "start it with JAX_PLATFORMS=cpu XLA_FLAGS" in capsys.readouterr().out


def test_a_machine_in_a_file(capsys, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("{devices: 4, memory: 24, tflops: 80, bandwidth: 900, link: 32}")
    plan("--model", "350m", "--machine", str(path), "--tokens", "64k")
    assert "own.yaml: 4 x custom, 24.00 GiB each; mesh seq 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "strategy", "words"),
    [
        ("--tokens 8k", "ring", "from the configuration; auto chooses ulysses: 1024 tokens per device do not hide"),
        (
            "--tokens 8k --strategy auto",
            "ulysses",
            "chosen by auto: 1024 tokens per device do not hide a hop (NVIDIA H200: ",
        ),
        ("--tokens 1M --strategy auto", "ring", "chosen by auto: 131072 tokens per device hide a hop (NVIDIA H200: "),
        (
            "--tokens 8k --strategy ulysses_ring --mesh.ulysses 2",
            "ulysses_ring",
            "from the configuration; auto chooses",
        ),
        ("--tokens 8k --attention blockwise", "all_gather", "from blockwise attention"),
    ],
)
def test_strategy_with_its_reason(flags, strategy, words, capsys):
    plan("--model", "7b", "--machine", "8xh200", "--mesh.seq", "8", *flags.split())
    text = capsys.readouterr().out
    assert f"\nstrategy {strategy}, {words}" in text
    assert f"exposed {strategy} " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model 7c --machine 8xa100 --tokens 8M", "no preset '7c'"),
        ("--model 7b --machine tpu-v4-500 --tokens 8M", "tpu-v4-8|16|32"),
        ("--model 7b --machine 8xa100 --tokens 8G", "--tokens 8G"),
        ("--model 7b --machine 8xa100 --tokens 1000 --mesh.seq 8", "nearest is 1024"),
        ("--model 7b --machine 8xa100 --tokens 1001", "no mesh of 8 devices"),
        ("--model 7b --machine 8xa100 --tokens 8M --mesh.seq 4", "is 4, expected the 8 devices of 8xa100"),
        ("--model 7b --machine 8xa100 --tokens 8M --mesh.fsdp 8", "mesh.fsdp"),
        ("--model 7b --machine 8xa100 --tokens 8M --method compiler", "cannot compile"),
        ("--model 7b --machine own.yaml --tokens 8M", "own.yaml: cannot be read"),
        ("--model 7b --machine 8xa100 --tokens 8k --contexts 0", "batch_size"),
        ("--model 7b --machine 8xa100", "--tokens"),
    ],
)
def test_user_errors_are_one_line_with_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        plan(*arguments.split())
    text = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert message in text[-1]
    assert len([line for line in text if line.startswith("ringrl:")]) == 1


def test_v3_is_planned_from_the_formula_with_the_reason(capsys):
    assert "no longer compiles" in (why_not(find_machine("tpu-v3-512")) or "")
    plan("--model", "7b", "--machine", "tpu-v3-512", "--tokens", "2M")
    assert "from the formula" in capsys.readouterr().out
