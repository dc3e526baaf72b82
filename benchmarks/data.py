"""Speed and memory of the data: relabelling, import, reading and batches, compared with the original's code.

    python benchmarks/data.py [relabel import read batch memory] [--exorl FOLDER] [--episodes 200] [--runs 5]
                              [--batch 8x128] [--gigabytes 20] [--limit 2] [--folder FOLDER] [--json FILE]

Every figure is the median of the runs. Each run measures ours and the peer in turn, so that other load slows both
equally. A ratio is the median over runs.

relabel  Milliseconds per episode, compared with ExoRL's loop over dm_control: `reset_context`, `set_state`,
         `get_reward` per row, control zero, one task. (For jaco with our sensor of the hand, which costs less than the
         original's.) Processor time. With --exorl, also the largest difference from the recorded reward over all
         episodes of every archive.
import   Milliseconds per walker episode (ten recorded ones, repeated) with one process and with one per core, compared
         with numpy.load and ExoRL's loop for one task. Inflating alone is the lower bound.
read     A random episode of a warm store, as views and copied, compared with numpy.load of its npz and all its arrays.
batch    ContextSampler.batch of contexts from a walker store, compared with numpy.copy of the same bytes.
memory   Random episodes and a batch of a sparse store of many gigabytes, in a process with limited private memory
         (RLIMIT_DATA: all but mapped files), and the peak including pages of the mapped file.
"""

import argparse
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from common import one_line_errors, positive

TASKS = {
    "walker": "walker_walk",
    "cheetah": "cheetah_run",
    "cartpole": "cartpole_swingup",
    "jaco": "jaco_reach_top_left",
}
PARTS = ("relabel", "import", "read", "batch", "memory")
PEER_EPISODES = 5

Numbers = dict[str, float]


def in_turn(
    runs: int, clock: Callable[[], float] = time.perf_counter, **cases: Callable[[], object]
) -> dict[str, list[float]]:
    """Return the seconds of each case for every run, after one run that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for run in range(runs + 1):
        for name, case in cases.items():
            start = clock()
            case()
            if run:
                seconds[name].append(clock() - start)
    return seconds


def ratio(peer: Sequence[float], ours: Sequence[float]) -> float:
    """Return how many times as long the peer takes, the median over runs."""
    return statistics.median(p / o for p, o in zip(peer, ours, strict=True))


def record(task: str, number: int) -> list[dict[str, np.ndarray]]:
    """Return episodes of the local collection's controller with much noise."""
    from ringrl.collect.controllers import recipe_of
    from ringrl.collect.record import record_episode
    from ringrl.envs import load_simulation

    simulation, recipe = load_simulation(task), recipe_of(task)
    settings = {"seed": 0, "noise_limit": 1.0}
    return [record_episode(simulation, recipe, recipe.mean, index=index, **settings) for index in range(number)]


def original_loop(task: str) -> Callable[[np.ndarray], list[float]]:
    """Return ExoRL's relabelling of one episode's physics (T+1, P) for one task."""
    from ringrl.envs import load_simulation

    if task.startswith("jaco"):
        simulation = load_simulation(task)
        physics = simulation.physics
        reward = lambda: simulation.reward(task, simulation.sensors(), np.zeros(9))  # noqa: E731
    else:
        from dm_control import suite

        env = suite.load(*task.split("_", 1))
        physics = env.physics
        reward = lambda: env.task.get_reward(physics)  # noqa: E731

    def relabel(states: np.ndarray) -> list[float]:
        rewards = []
        for state in states:
            with physics.reset_context():
                physics.set_state(state)
            rewards.append(float(reward()))
        return rewards

    return relabel


