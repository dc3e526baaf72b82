"""The memory formula against the GPU compiler (no GPU needed).

Needs the CUDA plugin in jax's version (`pip install "jax[cuda13]"`); skipped without it.
"""

import importlib.util
from collections.abc import Iterator

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from ringrl.model.parallel import MESH_AXES
from ringrl.planning.ahead_of_time import abstract_step
from ringrl.planning.memory import memory_of
from ringrl.planning.workload import Workload, find_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda13") is None
    or importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason=f'needs the CUDA compiler: pip install "jax[cuda13]=={jax.__version__}"',
)

TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} }}
  core_count: {cores} fpus_per_core: 64 clock_rate_ghz: 1.5
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared} shared_memory_per_core: {shared}
  l2_cache_size: 41943040 memory_bandwidth: 2000000000000 device_memory_size: 80000000000
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{kind}"
"""


@pytest.fixture(scope="module", autouse=True)
def gpus_are_of_cuda() -> Iterator[None]:
    """Let JAX treat "gpu" as CUDA without a GPU."""
    from jax._src import xla_bridge

    with pytest.MonkeyPatch.context() as patch:
        original = xla_bridge.canonicalize_platform
        patch.setattr(xla_bridge, "canonicalize_platform", lambda name: "cuda" if name == "gpu" else original(name))
        yield


@pytest.mark.parametrize(
    ("kind", "major", "cores", "shared"),
    [("NVIDIA H200", 9, 132, 232448), ("NVIDIA A100", 8, 108, 166912)],  # our kernel and cuDNN
)
def test_formula_is_within_10_percent_of_the_compiler(kind, major, cores, shared):
    workload = Workload(find_model("7b"), 8192 * 8).with_settings("mesh", seq=8).with_settings("model", layers=4)
    target = TARGET.format(kind=kind, major=major, cores=cores, shared=shared)
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x8")
    step = abstract_step(workload, list(topology.devices))
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform="gpu")
    with jax.sharding.use_abstract_mesh(
        AbstractMesh((1, 1, 1, 8), MESH_AXES, (AxisType.Auto,) * 4, abstract_device=device)
    ):
        lowered = step.function.trace(step.state, step.batch).lower(lowering_platforms=("cuda",))
    memory = lowered.compile().memory_analysis()
    compiled = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert memory_of(workload, "gpu").total == pytest.approx(compiled, rel=0.1)
