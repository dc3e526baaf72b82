"""Every knob of RingRL: frozen data, checked where it enters. Presets are YAML files in configs/."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
import yaml
from pydantic import Field

from ringrl.errors import UserError
from ringrl.methods import FAMILIES, Family, Kind


class Section(pydantic.BaseModel):
    """A group of settings: immutable, unknown names refused, docstrings shown by --help."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _names_are_known(cls, values: Any) -> Any:
        for name in values if isinstance(values, Mapping) else ():
            if name not in cls.model_fields:
                near = difflib.get_close_matches(str(name), cls.model_fields, n=1)
                what_to_do = f"did you mean {near[0]}?" if near else f"choose of {', '.join(cls.model_fields)}"
                raise ValueError(f"there is no setting {name}; {what_to_do}")
        return values


class ContextConfig(Section):
    """How trajectories are put together into one context."""

    trajectories: int = Field(4, ge=1)
    """Trajectories per context."""
    order: Literal["ascending", "descending", "history", "random"] = "ascending"
    """Order in the context: by return (ascending: chain of hindsight), as collected, or random."""
    target: Literal["best", "own", "none"] = "best"
    """Return that each trajectory's return-to-go starts from: the best of its context, or its own; none: no return is
    asked for, return-to-go and completion are zero throughout (algorithm distillation)."""
    sampling: Literal["uniform", "return_stratified", "history_window", "fixed"] = "uniform"
    """Which trajectories are drawn: all alike; ten equal ranges of return alike; consecutive ones of the history (with
    order history: algorithm distillation); or uniformly once, and then the same contexts at every step."""
    other_tasks: tuple[str, ...] = ()
    """Tasks whose rewards take turns with those of the run's own task: each context is of one task, all alike likely,
    and nothing but the rewards and returns in it tells the model of which."""
    max_transitions: int | None = Field(None, ge=1)
    """Use only so many transitions: whole episodes, taken in an order that the run's seed shuffles, up to the first
    that would exceed it. More transitions with the same seed hold all that fewer do."""
    best_fraction: float = Field(1.0, gt=0, le=1)
    """Of these episodes use only this fraction, those of highest return (0.1 with behaviour cloning: BC-10%)."""

    @pydantic.model_validator(mode="after")
    def _window_is_whole(self) -> Self:
        if self.sampling == "history_window" and (self.best_fraction < 1 or self.max_transitions is not None):
            raise ValueError(
                "sampling: a history_window is of consecutive episodes, which best_fraction and max_transitions leave "
                "gaps in; use it without them (`ringrl data import --subset first` shortens a history)"
            )
        return self


class ModelConfig(Section):
    """What maps a context to actions."""

    kind: Kind = "transformer"
    """The Agentic Transformer, or a feed-forward policy of the present observation alone: imitation, or TD3+BC."""
    token_set: Literal["at5", "ring4", "dt3", "fused1"] = "ring4"
    """Tokens per timestep: at5 (R,s,a,r,d), ring4 (R,s,a,r), dt3 (R,s,a), fused1 (all in one token)."""
    action_head: Literal["mse", "gaussian", "bins"] = "mse"
    """Squared error on tanh actions, a gaussian with state-dependent width, or the likeliest of 21 values of each
    component: where the data does one thing or the other, mse does what lies between, which may be neither."""
    loss_on: Literal["all", "last"] = "all"
    """Imitate every trajectory of the context, or only the last one (with order ascending, the best)."""
    layers: int = Field(3, ge=1)
    """Transformer blocks (hidden layers of the feed-forward kinds)."""
    width: int = Field(128, ge=8)
    """Features per token (units per hidden layer of the feed-forward kinds)."""
    heads: int = Field(2, ge=1)
    """Query heads; they divide the width."""
    kv_heads: int = Field(1, ge=1)
    """Key and value heads; they divide the query heads."""
    feed_forward: int = Field(4, ge=1)
    """Width of the feed-forward layer as a multiple of the width."""
    attention: Literal["vanilla", "memory_efficient", "blockwise", "ring"] = "ring"
    """Vanilla (all logits at once), memory_efficient (in tiles), blockwise (the feed-forward layer in blocks too), or
    ring (and the keys sent from device to device, not gathered). All compute the same."""
    block_tokens: int = Field(4096, ge=1)
    """Tokens per device that the feed-forward layer takes at a time, with attention blockwise or ring."""
    remat: Literal["none", "layers"] = "none"
    """What the backward pass computes anew: nothing, or each layer but its attention (about a quarter more work in
    matrices, and memory for little more than each layer's input)."""
    timestep_embedding: bool = False
    """Add a learned embedding of the timestep within the episode."""
    trajectory_embedding: bool = False
    """Add a learned embedding of the trajectory's index in the context."""
    rotary_base: float = Field(10_000.0, gt=1)
    """Of rotary positions (2104.09864): a head's slowest pair turns once in about 6 times as many tokens. In a context
    longer than that no feature keeps still, and what a token says is matched less the further off it is; so longer
    contexts ask for more (2310.05209)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Computation; parameters are float32 always."""

    @property
    def family(self) -> Family:
        """Properties of this kind of model."""
        return FAMILIES[self.kind]

    @pydantic.model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if not self.family.has_context:
            return self
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"heads: {self.heads} heads do not split a width of {self.width} into even parts")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: {self.kv_heads} do not divide {self.heads} heads")
        return self


