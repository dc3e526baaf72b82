"""Scratch memory of attention and transformer layers, by kind of attention and ring size. Nothing is run.

    python benchmarks/memory.py [--tokens 2048 4096 8192] [--rings 1 2 4 8] [--attention-rings 2 8 32 64]
                                [--local-tokens 2048] [--width 256] [--json FILE] [--plot FILE.svg]

XLA's scratch memory of forward and backward pass, float32, batch 1, causal. The memory of a layer is the difference
between models of three layers and one, in units of its input (tokens x width numbers). By 2305.19370 and 2310.01889
blockwise needs a quarter of memory_efficient, and vanilla is quadratic. A ring should need constant memory per device;
its peer is strategy "all_gather".
"""

import os
from collections.abc import Sequence
from pathlib import Path

from common import make_parser, one_line_errors, positive, save_json, save_svg

KINDS = ("vanilla", "memory_efficient", "blockwise")
STRATEGIES = ("ring", "all_gather")


def layer_bytes(kind: str, tokens: int, layers: int, width: int, remat: str, ring: int) -> int:
    """Return the scratch bytes per device of a transformer's loss and gradients."""
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


def attention_bytes(strategy: str, ring: int, local_tokens: int) -> int:
    """Return the scratch bytes per device of ring_attention's forward and backward pass, 4 heads of 64 features."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from ringrl.attention import ring_attention

    mesh = Mesh(np.array(jax.devices()[:ring]), ("seq",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "seq"))
    q = jax.ShapeDtypeStruct((1, ring * local_tokens, 4, 64), jnp.float32, sharding=sharding)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return ring_attention(q, k, v, mesh=mesh, strategy=strategy).sum()

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(q, q, q).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def per_layer(kind: str, tokens: int, width: int, remat: str) -> float:
    """Return the scratch memory per layer on one device, in units of the layer's float32 input."""
    one, three = (layer_bytes(kind, tokens, layers, width, remat, 1) for layers in (1, 3))
    return (three - one) / 2 / (tokens * width * 4)


def row(key: int, values: dict) -> None:
    """Print a row of a table."""
    print(f"{key:>8}" + "".join(f"{value:>20.1f}" for value in values.values()), flush=True)


def draw(results: dict, path: Path) -> None:
    """Draw memory of one layer against tokens, and of a ring against its size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind in KINDS:
        points = {tokens: found[kind] for tokens, found in results["working_set_mib"].items()}
        left.loglog(list(points), list(points.values()), "o-", label=kind, base=2)
    left.set(xlabel="tokens on one device", ylabel="scratch of one layer, MiB")
    left.legend(frameon=False)
    right.plot(list(results["ring_mib"]), [found["ring"] for found in results["ring_mib"].values()], "o-")
    right.set(xlabel="devices in the ring, tokens per device fixed", ylabel="scratch per device, MiB", ylim=(0, None))
    save_svg(figure, path)


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Compile and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=positive, nargs="+", default=[2_048, 4_096, 8_192])
    parser.add_argument("--rings", type=positive, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--attention-rings", type=positive, nargs="+", default=[2, 8, 32, 64])
    parser.add_argument("--local-tokens", type=positive, default=2_048)
    parser.add_argument("--width", type=positive, default=256)
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    options = parser.parse_args(arguments)
    width, local = options.width, options.local_tokens
    most = max(*options.rings, *options.attention_rings)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={most}"
    results: dict[str, dict] = {"per_layer": {}, "working_set_mib": {}, "ring_mib": {}, "attention_mib": {}}
    heading = "".join(f"{kind:>20}" for kind in KINDS)
    for remat in ("none", "layers"):
        print(f"\nper layer on one device, width {width}, remat {remat}, in units of the input\n  tokens{heading}")
        for tokens in options.tokens:
            found = {kind: per_layer(kind, tokens, width, remat) for kind in KINDS}
            results["per_layer"].setdefault(remat, {})[tokens] = found
            row(tokens, found)
    print(f"\none layer with remat, MiB\n  tokens{heading}")
    for tokens in options.tokens:
        found = {kind: layer_bytes(kind, tokens, 1, width, "layers", 1) / 2**20 for kind in KINDS}
        row(tokens, results["working_set_mib"].setdefault(tokens, found))
    print(f"\nthree layers with remat, {local} tokens per device, MiB per device\n devices{'ring':>20}")
    for ring in options.rings:
        found = {"ring": layer_bytes("ring", local * ring, 3, width, "layers", ring) / 2**20}
        row(ring, results["ring_mib"].setdefault(ring, found))
    print(f"\nattention alone, {local} tokens per device, MiB per device\n devices{'ring':>20}{'all_gather':>20}")
    for ring in options.attention_rings:
        found = {strategy: attention_bytes(strategy, ring, local) / 2**20 for strategy in STRATEGIES}
        row(ring, results["attention_mib"].setdefault(ring, found))
    save_json(results, options.json)
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
