import json

import jax
import pytest

from ringrl.cli import main
from ringrl.planning.ahead_of_time import why_not
from ringrl.planning.machines import find_machine


def plan(*arguments):
    main(["plan", *arguments])


def test_a_plan_by_the_formula_says_so(capsys):
    plan("--model", "7b", "--machine", "8xa100", "--tokens", "256k")
    said = capsys.readouterr().out
    assert "by the formula alone: no compiler here knows 8xa100" in said
    for part in ("parameters", "optimiser", "activations", "scratch", "total", "MFU", "assumed", "planned in"):
        assert part in said
    assert "\nfits, with " in said
    assert "longest context that fits" in said


def test_a_plan_that_does_not_fit_says_by_how_much_and_what_would(capsys, tmp_path):
    path = tmp_path / "plan.json"
    flags = "--remat", "none", "--mesh.seq", "8", "--json", str(path)
    plan("--model", "7b", "--machine", "8xa100-40", "--tokens", "128k", *flags)
    said, found = capsys.readouterr().out, json.loads(path.read_text())
    assert not found["fits"]
    excess = found["total_bytes"] - found["machine"]["device"]["memory"]
    assert f"does not fit: {excess / 2**30:.2f} GiB too much on each device" in said
    assert "\n  enough: --remat layers" in said
    assert found["longest_tokens"] < 2**17
    assert found["method"] == "formula"
    assert sum(value for name, value in found["formula_bytes"].items() if name != "total") == found["total_bytes"]


@pytest.mark.usefixtures("eight_devices")
def test_a_plan_by_the_compiler(capsys, tmp_path):
    """A run's own configuration, on host devices; the search takes no mesh that does not divide."""
    config, path = tmp_path / "config.yaml", tmp_path / "plan.json"
    config.write_text(
        "model: {token_set: fused1, layers: 1, width: 64, heads: 1, kv_heads: 1}\noptimiser: {batch_size: 1}"
    )
    plan("--model", str(config), "--machine", "cpu-8", "--tokens", "1024", "--method", "compiler", "--json", str(path))
    said, found = capsys.readouterr().out, json.loads(path.read_text())
    assert "by the compiler (" in said
    assert "corrected by the compiler's figure" in said
    assert found["method"] == "compiler"
    assert found["total_bytes"] == found["compiled"]["total"]
    assert found["fits"]
    assert list(found["tried_bytes"]) == ["1024"]
    assert found["mesh"]["seq"] == 8


def test_a_chosen_mesh_has_the_layout_that_is_asked_for(tmp_path):
    path = tmp_path / "plan.json"
    flags = "--mesh.layout", "contiguous", "--json", str(path)
    plan("--model", "7b", "--machine", "8xa100", "--tokens", "128k", *flags)
    assert json.loads(path.read_text())["mesh"]["layout"] == "contiguous"


def test_a_given_mesh_keeps_the_layout_of_the_configuration(tmp_path):
    config, path = tmp_path / "config.yaml", tmp_path / "plan.json"
    config.write_text("model: {width: 256, heads: 4}\nmesh: {layout: contiguous}\noptimiser: {batch_size: 1}")
    flags = "--mesh.seq", "8", "--json", str(path)
    plan("--model", str(config), "--machine", "8xa100", "--tokens", "128k", *flags)
    assert json.loads(path.read_text())["mesh"]["layout"] == "contiguous"


def test_of_a_gpu_it_is_said_how_much_a_program_has_to_take(capsys):
    plan("--model", "7b", "--machine", "8xa100", "--tokens", "128k")
    assert "76.00 GiB each (with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in capsys.readouterr().out


@pytest.mark.usefixtures("eight_devices")
def test_more_host_devices_than_there_are(capsys):
    assert len(jax.devices()) < 64  # which from here on are as many as they are
    plan("--model", "tiny", "--machine", "cpu-64", "--tokens", "1024", "--contexts", "1")
    assert "start it with JAX_PLATFORMS=cpu XLA_FLAGS" in capsys.readouterr().out


def test_a_machine_by_its_numbers(capsys):
    numbers = {"devices": "4", "memory": "24", "tflops": "80", "bandwidth": "900", "link": "32"}
    flags = [part for name, value in numbers.items() for part in (f"--custom.{name}", value)]
    plan("--model", "350m", "--machine", "custom", "--tokens", "64k", *flags)
    assert "custom: 4 x custom, 24.00 GiB each; mesh seq 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model 7c --machine 8xa100 --tokens 8M", "--model 7c: is not known"),
        ("--model 7b --machine tpu-v4-500 --tokens 8M", "did you mean tpu-v4-512"),
        ("--model 7b --machine 8xa100 --tokens 8G", "--tokens 8G"),
        ("--model 7b --machine 8xa100 --tokens 1000 --mesh.seq 8", "nearest is 1024"),
        ("--model 7b --machine 8xa100 --tokens 1001", "no mesh of 8 devices"),
        ("--model 7b --machine 8xa100 --tokens 8M --mesh.seq 4", "is 4 devices, and 8xa100 has 8"),
        ("--model 7b --machine 8xa100 --tokens 8M --mesh.fsdp 8", "mesh.fsdp"),
        ("--model 7b --machine 8xa100 --tokens 8M --mesh.seq 8 --search", "--search: looks for a mesh"),
        ("--model 7b --machine 8xa100 --tokens 8M --method compiler", "cannot be compiled for"),
        ("--model 7b --machine custom --tokens 8M", "--custom.memory"),
        ("--model jaco_reach --machine 8xa100 --tokens 8M", "sees no context"),
        ("--model 7b --machine 8xa100 --tokens 8k --json /nowhere/plan.json", "/nowhere/plan.json: cannot be written"),
        ("--model 7b --machine 8xa100 --tokens 8k --contexts 0", "batch_size"),
        ("--model 7b --machine 8xa100 --tokens 8k --custom.memory 40", "--machine is 8xa100"),
        ("--model 7b --machine tpu-v4-16 --tokens 8k --compilations -1", "--compilations -1"),
        ("--model 7b --machine 8xa100", "--tokens"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        plan(*arguments.split())
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert message in said[-1]
    assert len([line for line in said if line.startswith("ringrl:")]) == 1


def test_a_v3_is_planned_by_the_formula_and_the_reason_given(capsys):
    assert "no longer compiles" in (why_not(find_machine("tpu-v3-512")) or "")
    plan("--model", "7b", "--machine", "tpu-v3-512", "--tokens", "2M", "--search")
    said = capsys.readouterr().out
    assert "by the formula alone" in said
    assert "meshes, the best first:" in said