class HindsightConfig(Section):
    """Goals that a transition is scored for besides its task's own (1707.01495), where the task is to reach a place."""

    later: float = Field(0.0, ge=0, le=1)
    """Share of transitions whose goal is a place that their own episode comes to later."""
    steps_ahead: float = Field(10.0, ge=1, le=1e6)
    """How much later, in steps: the mean of a geometric distribution, cut at the episode's end."""
    nearby: float = Field(0.0, ge=0, le=1)
    """Share of transitions whose goal is a place from anywhere in the data, within `radius` of the task's goal."""
    radius: float = Field(0.25, gt=0)
    """What counts as nearby, in metres."""
    distance_cost: float = Field(0.0, ge=0)
    """Reward lost per metre from the goal, up to one metre: a slope where the reward is flat. In training only."""

    @pydantic.model_validator(mode="after")
    def _shares_add_up(self) -> Self:
        if self.later + self.nearby > 1:
            raise ValueError(f"later and nearby are shares of one whole, and {self.later} + {self.nearby} exceeds 1")
        return self


class ActorCriticConfig(Section):
    """TD3+BC (2106.06860): a policy that climbs a learned value and stays near the data's actions; kind td3_bc only."""

    discount: float = Field(0.99, ge=0, lt=1)
    """What a reward one step later is worth."""
    n_step: int = Field(1, ge=1)
    """Rewards summed before the target critics' value takes over; fewer at an episode's end (it is no termination)."""
    behaviour_cloning: float = Field(0.4, ge=0)
    """Weight of the squared distance to the data's action, beside a value scaled to one (1 / alpha of the paper);
    0: TD3, which imitates nothing."""
    target_rate: float = Field(0.005, gt=0, le=1)
    """How far the target networks move towards the learned ones at an actor update."""
    actor_delay: int = Field(2, ge=1, lt=2**31)
    """Critic updates (the optimiser's steps) per actor update."""
    target_noise: float = Field(0.2, ge=0)
    """Standard deviation of the noise on the target actor's actions, which lie in [-1, 1]."""
    target_noise_clip: float = Field(0.5, ge=0)
    """Largest such noise."""
    hindsight: HindsightConfig = HindsightConfig()
    """Other goals than the task's."""


BATCH_AXES = ("data", "fsdp")  # of a mesh: those that divide a batch,
SEQUENCE_AXIS = "seq"  # and the one that divides each of its contexts


