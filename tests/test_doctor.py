"""ringrl doctor passes on this machine, and notices kernels that are wrong."""

import json
import os
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from ringrl.attention import kernels
from ringrl.attention.contract import Gradients, Partial
from ringrl.cli import doctor as module
from ringrl.cli import main
from ringrl.cli.doctor import Finding, doctor
from ringrl.errors import UserError
from ringrl.planning.machines import find_machine

forward, backward = kernels.forward, kernels.backward


def without_segments(inputs, options, *more, run: Callable = forward):  # type: ignore[no-untyped-def]
    keys = inputs.keys._replace(segment_ids=jnp.zeros_like(inputs.keys.segment_ids))
    queries = inputs.queries._replace(segment_ids=jnp.zeros_like(inputs.queries.segment_ids))
    return run(inputs._replace(keys=keys, queries=queries), options, *more)


def rounded(inputs, options, *more) -> Partial:  # type: ignore[no-untyped-def]
    o, lse = forward(inputs, options, *more)
    return Partial(o.astype(jnp.bfloat16).astype(jnp.float32), lse)


def shifted(inputs, options, *more) -> Partial:  # type: ignore[no-untyped-def]
    o, lse = forward(inputs, options, *more)
    return Partial(o, lse + 0.01)


def keys_and_values_swapped(inputs, options, *more) -> Gradients:  # type: ignore[no-untyped-def]
    dq, dkv = backward(inputs, options, *more)
    return Gradients(dq, dkv[:, ::-1])


def unscaled(inputs, options, *more) -> Gradients:  # type: ignore[no-untyped-def]
    dq, dkv = backward(inputs, options, *more)
    return Gradients(dq / options.scale, dkv)


def without_delta(inputs, options, cotangents, *more) -> Gradients:  # type: ignore[no-untyped-def]
    return backward(inputs, options, cotangents._replace(delta=jnp.zeros_like(cotangents.delta)), *more)


MUTATIONS = {
    "output rounded to 16 bits": ("forward", rounded, "o"),
    "wrong log-sum-exp": ("forward", shifted, "lse"),
    "segments ignored": ("forward", without_segments, "o"),
    "segments ignored in the gradient": ("backward", partial(without_segments, run=backward), "dk"),
    "gradients of keys and values swapped": ("backward", keys_and_values_swapped, "dk"),
    "gradient of the queries without its scale": ("backward", unscaled, "dq"),
    "gradient without delta": ("backward", without_delta, "dq"),
}


