"""The choice of strategy with its reason, and errors of ring_attention."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from ringrl.attention import choose_strategy, ring_attention, ring_order
from ringrl.attention.strategy import LINKS, device_of, hiding_length, link_of


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (6, 1)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_ring_is_chosen_from_some_length_on(kind, heads, kv_heads, is_causal):
    link = LINKS[kind]
    lengths = [2**n for n in range(24)]
    chosen = [
        choose_strategy(n, 8, heads, kv_heads, device_kind=kind, is_causal=is_causal).strategy == "ring"
        for n in lengths
    ]
    assert chosen == sorted(chosen)
    assert not chosen[0]
    assert chosen[-1]
    hop = 2 * lengths[chosen.index(True)] * kv_heads * 2 / link.bytes  # seconds per value of head_dim, bfloat16
    work = (2 if is_causal else 4) * lengths[chosen.index(True)] ** 2 * heads / (link.flops / 2)
    assert hop <= work < 2 * hop, "the first that hides a hop, among powers of two"


def test_hiding_length():
    """2 c Hkv b / W = 2 c^2 H / F, so c = b F / W for MHA: 2 * (275e12 / 2) / 50e9 = 5,500."""
    link = LINKS["TPU v4"]
    causal = hiding_length(link, 8, 8, 2, is_causal=True)
    assert causal == pytest.approx(5500)
    assert hiding_length(link, 8, 8, 2, is_causal=False) == pytest.approx(causal / 2)
    assert hiding_length(link, 8, 2, 2, is_causal=True) == pytest.approx(causal / 4)
    assert hiding_length(link, 8, 8, 4, is_causal=True) == pytest.approx(causal * 2)


@pytest.mark.parametrize(
    ("arguments", "kind", "strategy", "reason"),
    [
        ((64, 1, 8, 8), "TPU v4", "ring", "one device"),
        ((10**6, 8, 8, 8), "TPU v4", "ring", "hide a hop"),
        ((64, 8, 8, 8), "NVIDIA H100 80GB HBM3", "ulysses", "8 heads divide over 8 devices"),
        ((64, 8, 6, 6), "NVIDIA H100 80GB HBM3", "all_gather", "do not hide a hop"),
        ((64, 8, 16, 1), "TPU v4", "all_gather", "do not hide a hop"),
        ((64, 8, 8, 8), "Abacus 3000", "ring", "no link speed is listed for 'Abacus 3000'"),
    ],
)
def test_choices_and_reasons(arguments, kind, strategy, reason):
    choice = choose_strategy(*arguments, device_kind=kind)
    assert choice.strategy == strategy
    assert reason in choice.reason


def test_the_default_device_is_respected(monkeypatch):
    """Traced arrays have no device: under jax.default_device a GPU's process may compute on the CPU."""
    cpu = jax.devices("cpu")[0]
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [cpu if backend == "cpu" else DeviceOf("gpu")])
    kinds = []
    trace = lambda x: kinds.append(device_of(x).platform) or x  # noqa: E731
    jax.make_jaxpr(trace)(1.0)
    for default in (cpu, "cpu"):
        with jax.default_device(default):
            jax.make_jaxpr(trace)(1.0)
    assert kinds == ["gpu", "cpu", "cpu"]


class DeviceOf(NamedTuple):
    platform: str


def test_device_kinds_match_by_prefix():
    assert link_of("TPU v5 lite") == LINKS["TPU v5 lite"]
    assert link_of("nvidia h100 80GB HBM3") == LINKS["NVIDIA H100"]
    assert link_of("TPU v99") is None


pytestmark = pytest.mark.usefixtures("eight_devices")


