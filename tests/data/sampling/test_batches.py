"""Batches over a mesh of eight devices, in one and two processes: equal numbers, and no unneeded row is read."""

import json
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from ringrl.attention import LAYOUTS, to_layout
from ringrl.config import ContextConfig
from ringrl.data.sampling.batches import ShardedSampler
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.sampling.sampler import ContextSampler
from ringrl.data.store import EpisodeStore

TASK = "cartpole_swingup"
LENGTHS = [6, 1, 9, 4, 9, 2, 9, 5]
STEP = 3
BATCH = 8
# (data, fsdp, seq, tensor) of eight devices; with tensor 2, two devices share every part of a batch
CASES = [((1, 1, 8, 1), layout) for layout in LAYOUTS] + [((2, 2, 2, 1), layout) for layout in LAYOUTS]
CASES += zip([(2, 1, 4, 1), (4, 1, 2, 1), (8, 1, 1, 1), (1, 2, 2, 2)], [*LAYOUTS, "zigzag"], strict=True)
PADDED = {
    8: 32,
    4: 32,
    2: 28,
    1: 27,
}  # three trajectories of up to nine steps give 27; zigzag needs a multiple of 2 * seq

PROGRAM = f"""
import json, sys
import jax, numpy as np
from jax.sharding import Mesh
from ringrl.config import ContextConfig
from ringrl.data import EpisodeStore
from ringrl.data.sampling.batches import iterate_batches
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.sampling.sampler import ContextSampler
from ringrl.data.sampling.batches import ShardedSampler

path, port, processes, index, result = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
if processes > 1:
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{{port}}", processes, index, initialization_timeout=60)
store = EpisodeStore(path)
normalisation = Normalisation.of(store)
arrays, rows = store.arrays, {{}}

class Recorded:
    def __init__(self, key):
        self.key, self.shape = key, arrays[key].shape
    def __getitem__(self, part):
        rows.setdefault(self.key, []).extend(np.atleast_1d(np.arange(len(arrays[self.key]))[part]).tolist())
        return arrays[self.key][part]

store.arrays = {{key: Recorded(key) for key in arrays}}
sampler = ContextSampler(store, "{TASK}", ContextConfig(trajectories=3, order="random"), normalisation, {BATCH}, 0)
values, read = {{}}, {{}}
for shape, layout in {CASES}:
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp", "seq", "tensor"))
    name = f"{{shape}} {{layout}}"
    rows.clear()
    batches = iterate_batches(ShardedSampler(sampler, mesh, layout), {STEP + 1})
    batches.set_state({{"next_index": {STEP}}})
    batch = next(batches)
    batches.close()
    read[name] = {{key: list(found) for key, found in rows.items()}}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        assert leaf.sharding.spec == jax.sharding.PartitionSpec(("data", "fsdp"), "seq")
        for shard in leaf.addressable_shards:
            begin = [part.start or 0 for part in shard.index[:2]]
            values[f"{{name}}|{{jax.tree_util.keystr(path)}}|{{begin[0]}}|{{begin[1]}}"] = np.asarray(shard.data)
    total = jax.jit(lambda x: (x.weight[..., None] * x.action).sum())(batch)
    values[f"{{name}}|total"] = np.asarray(total)
np.savez(result, read=json.dumps(read), **values)
"""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, random_episode, write_store) -> EpisodeStore:
    """A store of random episodes with several lengths."""
    path = tmp_path_factory.mktemp("sharded") / "mixed.h5"
    return write_store(path, "cartpole", [random_episode("cartpole", n, i) for i, n in enumerate(LENGTHS)])


