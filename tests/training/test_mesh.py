"""Training on meshes of eight host devices gives the losses and parameters of one device."""

import dataclasses
import json
import os
import re
import signal
from functools import partial
from io import StringIO
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from ringrl.config import MeshConfig, ModelConfig, TrainConfig
from ringrl.context import Context
from ringrl.data import EpisodeStore
from ringrl.data.sampling.batches import ShardedSampler
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.sampling.sampler import ContextSampler
from ringrl.errors import UserError
from ringrl.model import make_agent, make_policy
from ringrl.model.parallel import ONE_DEVICE, Parallel, make_parallel, make_ring_mesh
from ringrl.model.transformer import Transformer
from ringrl.training import train
from ringrl.training.metrics import MetricsRecorder

pytestmark = pytest.mark.usefixtures("eight_devices")
QUICK = {"xla_backend_optimization_level": 0}
MODEL = ModelConfig(layers=2, width=32, heads=8, kv_heads=8, token_set="fused1", block_tokens=13)
# (data, fsdp, tensor, seq): the usual axes alone, every three together, and one of four devices.
ALONE = [(8, 1, 1, 1), (1, 1, 1, 8)]
THREE = [(2, 2, 2, 1), (2, 2, 1, 2), (2, 1, 2, 2), (1, 2, 2, 2)]
FOUR = (1, 1, 2, 4)
SIZES = ("data", "fsdp", "tensor", "seq", "ulysses")


def settings(mesh: tuple[int, ...], **others: object) -> TrainConfig:
    values = {"data": "unused", "task": "unused", "run": "unused", "optimiser": {"batch_size": 8}}
    values |= {"model": MODEL.model_dump(), "mesh": dict(zip(SIZES, mesh, strict=False))}
    return TrainConfig.model_validate(values | others)


@pytest.fixture(scope="module")
def sampler(jaco_store: EpisodeStore) -> ContextSampler:
    context = TrainConfig.model_validate({"data": "a", "task": "b", "run": "c", "context": {"trajectories": 1}}).context
    return ContextSampler(jaco_store, "jaco_reach_top_left", context, Normalisation.of(jaco_store), 8, seed=0)


@pytest.fixture(scope="module")
def params() -> dict:
    """Parameters on one device."""
    return jax.device_get(nnx.to_pure_dict(nnx.state(make_policy(MODEL, 42, 9, seed=0), nnx.Param)))


def loss_and_gradients(model: ModelConfig, parallel: Parallel, params: dict, batch: Context) -> tuple[np.ndarray, dict]:
    graph, shapes = nnx.split(nnx.eval_shape(lambda: make_policy(model, 42, 9, seed=0, parallel=parallel)), nnx.Param)
    if parallel.mesh is not None:
        params = jax.device_put(params, parallel.parameter_shardings(shapes))
    both = jax.value_and_grad(lambda params, batch: nnx.merge(graph, params).loss(batch))
    return jax.device_get(jax.jit(both, compiler_options=QUICK)(params, batch))


@pytest.fixture(scope="module")
def expected(sampler: ContextSampler, params: dict) -> tuple[np.ndarray, dict]:
    """Loss and gradients of vanilla attention on one device."""
    plain = MODEL.model_copy(update={"attention": "vanilla"})
    return loss_and_gradients(plain, ONE_DEVICE, params, sampler.batch(0))


slow = partial(pytest.param, marks=pytest.mark.slow)
# (mesh, settings of the model, layout). Zigzag and the ring occur with every axis, the others with seq.
CASES = [
    *(slow(mesh, {}, "zigzag") for mesh in ALONE),
    (THREE[0], {}, "zigzag"),
    (THREE[1], {"remat": "layers"}, "zigzag"),
    slow(THREE[2], {"attention": "memory_efficient"}, "zigzag"),
    (THREE[3], {"attention": "vanilla"}, "zigzag"),
    slow(FOUR, {"attention": "blockwise"}, "zigzag"),
    (FOUR, {"remat": "full"}, "contiguous"),
    slow(FOUR, {}, "striped"),
    (ALONE[1], {"strategy": "ulysses"}, "striped"),
    slow(THREE[2], {"strategy": "ulysses", "remat": "layers"}, "zigzag"),
    (FOUR, {"strategy": "all_gather"}, "zigzag"),
    ((1, 1, 2, 4, 2), {"strategy": "ulysses_ring"}, "zigzag"),
    slow((2, 1, 1, 4, 2), {"strategy": "ulysses_ring", "remat": "full"}, "striped"),
    slow((1, 1, 1, 8, 4), {"strategy": "ulysses_ring", "bidirectional": True}, "contiguous"),
    slow(ALONE[1], {"strategy": "auto"}, "zigzag"),
    slow(FOUR, {"bidirectional": True}, "zigzag"),
]


