"""The workload of a plan: a run's configuration with its mesh, and the tokens per context."""

import dataclasses
import math
import re
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pydantic
from flax import nnx

from ringrl.attention.layout import length_multiple
from ringrl.attention.strategy import Choice, choose_strategy
from ringrl.config import ModelConfig, TrainConfig
from ringrl.config_files import one_line, read_yaml
from ringrl.configs import preset
from ringrl.errors import UserError
from ringrl.model import make_policy
from ringrl.model.parallel import MESH_AXES, check_divides
from ringrl.model.tokens import TOKEN_SETS
from ringrl.training.budget import longest_episode

OBSERVATION, ACTION = 24, 6  # sizes of the walker; other domains change the memory by less than 0.1 %
MOST_TOKENS = 2**31 - 1  # per context, since positions are 32-bit
# Layers and width for planning, as in LLaMA (2302.13971), with plain feed-forward layers and heads of 128 features.
# The other settings are those of the preset paper_350m.
SHAPES = {"3b": (26, 3072), "7b": (32, 4096), "13b": (40, 5120), "30b": (60, 6656)}
_UNUSED = {"data": "unused", "task": "unused", "run": "unused"}


@dataclasses.dataclass(frozen=True)
class Workload:
    """One optimiser step: the configuration (model, mesh, number of contexts) and the tokens per context."""

    config: TrainConfig
    tokens: int
    device_kind: str = ""  # of the machine, for strategy "auto"; unknown: ring

    @property
    def model(self) -> ModelConfig:
        """The model's configuration."""
        return self.config.model

    @property
    def local_tokens(self) -> int:
        """Tokens of a context per device."""
        return self.tokens // self.config.mesh.seq

    @property
    def local_contexts(self) -> int:
        """Contexts that a device processes at once."""
        mesh, optimiser = self.config.mesh, self.config.optimiser
        return optimiser.batch_size // optimiser.accumulation // (mesh.data * mesh.fsdp)

    @property
    def is_in_blocks(self) -> bool:
        """Whether the feed-forward layer processes a device's tokens in several blocks."""
        return self.model.attention in ("blockwise", "ring") and self.local_tokens > self.model.block_tokens

    @property
    def strategy(self) -> Choice:
        """How attention reaches the keys of other devices, and why."""
        model, mesh = self.model, self.config.mesh
        if model.attention != "ring":
            return Choice("all_gather", f"from {model.attention} attention")
        heads, kv_heads = model.heads // mesh.tensor, model.kv_heads // mesh.tensor
        sizes = self.local_tokens, mesh.seq, heads, kv_heads
        auto = choose_strategy(*sizes, device_kind=self.device_kind, itemsize=self.itemsize)
        if model.strategy == "auto" or mesh.seq == 1:
            return Choice(auto.strategy, f"chosen by auto: {auto.reason}")
        return Choice(model.strategy, f"from the configuration; auto chooses {auto.strategy}: {auto.reason}")

    @property
    def group(self) -> int:
        """Number of neighbouring devices that exchange tokens for heads; keys circulate among such groups."""
        mesh = self.config.mesh
        return {"ulysses": mesh.seq, "ulysses_ring": mesh.ulysses}.get(self.strategy.strategy, 1)

    @property
    def heads_held(self) -> float:
        """Key heads on a device relative to an equal share, above 1 if a group has more devices than key heads."""
        return max(1.0, self.group * self.config.mesh.tensor / self.model.kv_heads)

    @property
    def tokens_per_step(self) -> int:
        """Tokens per timestep."""
        return TOKEN_SETS[self.model.token_set].size

    @property
    def itemsize(self) -> int:
        """Bytes per number of the computation."""
        return 2 if self.model.dtype == "bfloat16" else 4

    @property
    def multiple(self) -> int:
        """The unit of a context's length in tokens."""
        mesh = self.config.mesh
        return self.tokens_per_step * length_multiple(mesh.layout, mesh.seq)

    @property
    def mesh_in_words(self) -> str:
        """The mesh as text, for example fsdp 2 x seq 4."""
        mesh = self.config.mesh
        sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
        words = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"
        return f"{words} (groups of {mesh.ulysses})" if mesh.ulysses > 1 else words

    @cached_property
    def parameters(self) -> "Parameters":
        """The numbers of parameters. Those outside the layers are not divided among devices."""
        model, mesh = self.model, self.config.mesh
        width, hidden = model.width, model.feed_forward * model.width
        key_value = 2 * width * width * model.kv_heads // model.heads
        matrices = 2 * width * width + key_value + 2 * width * hidden
        total = _count(model)
        whole = total - model.layers * (matrices + hidden + width)
        embed = mesh.fsdp * mesh.seq
        split = model.layers * (matrices / (embed * mesh.tensor) + hidden / mesh.tensor + width / embed)
        return Parameters(total, matrices, whole + split)

    def with_tokens(self, tokens: int) -> "Workload":
        """Return the workload with contexts of another length."""
        return dataclasses.replace(self, tokens=tokens)

    def with_settings(self, section: str, **values: Any) -> "Workload":
        """Return the workload with other settings in "model", "mesh" or "optimiser"."""
        values = self.config.model_dump() | {section: getattr(self.config, section).model_dump() | values}
        return dataclasses.replace(self, config=TrainConfig.model_validate(values))

    def check(self) -> None:
        """Raise UserError if the mesh or the tokens do not divide."""
        check_divides(self.config)
        if self.tokens < self.multiple or self.tokens % self.multiple:
            near = max(1, round(self.tokens / self.multiple)) * self.multiple
            raise UserError(
                f"--tokens {self.tokens}: not a multiple of {self.multiple} (tokens per timestep x devices along the "
                f"context x chunks of the layout {self.config.mesh.layout}); the nearest is {near}"
            )