class MeshConfig(Section):
    """Devices, and what each axis of them divides; their product is the number of devices used."""

    data: int = Field(1, ge=1)
    """Batch."""
    fsdp: int = Field(1, ge=1)
    """Batch and parameters."""
    tensor: int = Field(1, ge=1)
    """Heads and units of the feed-forward layer."""
    seq: int = Field(1, ge=1)
    """Each context, around a ring of this size (and parameters)."""
    layout: Literal["zigzag", "contiguous", "striped"] = "zigzag"
    """How a context's steps are dealt out to the ring; zigzag gives every device the same work."""

    @property
    def devices(self) -> int:
        """In all."""
        return self.data * self.fsdp * self.tensor * self.seq


class OptimiserConfig(Section):
    """AdamW with linear warm-up and cosine decay."""

    steps: int = Field(1000, ge=1)
    """Optimiser steps in all."""
    batch_size: int = Field(4, ge=1)
    """Contexts per step; transitions per step for td3_bc."""
    accumulation: int = Field(1, ge=1)
    """Parts that a batch is computed in, one after the other, to save memory; it divides the batch."""
    skipped_steps: int = Field(5, ge=0)
    """Steps in a row whose loss or gradients are not finite, and which change nothing, before the run stops."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    final_learning_rate: float = Field(0.0, ge=0)
    """Learning rate that the decay ends at, one step after the last, as a fraction of the peak."""
    warmup_steps: int = Field(50, ge=0)
    """Steps of linear warm-up, which begins at zero: with any, the first step changes no parameter."""
    weight_decay: float = Field(1e-2, ge=0)
    """AdamW's decoupled weight decay (matrices only)."""
    clip_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    beta2: float = Field(0.98, gt=0, lt=1)
    """AdamW's decay of the squared gradients."""

    @pydantic.model_validator(mode="after")
    def _parts_divide(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation: a batch of {self.batch_size} does not divide into {self.accumulation} parts"
            )
        return self