@pytest.mark.parametrize(("mesh", "changes", "layout"), CASES, ids=str)
def test_loss_and_gradients_equal_vanilla_attention_on_one_device(mesh, changes, layout, sampler, params, expected):
    model = MODEL.model_copy(update=changes)
    parallel = dataclasses.replace(make_parallel(settings(mesh, model=model.model_dump())), layout=layout)
    batch = ShardedSampler(sampler, parallel.mesh, layout).batch(0)
    found = loss_and_gradients(model, parallel, params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), found, expected)


@pytest.mark.parametrize(
    ("changes", "tokens", "expected"),
    [
        ({}, 64, {"collective_permute": 1}),
        ({"bidirectional": True}, 64, {"collective_permute": 2}),
        ({"strategy": "ulysses"}, 64, {"all_to_all": 1, "collective_permute": 0}),
        ({"strategy": "ulysses_ring"}, 64, {"all_to_all": 1, "collective_permute": 1}),
        ({"strategy": "all_gather"}, 64, {"all_to_all": 0, "collective_permute": 0, "all_gather": 1}),
        ({"strategy": "auto"}, 64, {"all_to_all": 1, "collective_permute": 0}),
        ({"strategy": "auto"}, 4096, {"all_to_all": 0, "collective_permute": 1}),
        ({"attention": "blockwise"}, 64, {"all_to_all": 0, "collective_permute": 0, "all_gather": 1}),
    ],
    ids=str,
)
def test_the_strategy_selects_the_transfers(changes, tokens, expected):
    """Count the kinds of transfers of one layer (for permutes: their directions) before compilation."""
    mesh = (1, 1, 1, 8, 2) if changes.get("strategy") == "ulysses_ring" else (1, 1, 1, 8)
    parallel = make_parallel(settings(mesh, model=MODEL.model_dump() | changes))
    made = Transformer(MODEL.model_copy(update=changes), nnx.Rngs(params=0), parallel)
    text = jax.jit(made.__call__).lower(jax.ShapeDtypeStruct((1, tokens, 32), "float32")).as_text()
    for kind, number in expected.items():
        found = set(
            re.findall(rf"stablehlo.{kind}\"?\(.*?(?:source_target_pairs = dense<(.*?)>|$)", text, re.MULTILINE)
        )
        assert len(found) == number, kind


def test_a_group_is_of_neighbours_along_the_context():
    parallel = make_parallel(settings((1, 1, 1, 8, 2), model=MODEL.model_dump() | {"strategy": "ulysses_ring"}))
    mesh = parallel.mesh_of_groups()
    assert (mesh.shape["seq"], mesh.shape["ulysses"]) == (4, 2)
    assert mesh.devices.flatten().tolist() == parallel.mesh.devices.flatten().tolist()


def test_a_policy_trained_in_groups_acts_on_any_ring():
    config = settings((1, 1, 1, 8, 2), model=MODEL.model_dump() | {"strategy": "ulysses_ring"})
    for ulysses in (1, 4):
        assert make_ring_mesh(config, MeshConfig(seq=4, ulysses=ulysses)).ring_size == 4