def relabelling(runs: int, exorl: Path | None) -> dict[str, Numbers]:
    """Measure one task and all tasks, and the original's loop; compare with recorded rewards."""
    from ringrl.data.relabel import relabel, relabel_all
    from ringrl.envs import domain_of

    results = {}
    for task in TASKS.values():
        domain, original = domain_of(task).name, original_loop(task)
        (episode,) = record(task, 1)
        physics, action = episode["physics"], episode["action"]
        seconds = in_turn(
            runs,
            time.process_time,
            one=lambda task=task, p=physics, a=action: relabel(task, p, a),
            all=lambda domain=domain, p=physics, a=action: relabel_all(domain, p, a),
            original=lambda original=original, p=physics: original(p),
        )
        results[task] = {
            "one task, ms": 1e3 * statistics.median(seconds["one"]),
            "all tasks, ms": 1e3 * statistics.median(seconds["all"]),
            "original, one task, ms": 1e3 * statistics.median(seconds["original"]),
            "one task, times faster": ratio(seconds["original"], seconds["one"]),
            "all tasks, times faster": len(domain_of(task).tasks) * ratio(seconds["original"], seconds["all"]),
        }
    for archive in sorted(exorl.glob("*/*.zip")) if exorl else ():
        results[f"{archive.parent.name}/{archive.name}"] = parity(archive)
    return results


def parity(archive: Path) -> Numbers:
    """Return the largest difference between relabelled and recorded reward, for the nearest task."""
    from ringrl.data.exorl import Archive
    from ringrl.data.relabel import relabel_all
    from ringrl.envs import domain_named

    worst: Numbers = {}
    with Archive(archive, domain_named(archive.parent.name)) as episodes:
        for episode in episodes:
            for task, reward in relabel_all(archive.parent.name, episode["physics"], episode["action"]).items():
                difference = float(np.abs(reward - episode["reward"][:, 0]).max())
                worst[task] = max(worst.get(task, 0.0), difference)
        task = min(worst, key=worst.__getitem__)
        return {"episodes": len(episodes), f"largest difference from the recorded {task}": worst[task]}


def walker_archive(folder: Path, number: int) -> Path:
    """Write a zip archive of walker episodes, packed as ExoRL packs them."""
    from ringrl.data.exorl import save_episode

    contents = [save_episode(folder, i, episode).read_bytes() for i, episode in enumerate(record("walker_walk", 10))]
    path = folder / "walker.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(number):
            archive.writestr(f"buffer/episode_{index:06d}_1000.npz", contents[index % len(contents)])
    return path


def load_npz(content: bytes) -> dict[str, np.ndarray]:
    """Load all arrays of an episode's file, as the original does."""
    with np.load(io.BytesIO(content), allow_pickle=False) as npz:
        return dict(npz)


def importing(runs: int, folder: Path, number: int) -> dict[str, Numbers]:
    """Measure the import of walker episodes, and loading and relabelling with the original's code."""
    from ringrl.data import import_archive

    archive, original = walker_archive(folder, number), original_loop("walker_walk")
    with zipfile.ZipFile(archive) as opened:
        contents = [opened.read(name) for name in opened.namelist()[:PEER_EPISODES]]

    def original_import() -> None:
        for content in contents:
            original(load_npz(content)["physics"])

    def inflate() -> None:
        for content in contents:
            with zipfile.ZipFile(io.BytesIO(content)) as npz:
                for name in npz.namelist():
                    npz.read(name)

    def ours() -> None:
        import_archive(archive, folder / "walker.h5", "walker", overwrite=True)

    seconds = in_turn(runs, one=ours, original=original_import, inflate=inflate)
    per_episode = {
        name: [1e3 * value / (PEER_EPISODES if name in ("original", "inflate") else number) for value in values]
        for name, values in seconds.items()
    }
    result = {
        "episodes": number,
        "one process, ms per episode": statistics.median(per_episode["one"]),
        "original way, one task, ms per episode": statistics.median(per_episode["original"]),
        "times faster per core": ratio(per_episode["original"], per_episode["one"]),
        "inflating alone, ms per episode": statistics.median(per_episode["inflate"]),
    }
    return {"walker": result}


