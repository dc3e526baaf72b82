"""Does the ring's memory per device depend on its size? Scratch memory of forward and backward, as the compiler counts.

    python benchmarks/attention_memory.py [--rings 2 8 32 64] [--local-tokens 2048] [--heads 4] [--head-dim 64]
                                          [--json FILE]

B1 float32 causal zigzag. Programs are compiled for host devices in a process of their own and never run. Peer: strategy
"all_gather", which holds all keys on every device.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from host_devices import in_process

STRATEGIES = ("ring", "all_gather")


def scratch_mib(strategy: str, ring: int, local_tokens: int, heads: int, head_dim: int) -> float:
    """MiB of scratch per device of a ring's forward and backward pass."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from ringrl.attention import ring_attention

    mesh = Mesh(np.array(jax.devices()[:ring]), ("seq",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "seq"))
    q = jax.ShapeDtypeStruct((1, ring * local_tokens, heads, head_dim), jnp.float32, sharding=sharding)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return ring_attention(q, k, v, mesh=mesh, strategy=strategy).sum()

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(q, q, q).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def run_worker(strategy: str, ring: int, options: argparse.Namespace) -> float:
    """The same in a process with as many host devices."""
    sizes = ["--local-tokens", options.local_tokens, "--heads", options.heads, "--head-dim", options.head_dim]
    command = [__file__, "--worker", strategy, "--rings", ring, *sizes]
    return float(in_process(command, ring, f"{strategy}, ring of {ring}"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, print and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rings", type=int, nargs="+", default=[2, 8, 32, 64])
    parser.add_argument("--local-tokens", type=int, default=2_048)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=STRATEGIES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        sizes = options.local_tokens, options.heads, options.head_dim
        print(json.dumps(scratch_mib(options.worker, options.rings[0], *sizes)))
        return
    results: dict[str, dict[int, float]] = {strategy: {} for strategy in STRATEGIES}
    print(f"scratch MiB per device, {options.local_tokens} tokens on each\n")
    print(f"{'devices':>8}{'tokens':>10}" + "".join(f"{strategy:>14}" for strategy in STRATEGIES))
    for ring in options.rings:
        for strategy in STRATEGIES:
            results[strategy][ring] = run_worker(strategy, ring, options)
        row = "".join(f"{results[strategy][ring]:>14.1f}" for strategy in STRATEGIES)
        print(f"{ring:>8}{ring * options.local_tokens:>10}{row}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(vars(options) | {"json": None, "scratch_mib": results}, indent=1))


if __name__ == "__main__":
    main()