def test_parameters_and_optimiser_state_are_sharded(params):
    config = settings((1, 2, 2, 2))
    parallel = make_parallel(config)
    state = make_agent(lambda: make_policy(MODEL, 42, 9, 0, parallel=parallel), config, parallel).init()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), jax.device_get(state.params), params)
    adam = jax.tree.leaves(state.optimiser, is_leaf=lambda x: hasattr(x, "mu"))
    for tree in (state.params, next(x for x in adam if hasattr(x, "mu")).mu):
        up = tree["transformer"]["blocks"]["feed_forward"]["up"]["kernel"]
        assert up.shape == (2, 32, 128)
        assert up.addressable_shards[0].data.shape == (2, 8, 64), "width over fsdp and seq, units over tensor"
        query = tree["transformer"]["blocks"]["attention"]["query"]["kernel"]
        assert query.addressable_shards[0].data.shape == (2, 8, 4, 4), "heads over tensor"


def heads(query: int, key: int, **others: object) -> dict:
    return {"model": MODEL.model_dump() | {"width": 48, "heads": query, "kv_heads": key} | others}


@pytest.mark.parametrize(
    ("mesh", "others", "words"),
    [
        ((1, 1, 1, 16), {}, "mesh: data 1 x fsdp 1 x tensor 1 x seq 16 is 16 devices, but JAX has 8 (cpu)"),
        ((3, 1, 1, 1), {}, "mesh.data x mesh.fsdp: 8 contexts"),
        ((1, 1, 3, 1), {}, "mesh.tensor: 8 query heads"),
        ((1, 1, 1, 6), {}, "mesh.fsdp x mesh.seq: 32 features"),
        ((1, 1, 2, 4), heads(4, 4, strategy="ulysses"), "ulysses, 4 must divide the 2 query heads on each device"),
        (
            (1, 1, 1, 4),
            heads(12, 6, strategy="ulysses"),
            "multiple or a divisor of the 6 key heads; use another mesh.seq",
        ),
        ((1, 1, 1, 8, 2), {}, "mesh.ulysses: 2 does not suit model.strategy ring"),
        ((1, 1, 1, 8), heads(8, 8, strategy="ulysses_ring"), "1 does not suit model.strategy ulysses_ring"),
        ((1, 1, 2, 4, 4), heads(4, 4, strategy="ulysses_ring"), "4 must divide the 2 query heads on each"),
        (
            (1, 1, 1, 8, 2),
            heads(4, 2, strategy="ulysses_ring", bidirectional=True),
            "model.bidirectional: the 1 key heads cannot be halved",
        ),
        ((1, 1, 2, 4), heads(8, 2, bidirectional=True), "model.bidirectional: the 1 key heads on each device"),
        ((2, 1, 1, 1), {"model": {"kind": "td3_bc"}}, "td3_bc trains on one device"),
        ((8, 1, 1, 1), {"optimiser": {"batch_size": 8, "accumulation": 2}}, "mesh.data x mesh.fsdp: 4 contexts"),
    ],
    ids=str,
)
def test_impossible_meshes_are_errors_with_the_reason(mesh, others, words):
    with pytest.raises(UserError, match=re.escape(words)):
        make_parallel(settings(mesh, **others))


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_resumes_on_eight_devices_then_one(
    jaco_store: EpisodeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def config(run: str, mesh: dict, strategy: str = "ring") -> TrainConfig:
        return TrainConfig.model_validate(
            {
                "data": jaco_store.path, "task": "jaco_reach_top_left", "run": tmp_path / run,
                "checkpoint_every": 2, "model": MODEL.model_dump() | {"strategy": strategy}, "mesh": mesh,
                "context": {"trajectories": 1},
                "optimiser": {"batch_size": 2, "steps": 4, "warmup_steps": 0},
            }
        )  # fmt: skip

    printed = StringIO()
    train(config("one", {}), console=Console(file=printed, width=200))
    assert "one: uses 1 of 8 devices; raise --mesh.data, fsdp, tensor or seq to use more" in printed.getvalue()
    add = MetricsRecorder.add

    def add_and_stop(recorder: MetricsRecorder, step: int, metrics: dict) -> None:
        add(recorder, step, metrics)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsRecorder, "add", add_and_stop)
    train(config("moved", {"seq": 2, "fsdp": 2, "tensor": 2}, "ulysses"), quiet=True)
    train(config("moved", {}, "auto"), resume=True, quiet=True)
    assert len(losses(tmp_path / "one")) == 4
    np.testing.assert_allclose(losses(tmp_path / "moved"), losses(tmp_path / "one"), rtol=2e-4)