@pytest.fixture
def one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check one mask in float32, to save time."""
    masks = module._masks(256)
    monkeypatch.setattr(module, "_masks", lambda tokens: {"segments": masks["segments"]})
    monkeypatch.setattr(module, "LIMITS", {"float32": module.LIMITS["float32"]})


@pytest.mark.usefixtures("one_mask")
def test_attention_is_fine():
    kernel, line = module._attention()
    assert kernel.text == "xla"
    assert line.is_fine
    assert line.text.startswith("1 masks; largest relative errors: ")


# Of both passes; the others change the same arrays.
QUICK = ("wrong log-sum-exp", "gradient without delta")


@pytest.mark.usefixtures("one_mask")
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MUTATIONS]
)
def test_a_wrong_kernel_is_noticed(name, monkeypatch):
    which, wrong, array = MUTATIONS[name]
    monkeypatch.setattr(
        "ringrl.attention.attend.LOCAL", type("Broken", (), {"forward": forward, "backward": backward})()
    )
    monkeypatch.setattr(f"ringrl.attention.api.LOCAL.{which}", wrong)
    wrong_lines = [line for line in module._attention() if not line.is_fine]
    assert any(line.name == "float32, segments" and line.text.startswith(f"{array} differs") for line in wrong_lines)


@pytest.mark.slow
@pytest.mark.usefixtures("eight_devices")
def test_a_ring_is_fine(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: jax.devices()[:4])  # half of the hops
    lines = list(module._ring())
    assert [line.name for line in lines] == ["zigzag", "contiguous", "striped"]
    assert all(line.is_fine and line.text.startswith("4 devices") for line in lines)


@pytest.mark.slow
def test_training_is_fine():
    (line,) = module._training()
    assert line.name == "cpu"
    assert line.is_fine
    assert module._losses_on_cpu() == module._losses()


def test_a_loss_that_differs_from_the_cpu_is_noticed(monkeypatch):
    right = [0.9, 0.8, 0.7]
    monkeypatch.setattr(module, "_losses_on_cpu", lambda: right)
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [FakeDevice()])
    for first, is_fine in ((right[0], True), (right[0] * 1.02, False)):
        monkeypatch.setattr(module, "_losses", lambda first=first: [first, *right[1:]])
        assert [line.is_fine for line in module._training()] == [is_fine, True]


class FakeDevice:
    platform = "tpu"


def test_one_line_per_failure_and_exit_code_1(monkeypatch, tmp_path, capsys):
    def broken() -> Iterator[Finding]:
        yield Finding("kernel", "xla")
        raise RuntimeError("the driver\nis gone")

    def speed(rates: dict[str, float]) -> Iterator[Finding]:
        rates |= {"tflops": 2.0, "attention": 1.5, "bandwidth": 30.0, "link": 10.0, "memory": 16.0}
        rates |= {"device_kind": "TPU v4", "devices": 4}
        yield Finding("matrix product", "2 TFLOP/s")

    for name, section in {
        "_machine": lambda: iter(()),
        "_attention": broken,
        "_ring": broken,
        "_training": broken,
    }.items():
        monkeypatch.setattr(module, name, section)
    monkeypatch.setattr(module, "_speed", speed)
    with pytest.raises(SystemExit) as stopped:
        doctor(json=tmp_path / "found.json", save=tmp_path / "machine.yaml")
    assert stopped.value.code == 1
    shown = capsys.readouterr()
    assert "3 of 7 lines are wrong" in shown.out
    assert shown.err.count("RuntimeError: the driver is gone\n") == 3
    sections, measured = json.loads((tmp_path / "found.json").read_text()).values()
    assert measured["tflops"] == 2.0
    assert sum(not line["is_fine"] for lines in sections.values() for line in lines) == 3
    machine = find_machine(str(tmp_path / "machine.yaml"))
    assert (machine.devices, machine.device.flops, machine.measured) == (4, 2e12, 0.75)
    assert machine.device.platform == "tpu"
    arguments = ["plan", "--model", "tiny", "--machine", str(tmp_path / "machine.yaml"), "--tokens", "4096"]
    main([*arguments, "--method", "formula"])
    assert "machine.yaml: 4 x TPU v4, 16.00 GiB each" in capsys.readouterr().out
    (tmp_path / "machine.yaml").write_text("tflops: 1\n# end\n")
    with pytest.raises(SystemExit):
        main(arguments)
    assert "machine.yaml: memory" in capsys.readouterr().err
    with pytest.raises(UserError, match="is a folder"):
        doctor(save=tmp_path)
    with pytest.raises(UserError, match=r"nowhere/found.json: cannot be written"):
        doctor(json=tmp_path / "nowhere" / "found.json")
    assert not capsys.readouterr().out, "before any work"
    monkeypatch.setattr(module, "_speed", lambda rates: broken())
    with pytest.raises(SystemExit):
        doctor(save=tmp_path / "other.yaml")
    assert "other.yaml: not written, because the speed was not measured" in capsys.readouterr().err
    assert not (tmp_path / "other.yaml").exists()


def test_a_driver_that_hangs_is_one_line(monkeypatch, tmp_path, capsys):
    plugin = tmp_path / "jax_plugins" / "stuck.py"  # JAX loads each module of this package before it looks for devices
    plugin.parent.mkdir()
    plugin.write_text("import time\ndef initialize(): time.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(module, "PATIENCE", 5)
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("ringrl: JAX did not find its devices within 5 s: the driver hangs, or another")
    assert not shown.out