class Parameters(NamedTuple):
    """Numbers of parameters."""

    total: int
    layer: int  # of the matrices of one layer
    device: float  # per device of the mesh


@cache
def _count(model: ModelConfig) -> int:
    """Return the number of parameters of a model, which is not allocated."""
    policy = nnx.eval_shape(partial(make_policy, model, OBSERVATION, ACTION, 0))
    return sum(math.prod(array.shape) for array in jax.tree.leaves(nnx.state(policy, nnx.Param)))


def find_model(name: str) -> TrainConfig:
    """Return the configuration of a shape ("7b"), a preset ("small") or a run (runs/walk, or its config.yaml).

    Raise UserError for other names, and for a model without context.
    """
    path, shape = Path(name), SHAPES.get(name.lower())
    if (path / "config.yaml").is_file():
        path /= "config.yaml"
    if shape or name.lower() == "350m":
        path = preset("paper_350m")
    elif path.suffix not in (".yaml", ".yml"):
        try:
            path = preset(name)
        except UserError as error:
            sizes = ", ".join(("350m", *SHAPES))
            raise UserError(f"--model: {error}; sizes: {sizes}, or a YAML file with model: {{layers: ...}}") from error
    values = read_yaml(path)
    if shape:
        layers, width = shape
        values["model"] |= {"layers": layers, "width": width, "heads": width // 128, "kv_heads": width // 128}
    try:
        config = TrainConfig.model_validate(_UNUSED | values)
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    if not config.model.family.has_context:
        raise UserError(f"--model {name}: {config.model.kind} has no context; plan a transformer")
    return config


def context_tokens(name: str, config: TrainConfig) -> int:
    """Return the tokens of a context of `find_model(name)`. UserError if it is a shape, without a task."""
    if config.task == _UNUSED["task"]:
        raise UserError(f"--tokens: is required, since {name} has no dataset; give a context's length, such as 512k")
    timesteps = config.context.steps(longest_episode(config))
    return timesteps * TOKEN_SETS[config.model.token_set].size


def read_tokens(text: str) -> int:
    """Return a number of tokens from text such as 32768, 512k (x 1024) or 8M (x 1024^2). Raise UserError if invalid."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", text.strip())
    tokens = float(found[1]) * {"": 1, "k": 2**10, "m": 2**20}[found[2].lower()] if found else 0
    if tokens < 1 or tokens != int(tokens) or tokens > MOST_TOKENS:
        raise UserError(f"--tokens {text}: expected a whole number of tokens below 2^31, such as 32768, 512k or 8M")
    return int(tokens)


def format_tokens(tokens: int) -> str:
    """Format a number of tokens: 131072 -> 128k."""
    if tokens >= 2**20:
        return f"{tokens / 2**20:.4g}M"
    return f"{tokens / 2**10:.4g}k" if tokens >= 2**10 else str(tokens)
