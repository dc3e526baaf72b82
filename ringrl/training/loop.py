"""Training loop. A resumed run is bit-identical to an uninterrupted one."""

from collections.abc import Sequence
from contextlib import closing, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from ringrl.config import TrainConfig
from ringrl.data import EpisodeStore
from ringrl.data.sampling.batches import BatchSource, ShardedSampler, iterate_batches
from ringrl.data.sampling.held_out import WrongPromptSampler, all_but, held_out
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.sampling.sampler import ContextSampler, Episodes, eligible_by_task
from ringrl.data.transitions import TransitionSampler
from ringrl.envs import Domain, ForeignDomain
from ringrl.errors import UserError, require
from ringrl.files import explain_write_errors
from ringrl.model import TrainState, make_agent
from ringrl.model.parallel import Parallel, make_parallel
from ringrl.training import distributed
from ringrl.training.budget import step_cost
from ringrl.training.checkpoints import Checkpoints, EarlyStopping, RunInfo, read_info, saved_steps
from ringrl.training.distributed import stop_on_signal
from ringrl.training.metrics import MetricsRecorder, open_log, progress_bar, step_memory
from ringrl.training.run_folder import claim_folder, dataset_fingerprint, flat, run_lock
from ringrl.training.validation import Validation


def train(config: TrainConfig, *, resume: bool = False, console: Console | None = None, quiet: bool = False) -> Path:
    """Train a policy and return the folder of the run.

    Batches depend on (seed, step) only and checkpoints hold the whole state. A run that is killed and resumed therefore
    gives bit-identical metrics. A signal to stop (SIGTERM, SIGHUP, SIGUSR1, SIGUSR2) saves a checkpoint after the
    current step and ends the run.

    Args:
      resume: continue from the newest checkpoint of `config.run`.
      console: by default on standard error.
      quiet: show no progress bar, and no message if a resumed run has no checkpoint.

    Raises:
      UserError: the run exists (without `resume`), its configuration or dataset differs, the data does not fit the
        task, or the disk is full.
    """
    if not isinstance(config, TrainConfig):
        raise UserError(
            f"train: {config!r} is not a TrainConfig; make one: ringrl.config.TrainConfig(data=..., task=...)"
        )
    settings = flat(config.model_dump(mode="json", exclude={"data"}))  # the path may differ between hosts
    if "wandb" in config.log:
        require("--log wandb", "wandb", "wandb")
    distributed.check_connected()
    distributed.agree("settings", settings | {"resume": resume, "version of jax": version("jax")})
    store, context = EpisodeStore(config.data), config.context
    facts = store.facts if isinstance(store.facts, ForeignDomain) else None
    check_actions(config, store.facts)
    data_fingerprint = dataset_fingerprint(store)
    distributed.agree("data", {"fingerprint of the data": data_fingerprint})
    excluded = held_out(store, config)
    eligible = eligible_by_task(store, config.task, context, config.seed, excluded)
    episodes = np.unique(np.concatenate(list(eligible.values())))
    normalisation = Normalisation.of(store, episodes, excluded)
    parallel = make_parallel(config)
    sources = [make_source(store, config, normalisation, parallel, excluded)]
    sources += held_out_sources(store, config, normalisation, parallel, excluded)
    info = RunInfo(
        config=config,
        normalisation=normalisation,
        observation_size=store.observation_size,
        action_size=store.action_size,
        domain=store.domain,
        data_fingerprint=data_fingerprint,
        best_return=float(store.returns(config.task)[eligible[config.task]].max()),
        versions={name: version(name) for name in ("ringrl", "jax", "flax", "optax", "mujoco", "dm_control")},
        transitions=int(store.lengths[episodes].sum()),
        actions=None if facts is None else (facts.action_low, facts.action_high, facts.is_discrete),
        reference_returns=store.reference_returns,
    )
    with explain_write_errors(config.run), run_lock(config.run) if distributed.is_first() else nullcontext():
        distributed.first_then_others(partial(claim_folder, config, resume), config.run / "config.yaml")
        checkpoints = Checkpoints(config.run, config.keep_checkpoints)
        try:
            console = console or Console(stderr=True, quiet=not distributed.is_first())
            used, found = config.mesh.devices, jax.device_count()
            if used < found and config.model.family.splits_batches and not quiet:
                more = "raise --mesh.data, fsdp, tensor or seq to use more"
                console.print(f"{config.run}: uses {used} of {found} devices; {more}", soft_wrap=True)
            if resume and not saved_steps(config.run) and not quiet:
                console.print(f"{config.run}: no checkpoint yet; training starts at step 0", soft_wrap=True)
            _run_steps(info, sources, parallel, checkpoints, progress_bar(console, quiet or console.quiet))
        finally:
            checkpoints.close()
    return config.run


def check_actions(config: TrainConfig, facts: Domain) -> None:
    """Raise UserError unless the model's actions are discrete if and only if the data's are."""
    is_discrete = isinstance(facts, ForeignDomain) and facts.is_discrete
    model_is_discrete = config.model.action_head == "categorical"
    if is_discrete and config.model.family.source == "transitions":
        raise UserError(f"{config.data}: {config.model.kind} cannot learn its discrete actions; use bc or at")
    if is_discrete != model_is_discrete:
        kind, heads = ("discrete", "categorical") if is_discrete else ("continuous", "mse, gaussian or bins")
        raise UserError(f"model.action_head: the actions of {config.data} are {kind}; use {heads}")


