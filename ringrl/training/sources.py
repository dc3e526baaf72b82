"""The batches of a run, for training and from held-out episodes."""

from ringrl.config import TrainConfig
from ringrl.data import EpisodeStore
from ringrl.data.sampling.batches import BatchSource, ShardedSampler
from ringrl.data.sampling.held_out import WrongPromptSampler, all_but
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.sampling.sampler import ContextSampler, Episodes
from ringrl.data.transitions import TransitionSampler
from ringrl.model.parallel import Parallel


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
