"""Methods and the families of models that implement them.

    random  uniform actions; nothing is trained
    copy    the action of the prompt's step with the nearest observation; nothing is trained
    clone   behaviour cloning of the prompt alone, trained during the evaluation
    bc      behaviour cloning: a feed-forward policy imitates all actions of the data
    bc-10%  behaviour cloning on the best tenth of the episodes; also bc-25% and bc-50%
    dt      Decision Transformer (2106.01345): one trajectory, conditioned on its own return-to-go
    at      Agentic Transformer (2305.16554): several trajectories, ascending by return, conditioned on the best return
    ad      Algorithm Distillation (2210.14215): several trajectories in the order of collection, no target return
    td3     TD3 (1802.09477) on a fixed dataset: the policy maximises a learned value, without imitation
    td3+bc  TD3 with a behaviour cloning term (2106.06860)

A new method is an entry of METHODS, and of FAMILIES if no existing family implements it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from ringrl.errors import UserError

if TYPE_CHECKING:
    from ringrl.config import TrainConfig

MethodName = Literal["bc", "bc-10%", "bc-25%", "bc-50%", "dt", "at", "ad", "td3", "td3+bc"]
"""Methods that are trained."""

Kind = Literal["transformer", "behaviour_cloning", "td3_bc"]
"""Values of `model.kind`, the keys of FAMILIES."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Properties of a kind of model on which the rest of the project depends."""

    ignored: tuple[str, ...]  # settings ("model.heads") and sections ("actor_critic.") that have no effect
    used: tuple[str, ...] = ()  # settings of these sections that have an effect
    has_context: bool = False  # the model sees a context of trajectories as tokens, else one observation at a time
    source: Literal["contexts", "transitions"] = "contexts"  # batches that training draws
    splits_batches: bool = True  # a batch may be computed in parts, by accumulation or on several devices

    def uses(self, setting: str) -> bool:
        """Return whether a setting such as "model.heads" has an effect on training."""
        return setting in self.used or not {setting, f"{setting.partition('.')[0]}."} & {*self.ignored}


@dataclasses.dataclass(frozen=True)
class Method:
    """A method: its full name, and its settings as in YAML files, or None for a method without training."""

    title: str
    settings: Mapping[str, Any] | None


# Two hidden layers of 256 units, as in the TD3+BC paper.
_FEED_FORWARD = {"layers": 2, "width": 256}
_ALONE = {
    "trajectories": 1, "other_tasks": [], "segment_steps": None, "segment_start_share": 0.5, "first_steps": 20,
    "first_steps_weight": 1.0, "history_stride": 1,
}  # fmt: skip
_TD3 = {
    "model": {"kind": "td3_bc", "dtype": "float32", "remat": "none", **_FEED_FORWARD},
    "context": {"other_tasks": [], "history_stride": 1},
    # Adam as in the papers: constant learning rate, no weight decay, practically no clipping.
    "optimiser": {
        "batch_size": 256, "accumulation": 1, "learning_rate": 3e-4, "final_learning_rate": 1.0, "warmup_steps": 0,
        "weight_decay": 0.0, "clip_norm": 1000.0, "beta2": 0.999,
    },
}  # fmt: skip


def _cloning(title: str, **context: Any) -> Method:
    model = {"kind": "behaviour_cloning", **_FEED_FORWARD}
    return Method(title, {"model": model, "context": _ALONE | context, "optimiser": {"batch_size": 16}})


def _transformer(title: str, model: Mapping[str, Any] = MappingProxyType({}), **context: Any) -> Method:
    return Method(title, {"model": {"kind": "transformer", **model}, "context": context})


