"""ringrl doctor: check that this machine computes the right numbers, and measure its speed."""

import json as json_module
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

MAIN = ("jax", "flax", "optax", "numpy", "mujoco", "dm_control", "gymnasium")  # packages that are shown
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64  # of the checked cases
LIMITS = {"float32": 1e-4, "bfloat16": 0.03}  # errors relative to the largest number of an array
PATIENCE = 120  # seconds until the driver of an accelerator counts as hanging


class Finding(NamedTuple):
    """One line of the output."""

    name: str
    text: str
    is_fine: bool = True


def doctor(*, json: Path | None = None, save: Path | None = None) -> None:
    """Check in a minute or two that this machine computes the right numbers, and measure its speed.

    Attention and its gradients are compared with their definition in float64, and a ring over all local devices with
    one device. Training steps must give the CPU's losses. The exit code is 1 if something is wrong.

    Args:
        json: also write all lines, by section, and the measured numbers to this file.
        save: write the measured speed to this file, for `ringrl plan --machine FILE`.

    Raises:
        UserError: a file that cannot be written, or devices that do not answer.
    """
    from ringrl.config_files import to_yaml
    from ringrl.errors import UserError
    from ringrl.files import explain_write_errors, write_whole

    for written in filter(None, (json, save)):  # before two minutes of work
        if written.is_dir():
            raise UserError(f"{written}: is a folder; give the name of a file")
        with explain_write_errors(written), tempfile.TemporaryFile(dir=written.absolute().parent):
            pass
    _await_devices()
    os.environ["RINGRL_KERNEL_CHECK"] = "off"  # the doctor checks kernels itself, without a fallback to plain XLA
    console, found, rates = Console(highlight=False), dict[str, list[Finding]](), dict[str, Any]()
    sections: dict[str, Callable[[], Iterator[Finding]]] = {
        "This machine": _machine,
        "Attention against its definition": _attention,
        "A ring over all local devices": _ring,
        "Training steps": _training,
        "Speed": lambda: _speed(rates),
    }
    for title, section in sections.items():
        console.print(f"\n[bold]{title}[/bold]")
        found[title] = []
        for finding in _findings(title, section):
            found[title].append(finding)
            mark = "" if finding.is_fine else "[red]wrong[/red]  "
            console.print(f"  {finding.name:<24}{mark}{finding.text}", soft_wrap=True)
    is_measured = "devices" in rates  # set last
    by_section = {title: [one._asdict() for one in lines] for title, lines in found.items()}
    report = json_module.dumps({"sections": by_section, "measured": rates}, indent=1)
    for path, text in ((json, report), (save if is_measured else None, to_yaml(rates))):
        if path is not None:
            with explain_write_errors(path):
                write_whole(path, text, alone=False)
    every = [one for lines in found.values() for one in lines]
    wrong = [one for one in every if not one.is_fine]
    print(f"\n{len(wrong)} of {len(every)} lines are wrong" if wrong else "\nall is well")
    if save is not None and not is_measured:
        print(f"ringrl doctor: {save}: not written, because the speed was not measured", file=sys.stderr)
    for one in wrong:
        print(f"ringrl doctor: {one.name}: {one.text}", file=sys.stderr)
    if wrong:
        sys.exit(1)


def _await_devices() -> None:
    """Start the devices in a process of their own: if a driver hangs, it can be killed."""
    from ringrl.errors import UserError

    try:
        subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], capture_output=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"JAX did not find its devices within {PATIENCE} s: the driver hangs, or another process holds them; "
            "see whether nvidia-smi or tpu-info answers, end other processes, or set JAX_PLATFORMS=cpu"
        ) from None