class TrainConfig(Section):
    """One training run."""

    data: Path
    """Dataset: a RingRL store (.h5), made by `ringrl data import`."""
    task: str
    """Task whose reward is learned, for example walker_walk."""
    run: Path
    """Folder of the run: configuration, metrics, checkpoints, evaluations."""
    seed: int = Field(0, ge=0, lt=2**32)  # of a larger one, JAX's keys know the last 32 bits alone
    """Seed of parameters and of the order of the data."""
    checkpoint_every: int = Field(200, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept."""
    log_every: int = Field(10, ge=1)
    """Steps between writes of metrics.jsonl, which has a line for each step."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """What shows the same numbers besides metrics.jsonl; wandb works offline, in the run's folder, unless the
    environment's WANDB_MODE says otherwise."""
    ignored_observations: tuple[int, ...] = ()
    """Components of the observation, from 0, that the model does not see."""
    context: ContextConfig = ContextConfig()
    """How trajectories are put together (of this, td3_bc knows max_transitions and best_fraction alone)."""
    model: ModelConfig = ModelConfig()
    """What maps a context to actions."""
    optimiser: OptimiserConfig = OptimiserConfig()
    """AdamW."""
    actor_critic: ActorCriticConfig = ActorCriticConfig()
    """TD3+BC."""
    mesh: MeshConfig = MeshConfig()
    """Devices."""

    @pydantic.model_validator(mode="after")
    def _tasks_are_told_apart(self) -> Self:
        others = self.context.other_tasks
        if not others:
            return self
        if len({self.task, *others}) <= len(others):
            raise ValueError("context.other_tasks: a task stands there twice, or is the run's own")
        if not self.model.family.has_context:
            raise ValueError(f"context.other_tasks: a {self.model.kind} has no context that could tell tasks apart")
        if self.context.best_fraction < 1:
            raise ValueError(
                "context.best_fraction: the best episodes of one task are not those of other_tasks; give 1"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _one_part(self) -> Self:
        if not self.model.family.splits_batches and self.optimiser.accumulation > 1:
            raise ValueError(f"optimiser.accumulation: {self.model.kind} computes a batch in one part; leave it at 1")
        return self


class DistributedConfig(Section):
    """Several processes as one run. How they meet is no part of what the run is, and not saved with it."""

    enabled: Literal["auto", "on", "off"] = "auto"
    """auto: where a coordinator is given or srun started several tasks; on: also where JAX finds Kubernetes, Cloud TPU
    or MPI; off: alone."""
    coordinator: str | None = None
    """HOST:PORT of process 0, which all others can reach."""
    processes: int | None = Field(None, ge=1)
    """How many there are, where a coordinator is given."""
    process: int | None = Field(None, ge=0)
    """Which one this is, from 0, where a coordinator is given."""
    start_timeout: int = Field(300, ge=1)
    """Seconds within which all have to meet."""
    heartbeat_timeout: int = Field(30, ge=2)
    """Seconds after which a process that is silent counts as lost, which ends the run."""

    @pydantic.model_validator(mode="after")
    def _says_where_and_who(self) -> Self:
        given = [value is not None for value in (self.coordinator, self.processes, self.process)]
        if any(given) and not all(given):
            raise ValueError("coordinator, processes and process belong together; give all three, or none")
        if self.coordinator is None or self.processes is None or self.process is None:
            return self
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"coordinator {self.coordinator!r} is not of the form HOST:PORT")
        if self.process >= self.processes:
            raise ValueError(f"process {self.process} is none of {self.processes}, which count from 0")
        return self


class SlurmConfig(Section):
    """What a job asks of SLURM; one process per GPU."""

    partition: str | None = None
    """Partition; without it, the cluster's default."""
    account: str | None = None
    """Account that pays."""
    constraint: str | None = None
    """Features that the nodes must have."""
    nodes: int = Field(1, ge=1)
    """Machines."""
    gpus_per_node: int = Field(0, ge=0)
    """GPUs of each, with a process for each of them; 0: one process per machine, on its cores."""
    cpus_per_task: int = Field(8, ge=1)
    """Cores per process."""
    memory: int = Field(64, ge=1)
    """GB per machine."""
    minutes: int = Field(1440, ge=2)
    """Time after which the job is stopped, queued again and resumed."""
    restarts: int = Field(10, ge=0)
    """How often it is queued again after its time is up."""
    setup: tuple[str, ...] = ()
    """Lines of shell before the run, for example "module load cuda"."""


_WORDS = {  # in place of pydantic's, by its name of the mistake
    "tuple_type": "give a list, for example [1, 2]",
    "model_type": "give settings by name, for example {name: value}",
    "missing": "is needed",
}


def problems(error: pydantic.ValidationError) -> list[tuple[str, str]]:
    """What is wrong with which setting; an empty name where it is with several together."""
    return [
        (".".join(map(str, p["loc"])), _WORDS.get(p["type"], p["msg"].removeprefix("Value error, ")))
        for p in error.errors()
    ]


def one_line(error: pydantic.ValidationError) -> str:
    """The same, as one line."""
    return "; ".join(f"{name}: {words}" if name else words for name, words in problems(error))


class _EachKeyOnce(yaml.SafeLoader):
    """Of a key that is there twice, YAML would keep the last alone, and half of what is said would go unheeded."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; UserError names the file when it is missing, empty, not YAML or not a mapping."""
    try:
        values = yaml.load(path.read_text(), _EachKeyOnce)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    if values is None:
        raise UserError(f"{path}: is empty, where settings by name are expected")
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    return dict(values)


def merged(below: Mapping[str, Any], above: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Nested settings laid over others: `above` wins wherever both say something.

    Both are of `section`, "model." for example. UserError where `below` has something else than settings by name (or
    nothing) in the place of a section of `above`.
    """
    whole = dict(below)
    for name, value in above.items():
        if isinstance(value, Mapping):
            under = whole.get(name)
            if not isinstance(under, Mapping | None):
                raise UserError(f"{section}{name}: expected settings by name, got {under!r}")
            value = merged(under or {}, value, f"{section}{name}.")
        whole[name] = value
    return whole


def to_yaml(section: Section) -> str:
    """The configuration as YAML, in the order of its fields."""
    return yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False)
