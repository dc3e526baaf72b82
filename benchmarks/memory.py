"""How much memory does a layer's backward pass hold, by kind of attention, and does it stay flat around a ring?

    python benchmarks/memory.py [--tokens 2048 4096 8192] [--rings 1 2 4 8] [--local-tokens 2048] [--width 256]
                                [--json FILE] [--plot FILE.svg]

Scratch memory of loss and gradients of a float32 transformer as XLA counts it; nothing is run. What a layer adds is
measured between models of one and of three layers, in units of its input (tokens x width numbers). By the papers
(2305.19370, 2310.01889), blockwise holds a quarter of what memory_efficient holds, and vanilla grows with the square.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from command_line import positive, told_in_one_line
from drawing import save_svg

KINDS = ("vanilla", "memory_efficient", "blockwise", "ring")
MOST_DEVICES = 8


def scratch_bytes(kind: str, tokens: int, layers: int, width: int, remat: str, ring: int) -> int:
    """Scratch memory per device of a transformer's loss and gradients."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from ringrl.attention import layout_positions
    from ringrl.config import ModelConfig
    from ringrl.model.parallel import MESH_AXES, ONE_DEVICE, Parallel
    from ringrl.model.transformer import Transformer

    heads = width // 64
    config = ModelConfig(
        layers=layers, width=width, heads=heads, kv_heads=heads, attention=kind, block_tokens=512, remat=remat
    )
    parallel = ONE_DEVICE
    if ring > 1:
        types = (jax.sharding.AxisType.Auto,) * 4
        parallel = Parallel(jax.make_mesh((1, 1, 1, ring), MESH_AXES, types, devices=jax.devices()[:ring]))
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(params=0), parallel)))
    params, x = nnx.to_pure_dict(shapes), jax.ShapeDtypeStruct((1, tokens, width), jnp.float32)
    if ring > 1:
        x = x.update(sharding=parallel.sharding("batch", "time", None))
        params = jax.tree.map(lambda p, where: p.update(sharding=where), params, parallel.parameter_shardings(shapes))
    positions = layout_positions(parallel.layout, tokens, ring)

    def loss(params: object, x: jax.Array) -> jax.Array:
        return jnp.square(nnx.merge(graph, params)(x, positions)).mean()

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(params, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def per_layer(kind: str, tokens: int, width: int, remat: str, ring: int) -> float:
    """Scratch that a layer adds, on each device, in units of its input there (float32)."""
    one, three = (scratch_bytes(kind, tokens, layers, width, remat, ring) for layers in (1, 3))
    return (three - one) / 2 / (tokens // ring * width * 4)


def measure(options: argparse.Namespace) -> dict:
    """Three tables, printed row by row."""
    width, results = options.width, {"per_layer": {}, "working_set_mib": {}, "ring_mib": {}}
    print(f"one device, width {width}: what a layer adds, in units of its input (first: without remat; then with)\n")
    print(f"{'tokens':>8}" + "".join(f"{kind:>24}" for kind in KINDS[:3]))
    for tokens in options.tokens:
        row = {kind: [per_layer(kind, tokens, width, remat, 1) for remat in ("none", "layers")] for kind in KINDS[:3]}
        results["per_layer"][tokens] = row
        print(f"{tokens:>8}" + "".join(f"{plain:>14.1f}{saved:>10.1f}" for plain, saved in row.values()), flush=True)
    print("\none layer in all, MiB\n")
    for tokens in options.tokens:
        mib = {kind: scratch_bytes(kind, tokens, 1, width, "layers", 1) / 2**20 for kind in KINDS[:3]}
        results["working_set_mib"][tokens] = mib
        print(f"{tokens:>8}" + "".join(f"{value:>24.1f}" for value in mib.values()), flush=True)
    print(f"\nring, {options.local_tokens} tokens per device, three layers with remat: MiB per device\n")
    for ring in options.rings:
        mib = scratch_bytes("ring", options.local_tokens * ring, 3, width, "layers", ring) / 2**20
        results["ring_mib"][ring] = mib
        print(f"{ring:>8}{options.local_tokens * ring:>12}{mib:>12.1f}", flush=True)
    return results


def draw(results: dict, path: Path) -> None:
    """The last two tables as one figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    tokens = list(results["working_set_mib"])
    for kind in KINDS[:3]:
        left.loglog(tokens, [results["working_set_mib"][t][kind] for t in tokens], "o-", label=kind, base=2)
    left.set(xlabel="tokens on one device", ylabel="scratch of one layer, MiB")
    left.legend(frameon=False)
    rings = list(results["ring_mib"])
    right.plot(rings, [results["ring_mib"][ring] for ring in rings], "o-")
    right.set(xlabel="devices in the ring, tokens per device fixed", ylabel="scratch per device, MiB", ylim=(0, None))
    save_svg(figure, path)


@told_in_one_line
def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, print and, if asked, write JSON and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=positive, nargs="+", default=[2_048, 4_096, 8_192])
    parser.add_argument("--rings", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--local-tokens", type=int, default=2_048)
    parser.add_argument("--width", type=positive, default=256)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={MOST_DEVICES}"
    results = measure(options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
