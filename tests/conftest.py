"""Fixtures for all tests: small real datasets, devices."""

import dataclasses
import functools
import gc
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.backend import clear_backends

from ringrl.config import TrainConfig
from ringrl.data import EpisodeStore, import_archive
from ringrl.data.exorl import save_episode
from ringrl.envs import make
from ringrl.evaluation import policy
from ringrl.model import Agent
from ringrl.model.parallel import Parallel
from ringrl.training import loop

# All processes of a session share one compilation cache: the first process creates the folder, the others inherit it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="ringrl-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
# Test programs run briefly, so compilation dominates. Skip LLVM's optimisations and the fusion emitters.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
FAST_COMPILATION = "--xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):  # later versions have no such flag
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
if FAST_COMPILATION not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILATION}".strip()
jax.config.update("jax_disable_most_optimizations", True)
# Processes that tests start keep bytecode: imports from source take three times as long.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Tracing creates many objects that live long: collect them rarely, and store no source lines with their operations.
gc.set_threshold(100_000, 50, 100)
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
jax.config.update("jax_traceback_in_locations_limit", 0)

# Slow examples are no failures: the machine may be busy.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

# Files with long tests start first, so that no process runs them alone at the end.
LONGEST = (
    "study/test_ablate.py", "attention/test_ring.py", "training/test_validation.py", "training/test_mesh.py",
    "test_docs.py", "training/test_distributed.py", "evaluation/test_evaluate.py", "attention/test_derivatives.py",
    "collect/test_learner.py", "training/test_loop.py", "model/test_policy.py", "attention/test_attention.py",
    "training/test_run_folder.py", "collect/test_collection.py", "attention/test_decode.py",
    "attention/test_mosaic_gpu.py", "data/exorl/test_import_resume.py", "model/test_cache.py",
    "evaluation/test_actors.py", "training/test_resume.py", "attention/test_lengths.py", "evaluation/test_player.py",
    "attention/test_cudnn.py", "evaluation/test_video.py", "attention/test_mosaic_tpu.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first. pytest-xdist keeps the order (--no-loadscope-reorder)."""
    places = {name: place for place, name in enumerate(LONGEST)}
    folder = Path(__file__).parent
    items.sort(key=lambda item: places.get(item.path.relative_to(folder).as_posix(), len(places)))


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Return the environment of processes that a test starts. Each process chooses its number of host devices."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST_COMPILATION}


@pytest.fixture
def optimised() -> Iterator[None]:
    """Compile with the optimisations that users get."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session", autouse=True)
def agents() -> Iterator[None]:
    """Make agents of equal settings once, not once per run and evaluation: tracing them takes seconds. Keep 30."""
    make_agent, made = loop.make_agent, dict[Any, Agent]()

    def shared(make_policy: Any, config: TrainConfig, parallel: Parallel) -> Agent:
        info = make_policy.func.__self__
        settings = config.model_dump_json(include={"task", "seed", "model", "optimiser", "actor_critic"})
        data = str(info.normalisation.to_json()), info.observation_size, info.action_size, info.actions
        key = settings, *data, parallel, jax.devices()[0]
        if key not in made:
            if len(made) == 30:
                made.pop(next(iter(made)))
            agent = make_agent(make_policy, config, parallel)
            init = functools.cache(agent.init)  # training donates its state, so each run needs a copy
            is_one = parallel.mesh is None
            made[key] = dataclasses.replace(agent, init=lambda: jax.tree.map(jnp.copy, init())) if is_one else agent
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_agent", shared)
        patch.setattr(policy, "make_agent", shared)
        yield


# A background job of a shell ignores SIGINT, but tested processes must receive it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def record_random_episodes(task: str, folder: Path, episodes: int) -> Path:
    """Record random actions in the real environment as an ExoRL folder."""
    (folder / "buffer").mkdir(parents=True)
    environment = make(task, seed=0)
    random = np.random.default_rng(0)
    for number in range(episodes):
        observation, info = environment.reset()
        rows = [(observation, np.zeros(environment.action_space.shape, np.float32), 0.0, info["physics"])]
        truncated = False
        while not truncated:
            action = random.uniform(-1, 1, environment.action_space.shape).astype(np.float32)
            observation, reward, _, truncated, info = environment.step(action)
            rows.append((observation, action, reward, info["physics"]))
        observations, actions, rewards, physics = zip(*rows, strict=True)
        episode = {
            "observation": np.stack(observations),
            "action": np.stack(actions),
            "reward": np.array(rewards, np.float32)[:, None],
            "discount": np.ones((len(rows), 1), np.float32),
            "physics": np.stack(physics),
        }
        save_episode(folder / "buffer", number, episode)
    return folder


@pytest.fixture(scope="session")
def jaco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight random jaco episodes of 250 steps in ExoRL's format."""
    return record_random_episodes("jaco_reach_top_left", tmp_path_factory.mktemp("jaco") / "random", 8)


@pytest.fixture(scope="session")
def jaco_store(jaco_folder: Path) -> EpisodeStore:
    """The episodes of `jaco_folder` as a store."""
    return import_archive(jaco_folder, jaco_folder.with_suffix(".h5"), "jaco")


@pytest.fixture(scope="module")
def eight_devices() -> Iterator[None]:
    """Eight host devices for the tests of a module. The previous number is restored after them."""
    if jax.local_device_count() >= 8:
        yield
        return
    before = jax.config.jax_num_cpu_devices
    _restart_with(8)
    yield
    _restart_with(before)


def _restart_with(devices: int) -> None:
    clear_backends()
    jax.config.update("jax_num_cpu_devices", devices)
