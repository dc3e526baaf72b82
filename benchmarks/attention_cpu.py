"""How fast is attention on a CPU, beside its peers? Ring over 8 host devices, and one device.

    python benchmarks/attention_cpu.py [--official PYTHON] [--ring-tokens 16384] [--tokens 8192] [--runs 5]
                                       [--rounds 3] [--json FILE]

B1 H4 D64 float32 causal. Counts useful operations only: 4 S^2 H D / 2 forward, 3.5 times that with gradients (what a
mask excludes does not count, nor what the backward pass computes again). A figure is the median of the runs; the peers
run in turn with ours, so that a busy machine slows all alike, and ratios are the median over rounds.

Peers: the rate of a plain matrix product; jax.nn.dot_product_attention (one device); and, with --official, the ring of
the `ringattention` package (0.1.2 needs jax 0.4.30: python -m venv V; V/bin/pip install jax==0.4.30
ringattention==0.1.2; then --official V/bin/python). Also prints each program's scratch memory per device, as the
compiler counts it.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from command_line import positive
from host_devices import in_process

RING, HEADS, HEAD_DIM = 8, 4, 64
CASES = ("ring", "official", "one_device", "dot_product_attention")


def measure(run: Callable, operations: float, runs: int) -> dict[str, float]:
    """Rate in GFLOP/s of a jitted function without arguments, and its scratch memory."""
    import jax

    compiled = run.lower().compile()
    jax.block_until_ready(compiled())
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(compiled())
        seconds.append(time.perf_counter() - start)
    memory = compiled.memory_analysis()
    return {
        "gflops": operations / sorted(seconds)[runs // 2] / 1e9,
        "scratch_mib": memory.temp_size_in_bytes / 2**20 if memory else float("nan"),
    }


def matrix_product(runs: int) -> float:
    """GFLOP/s of a plain product of two 2048 x 2048 matrices."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((2048, 2048))
    return measure(jax.jit(lambda: a @ a), 2 * 2048.0**3, runs)["gflops"]


def official_ring(mesh):  # type: ignore[no-untyped-def]
    """The official package's ring under shard_map, causal, with blocks of 512."""
    import jax.numpy as jnp
    from jax.experimental.shard_map import shard_map
    from jax.sharding import PartitionSpec
    from ringattention.ringattention_jax import ring_attention

    options = {
        "causal_block_size": 1,
        "deterministic": True,
        "dropout_rng": None,
        "attn_pdrop": 0.0,
        "query_chunk_size": 512,
        "key_chunk_size": 512,
        "dtype": jnp.float32,
        "policy": None,
        "precision": None,
        "prevent_cse": False,
    }
    spec = PartitionSpec(None, "seq", None, None)
    attend = lambda q, k, v: ring_attention(q, k, v, None, None, None, "seq", True, options)  # noqa: E731
    return shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_rep=False)


def worker(case: str, tokens: int, runs: int) -> dict[str, object]:
    """Measure one implementation in this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    is_ring = case in ("ring", "official")
    q, k, v, do = (
        jax.random.normal(key, (1, tokens, HEADS, HEAD_DIM)) for key in jax.random.split(jax.random.key(0), 4)
    )
    if is_ring:
        mesh = Mesh(np.array(jax.devices()), ("seq",))
        q, k, v, do = jax.device_put((q, k, v, do), NamedSharding(mesh, PartitionSpec(None, "seq")))
    if case == "official":
        attend = official_ring(mesh)
    elif case == "dot_product_attention":
        attend = partial(jax.nn.dot_product_attention, is_causal=True)
    else:
        from ringrl.attention import attention, ring_attention

        attend = partial(ring_attention, mesh=mesh) if case == "ring" else attention
    forward = 4.0 * tokens**2 * HEADS * HEAD_DIM / 2
    loss = lambda q, k, v: jnp.vdot(attend(q, k, v), do)  # noqa: E731
    return {
        "forward": measure(jax.jit(lambda: attend(q, k, v)), forward, runs),
        "gradient": measure(jax.jit(lambda: jax.grad(loss, (0, 1, 2))(q, k, v)), 3.5 * forward, runs),
        "matrix_product": matrix_product(runs),
        "jax": jax.__version__,
    }


def run_worker(case: str, tokens: int, runs: int, python: str) -> dict[str, object]:
    """The same in a process of its own, with as many host devices as the case needs."""
    devices = RING if case in ("ring", "official") else 1
    command = [__file__, "--worker", case, "--tokens", tokens, "--runs", runs]
    found: dict[str, object] = in_process(command, devices, case, python)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", help="python of an environment with jax 0.4.30 and ringattention 0.1.2")
    parser.add_argument("--ring-tokens", type=positive, default=16_384)
    parser.add_argument("--tokens", type=positive, default=8_192, help="on one device")
    parser.add_argument("--runs", type=positive, default=5)
    parser.add_argument("--rounds", type=positive, default=3, help="times that all cases are run in turn")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(worker(options.worker, options.tokens, options.runs)))
        return
    pythons = {"ring": sys.executable, "official": options.official, "one_device": sys.executable}
    pythons["dot_product_attention"] = sys.executable
    results: dict[str, list] = {}
    print(f"{'':<24}{'tokens':>8}{'forward':>10}{'gradient':>10}{'matrix product':>16}   scratch MiB per device")
    for _ in range(options.rounds):
        for case in CASES:
            if pythons[case] is None:
                continue
            tokens = options.ring_tokens if case in ("ring", "official") else options.tokens
            result = run_worker(case, tokens, options.runs, pythons[case])
            results.setdefault(case, []).append(result)
            forward, gradient = result["forward"], result["gradient"]
            print(
                f"{case:<24}{tokens:>8}{forward['gflops']:>10.1f}{gradient['gflops']:>10.1f}"
                f"{result['matrix_product']:>16.1f}   {forward['scratch_mib']:.1f}, {gradient['scratch_mib']:.1f}",
                flush=True,
            )
    for ours, peer in (("ring", "official"), ("one_device", "dot_product_attention")):
        for what in ("forward", "gradient"):
            ratios = [
                a[what]["gflops"] / b[what]["gflops"]
                for a, b in zip(results[ours], results.get(peer, []), strict=False)
            ]
            if ratios:
                print(f"{ours} / {peer}, {what}: {sorted(ratios)[len(ratios) // 2]:.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
