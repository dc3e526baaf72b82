"""Compare TD3+BC and Decision Transformer with d3rlpy's (2.8): the same data, updates, batch size and network sizes.

    python benchmarks/peers.py DATA --peer-python PYTHON [--methods td3+bc dt] [--updates 2000] [--seeds 3]
        [--episodes 10] [--json FILE]

DATA is a store of a Gymnasium environment with continuous actions. PYTHON is an interpreter with d3rlpy, gymnasium and
mujoco. Both train on one host device with actions scaled to [-1, 1] and normalised observations, one seed after
another, and act from the same starts. Decision Transformers see 20 steps and aim for the best return of the data.

Columns: mean return over seeds and episodes, its standard error over seeds, and updates per second (the median over
updates, without the first tenth). The last column is the ratio of speeds, seed by seed: above 1, RingRL is faster.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import in_process, make_parser, one_line_errors, positive, save_json

CONTEXT, FIRST_SEED = 20, 1_000_000
METHODS = ("td3+bc", "dt")
DT = {"layers": 3, "width": 128, "heads": 1, "kv_heads": 1, "action_head": "mse"}


def speed(times: list[float]) -> float:
    """Return updates per second, given the time of each update's end."""
    return 1 / statistics.median(np.diff(times[len(times) // 10 :]).tolist())


def ours(data: str, method: str, seed: int, updates: int, episodes: int) -> dict[str, Any]:
    """Train and evaluate with RingRL."""
    from ringrl.config import TrainConfig
    from ringrl.config_files import merged
    from ringrl.data import EpisodeStore
    from ringrl.evaluation import Protocol, evaluate_policy, load_policy
    from ringrl.methods import METHODS as RECIPES
    from ringrl.training import train

    settings: Any = {"optimiser": {"steps": updates}, "log": (), "checkpoint_every": updates}
    settings = merged(settings, RECIPES[method].settings or {})
    if method == "dt":
        optimiser = {"batch_size": 64, "learning_rate": 1e-4, "warmup_steps": updates // 10}
        settings = merged(settings, {"model": DT, "context": {"segment_steps": CONTEXT}, "optimiser": optimiser})
    with tempfile.TemporaryDirectory() as folder:
        task, run = EpisodeStore(data).tasks[0], Path(folder) / "run"
        train(TrainConfig.model_validate(settings | {"data": data, "task": task, "run": run, "seed": seed}), quiet=True)
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        times = np.cumsum([1 / line["steps_per_second"] for line in lines]).tolist()
        records = evaluate_policy(load_policy(run), Protocol(environments=episodes, seed=FIRST_SEED))
    return {"return": statistics.fmean(record.returns[0] or 0.0 for record in records), "speed": speed(times)}


def theirs(data: str, method: str, seed: int, updates: int, episodes: int) -> dict[str, Any]:
    """Train and evaluate with d3rlpy, in its own interpreter."""
    import d3rlpy
    import gymnasium

    d3rlpy.seed(seed)
    with np.load(data) as file:
        arrays = dict(file)
    names = ("observations", "actions", "rewards", "terminals", "timeouts")
    dataset = d3rlpy.dataset.MDPDataset(*(arrays[name] for name in names))
    scaled = {"observation_scaler": d3rlpy.preprocessing.StandardObservationScaler()}
    if method == "td3+bc":
        algorithm = d3rlpy.algos.TD3PlusBCConfig(batch_size=256, **scaled).create("cpu:0")
    else:
        algorithm = d3rlpy.algos.DecisionTransformerConfig(
            batch_size=64,
            learning_rate=1e-4,
            context_size=CONTEXT,
            max_timestep=int(arrays["limit"]) + 1,
            num_layers=DT["layers"],
            num_heads=DT["heads"],
            encoder_factory=d3rlpy.models.VectorEncoderFactory([DT["width"]], exclude_last_activation=True),
            optim_factory=d3rlpy.optimizers.AdamWFactory(
                weight_decay=1e-4,
                clip_grad_norm=0.25,
                lr_scheduler_factory=d3rlpy.optimizers.WarmupSchedulerFactory(warmup_steps=updates // 10),
            ),
            position_encoding_type=d3rlpy.PositionEncodingType.GLOBAL,
            reward_scaler=d3rlpy.preprocessing.MultiplyRewardScaler(1 / float(abs(arrays["target"]))),
            **scaled,
        ).create("cpu:0")
    times: list[float] = []
    algorithm.fit(
        dataset,
        n_steps=updates,
        n_steps_per_epoch=updates,
        show_progress=False,
        logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
        callback=lambda *_: times.append(time.perf_counter()),
    )
    environment = gymnasium.make(str(arrays["environment"]))
    low, high = environment.action_space.low, environment.action_space.high
    returns = []
    for number in range(episodes):
        actor = algorithm.as_stateful_wrapper(target_return=float(arrays["target"])) if method == "dt" else None
        (observation, _), reward, total, ended = environment.reset(seed=FIRST_SEED + number), 0.0, 0.0, False
        while not ended:
            action = actor.predict(observation, reward) if actor else algorithm.predict(observation[None])[0]
            action = low + (np.clip(action, -1, 1) + 1) / 2 * (high - low)
            observation, reward, terminated, truncated, _ = environment.step(action.astype(np.float32))
            total, ended = total + float(reward), terminated or truncated
        returns.append(total)
    return {"return": statistics.fmean(returns), "speed": speed(times)}


def write_arrays(data: Path, path: Path) -> None:
    """Write a store as d3rlpy's flat arrays."""
    from ringrl.data import EpisodeStore
    from ringrl.envs import domain_of, is_foreign
    from ringrl.errors import UserError

    store = EpisodeStore(data)
    task = store.tasks[0]
    if not is_foreign(task) or "(" in task:
        raise UserError(f"{data}: {task} is not a Gymnasium environment without arguments; give such a store")
    episodes = [store.episode(index) for index in range(store.num_episodes)]
    last = np.concatenate([np.arange(length) == length - 1 for length in store.lengths])
    terminals = np.concatenate([rows["discount"][1:, 0] == 0 for rows in episodes])
    np.savez(
        path,
        observations=np.concatenate([rows["observation"][:-1] for rows in episodes]),
        actions=np.concatenate([rows["action"][1:] for rows in episodes]),
        rewards=np.concatenate([rows["reward"][1:] for rows in episodes]),
        terminals=terminals.astype(np.float32),
        timeouts=(last & ~terminals).astype(np.float32),
        target=store.returns(task).max(),
        limit=domain_of(task).episode_length,
        environment=task.removeprefix("gymnasium:"),
    )


@one_line_errors
def main(arguments: Any = None) -> None:
    """Parse the arguments, train and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--updates", type=positive, default=2000)
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--episodes", type=positive, default=10)
    options = parser.parse_args(arguments)
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    print(f"{'method':8} {'code':8} {'return':>9} {'error':>8} {'updates/s':>10} {'ratio of speeds'}")
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "arrays.npz"
        write_arrays(options.data, arrays)
        for method in options.methods:
            found: dict[str, list[dict[str, Any]]] = {"RingRL": [], "d3rlpy": []}
            for seed in range(options.seeds):
                common = method, seed, options.updates, options.episodes
                found["RingRL"].append(in_process(ours, str(options.data.resolve()), *common, devices=1))
                found["d3rlpy"].append(in_process(theirs, str(arrays), *common, devices=1, python=options.peer_python))
            ratios = [one["speed"] / other["speed"] for one, other in zip(*found.values(), strict=True)]
            for code, runs in found.items():
                returns = [run["return"] for run in runs]
                error = statistics.stdev(returns) / len(returns) ** 0.5 if len(returns) > 1 else float("nan")
                rate = statistics.median(run["speed"] for run in runs)
                shown = ", ".join(f"{ratio:.2f}" for ratio in ratios) if code == "RingRL" else ""
                print(
                    f"{method:8} {code:8} {statistics.fmean(returns):9.1f} {error:8.1f} {rate:10.1f} {shown}",
                    flush=True,
                )
            results[method] = found
    save_json(results, options.json)


if __name__ == "__main__":
    main()