def reading(runs: int, folder: Path) -> dict[str, Numbers]:
    """Measure a random episode of a warm store, and numpy.load of its file."""
    from ringrl.data import import_archive

    archive = walker_archive(folder, 100)
    store = import_archive(archive, folder / "read.h5", "walker")
    store.verify()  # warms the page cache
    with zipfile.ZipFile(archive) as opened:
        for index, name in enumerate(opened.namelist()):
            (folder / f"{index}.npz").write_bytes(opened.read(name))
    order = np.random.default_rng(0).integers(100, size=50).tolist()

    def npz() -> None:
        for index in order:
            with np.load(folder / f"{index}.npz", allow_pickle=False) as file:
                dict(file)

    seconds = in_turn(
        runs,
        views=lambda: [store.episode(index) for index in order],
        copies=lambda: [{k: v.copy() for k, v in store.episode(index).items()} for index in order],
        npz=npz,
    )
    milliseconds = {name: 1e3 * statistics.median(values) / len(order) for name, values in seconds.items()}
    return {
        "walker": {
            "views, ms": milliseconds["views"],
            "copied, ms": milliseconds["copies"],
            "numpy.load, ms": milliseconds["npz"],
            "views, times faster": ratio(seconds["npz"], seconds["views"]),
            "copied, times faster": ratio(seconds["npz"], seconds["copies"]),
        }
    }


def made_up_store(path: Path, episodes: int) -> None:
    """Write a sparse walker store of zeros, which takes almost no disk."""
    from ringrl.data.store import Provenance, create_store
    from ringrl.envs import domain_named

    walker = domain_named("walker")
    with create_store(path, walker, walker.tasks, [1000] * episodes, source=Provenance("zeros")) as writer:
        layout = writer.layout
        zeros = {key: np.zeros(layout.shape(key, 1001), spec.dtype) for key, spec in layout.arrays.items()}
        writer.records = [layout.record(zeros)] * episodes


def sampler(path: Path, batch: tuple[int, int]):  # type: ignore[no-untyped-def]
    """Return a sampler of contexts with given statistics."""
    from ringrl.config import ContextConfig
    from ringrl.data import EpisodeStore
    from ringrl.data.sampling.normalisation import Normalisation
    from ringrl.data.sampling.sampler import ContextSampler

    normalisation = Normalisation(np.full(24, 0.1), np.full(24, 2.0), 1000)
    size, trajectories = batch
    return ContextSampler(
        EpisodeStore(path), "walker_walk", ContextConfig(trajectories=trajectories), normalisation, size, 0
    )


def batches(runs: int, folder: Path, batch: tuple[int, int]) -> dict[str, Numbers]:
    """Measure a batch of contexts from a warm store with twice its episodes, and a copy of the same bytes."""
    import jax

    from ringrl.data.store import Provenance, create_store
    from ringrl.envs import domain_named

    random, path = np.random.default_rng(0), folder / "batch.h5"
    (episode,) = record("walker_walk", 1)
    number, tasks = 2 * batch[0] * batch[1], domain_named("walker").tasks
    with create_store(path, domain_named("walker"), tasks, [1000] * number, source=Provenance("made up")) as writer:
        for _ in range(number):
            rewards = random.random((len(tasks), 1001)).astype(np.float32)
            writer.append(episode | {f"reward/{task}": reward for task, reward in zip(tasks, rewards, strict=True)})
    contexts = sampler(path, batch)
    contexts.store.verify()  # warms the page cache
    leaves = jax.tree.leaves(contexts.batch(0))
    steps = iter(range(1, runs + 2))
    seconds = in_turn(runs, batch=lambda: contexts.batch(next(steps)), copy=lambda: [np.copy(leaf) for leaf in leaves])
    beyond = [b - c for b, c in zip(seconds["batch"], seconds["copy"], strict=True)]
    return {
        f"{batch[0]} x {batch[1]} episodes": {
            "steps": contexts.batch_size * contexts.time,
            "megabytes": sum(leaf.nbytes for leaf in leaves) / 1e6,
            "batch, ms": 1e3 * statistics.median(seconds["batch"]),
            "numpy.copy of the same bytes, ms": 1e3 * statistics.median(seconds["copy"]),
            "beyond the copy, ms": 1e3 * statistics.median(beyond),
        }
    }


