"""Speed of attention on a CPU against other implementations: a ring of 8 host devices, and one device.

    python benchmarks/attention_cpu.py [--official PYTHON] [--ring-tokens 16384] [--tokens 8192] [--runs 5]
                                       [--rounds 3] [--json FILE]

B1 H4 D64 float32 causal. Rates count useful operations: 4 S^2 H D / 2 forward, 3.5 times that with gradients, without
masked and recomputed operations. Rates are medians over the runs. Implementations run in turn, so that other load
affects all of them, and ratios are medians over the rounds. The scratch memory per device is the compiler's.

Peers: a plain matrix product, jax.nn.dot_product_attention (one device), and with --official the ring of the
`ringattention` package. Its version 0.1.2 needs jax 0.4.30: python -m venv V; V/bin/pip install jax==0.4.30
ringattention==0.1.2; then --official V/bin/python.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial

from common import in_process, make_parser, median_seconds, positive, save_json

RING, HEADS, HEAD_DIM = 8, 4, 64
CASES = ("ring", "official", "one_device", "dot_product_attention")


def measure(run: Callable, operations: float, runs: int) -> dict[str, float]:
    """Return the rate in GFLOP/s of a jitted function without arguments, and its scratch memory in MiB."""
    import jax

    compiled = run.lower().compile()
    seconds = median_seconds(lambda: jax.block_until_ready(compiled()), runs)
    memory = compiled.memory_analysis()
    return {
        "gflops": operations / seconds / 1e9,
        "scratch_mib": memory.temp_size_in_bytes / 2**20 if memory else float("nan"),
    }


def official_ring(mesh):  # type: ignore[no-untyped-def]
    """Return the official package's causal ring under shard_map, with blocks of 512."""
    import jax.numpy as jnp
    from jax.experimental.shard_map import shard_map
    from jax.sharding import PartitionSpec
    from ringattention.ringattention_jax import ring_attention

    options = {
        "causal_block_size": 1, "deterministic": True, "dropout_rng": None, "attn_pdrop": 0.0, "query_chunk_size": 512,
        "key_chunk_size": 512, "dtype": jnp.float32, "policy": None, "precision": None, "prevent_cse": False,
    }  # fmt: skip
    spec = PartitionSpec(None, "seq", None, None)
    attend = lambda q, k, v: ring_attention(q, k, v, None, None, None, "seq", True, options)  # noqa: E731
    return shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_rep=False)


def measure_case(case: str, tokens: int, runs: int) -> dict[str, object]:
    """Measure one implementation on all devices of this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, do = (jax.random.normal(key, (1, tokens, HEADS, HEAD_DIM)) for key in keys)
    mesh = Mesh(np.array(jax.devices()), ("seq",))
    if case in ("ring", "official"):
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
    matrix = jnp.ones((2048, 2048))
    return {
        "forward": measure(jax.jit(lambda: attend(q, k, v)), forward, runs),
        "gradient": measure(jax.jit(lambda: jax.grad(loss, (0, 1, 2))(q, k, v)), 3.5 * forward, runs),
        "matrix_product": measure(jax.jit(lambda: matrix @ matrix), 2 * 2048.0**3, runs)["gflops"],
        "jax": jax.__version__,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--official", help="python of an environment with jax 0.4.30 and ringattention 0.1.2")
    parser.add_argument("--ring-tokens", type=positive, default=16_384)
    parser.add_argument("--tokens", type=positive, default=8_192, help="on one device")
    parser.add_argument("--runs", type=positive, default=5)
    parser.add_argument("--rounds", type=positive, default=3)
    options = parser.parse_args(arguments)
    results: dict[str, list] = {}
    print(f"{'':<24}{'tokens':>8}{'forward':>10}{'gradient':>10}{'matrix product':>16}   scratch MiB per device")
    for _ in range(options.rounds):
        for case in CASES:
            python = options.official if case == "official" else sys.executable
            if python is None:
                continue
            tokens, devices = (options.ring_tokens, RING) if case in ("ring", "official") else (options.tokens, 1)
            found = in_process(measure_case, case, tokens, options.runs, devices=devices, python=python)
            results.setdefault(case, []).append(found)
            forward, gradient = found["forward"], found["gradient"]
            print(
                f"{case:<24}{tokens:>8}{forward['gflops']:>10.1f}{gradient['gflops']:>10.1f}"
                f"{found['matrix_product']:>16.1f}   {forward['scratch_mib']:.1f}, {gradient['scratch_mib']:.1f}",
                flush=True,
            )
    for ours, peer in (("ring", "official"), ("one_device", "dot_product_attention")):
        for what in ("forward", "gradient"):
            pairs = zip(results[ours], results.get(peer, []), strict=False)
            if ratios := sorted(a[what]["gflops"] / b[what]["gflops"] for a, b in pairs):
                print(f"{ours} / {peer}, {what}: {ratios[len(ratios) // 2]:.2f}")
    save_json(results, options.json)


if __name__ == "__main__":
    main()