@pytest.fixture(scope="module")
def made(mixed: EpisodeStore) -> ContextSampler:
    config = ContextConfig(trajectories=3, order="random")
    return ContextSampler(mixed, TASK, config, Normalisation.of(mixed), BATCH, 0)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(
    scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["one process", "two processes"]
)
def results(
    request, mixed: EpisodeStore, tmp_path_factory, environment: dict[str, str], eight_devices: None
) -> list[dict[str, np.ndarray]]:
    """The parts of each batch that each process has, and the rows that it read. A single process is this one."""
    folder, number = tmp_path_factory.mktemp("results"), request.param
    files = [folder / f"{index}.npz" for index in range(number)]
    if number == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["", str(mixed.path), "", "1", "0", str(files[0])])
            exec(PROGRAM, {})
        return [dict(np.load(files[0]))]
    port = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(mixed.path), port, str(number), str(index), str(file)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, file in enumerate(files)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output
    return [dict(np.load(file)) for file in files]


@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
def test_the_global_batch_is_the_plain_one_in_layout_order(results, made, shape, layout):
    ring = shape[2]
    length = PADDED[ring] if layout == "zigzag" else -(-27 // ring) * ring
    plain = made.read(made.draw(STEP), slice(None), np.arange(length))
    np.testing.assert_array_equal(plain.observation[:, : made.time], made.batch(STEP).observation)
    for path, leaf in jax.tree_util.tree_leaves_with_path(plain):
        expected = np.asarray(to_layout(leaf, layout, ring))
        found, covered = np.full_like(expected, 99), np.zeros(expected.shape[:2], int)
        prefix = f"{shape} {layout}|{jax.tree_util.keystr(path)}|"
        for values in results:
            for name in (name for name in values if name.startswith(prefix)):
                rows, places = (int(x) for x in name.removeprefix(prefix).split("|"))
                part = values[name]
                found[rows : rows + part.shape[0], places : places + part.shape[1]] = part
                covered[rows : rows + part.shape[0], places : places + part.shape[1]] += 1
        np.testing.assert_array_equal(found, expected, err_msg=prefix, strict=True)
        assert covered.min() >= 1
    for values in results:
        np.testing.assert_allclose(values[f"{shape} {layout}|total"], plain.action.sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
def test_each_process_reads_the_rows_of_its_own_devices(results, made, mixed, shape, layout):
    draw, seen = made.draw(STEP), []
    for values in results:
        observation, action, reward = set(), set(), set()
        positions = f"{shape} {layout}|.position|"
        for name in (name for name in values if name.startswith(positions)):
            first_context = int(name.split("|")[2])
            for (i, _), t in np.ndenumerate(values[name]):
                starts, episodes = draw.starts[first_context + i], draw.episodes[first_context + i]
                k = int(np.searchsorted(starts, t, side="right")) - 1
                if k == 3:
                    continue  # padding
                first = int(mixed.offsets[episodes[k]])
                row = first + int(t - starts[k])
                observation.add(row)
                action |= {row, row + 1}
                reward |= set(range(first, row + 2))  # sum of earlier rewards
                if row == first and k > 0:
                    last = int(mixed.offsets[episodes[k - 1] + 1]) - 1
                    action.add(last)
                    reward.add(last)
        read = json.loads(str(values["read"]))[f"{shape} {layout}"]
        assert set(read) == {"observation", "action", f"reward/{TASK}"}
        assert set(read["observation"]) == observation
        assert set(read["action"]) == action
        assert set(read[f"reward/{TASK}"]) <= reward
        seen.append(read["observation"])
    # Each process reads each of its steps once, even if several devices share the step.
    steps = int(draw.starts[:, -1].sum())
    if shape[3] == 1:
        assert sum(map(len, seen)) == steps
    else:
        assert sum(map(len, seen)) in (steps, 2 * steps)
    if len(results) == 2 and shape[3] == 1:
        assert all(0 < len(rows) < steps for rows in seen)


def test_one_device_has_the_plain_batch(made):
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "seq"))
    sharded = ShardedSampler(made, mesh)
    for a, b in zip(jax.tree.leaves(sharded.batch(5)), jax.tree.leaves(made.batch(5)), strict=True):
        assert isinstance(a, jax.Array)
        np.testing.assert_array_equal(a, b, strict=True)