def make_source(
    store: EpisodeStore,
    config: TrainConfig,
    normalisation: Normalisation,
    parallel: Parallel,
    excluded: Episodes,
    kind: type[ContextSampler] = ContextSampler,
) -> BatchSource:
    """Return the sampler of the batches that the configured family of models needs."""
    size, seed, context = config.optimiser.batch_size, config.seed, config.context
    if config.model.family.source == "transitions":
        return TransitionSampler(
            store, config.task, config.actor_critic, normalisation, size, seed,
            best_fraction=context.best_fraction, max_transitions=context.max_transitions, excluded=excluded,
        )  # fmt: skip
    sampler = kind(store, config.task, context, normalisation, size, seed, excluded=excluded)
    return sampler if parallel.mesh is None else ShardedSampler(sampler, parallel.mesh, parallel.layout)


def held_out_sources(
    store: EpisodeStore, config: TrainConfig, normalisation: Normalisation, parallel: Parallel, held_out: Episodes
) -> tuple[BatchSource, ...]:
    """Return the sampler of held-out batches, and one with prompts of a wrong task if the run has several tasks.

    Batches are as large as one part of a training batch (see `optimiser.accumulation`).
    """
    if len(held_out) == 0:
        return ()
    context, optimiser = config.context, config.optimiser
    fixed = {"sampling": "uniform"} if context.sampling == "fixed" else {}
    size = optimiser.batch_size // optimiser.accumulation
    changes = {
        "context": context.model_copy(update={"max_transitions": None, **fixed}),
        "optimiser": optimiser.model_copy(update={"batch_size": size, "accumulation": 1}),
    }
    has_wrong_prompts = context.trajectories > 1 and context.other_tasks
    return tuple(
        make_source(store, config.model_copy(update=changes), normalisation, parallel, all_but(store, held_out), kind)
        for kind in (ContextSampler, *([WrongPromptSampler] if has_wrong_prompts else []))
    )


def _run_steps(
    info: RunInfo, sources: Sequence[BatchSource], parallel: Parallel, checkpoints: Checkpoints, progress: Progress
) -> None:
    """Take the remaining steps. `sources`: the batches of training, then those of `held_out_sources`."""
    config, console, (source, *held_out_batches) = info.config, progress.console, sources
    agent = make_agent(partial(info.make_policy, parallel), config, parallel)
    state, iterator = _newest(info, agent.init(), checkpoints)
    start = int(state.step)
    early_stopping = EarlyStopping.saved(config.run, start)
    end = start if early_stopping.has_converged(config) else config.optimiser.steps
    batches = iterate_batches(source, end)
    if iterator is not None:
        batches.set_state(iterator)
    if start and not progress.disable:
        what = "has finished" if start >= end else f"resumes at step {start} of {config.optimiser.steps}"
        console.print(f"{config.run}: {what}", soft_wrap=True)
    progress.disable |= start >= end  # else a finished run prints an empty line in a log
    with closing(batches), open_log(config, start) as log, progress, stop_on_signal() as stop:
        if log is not None and log.missing:
            what = f"metrics of {log.missing} of {start} steps are missing or damaged; the run continues without them"
            console.print(f"{config.run / 'metrics.jsonl'}: {what}", soft_wrap=True)
        length = info.normalisation.episode_length
        recorder = MetricsRecorder(config, step_cost(config, length), log, progress)
        validate = Validation(config, agent.graph, held_out_batches, length, parallel)
        for step, batch in enumerate(batches, start + 1):
            state, metrics = agent.update(state, batch)
            if step == start + 1:  # the step has just been compiled
                recorder.memory = step_memory(agent.update, state, batch)
            is_planned = step % config.checkpoint_every == 0 or step == config.optimiser.steps
            is_due = held_out_batches and (is_planned or step % config.validate_every == 0)
            validation = validate(state.params) if is_due else {}
            if validation and config.patience:
                early_stopping = early_stopping.after(validation["validation_loss"])
                validation["validations_without_fall"] = early_stopping.since
            recorder.add(step, metrics | validation)
            has_converged = early_stopping.has_converged(config)
            is_last = stop.after(step) or has_converged
            is_checkpoint = is_last or is_planned
            loss = recorder.flush() if is_checkpoint or step % config.log_every == 0 else None
            if is_checkpoint or recorder.failure:
                held_out_loss = validation.get("validation_loss")
                checkpoints.save(state, info, batches.get_state(), loss, held_out_loss, early_stopping)
            if recorder.failure:
                raise recorder.failure
            if is_last:
                checkpoints.wait()
                saved = f"stopped by {stop.signal}: checkpoint saved after step {step}; continue with --resume"
                if has_converged:
                    last = "validation" if config.patience == 1 else f"{config.patience} validations"
                    saved = f"stopped at step {step}: validation loss has not fallen in the last {last}"
                console.print(saved, soft_wrap=True)
                return


def _newest(info: RunInfo, like: TrainState, checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any] | None]:
    """Return the training state and the iterator state of the newest checkpoint, or the initial state."""
    if not (steps := saved_steps(info.config.run)):
        return like, None
    saved = read_info(info.config.run, steps[-1])[1]
    if saved.data_fingerprint != info.data_fingerprint:
        raise UserError(
            f"{info.config.data}: is not the dataset that {info.config.run} was trained on "
            f"(fingerprint {info.data_fingerprint[:12]}, expected {saved.data_fingerprint[:12]}); "
            "give that dataset with --data, or start a new --run"
        )
    jax.tree.map(lambda x: x.delete(), like)  # free the memory for the restored state
    return checkpoints.restore(steps[-1], like), checkpoints.restore_iterator(steps[-1])
