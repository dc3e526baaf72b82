"""The check of a kernel before its first use: a small case against plain XLA, forward and every gradient.

A kernel may run with a compiler or on a device with which it was never tested. The case has several tiles of every
kernel's default size, so that hidden, full and partial pairs of tiles occur.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ringrl.attention.contract import Cotangents, Gradients, Inputs, Partial, merge
from ringrl.attention.kernels import xla
from ringrl.attention.mask import Options, Rule, Side
from ringrl.attention.strategy import DeviceKind

REPORT = "please report it to the maintainers of RingRL, with doctor.json of ringrl doctor --json doctor.json"
BATCH, KV_HEADS, GROUPS, TOKENS = 2, 2, 2, 1200
WINDOW, CAP = (5, 2), 2.0  # checked instead of the call's own window and soft cap
LIMITS = {"float32": 1e-4}  # errors relative to the largest number of an array, as for `ringrl doctor`
LIMIT, LIMIT_OF_LSE = 0.03, 1e-3  # in 16 bits; the log-sum-exp is float32 there, too
Results = tuple[jax.Array, ...]


def failure(kernel: Any, options: Options, dtype: jnp.dtype, head_dim: int, device: DeviceKind) -> str | None:
    """Return one sentence if the kernel of `options` differs from plain XLA or does not compile, or None.

    A process checks a kernel once for each device kind, dtype, head_dim and kind of mask, on its first local device of
    this kind and with fixed inputs, so that the processes of one program agree. Verdicts on numbers are stored in the
    user's cache folder. Nothing is checked with RINGRL_KERNEL_CHECK=off, or if this process has no such device.
    """
    if os.environ.get("RINGRL_KERNEL_CHECK") == "off":
        return None
    try:
        local = jax.local_devices(backend=device.platform)
    except RuntimeError:  # no such platform
        return None
    owned = next((one for one in local if one.device_kind == device.device_kind), None)
    if owned is None:
        return None
    rule = Rule(options.rule.is_causal, None if options.rule.window is None else WINDOW)
    cap = None if options.logits_soft_cap is None else CAP
    options = dataclasses.replace(options, rule=rule, scale=head_dim**-0.5, logits_soft_cap=cap)
    return _verdict(kernel, options, jnp.dtype(dtype).name, head_dim, owned) or None


@functools.cache
def _verdict(kernel: Any, options: Options, dtype: str, head_dim: int, device: jax.Device) -> str:
    """Return the sentence of `failure`, or "" for a right kernel."""
    versions = f"jax {jax.__version__}, jaxlib {metadata.version('jaxlib')}, ringrl {_sources()}"
    key = f"{device.device_kind}, {device.client.platform_version}, {versions}, {dtype}, {head_dim}, {options}"
    if (known := _stored().get(key)) is not None:
        return known
    name, case = f'the kernel "{options.implementation}"', f"{dtype}, head_dim {head_dim}, {device.device_kind}"
    try:
        with ThreadPoolExecutor(1) as fresh:  # the caller's thread may be tracing, inside meshes and vmap
            wrong = fresh.submit(_differences, kernel, options, dtype, head_dim, device).result()
    except Exception as error:  # a compiler may raise anything; not stored, since memory may have run out
        text = " ".join(str(error).split())[:200]
        return f"{name} does not run ({case}): {type(error).__name__}: {text}; {REPORT}"
    verdict = f"{name} computes another {', '.join(wrong)} ({case}); {REPORT}" if wrong else ""
    _store(_stored() | {key: verdict})
    return verdict


def _differences(kernel: Any, options: Options, dtype: str, head_dim: int, device: jax.Device) -> list[str]:
    """Return the names of the results that differ, with their errors relative to the largest number."""
    found = dict[str, float]()
    with jax.default_device(device), np.errstate(invalid="ignore"):
        kinds = ["packed", *["prefix"] * bool(options.rule.window)]
        for kind in kinds + ["causal", "full"] * (options.implementation == "cudnn"):
            inputs, earlier, of_results = _case(dtype, head_dim, kind)
            if kind in ("causal", "full"):  # the blocks that are not left to plain XLA, under any rule
                options = dataclasses.replace(options, rule=Rule())
            right, cotangents = _expected(options, inputs, earlier, of_results)
            given = _results(kernel, options, inputs, earlier, cotangents)
            for name, *both in zip(("o", "lse", "dq", "dk", "dv"), given, right, strict=True):
                x, expected = map(np.asarray, both)
                error = np.where(x == expected, 0, np.abs(x - expected)).max()  # equal infinities
                relative = float(error / np.abs(expected[np.isfinite(expected)]).max())
                limit = LIMITS.get(dtype, LIMIT_OF_LSE if name == "lse" else LIMIT)
                if not relative <= limit:  # also nan
                    found[name] = relative
    return [f"{name} (by {error:.1e})" for name, error in found.items()]


def _case(dtype: str, head_dim: int, kind: str) -> tuple[Inputs, Partial, Partial]:
    """Return inputs, results over earlier keys, and cotangents of the results.

    In one context the last queries see nothing. The other one ends with a segment of seven tokens, in which each key
    counts. A prefix reaches far beyond the window. "causal" and "full" have no segments, and "full" has later queries.
    """
    random = np.random.default_rng(0)
    heads, rows = BATCH * KV_HEADS, GROUPS * TOKENS

    def normal(*shape: int, dtype: str = "float32") -> jax.Array:
        return jnp.asarray(random.normal(size=(heads, *shape)), dtype)

    place = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), (BATCH, TOKENS))
    of_keys = jnp.stack([0 * place[0], (place[0] + 7) // (TOKENS // 3)])
    of_queries = jnp.where((place >= TOKENS - 5) & (of_keys == 0), -1, of_keys)
    prefix = place // (TOKENS // 4) * (TOKENS // 4) if kind == "prefix" else None
    if kind in ("causal", "full"):
        of_keys = of_queries = 0 * place
    sides = Side(place + TOKENS * (kind == "full"), of_queries, prefix), Side(place, of_keys)
    inputs = Inputs(normal(rows, head_dim, dtype=dtype), normal(2, TOKENS, head_dim, dtype=dtype), *sides)
    earlier, of_results = (Partial(normal(rows, head_dim), normal(rows)) for _ in range(2))
    return inputs, earlier._replace(lse=earlier.lse + 5), of_results._replace(o=of_results.o.astype(dtype))


@partial(jax.jit, static_argnums=0)
def _expected(options: Options, inputs: Inputs, earlier: Partial, of_results: Partial) -> tuple[Results, Cotangents]:
    """Return the results of plain XLA, and the inputs of the backward pass."""
    alone = xla.forward(inputs, options)
    dlse = jnp.where(jnp.isneginf(alone.lse), 0.0, of_results.lse)
    cotangents = Cotangents(of_results.o, alone.lse, (alone.o * of_results.o).sum(-1) - dlse)
    return _listed(alone, merge(alone, earlier), xla.backward(inputs, options, cotangents, earlier.o)), cotangents


@partial(jax.jit, static_argnums=(0, 1))
def _results(kernel: Any, options: Options, inputs: Inputs, earlier: Partial, cotangents: Cotangents) -> Results:
    """Return the results of a kernel."""
    alone, after = kernel.forward(inputs, options, None), kernel.forward(inputs, options, earlier)
    return _listed(alone, after, kernel.backward(inputs, options, cotangents, earlier.o))


def _listed(alone: Partial, after: Partial, gradients: Gradients) -> Results:
    """Return o and lse, without and with earlier keys, and dq, dk, dv."""
    o, lse = (jnp.stack(both) for both in zip(alone, after, strict=True))
    return o, lse, gradients.dq, gradients.dkv[:, 0], gradients.dkv[:, 1]


@functools.cache
def _sources() -> str:
    """Return a digest of this package's code, which changes more often than its version."""
    files = sorted(Path(__file__).parent.parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ringrl" / "kernels.json"


def _stored() -> dict[str, str]:
    """Return the stored verdicts; none if the file is missing or damaged."""
    try:
        known = json.loads(_path().read_text())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home folder
        return {}
    return known if isinstance(known, dict) else {}


def _store(verdicts: dict[str, str]) -> None:
    """Replace the file as a whole. Without a writable folder, the next process checks again."""
    with contextlib.suppress(OSError, RuntimeError):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(f".{uuid.uuid4().hex}")
        written.write_text(json.dumps(verdicts, indent=1))
        written.replace(path)
