"""A training run from its configuration to its last checkpoint, exactly resumable."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pydantic
from rich.console import Console
from rich.progress import Progress, TaskID

from ringrl.config import TrainConfig, one_line, read_yaml, to_yaml
from ringrl.data import EpisodeStore
from ringrl.data.normalisation import Normalisation
from ringrl.data.sampler import ContextSampler
from ringrl.data.transitions import TransitionSampler
from ringrl.errors import UserError
from ringrl.training.checkpoints import Checkpoints, RunInfo, read_info
from ringrl.training.learner import make_learner
from ringrl.training.mesh import make_parallel
from ringrl.training.metrics import MetricsLog, progress_bar
from ringrl.training.optimiser import learning_rate

PLACES = ("data", "run", "keep_checkpoints")  # where things lie may change between a run and its resumption

Sampler = ContextSampler | TransitionSampler


def train(config: TrainConfig, *, resume: bool = False, console: Console | None = None, quiet: bool = False) -> Path:
    """Train a policy and return the folder of the run.

    Batches depend on (seed, step) alone and the state is saved whole, so a run that was killed and resumed gives the
    same metrics, bit for bit, as one that was not.

    Raises:
      UserError: a run that exists (without `resume`), another configuration or dataset than the run's, data that does
        not fit the task, a disk that is full.
    """
    store = EpisodeStore(config.data)
    normalisation = Normalisation.of(store, config.ignored_observations)
    sampler = _make_sampler(store, config, normalisation)
    info = RunInfo(
        config=config,
        normalisation=normalisation,
        observation_size=store.observation_size,
        action_size=store.action_size,
        domain=store.domain,
        data_fingerprint=store.fingerprint,
        best_return=float(store.returns(config.task).max()),
        versions={name: version(name) for name in ("ringrl", "jax", "flax", "optax", "mujoco", "dm_control")},
    )
    _claim_folder(info, resume)
    checkpoints = Checkpoints(config.run, config.keep_checkpoints)
    try:
        _run_steps(info, sampler, checkpoints, console or Console(stderr=True), quiet)
    except OSError as error:
        raise UserError(
            f"{config.run}: cannot be written ({error.strerror or error}); free some space, then use --resume"
        ) from error
    finally:
        checkpoints.close()
    return config.run


def _make_sampler(store: EpisodeStore, config: TrainConfig, normalisation: Normalisation) -> Sampler:
    """What draws the batches that the configured kind of model is trained on."""
    size, seed = config.optimiser.batch_size, config.seed
    if config.model.kind == "td3_bc":
        fraction = config.context.best_fraction
        return TransitionSampler(store, config.task, config.actor_critic, normalisation, size, seed, fraction)
    return ContextSampler(store, config.task, config.context, normalisation, size, seed)


def _claim_folder(info: RunInfo, resume: bool) -> None:
    """Make the run's folder, or check that what is to be resumed is the same run."""
    config = info.config
    saved = config.run / "config.yaml"
    if not saved.exists():
        temporary = saved.with_suffix(".tmp")
        try:
            config.run.mkdir(parents=True, exist_ok=True)
            if any(path != temporary for path in config.run.iterdir()):  # which a kill may leave
                raise UserError(f"{config.run}: holds other files and no run; give another --run")
            temporary.write_text(to_yaml(config))
            temporary.replace(saved)
        except OSError as error:
            raise UserError(f"{config.run}: cannot be made ({error.strerror}); give another --run") from error
        return
    if not resume:
        raise UserError(f"{config.run}: holds a run already; use --resume to go on with it, or give another --run")
    try:
        known = TrainConfig.model_validate(read_yaml(saved))  # settings that are newer than the run have their defaults
    except pydantic.ValidationError as error:
        raise UserError(f"{saved}: does not fit this version ({one_line(error)}); start a new --run") from error
    was, now = (_flat(settings.model_dump(mode="json")) for settings in (known, config))
    changed = [
        f"{name} was {was.get(name)}, is {value}"
        for name, value in now.items()
        if name not in PLACES and was.get(name) != value
    ]
    if changed:
        raise UserError(
            f"{saved}: the run has another configuration ({'; '.join(changed)}); "
            "resume with the same, or start a new --run"
        )


def _check_dataset(info: RunInfo, saved: RunInfo) -> None:
    if saved.data_fingerprint != info.data_fingerprint:
        raise UserError(
            f"{info.config.data}: is not the dataset that {info.config.run} was trained on "
            f"(fingerprint {info.data_fingerprint[:12]}, expected {saved.data_fingerprint[:12]})"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _batches(sampler: Sampler, start: int, stop: int) -> Iterator[Any]:
    """Batches of steps start ... stop - 1, the next one being built while one is used."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(sampler.batch, start)
        for step in range(start, stop):
            batch = following.result()
            if step + 1 < stop:
                following = pool.submit(sampler.batch, step + 1)
            yield batch


def _run_steps(info: RunInfo, sampler: Sampler, checkpoints: Checkpoints, console: Console, quiet: bool) -> None:
    config = info.config
    parallel = make_parallel(config)
    state, train_step, tokens_per_step = make_learner(partial(info.make_policy, parallel), config, parallel)
    saved = checkpoints.latest()
    if saved is not None:
        _check_dataset(info, read_info(config.run, saved)[1])
        state = checkpoints.restore(saved, state)
    start, stop = int(state.step), config.optimiser.steps
    with MetricsLog(config.run, start) as log, progress_bar(console, quiet) as progress:
        recorder = _Recorder(config, sampler.steps_per_batch * tokens_per_step, log, progress)
        for step, batch in enumerate(_batches(sampler, start, stop), start + 1):
            state, metrics = train_step(state, batch)
            recorder.add(step, metrics)
            is_checkpoint = step % config.checkpoint_every == 0 or step == stop
            if is_checkpoint or step % config.log_every == 0:
                recorder.flush()
            if is_checkpoint:
                checkpoints.save(state, info)


class _Recorder:
    """Holds metrics on the device until it is time to write them, so that logging never stalls the step."""

    def __init__(self, config: TrainConfig, tokens: int, log: MetricsLog, progress: Progress) -> None:
        self._schedule = jax.jit(learning_rate(config.optimiser))
        self._tokens, self._log, self._progress = tokens, log, progress
        self._task: TaskID | None = None
        self._stop = config.optimiser.steps
        self._waiting: list[tuple[int, dict[str, jax.Array]]] = []
        self._since = time.perf_counter()

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take the metrics of one step."""
        self._waiting.append((step, metrics))

    def flush(self) -> None:
        """Write what waits; this is where the host meets the device."""
        values = jax.device_get(self._waiting)
        now = time.perf_counter()
        rate = len(values) * self._tokens / (now - self._since)
        entries = []
        for step, metrics in values:
            entry = {"step": step} | {name: float(value) for name, value in metrics.items()}
            entries.append(entry | {"learning_rate": float(self._schedule(step - 1)), "tokens_per_second": rate})
        self._log.write(entries)
        loss = float(np.mean([entry["loss"] for entry in entries]))
        if self._task is None:
            self._task = self._progress.add_task("training", total=self._stop, loss=loss, rate=rate)
        self._progress.update(self._task, completed=values[-1][0], loss=loss, rate=rate)
        self._waiting, self._since = [], now
