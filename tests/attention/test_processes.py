"""A ring of two processes with two devices each equals the definition. Training: training/test_distributed.py."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ringrl.attention import to_layout
from ringrl.attention.mask import Rule

PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ringrl.attention import ring_attention

port, processes, index, result = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
jax.config.update("jax_num_cpu_devices", 4 // processes)
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, index, initialization_timeout=60)
assert len(jax.devices()) == 4 and len(jax.local_devices()) == 4 // processes
mesh = Mesh(np.array(jax.devices()), ("seq",))
sharding = NamedSharding(mesh, PartitionSpec(None, "seq"))
random = np.random.default_rng(0)

def spread(heads):
    whole = random.normal(size=(1, 32, heads, 8)).astype(np.float32)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

q, k, v, do = (spread(heads) for heads in (4, 2, 2, 4))

@jax.jit
def run(q, k, v, do):
    o, backward = jax.vjp(lambda *qkv: ring_attention(*qkv, mesh=mesh), q, k, v)
    return o, *backward(do)

def ids(dtype):
    whole = np.arange(32, dtype=dtype)[None] // 9
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

# Without jit ids and positions are checked, but each process sees only a part of them.
packed = ring_attention(q, k, v, mesh=mesh, segment_ids=ids(np.int32), positions=ids(np.uint32))

values = {}
for name, x in zip(("packed", "o", "dq", "dk", "dv"), (packed, *run(q, k, v, do))):
    for shard in x.addressable_shards:
        values[f"{name} {shard.index[1].start}"] = np.asarray(shard.data)
np.savez(result, **values)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_processes(number: int, folder: Path, environment: dict[str, str]) -> dict[str, np.ndarray]:
    """Return outputs and gradients by name, joined from the shards of all processes' devices."""
    port = str(free_port())
    results = [folder / f"{index}.npz" for index in range(number)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, port, str(number), str(index), str(result)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, result in enumerate(results)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output
    values: dict[str, np.ndarray] = {}
    for result in results:
        with np.load(result) as file:
            assert len(file.files) == 5 * 4 // number, "packed, o, dq, dk, dv of this process's devices"
            values |= dict(file)
    joined = lambda name: np.concatenate([values[f"{name} {first}"] for first in (0, 8, 16, 24)], axis=1)  # noqa: E731
    return {name: joined(name) for name in ("packed", "o", "dq", "dk", "dv")}


@pytest.mark.slow
def test_two_processes_equal_the_definition(tmp_path, environment, oracle):
    random, arrays = np.random.default_rng(0), {"dlse": np.zeros((1, 32, 4), np.float32)}
    for name, heads in (("q", 4), ("k", 2), ("v", 2), ("do", 4)):
        arrays[name] = random.normal(size=(1, 32, heads, 8)).astype(np.float32)
    order, ids = to_layout(np.arange(32)[None], "zigzag", 4), np.arange(32)[None] // 9
    in_order = np.asarray(order), np.zeros((1, 32), int)
    expected = oracle(arrays, in_order, in_order, Rule())
    expected["packed"] = oracle(arrays, (ids, ids), (ids, ids), Rule())["o"]
    for name, x in run_processes(2, tmp_path, environment).items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