def call(tokens: int = 16, heads: int = 4, kv_heads: int = 4, ring: int = 4, **keywords) -> None:
    """Trace ring_attention over a mesh (data, seq) = (2, ring)."""
    mesh = Mesh(np.array(jax.devices()[: 2 * ring]).reshape(2, ring), ("data", "seq"))
    q, k = (jax.ShapeDtypeStruct((2, tokens, n, 8), jnp.float32) for n in (heads, kv_heads))
    jax.eval_shape(lambda *qkv: ring_attention(*qkv, **{"mesh": mesh} | keywords), q, k, k)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"layout": "spiral"}, "layout: 'spiral'"),
        ({"strategy": "star"}, "strategy: 'star'"),
        ({"axis_name": "sequence"}, "axis_name: the mesh has no axis 'sequence'"),
        ({"axis_name": None}, "axis_name: expected one or several different mesh axes, got None"),
        ({"axis_name": ("seq", "seq"), "tokens": 32}, "axis_name: expected one or several different mesh axes"),
        ({"mesh": None}, "mesh: expected a jax.sharding.Mesh, got NoneType"),
        ({"batch_axes": 0}, "batch_axes: expected the name of a mesh axis, a tuple of names or None, got 0"),
        ({"bidirectional": "no"}, "bidirectional: expected True or False, got 'no'"),
        ({"batch_axes": "rows"}, "batch_axes: the mesh has no axis 'rows'"),
        ({"head_axes": "data", "heads": 3, "kv_heads": 3}, "head_axes: 3 key heads"),
        ({"tokens": 20}, "q: a sequence of 20 "),
        ({"tokens": 18, "layout": "contiguous"}, "q: a sequence of 18 "),
        ({"strategy": "ulysses", "heads": 6, "kv_heads": 6}, "q: 6 heads"),
        ({"strategy": "ulysses", "heads": 12, "kv_heads": 3}, "k: 3 heads"),
        ({"strategy": "ulysses_ring"}, "axis_name: "),
        ({"bidirectional": True, "heads": 3, "kv_heads": 3}, "bidirectional: "),
        ({"positions": np.arange(12)}, "positions: expected shape"),
        ({"segment_ids": np.zeros((3, 16), int)}, "segment_ids: expected shape"),
        ({"positions": np.arange(16.0)}, "positions: expected integers"),
        ({"implementation": "abacus"}, "implementation: 'abacus'"),
        ({"logits_soft_cap": 0}, "logits_soft_cap: "),
        ({"local_window_size": -1}, "local_window_size: "),
    ],
)
def test_invalid_arguments_are_named(keywords, message):
    call()
    with pytest.raises(ValueError, match=f"^{message}"):
        call(**keywords)


class Chip(NamedTuple):
    coords: tuple[int, int, int]
    core: int = 0


def chips(columns, rows, layers=1, first=0):
    return [Chip((first + x, y, z)) for z in range(layers) for y in range(rows) for x in range(columns)]


@pytest.mark.parametrize(("columns", "rows"), [(2, 4), (4, 4), (4, 8), (8, 8), (16, 16), (2, 3)])
@pytest.mark.parametrize("first", [0, 4])
def test_each_ring_of_a_grid_leads_from_neighbour_to_neighbour(columns, rows, first):
    devices = chips(columns, rows, first=first)
    for ring_size in {4, 6, 8, 16, 32, 64, len(devices)}:
        if len(devices) % ring_size or (ring_size == 6 and len(devices) != 6):
            continue
        order = ring_order(devices, ring_size)
        assert sorted(order) == sorted(devices)
        for ring in np.reshape([chip.coords for chip in order], (-1, ring_size, 3)):
            hops = np.abs(ring - np.roll(ring, -1, axis=0)).sum(1)
            assert (hops == 1).all(), (ring_size, ring)


@pytest.mark.parametrize(
    ("devices", "ring_size"),
    [
        (chips(3, 3), 9),  # no closed walk
        (chips(1, 8), 8),
        (chips(4, 4)[:-2], 14),  # holes
        (chips(2, 2, layers=2), 8),
        ([Chip((0, 0, 0), 0), Chip((0, 0, 0), 1)], 2),
        (chips(4, 4), 1),
    ],
)
def test_other_devices_keep_their_order(devices, ring_size):
    assert ring_order(devices, ring_size) == devices
    assert ring_order(jax.devices()) == jax.devices()