def _findings(title: str, section: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield the lines of a section. An error becomes a line, so that the other sections still run."""
    try:
        yield from section()
    except Exception as error:  # a driver or compiler may raise anything
        yield Finding(title, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", is_fine=False)


def _machine() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    yield Finding("Python", sys.version.split()[0])
    needed = {one.name: one for one in map(Requirement, metadata.requires("ringrl") or []) if one.marker is None}
    for name, requirement in needed.items():
        version = metadata.version(name)
        if not requirement.specifier.contains(version, prereleases=True):
            yield Finding(name, f"{version}, but {requirement.specifier} is needed", is_fine=False)
        elif name in MAIN:
            yield Finding(name, version)
    import jax

    from ringrl.planning.machines import host_memory

    devices = jax.local_devices()
    known = (devices[0].memory_stats() or {}).get("bytes_limit")
    each = f", {known / 2**30:.1f} GiB each" if known else ""
    yield Finding("devices", f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}){each}")
    yield Finding("host", f"{len(os.sched_getaffinity(0))} cores, {host_memory() / 2**30:.0f} GiB of memory")
    yield Finding("open files", f"at most {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}")
    yield Finding("disk", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free in this folder")
    yield Finding("pictures", _pictures())


def _pictures() -> str:
    """Return whether OpenGL renders. Only videos need it."""
    from contextlib import closing

    from ringrl.envs import make

    try:
        with closing(make("walker_walk", render_mode="rgb_array")) as environment:
            environment.reset(seed=0)
            shape = environment.render().shape
    except Exception as error:  # a graphics driver may raise anything
        return f"not available, videos will not work: {' '.join(str(error).split())[:200]}"
    return f"OpenGL renders {shape[1]} x {shape[0]} pixels"


def _masks(tokens: int) -> dict[str, dict[str, Any]]:
    import numpy as np

    place = np.arange(tokens)
    return {
        "causal": {},
        "full": {"is_causal": False},
        "window": {"is_causal": False, "local_window_size": (40, 7)},
        "window and prefix": {"local_window_size": (5, 0), "global_prefix": place // 100 * 100},
        "segments": {"segment_ids": place // 90},
        "positions": {"positions": (place * 7) % tokens},
        "soft cap": {"logits_soft_cap": 2.0},
    }


def _attention() -> Iterator[Finding]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ringrl.attention import attention
    from ringrl.attention.definition import definition
    from ringrl.attention.kernels import native_to
    from ringrl.attention.mask import Rule

    kernel = native_to(jax.local_devices()[0])
    tokens = 256 if kernel == "xla" else 1200  # several tiles
    random, place, masks = np.random.default_rng(0), np.arange(tokens), _masks(tokens)
    drawn = {name: random.normal(size=shape) for name, shape in _shapes(tokens).items()}
    yield Finding("kernel", kernel)
    for dtype, limit in LIMITS.items():
        arrays = {name: jnp.asarray(x, "float32" if name == "dlse" else dtype) for name, x in drawn.items()}
        errors = dict[str, float]()
        for mask, options in masks.items():
            run = jax.jit(lambda given, options=options: _with_gradients(attention, given, options))
            side = options.get("positions", place)[None], options.get("segment_ids", 0 * place)[None]
            prefix = [options["global_prefix"][None]] if "global_prefix" in options else []
            rule = Rule(options.get("is_causal", True), options.get("local_window_size"))
            exact = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
            cap = options.get("logits_soft_cap")
            expected = definition(exact, (*side, *prefix), side, rule, logits_soft_cap=cap)
            for name, x in run(arrays).items():
                error = np.abs(np.asarray(x, np.float64) - expected[name]).max() / np.abs(expected[name]).max()
                errors[name] = max(errors.get(name, 0.0), float(error))
                if not error <= limit:  # also nan
                    text = f"{name} differs by {error:.1e} of its largest number"
                    yield Finding(f"{dtype}, {mask}", text, is_fine=False)
        shown = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
        yield Finding(dtype, f"{len(masks)} masks; largest relative errors: {shown}")


def _shapes(tokens: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of q, k, v and of the cotangents."""
    queries, keys = (1, tokens, HEADS, HEAD_DIM), (1, tokens, KV_HEADS, HEAD_DIM)
    return {"q": queries, "k": keys, "v": keys, "do": queries, "dlse": queries[:3]}


def _with_gradients(attend: Callable[..., Any], given: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return output, log-sum-exp and gradients."""
    import jax

    found, backward = jax.vjp(lambda *qkv: attend(*qkv, return_residual=True, **options), *(given[n] for n in "qkv"))
    of_inputs = backward((given["do"].astype(found[0].dtype), given["dlse"]))
    return dict(zip(("o", "lse", "dq", "dk", "dv"), (*found, *of_inputs), strict=True))


def _ring() -> Iterator[Finding]:
    from functools import partial

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh

    from ringrl.attention import attention, from_layout, ring_attention, to_layout
    from ringrl.attention.kernels import native_to

    devices = jax.local_devices()
    if len(devices) == 1:
        yield Finding("ring", "not checked: there is one device")
        return
    # Kernels differ by dtype, and cut only long blocks into parts.
    random, tokens = np.random.default_rng(0), (128 if devices[0].platform == "cpu" else 1024) * len(devices)
    drawn = {name: random.normal(size=shape) for name, shape in _shapes(tokens).items()}
    mesh = Mesh(np.array(devices), ("seq",))
    for dtype in ("float32",) if native_to(devices[0]) == "xla" else LIMITS:
        given = {name: jnp.asarray(x, "float32" if name == "dlse" else dtype) for name, x in drawn.items()}
        expected = jax.jit(lambda given: _with_gradients(attention, given, {}))(given)
        for layout in ("zigzag", "contiguous", "striped"):
            attend = partial(ring_attention, mesh=mesh, layout=layout)

            def run(given: dict[str, Any], layout: str = layout, attend: Callable[..., Any] = attend) -> Any:
                given = {name: to_layout(x, layout, len(devices)) for name, x in given.items()}
                found = _with_gradients(attend, given, {})
                return {name: from_layout(x, layout, len(devices)) for name, x in found.items()}

            found, alone = jax.tree.map(lambda x: np.asarray(x, np.float32), (jax.jit(run)(given), expected))
            error = max(float(np.abs(found[name] - x).max() / np.abs(x).max()) for name, x in alone.items())
            text = f"{len(devices)} devices equal one up to {error:.0e}, {dtype}"
            yield Finding(layout, text, error <= LIMITS[dtype])


def _training() -> Iterator[Finding]:
    import jax

    losses = {jax.local_devices()[0].platform: _losses()}
    if "cpu" not in losses:
        losses["cpu"] = _losses_on_cpu()
    for platform, values in losses.items():
        is_same = all(abs(a - b) <= 0.01 * abs(b) for a, b in zip(values, losses["cpu"], strict=True))
        text = "losses " + ", ".join(f"{value:.5f}" for value in values)
        yield Finding(platform, text if is_same else f"{text}; the CPU gives other losses", is_same)


def _losses(steps: int = 3) -> list[float]:
    """Train a small model on random episodes. Return the loss of each step."""
    import numpy as np

    from ringrl.config import TrainConfig
    from ringrl.data import write_episodes
    from ringrl.training import train

    random = np.random.default_rng(0)
    episodes = [
        {
            "observation": random.normal(size=(33, 24)).astype(np.float32),
            "action": random.uniform(-1, 1, (32, 6)).astype(np.float32),
            "reward": random.uniform(size=32),
        }
        for _ in range(8)
    ]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "random.h5"
        store = write_episodes(data, episodes)
        values = {
            "data": data, "task": store.tasks[0], "run": Path(folder) / "run", "log": [], "log_every": 1,
            "context": {"trajectories": 4}, "model": {"width": 128, "heads": 2, "kv_heads": 1, "layers": 2},
            "optimiser": {"steps": steps, "batch_size": 2, "warmup_steps": 0},
        }  # fmt: skip
        run = train(TrainConfig.model_validate(values), quiet=True)
        return [json_module.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def _losses_on_cpu() -> list[float]:
    """Return `_losses` of a process without the accelerator."""
    program = f"import json; from {__name__} import _losses; print(json.dumps(_losses()))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"training on the CPU ended with {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    losses: list[float] = json_module.loads(done.stdout.splitlines()[-1])
    return losses


def _speed(rates: dict[str, Any]) -> Iterator[Finding]:
    """Measure all devices at once, and fill `rates` for a plan (`ringrl.planning.machines.Rates`)."""
    import jax
    import jax.numpy as jnp

    from ringrl.planning.machines import DEVICES, host_memory, rates_of, seconds_on
    from ringrl.planning.roofline import ATTAINED
    from ringrl.study.cost import Speed

    devices, giga, tera = jax.local_devices(), 1e9, 1e12
    count, is_cpu = len(devices), devices[0].platform == "cpu"
    dtype, size, tokens, numbers = ("float32", 1024, 1024, 2**22) if is_cpu else ("bfloat16", 8192, 16384, 2**28)
    sheet = next((one for one in DEVICES.values() if devices[0].device_kind.startswith(one.device_kind)), None)

    def assume(rate: str, attained: float, unit: float) -> str:
        """Return what a plan assumes."""
        if is_cpu:
            return ""  # a plan for host devices measures them
        if sheet is None:
            return "; a plan knows no data sheet of this device: use --save"
        peak = getattr(sheet, rate)
        return f"; a plan assumes {attained * peak / unit:.3g}, {attained:.0%} of the data sheet's {peak / unit:.3g}"

    found = rates_of(devices, jnp.dtype(dtype), (size,) * 3, (tokens, 8, 2, HEAD_DIM), numbers)
    flops, attended, moved = (rate / count for rate in found)
    rates |= {"tflops": flops / tera, "attention": attended / tera, "bandwidth": moved / giga, "link": moved / 2 / giga}
    yield Finding("matrix product", f"{rates['tflops']:.3g} TFLOP/s, {dtype}{assume('flops', ATTAINED.matrices, tera)}")
    text = f"{rates['attention']:.3g} TFLOP/s with gradients, causal, {tokens} tokens"
    yield Finding("attention", text + assume("flops", ATTAINED.attention, tera))
    yield Finding("device memory", f"{rates['bandwidth']:.3g} GB/s{assume('bandwidth', ATTAINED.memory, giga)}")
    if count > 1:
        sent, around = jnp.zeros((count, numbers // 4)), [(index, (index + 1) % count) for index in range(count)]
        hop = seconds_on(devices, lambda x: jax.lax.ppermute(x, "device", around), sent)
        rates["link"] = numbers / hop / giga
        yield Finding("between devices", f"{rates['link']:.3g} GB/s{assume('link', ATTAINED.links, giga)}")
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    each = (limit or host_memory() / count) / 2**30
    rates |= {"memory": each, "device_kind": devices[0].device_kind, "devices": count}
    per_step = Speed.measure(["walker_walk"]).simulation["walker_walk"]
    yield Finding("simulation", f"{1 / per_step:,.0f} steps of walker_walk per second")
