"""Methods: what each sets beside the settings that all share, and the name that a run's settings amount to.

random    uniform actions; nothing is trained
bc        behaviour cloning: a feed-forward policy imitates all actions of the data
bc-10%    the same of the best tenth of the episodes
dt        Decision Transformer (2106.01345): one trajectory, conditioned on its own return-to-go
at        Agentic Transformer (2305.16554): several, ascending by return, all asked for the best one's return
ad        Algorithm Distillation (2210.14215): several that a learner collected one after another, no return asked for
td3       a learned value is climbed, and nothing imitated: TD3 (1802.09477) on data that it did not collect
td3+bc    the same, held near the data's actions (2106.06860)
"""

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from ringrl.config import TrainConfig
from ringrl.errors import UserError

MethodName = Literal["bc", "bc-10%", "dt", "at", "ad", "td3", "td3+bc"]
"""Those that are trained."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        title: its name in words.
        settings: of `ringrl train`, nested as in its YAML files; None: there is nothing to train.
    """

    title: str
    settings: Mapping[str, Any] | None


# Two hidden layers of 256, as in TD3+BC's paper: cheap, since they see one step at a time.
_FEED_FORWARD = {"layers": 2, "width": 256}
_CLONING = {"kind": "behaviour_cloning", **_FEED_FORWARD}
_ALONE = {"trajectories": 1, "other_tasks": []}  # as there is no context: so few episodes are enough
_TD3 = {
    "model": {"kind": "td3_bc", "dtype": "float32", "remat": "none", **_FEED_FORWARD},
    "context": {"other_tasks": []},
    # The papers' Adam: one learning rate throughout, no weight decay; gradients are clipped nowhere near what is usual.
    "optimiser": {
        "batch_size": 256, "accumulation": 1, "learning_rate": 3e-4, "final_learning_rate": 1.0, "warmup_steps": 0,
        "weight_decay": 0.0, "clip_norm": 1000.0, "beta2": 0.999,
    },
}  # fmt: skip

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "random": Method("Random policy", None),
        "bc": Method("Behaviour cloning", {"model": _CLONING, "context": _ALONE, "optimiser": {"batch_size": 16}}),
        "bc-10%": Method(
            "Behaviour cloning, best 10%",
            {
                "model": _CLONING,
                "context": _ALONE | {"sampling": "uniform", "best_fraction": 0.1},
                "optimiser": {"batch_size": 16},
            },
        ),
        "dt": Method(
            "Decision Transformer",
            {
                "model": {"kind": "transformer", "token_set": "dt3", "timestep_embedding": True},
                "context": {"trajectories": 1, "target": "own"},
            },
        ),
        "at": Method(
            "Agentic Transformer",
            {"model": {"kind": "transformer"}, "context": {"order": "ascending", "target": "best"}},
        ),
        "ad": Method(
            "Algorithm Distillation",
            {
                "model": {"kind": "transformer"},
                # A history has no gaps: none of its episodes are left out.
                "context": {"order": "history", "sampling": "history_window", "target": "none", "best_fraction": 1.0},
            },
        ),
        "td3": Method("TD3", _TD3 | {"actor_critic": {"behaviour_cloning": 0.0}}),
        "td3+bc": Method("TD3+BC", _TD3 | {"actor_critic": {"behaviour_cloning": 0.4}}),
    }
)


def method_of(config: TrainConfig) -> str:
    """The name of what a run's settings amount to, as results carry it.

    Besides those of METHODS there are "bc-50%" and so on, by the share of the episodes, and "td3+her" and "td3+bc+her",
    with goals in hindsight; "at-4tasks" and so on, where tasks take turns.
    """
    name = _method_of(config)
    return f"{name}-{1 + len(config.context.other_tasks)}tasks" if config.context.other_tasks else name


def _method_of(config: TrainConfig) -> str:
    context, actor_critic = config.context, config.actor_critic
    if config.model.kind == "td3_bc":
        hindsight = actor_critic.hindsight
        name = "td3+bc" if actor_critic.behaviour_cloning else "td3"
        return f"{name}+her" if hindsight.later or hindsight.nearby else name
    if config.model.kind == "behaviour_cloning":
        percent = round(100 * context.best_fraction)
        return "bc" if percent == 100 else f"bc-{percent}%"
    if context.target == "none" and context.order == "history":
        return "ad"
    # A Decision Transformer is asked for a return; what is not is one method with any number of trajectories.
    return "dt" if context.trajectories == 1 and context.target != "none" else "at"


def check_method(config: TrainConfig, name: MethodName) -> None:
    """UserError where other settings have made another method of it; a share of the episodes, or goals, do not."""
    found = method_of(config)
    if name in ("at", "dt") and config.context.sampling == "history_window":
        raise UserError(f"--method {name}: context.sampling history_window is of ad; choose another, or --method ad")
    if _family(found) != _family(name):
        raise UserError(
            f"--method {name}: with the other settings the run is {found} (context.trajectories "
            f"{config.context.trajectories}, context.target {config.context.target}, model.kind {config.model.kind}, "
            f"actor_critic.behaviour_cloning {config.actor_critic.behaviour_cloning:g}); change them, or --method"
        )


def _family(name: str) -> str:
    return re.sub(r"-\d+(%|tasks)$|\+her$", "", name)