def memory(folder: Path, gigabytes: float, limit: float, batch: tuple[int, int]) -> dict[str, Numbers]:
    """Measure the peak memory of a process with limited private memory."""
    path = folder / "sparse.h5"
    start = time.perf_counter()
    made_up_store(path, round(gigabytes * 1e9 / 288_288))
    command = [sys.executable, __file__, "--reader", str(path), str(limit), "x".join(map(str, batch))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    if done.returncode:
        raise SystemExit(f"memory: {done.stderr.strip().splitlines()[-1]}")
    written = {"store, GB": path.stat().st_size / 1e9, "on the disk, GB": 512e-9 * path.stat().st_blocks}
    return {f"limit {limit:g} GB": written | json.loads(done.stdout) | {"seconds": time.perf_counter() - start}}


def read_with_limit(path: Path, limit: float, batch: tuple[int, int]) -> Numbers:
    """Limit the private memory of this process and read much of a store."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit * 1e9), int(limit * 1e9)))
    contexts = sampler(path, batch)
    store, total = contexts.store, 0.0
    for index in np.random.default_rng(0).integers(store.num_episodes, size=4_000).tolist():
        total += float(store.episode(index)["physics"].sum())
    contexts.batch(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = {name: int(status[name].split()[0]) for name in ("VmData", "RssAnon", "RssFile", "VmHWM")}
    return {
        "episodes read": 4_000 + batch[0] * batch[1],
        "private memory now, GB": kilobytes["RssAnon"] / 1e6,
        "pages of files now, GB": kilobytes["RssFile"] / 1e6,
        "peak of both, GB": kilobytes["VmHWM"] / 1e6,
    }


def show(part: str, results: dict[str, Numbers]) -> None:
    """Print a table of one part."""
    for name, numbers in results.items():
        print(f"\n{part}: {name}")
        for what, number in numbers.items():
            print(f"  {what:<52}{number:>14,.3f}" if number > 1e-3 else f"  {what:<52}{number:>14.1e}", flush=True)


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all by default")
    parser.add_argument("--exorl", type=Path, help="folder of {domain}/{algo}.zip, for the parity of rewards")
    parser.add_argument(
        "--episodes", type=positive, default=200, help="to import (10000: as many as an ExoRL archive has)"
    )
    parser.add_argument("--runs", type=positive, default=5)
    parser.add_argument("--batch", default="8x128", help="contexts x trajectories")
    parser.add_argument("--gigabytes", type=float, default=20, help="of the sparse store")
    parser.add_argument("--limit", type=float, default=2, help="gigabytes of private memory of its reader")
    parser.add_argument("--folder", type=Path, help="where files are made and deleted; by default the system's")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--reader", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.reader:
        path, limit, batch = options.reader
        print(json.dumps(read_with_limit(Path(path), float(limit), parse_batch(batch))))
        return
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if options.exorl and not options.exorl.is_dir():
        parser.error(f"--exorl: {options.exorl} is no folder; give one of {{domain}}/{{algo}}.zip")
    batch, results = parse_batch(options.batch), {}
    for part in options.parts or PARTS:
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            results[part] = {
                "relabel": lambda: relabelling(options.runs, options.exorl),
                "import": lambda folder=folder: importing(options.runs, folder, options.episodes),
                "read": lambda folder=folder: reading(options.runs, folder),
                "batch": lambda folder=folder: batches(options.runs, folder, batch),
                "memory": lambda folder=folder: memory(folder, options.gigabytes, options.limit, batch),
            }[part]()
        finally:
            shutil.rmtree(folder)
        show(part, results[part])
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def parse_batch(text: str) -> tuple[int, int]:
    """ "8x128" as numbers."""
    contexts, trajectories = text.split("x")
    return int(contexts), int(trajectories)


if __name__ == "__main__":
    main()
