"""What tests of rollouts share: an actor that keeps what it sees, a tiny policy, and short episodes."""

import dataclasses
from collections.abc import Sequence

import gymnasium
import jax
import numpy as np

from ringrl.config import ModelConfig
from ringrl.context import Context
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.envs import DOMAINS
from ringrl.evaluation import TrainedPolicy
from ringrl.evaluation.actors import Actor, RandomActor
from ringrl.evaluation.rollout import EpisodeBatch, Group, rollout
from ringrl.model import Policy, make_policy

TASK, OTHER, JACO = "jaco_reach_top_left", "jaco_reach_bottom_right", DOMAINS["jaco"]
LENGTH = JACO.episode_length
NORMALISATION = Normalisation(np.linspace(-0.5, 0.5, 42), np.linspace(0.5, 2, 42), LENGTH)
SEED = 11
ARRAYS = ("reward", "physics", "length", "terminated")  # of an episode
SHORT = Normalisation(NORMALISATION.mean, NORMALISATION.std, 4)


class RecordingActor:
    """Forwards everything to another actor and keeps it."""

    def __init__(self, actor: Actor) -> None:
        self.actor, self.steps, self.actions, self.started = actor, [], [], []

    def start(self, num_environments: int, num_steps: int, prompt: Context | None = None) -> None:
        self.started.append((num_environments, num_steps))
        self.prompt = prompt
        self.actor.start(num_environments, num_steps, prompt)

    def act(self, current: Context) -> np.ndarray:
        for name in ("action", "reward", "completion"):
            assert (getattr(current, name) == 0).all(), "unknown values are zero"
        self.actions.append(self.actor.act(current))
        return self.actions[-1]

    def observe(self, finished: Context) -> None:
        self.steps.append(finished)
        self.actor.observe(finished)

    @property
    def context(self) -> Context:
        """Return everything that was observed as one context."""
        return jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=1), *self.steps)


def tiny(**settings: object) -> Policy:
    config = {"layers": 1, "width": 16, "heads": 2, "token_set": "at5", "timestep_embedding": True} | settings
    return make_policy(ModelConfig.model_validate(config), JACO.observation_size, JACO.action_size, seed=0)


def seeds(streams: int, episodes: int = 1, first: int = SEED) -> np.ndarray:
    """Return one seed per episode, stream by stream."""
    return first + np.arange(streams * episodes).reshape(streams, episodes)


def play(vectors: Sequence[gymnasium.vector.VectorEnv], episodes: int = 3, **options):
    """Return returns and episodes of short environments, and the context that the actors observed."""
    played: list[EpisodeBatch] = []
    firsts = np.cumsum([0, *(vector.num_envs for vector in vectors)])
    recorders = [RecordingActor(RandomActor(9, seed=int(first))) for first in firsts[:-1]]
    groups = [Group(recorder, vector) for recorder, vector in zip(recorders, vectors, strict=True)]
    options = {"target_return": 2.0, "seeds": seeds(firsts[-1], episodes), "on_episode": played.append} | options
    returns = rollout(groups, SHORT, **options)
    observed = [recorder.context for recorder in recorders if recorder.steps]
    is_even = len({context.reward.shape[1] for context in observed}) == 1
    return returns, played, jax.tree.map(lambda *x: np.concatenate(x), *observed) if is_even else None


def assert_same(one: object, other: object) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def with_config(trained: TrainedPolicy, **changes: object) -> TrainedPolicy:
    """Return the policy as if trained with other settings; settings of the context are changed one by one."""
    config = trained.info.config
    if "context" in changes:
        changes["context"] = config.context.model_copy(update=changes["context"])
    info = dataclasses.replace(trained.info, config=config.model_copy(update=changes))
    return dataclasses.replace(trained, info=info)
