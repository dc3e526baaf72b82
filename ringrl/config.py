"""Every setting of RingRL, as frozen and validated models. Presets are YAML files in configs/."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic
from pydantic import Field

from ringrl.files import expanded
from ringrl.methods import FAMILIES, Family, Kind

FilePath = Annotated[
    Path, pydantic.BeforeValidator(lambda path: str(expanded(path)) if isinstance(path, str) else path)
]


class Section(pydantic.BaseModel):
    """A group of settings. Immutable; unknown names are errors; the docstrings of attributes are the --help texts."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    largest: ClassVar[int] = 2**31 - 1
    """Largest value of any integer except the seed. Step counters and array sizes hold no more."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        for name in values if isinstance(values, Mapping) else ():
            if name not in cls.model_fields:
                near = difflib.get_close_matches(str(name), cls.model_fields, n=1)
                advice = f"did you mean {near[0]}?" if near else f"choose from {', '.join(cls.model_fields)}"
                raise ValueError(f"there is no setting {name}; {advice}")
            if isinstance(values[name], bool) and cls.model_fields[name].annotation is not bool:
                raise ValueError(f"{name}: expected a value, got {str(values[name]).lower()}")
        return values

    @pydantic.model_validator(mode="after")
    def _check_range(self) -> Self:
        for name in type(self).model_fields:
            value, most = getattr(self, name), 2**32 - 1 if name == "seed" else self.largest
            if isinstance(value, int) and value > most:
                raise ValueError(f"{name}: {value} is too large; give at most {most}")
        return self

    def _check_unused(self, name: str, reason: str) -> None:
        """Raise an error if a setting differs from its default although it has no effect."""
        if getattr(self, name) != type(self).model_fields[name].default:
            raise ValueError(f"{name}: has no effect {reason}")


class ContextConfig(Section):
    """How trajectories are combined into one context."""

    trajectories: int = Field(4, ge=1)
    """Trajectories (episodes) per context. More give the model more to learn from, and cost memory and time."""
    order: Literal["ascending", "descending", "history", "random"] = "ascending"
    """Order of the trajectories: by return (ascending is chain of hindsight), as collected (history), or random."""
    target: Literal["best", "own", "none"] = "best"
    """Start of each return-to-go: the best return in the context, or the trajectory's own return. none: return-to-go
    and completion are zero (algorithm distillation)."""
    sampling: Literal["uniform", "return_stratified", "history_window", "fixed"] = "uniform"
    """How trajectories are drawn. uniform: all equally likely. return_stratified: evenly from ten equal ranges of
    return. history_window: consecutive episodes (algorithm distillation, with order history). fixed: one uniform draw
    that every step repeats."""
    other_tasks: tuple[str, ...] = ()
    """Further tasks to train on. Each context has the rewards of one task, drawn uniformly from these tasks and
    the run's task. Only the trajectories in the context identify the task to the model."""
    max_transitions: int | None = Field(None, ge=1)
    """Cap on transitions. Whole episodes are taken in seed-shuffled order, so a smaller cap is a subset of a larger."""
    best_fraction: float = Field(1.0, gt=0, le=1)
    """Fraction of the episodes (within max_transitions) to keep, highest returns first: 0.1 with behaviour cloning is
    BC-10%. With several tasks, each task keeps the best episodes by its own returns."""
    history_stride: int = Field(1, ge=1)
    """With sampling history_window: take every k-th episode, so that a context spans a longer part of the history."""
    segment_steps: int | None = Field(None, ge=1)
    """Steps of each trajectory, if trajectories are segments of episodes. A short context then holds many
    trajectories. Shorter episodes are taken whole."""
    segment_start_share: float = Field(0.5, ge=0, le=1)
    """Share of segments that begin with their episode. The others begin anywhere, with their own return-to-go."""
    first_steps: int = Field(20, ge=1)
    """Number of steps that `first_steps_weight` applies to."""
    first_steps_weight: float = Field(1.0, gt=0)
    """Loss weight of the first steps of each trajectory; other steps have 1. ICRT (2408.15980) uses 50."""

    @property
    def window(self) -> int:
        """Episodes from the first to the last of a history window."""
        return (self.trajectories - 1) * self.history_stride + 1

    def steps(self, episode_length: int) -> int:
        """Return the steps of a context of episodes of the given length, or of segments of them."""
        return self.trajectories * (self.segment_steps or episode_length)

    @pydantic.model_validator(mode="after")
    def _check_sampling(self) -> Self:
        if self.sampling == "history_window" and (self.best_fraction < 1 or self.max_transitions is not None):
            raise ValueError(
                "sampling: history_window needs consecutive episodes, but best_fraction and max_transitions remove "
                "some; leave both out (`ringrl data import --subset first` shortens a history)"
            )
        if self.sampling != "history_window":
            self._check_unused("history_stride", f"with sampling {self.sampling}; use history_window")
        if self.segment_steps is None:
            self._check_unused("segment_start_share", "without segments; set segment_steps, too")
        if self.first_steps_weight == 1:
            self._check_unused("first_steps", "with first_steps_weight 1; change the weight, too")
        return self