_DT3 = {"token_set": "dt3", "timestep_embedding": True, "past_rewards": "on"}
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "random": Method("Random policy", None),
        "copy": Method("Nearest step of the prompt", None),
        "clone": Method("Cloning of the prompt", None),
        "bc": _cloning("Behaviour cloning"),
        **{
            f"bc-{percent}%": _cloning(
                f"Behaviour cloning, best {percent}%", sampling="uniform", best_fraction=percent / 100
            )
            for percent in (10, 25, 50)
        },
        "dt": _transformer("Decision Transformer", _DT3, trajectories=1, target="own", history_stride=1),
        "at": _transformer("Agentic Transformer", order="ascending", target="best", history_stride=1),
        "ad": _transformer(  # best_fraction would leave gaps in the history
            "Algorithm Distillation", order="history", sampling="history_window", target="none", best_fraction=1.0
        ),
        "td3": Method("TD3", _TD3 | {"actor_critic": {"behaviour_cloning": 0.0}}),
        "td3+bc": Method("TD3+BC", _TD3 | {"actor_critic": {"behaviour_cloning": 0.4}}),
    }
)


_TRANSFORMER_ONLY = (
    "model.heads", "model.kv_heads", "model.feed_forward", "model.timestep_embedding", "model.trajectory_embedding",
    "model.rotary_base", "model.episode_window", "model.past_actions", "model.past_rewards", "model.strategy",
    "model.bidirectional",
)  # fmt: skip

FAMILIES: Mapping[Kind, Family] = MappingProxyType(
    {
        "transformer": Family(ignored=("actor_critic.",), has_context=True),
        "behaviour_cloning": Family(ignored=("actor_critic.", *_TRANSFORMER_ONLY)),
        "td3_bc": Family(
            ignored=(*_TRANSFORMER_ONLY, "context.", "model.action_head", "model.action_choice", "stop_after"),
            used=("context.max_transitions", "context.best_fraction"),
            source="transitions",
            splits_batches=False,
        ),
    }
)


def method_of(config: TrainConfig) -> str:
    """Return the method's name for a run's settings, as it appears in results.

    Names that METHODS lacks: "bc-30%" (and other fractions of the episodes), and names with a suffix such as "-4tasks"
    for runs on several tasks.
    """
    context = config.context
    if config.model.kind == "td3_bc":
        name = "td3+bc" if config.actor_critic.behaviour_cloning else "td3"
    elif config.model.kind == "behaviour_cloning":
        percent = round(100 * context.best_fraction)
        name = "bc" if percent == 100 else f"bc-{percent}%"
    elif context.target == "none":  # a Decision Transformer has a target return
        name = "ad" if context.order == "history" else "at"
    else:
        name = "dt" if context.trajectories == 1 and context.target == "own" else "at"
    return f"{name}-{1 + len(config.context.other_tasks)}tasks" if config.context.other_tasks else name


def title_of(name: str, trajectories: int | None = None) -> str:
    """Return the full name of a method of results, such as "Agentic Transformer, 1 trajectory"."""
    method, _, rest = name.partition("-")
    title = METHODS[method].title if method in METHODS else name
    if rest.endswith("tasks"):
        title += f", {rest.removesuffix('tasks')} tasks in turn" if method in METHODS else ""
    elif rest:
        title = f"{title}, best {rest}" if method == "bc" else name
    return f"{title}, {trajectories} trajector{'y' if trajectories == 1 else 'ies'}" if trajectories else title


def check_method(config: TrainConfig, name: MethodName) -> None:
    """Raise UserError if the settings amount to another method. Fractions of episodes are allowed."""
    found = method_of(config)
    if name in ("at", "dt") and config.context.sampling == "history_window":
        raise UserError(
            f"--method {name}: context.sampling history_window belongs to ad; choose another, or --method ad"
        )
    if _family(found) != _family(name):
        raise UserError(
            f"--method {name}: with the other settings the run is {found} (context.trajectories "
            f"{config.context.trajectories}, context.target {config.context.target}, model.kind {config.model.kind}, "
            f"actor_critic.behaviour_cloning {config.actor_critic.behaviour_cloning:g}); change them, or --method"
        )


def _family(name: str) -> str:
    return re.sub(r"-\d+(%|tasks)$", "", name)