_as_tuple = pydantic.BeforeValidator(
    lambda value: () if value is None else value if isinstance(value, list | tuple) else (value,)
)
_none_from_text = pydantic.BeforeValidator(lambda value: None if value == "none" else value)
Window = Annotated[Annotated[int, Field(ge=0)] | None, _none_from_text]
Strategy = Literal["ring", "ulysses", "ulysses_ring", "all_gather", "auto"]


class ModelConfig(Section):
    """The network that maps a context to actions."""

    kind: Kind = "transformer"
    """transformer: sees the context. behaviour_cloning, td3_bc: feed-forward policies that see one observation."""
    token_set: Literal["at5", "ring4", "dt3", "fused1"] = "ring4"
    """Tokens per timestep: at5 (return-to-go, state, action, reward, completion), ring4 (return-to-go, state, action,
    reward), dt3 (return-to-go, state, action), fused1 (all in one token: the shortest context)."""
    action_head: Literal["mse", "gaussian", "bins", "categorical"] = "mse"
    """Distribution of actions: mse (mean, tanh), gaussian (mean and state-dependent width) or bins (21 values per
    component). mse and gaussian average over modes. categorical: for discrete actions."""
    action_choice: Literal["mode", "mean"] = "mode"
    """Action of the head bins: the most likely values (mode) or the mean. Without effect on training."""
    loss_on: Literal["all", "last"] = "all"
    """Trajectories that the loss imitates: all, or the last of the context (the best one, with order ascending)."""
    layers: int = Field(3, ge=1, le=2**16)
    """Transformer blocks (hidden layers of a feed-forward policy)."""
    width: int = Field(128, ge=8, le=2**20)
    """Features per token (units per hidden layer of a feed-forward policy)."""
    heads: int = Field(2, ge=1)
    """Query heads. Must divide the width."""
    kv_heads: int = Field(1, ge=1)
    """Key and value heads. Must divide the query heads; fewer make the key-value cache smaller."""
    feed_forward: int = Field(4, ge=1, le=2**10)
    """Width of the feed-forward layer, as a multiple of the width."""
    attention: Literal["vanilla", "memory_efficient", "blockwise", "ring"] = "ring"
    """How attention is computed, with the same result. vanilla: all logits at once. memory_efficient: in tiles.
    blockwise: the feed-forward layer in blocks, too. ring: keys circulate between devices instead of being gathered."""
    strategy: Strategy = "ring"
    """How ring attention gets the keys of other devices. Without effect if mesh.seq is 1. ring: keys circulate.
    ulysses: devices exchange tokens for heads (2309.14509). ulysses_ring: ulysses within groups of mesh.ulysses
    devices, ring between the groups (2405.07719). all_gather: every device holds all keys. auto: ring, ulysses or
    all_gather, chosen by length, heads and link speed; `ringrl plan` prints the choice."""
    bidirectional: bool = False
    """Send half of the key heads around the ring in the opposite direction. Without effect if mesh.seq is 1."""
    block_tokens: int = Field(4096, ge=1)
    """Tokens per device in a block of the feed-forward layer (blockwise and ring only). Smaller blocks save memory."""
    remat: Literal["none", "layers", "full"] = "none"
    """Rematerialisation in the backward pass. layers: recompute each layer except its attention. Memory then holds
    each layer's input and attention output, for about a quarter more matrix work. full: recompute the attention, too.
    Memory then holds only each layer's input, and the ring runs once more."""
    timestep_embedding: bool = False
    """Add a learned embedding of the timestep within the episode."""
    trajectory_embedding: bool = False
    """Add a learned embedding of the trajectory's index in the context."""
    episode_window: Annotated[tuple[Window, ...], _as_tuple] = ()
    """Steps of its own episode that a step sees, this step included. All earlier trajectories stay visible. One value,
    or one for each layer. none: the whole episode so far. 0: earlier trajectories only."""
    past_actions: Literal["on", "off"] = "on"
    """Whether the model sees the actions of earlier steps."""
    past_rewards: Literal["on", "off"] = "on"
    """Whether the model sees the rewards of earlier steps. Returns-to-go still show them, except with target none."""
    rotary_base: float = Field(10_000.0, gt=1)
    """RoPE base. The slowest pair has a period of about 6 x base tokens; raise it for longer contexts (2310.05209)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation. Parameters are always float32."""

    @property
    def family(self) -> Family:
        """Properties of this kind of model."""
        return FAMILIES[self.kind]

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The episode window of each layer."""
        return self.episode_window if len(self.episode_window) > 1 else (self.episode_window or (None,)) * self.layers

    @pydantic.model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if len(self.episode_window) > 1 and len(self.episode_window) != self.layers:
            raise ValueError(
                f"episode_window: {len(self.episode_window)} values for {self.layers} layers; give 1 or {self.layers}"
            )
        if self.token_set == "dt3" and self.family.uses("model.past_rewards"):
            self._check_unused("past_rewards", "with token_set dt3, which has no rewards; leave it on")
        if self.action_head != "bins" and self.family.uses("model.action_choice"):
            self._check_unused("action_choice", f"with action_head {self.action_head}; use bins")
        if not self.family.has_context:
            return self
        if self.attention != "ring":
            self._check_unused("strategy", f"with attention {self.attention}; use ring")
            self._check_unused("bidirectional", f"with attention {self.attention}; use ring")
        if self.strategy in ("ulysses", "all_gather"):
            self._check_unused("bidirectional", f"with strategy {self.strategy}; use ring or auto")
        if self.width % (2 * self.heads):
            raise ValueError(f"heads: width {self.width} over {self.heads} heads must give an even integer per head")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: {self.kv_heads} must divide the {self.heads} query heads")
        return self


class ActorCriticConfig(Section):
    """TD3+BC (2106.06860): a policy that maximises a learned value and stays near the data. For kind td3_bc only."""

    discount: float = Field(0.99, ge=0, lt=1)
    """Discount of rewards, per step."""
    n_step: int = Field(1, ge=1)
    """Rewards summed before bootstrapping, fewer at the end of an episode. No value follows a termination."""
    behaviour_cloning: float = Field(0.4, ge=0)
    """Weight of the squared distance to the data's action, relative to a value scaled to one (1 / alpha in the paper).
    0 is TD3 without imitation."""
    target_rate: float = Field(0.005, gt=0, le=1)
    """Rate at which the target networks follow the learned ones, per actor update."""
    actor_delay: int = Field(2, ge=1, lt=2**31)
    """Critic updates (optimiser steps) per actor update."""
    target_noise: float = Field(0.2, ge=0)
    """Standard deviation of the noise on target actions; actions are in [-1, 1]."""
    target_noise_clip: float = Field(0.5, ge=0)
    """Largest magnitude of the target noise."""


BATCH_AXES = ("data", "fsdp")  # mesh axes that divide a batch
SEQUENCE_AXIS = "seq"  # mesh axis that divides each context


class MeshConfig(Section):
    """Devices along each mesh axis. The product of the axes is the number of devices used."""

    data: int = Field(1, ge=1)
    """Data parallelism: devices that divide the batch."""
    fsdp: int = Field(1, ge=1)
    """Fully sharded data parallelism: devices that divide the batch and the parameters."""
    tensor: int = Field(1, ge=1)
    """Tensor parallelism: devices that divide the heads and the feed-forward units."""
    seq: int = Field(1, ge=1)
    """Sequence parallelism: devices that divide each context (and the parameters)."""
    ulysses: int = Field(1, ge=1)
    """Neighbouring devices of seq that form a group, for model.strategy ulysses_ring. Must divide seq."""
    layout: Literal["zigzag", "contiguous", "striped"] = "zigzag"
    """Assignment of a context's steps to the ring's devices. zigzag gives each device the same work."""

    @property
    def devices(self) -> int:
        """Number of devices used."""
        return self.data * self.fsdp * self.tensor * self.seq

    @pydantic.model_validator(mode="after")
    def _check_ulysses(self) -> Self:
        if self.seq % self.ulysses:
            raise ValueError(f"ulysses: {self.ulysses} must divide the {self.seq} devices of seq")
        return self


class OptimiserConfig(Section):
    """AdamW with linear warm-up and decay."""

    steps: int = Field(1000, ge=1)
    """Optimiser steps of the whole run."""
    batch_size: int = Field(4, ge=1, le=2**20)
    """Contexts per step (transitions per step for td3_bc)."""
    accumulation: int = Field(1, ge=1)
    """Parts of a batch that are computed one after the other. More parts save memory. Must divide the batch."""
    skipped_steps: int = Field(5, ge=0)
    """Allowed number of consecutive steps with non-finite loss, gradients or new parameters. Such steps change no
    parameter."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "constant", "linear", "wsd"] = "cosine"
    """Learning rate after the warm-up: cosine decay, constant, linear decay, or wsd (warm-up, stable, decay;
    2404.06395): constant, then linear decay over the last fifth of the steps."""
    final_learning_rate: float = Field(0.0, ge=0)
    """Learning rate at the end of the decay (one step after the last), as a fraction of the peak."""
    warmup_steps: int = Field(50, ge=0)
    """Steps of linear warm-up, at most optimiser.steps - 1. The first step has a learning rate of zero."""
    weight_decay: float = Field(1e-2, ge=0)
    """Decoupled weight decay, on matrices only."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest global norm of the gradients; larger gradients are scaled down."""
    beta2: float = Field(0.98, gt=0, lt=1)
    """Decay rate of the squared gradients."""

    @pydantic.model_validator(mode="after")
    def _check_values(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation: {self.accumulation} parts do not divide a batch of {self.batch_size}")
        if self.schedule == "constant" and self.final_learning_rate != 1:  # which --method td3 sets
            self._check_unused("final_learning_rate", "with schedule constant; use cosine, linear or wsd")
        return self


class TrainConfig(Section):
    """One training run."""

    data: FilePath
    """Dataset: a RingRL store (.h5), written by `ringrl data import`."""
    task: str
    """Task whose reward is used, for example walker_walk."""
    run: FilePath
    """Folder of the run: configuration, metrics, checkpoints, evaluations."""
    seed: int = Field(0, ge=0, lt=2**32)  # JAX's keys keep only 32 bits
    """Seed of the initial parameters and of the order of the data."""
    checkpoint_every: int = Field(200, ge=1)
    """Steps between checkpoints. A killed run repeats at most this many."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints to keep, in addition to the best (lowest held-out loss, or else lowest training loss)."""
    log_every: int = Field(10, ge=1)
    """Steps between writes of metrics.jsonl, which has one line per step."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Additional loggers. wandb writes offline to the run's folder, unless WANDB_MODE is set."""
    validation_fraction: float = Field(0.0, ge=0, lt=1)
    """Fraction of the episodes to hold out of training, spread over all returns. The loss on these episodes (held-out
    loss) is reported and selects the best checkpoint."""
    validate_every: int = Field(100, ge=1)
    """Steps between measurements of the held-out loss. Planned checkpoints measure it, too."""
    stop_after: int | None = Field(None, ge=1)
    """End the run after this many measurements in a row without a new lowest held-out loss, or after optimiser.steps.
    Use a constant schedule, since other schedules decay until optimiser.steps. td3_bc ignores this setting: its
    held-out loss measures imitation, which it does not minimise."""
    context: ContextConfig = ContextConfig()
    """Contexts (td3_bc uses only max_transitions and best_fraction)."""
    model: ModelConfig = ModelConfig()
    """Network."""
    optimiser: OptimiserConfig = OptimiserConfig()
    """Optimiser."""
    actor_critic: ActorCriticConfig = ActorCriticConfig()
    """TD3+BC."""
    mesh: MeshConfig = MeshConfig()
    """Devices."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that contexts are drawn for."""
        return self.task, *self.context.other_tasks

    @property
    def patience(self) -> int | None:
        """`stop_after`, if the kind of model uses it."""
        return self.stop_after if self.model.family.uses("stop_after") else None

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> Self:
        """Return the settings that a run saved. A `~` or `$` in their paths is not expanded again."""
        if not values.get("ignored_observations"):  # a setting of older versions
            values = {name: value for name, value in values.items() if name != "ignored_observations"}
        paths = {name: Path(path) for name in ("data", "run") if isinstance(path := values.get(name), str)}
        return cls.model_validate({**values, **paths})

    @pydantic.model_validator(mode="after")
    def _check_combinations(self) -> Self:
        others, kind, family = self.context.other_tasks, self.model.kind, self.model.family
        if not family.splits_batches and self.optimiser.accumulation > 1:
            raise ValueError(f"optimiser.accumulation: {kind} computes a batch in one part; leave it at 1")
        if others and len({self.task, *others}) <= len(others):
            raise ValueError("context.other_tasks: names a task twice, or the run's own task")
        if others and not family.has_context:
            raise ValueError(f"context.other_tasks: {kind} has no context that could identify the task")
        if self.validation_fraction and self.context.sampling == "history_window" and family.has_context:
            raise ValueError(
                "validation_fraction: history_window needs consecutive episodes, but held-out episodes make gaps; "
                "leave it out"
            )
        for name in ("validate_every", "stop_after") if not self.validation_fraction else ():
            self._check_unused(name, "without held-out episodes; set validation_fraction, too")
        return self


class DistributedConfig(Section):
    """Several processes that train one run together. Not saved with the run."""

    enabled: Literal["auto", "on", "off"] = "auto"
    """auto: on if a coordinator is given or srun started several tasks. on: JAX also detects Kubernetes, Cloud TPU
    or MPI. off: one process."""
    coordinator: str | None = None
    """Address HOST:PORT of process 0, reachable from all processes."""
    processes: int | None = Field(None, ge=1)
    """Number of processes; with a coordinator only."""
    process: int | None = Field(None, ge=0)
    """Index of this process, from 0; with a coordinator only."""
    start_timeout: int = Field(300, ge=1)
    """Seconds to wait until all processes are connected."""
    heartbeat_timeout: int = Field(30, ge=2)
    """Seconds without a heartbeat after which a process counts as lost and the run ends."""

    @pydantic.model_validator(mode="after")
    def _check_address(self) -> Self:
        if self.coordinator is None or self.processes is None or self.process is None:
            if (self.coordinator, self.processes, self.process) != (None, None, None):
                raise ValueError("coordinator, processes, process: give all three, or none")
            return self
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"coordinator {self.coordinator!r} is not of the form HOST:PORT")
        if self.process >= self.processes:
            raise ValueError(f"process {self.process} is out of range: {self.processes} processes count from 0")
        return self
