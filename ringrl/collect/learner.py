"""Collection with a learner: TD3 explores, learns from its replay memory, and every episode is kept."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ringrl.collect.record import EpisodeRecording, ForeignRecording, Recording, coloured_noise, start_seed
from ringrl.config import ActorCriticConfig, ModelConfig, OptimiserConfig
from ringrl.context import Transitions
from ringrl.data.exorl import Archive
from ringrl.data.foreign import load_episode
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.store.format import Episode
from ringrl.data.transitions import n_step_transitions
from ringrl.envs import Domain, ForeignDomain, ForeignEnv, domain_of, is_foreign, load_simulation
from ringrl.errors import UserError
from ringrl.files import explain_read_errors, raise_unreadable, write_whole
from ringrl.model import ActorCritic, TrainState
from ringrl.model.agents.td3 import EXORL, TD3
from ringrl.pace import Progress

_ENVIRONMENTS = 4  # parallel episodes, which share one call of the actor
_STRIDE = 25  # steps between rounds of updates; divides the episode length of every ExoRL domain
_TRANSITIONS_PER_UPDATE = 2
_BATCH = 256
_WARM_UP = 2000  # transitions before the first update
_NOISE = (1.0, 0.2)  # standard deviation of the action noise at the start and at the end of the decay
_NOISE_DECAY = 0.5  # share of the collection
_CHECKPOINT = "learner.npz"
_ADAM = OptimiserConfig(
    learning_rate=1e-3, final_learning_rate=1.0, warmup_steps=0, weight_decay=0.0, clip_norm=1e9, beta2=0.999
)


class Learner:
    """TD3 with ExoRL's networks. What it learns is in `TrainState`."""

    def __init__(self, domain: Domain, seed: int, *, width: int = 256) -> None:
        self._model = ModelConfig(kind="td3_bc", layers=2, width=width)
        self._sizes = (domain.observation_size, domain.action_size)
        self._seed = int(np.random.default_rng((seed, 4)).integers(2**32))  # JAX needs a seed below 2^32
        self.settings = ActorCriticConfig(n_step=3, behaviour_cloning=0.0, target_rate=0.01)
        self._graph = nnx.split(nnx.eval_shape(lambda: self._policy(nnx.Rngs(params=0))), nnx.Param)[0]
        self._td3 = TD3(self._graph, _ADAM, self.settings, self._seed)
        self.update = jax.jit(self._updates, donate_argnums=0)
        self.act = jax.jit(self._act)

    def init(self) -> TrainState:
        """Return the state before the first update."""
        return self._td3.init(self._policy(nnx.Rngs(params=self._seed)))

    def _policy(self, rngs: nnx.Rngs) -> ActorCritic:
        return ActorCritic(self._model, *self._sizes, rngs, style=EXORL)

    def _act(self, state: TrainState, observation: Float[Array, "batch observation"]) -> Float[Array, "batch action"]:
        """Return the actions of the learned actor, without noise."""
        policy = nnx.merge(self._graph, state.params)
        return jnp.tanh(policy.actor(policy.inputs(observation)))

    def _updates(self, state: TrainState, batches: Transitions) -> TrainState:
        """Make an update per batch (number, batch, ...)."""
        return jax.lax.scan(lambda state, batch: (self._td3.update(state, batch)[0], None), state, batches)[0]


class Replay:
    """The replay memory: episodes by number, also incomplete ones, in ExoRL's rows with one `column` of the rewards."""

    def __init__(self, domain: Domain, episodes: int, column: int) -> None:
        self.domain, self._column, self._length = domain, column, domain.episode_length + 1
        self._steps = np.zeros(episodes, np.int64)  # recorded in each episode
        widths = {"observation": domain.observation_size, "action": domain.action_size, "discount": 1}
        rows = episodes * self._length
        self._arrays = {name: np.zeros((rows, width), np.float32) for name, width in widths.items()}
        self._reward = np.zeros(rows, np.float32)  # of the learned task
        size = domain.observation_size
        self._normalisation = Normalisation(np.zeros(size), np.ones(size), domain.episode_length)  # changes nothing

    @property
    def transitions(self) -> int:
        """Number of transitions to sample from."""
        return int(self._steps.sum())

    def put(self, number: int, episode: Episode, steps: int) -> None:
        """Store an episode with `steps` recorded steps, which may be fewer than it has rows."""
        first, count = number * self._length, steps + 1
        for name, array in self._arrays.items():
            array[first : first + count] = episode[name][:count]
        self._reward[first : first + count] = episode["reward"][:count, self._column]
        self._steps[number] = steps

    def sample(self, random: np.random.Generator, shape: tuple[int, ...], config: ActorCriticConfig) -> Transitions:
        """Return uniform n-step transitions, arrays (*shape, ...) float32. n shrinks at the last row of an episode."""
        ends = np.cumsum(self._steps)
        index = random.integers(ends[-1], size=shape)
        episode = np.searchsorted(ends, index, side="right")
        end = episode * self._length + self._steps[episode]
        row = end + index - ends[episode]
        return n_step_transitions(self._arrays, self._reward, row, end, config, self._normalisation)


def learn(task: str, folder: Path, *, episodes: int, seed: int, progress: Progress, width: int = 256) -> None:
    """Record the history of a learner into `folder`/buffer. A call after a kill continues bit-identically."""
    domain = domain_of(task)
    learner = Learner(domain, seed, width=width)
    replay = Replay(domain, episodes, domain.recorded_tasks(task).index(task))
    made = [
        ForeignEnv(task) if is_foreign(task) else load_simulation(task) for _ in range(min(_ENVIRONMENTS, episodes))
    ]
    done, state = _saved(folder, learner.init())
    _recall(folder, domain, replay, done)
    while done < episodes:
        starts = [start_seed(seed, number) for number in range(done, min(done + len(made), episodes))]
        recordings = [
            ForeignRecording(one, start) if isinstance(one, ForeignEnv) else EpisodeRecording(one, start)
            for one, start in zip(made, starts, strict=False)
        ]
        noise = np.interp(done / episodes, (0, _NOISE_DECAY), _NOISE)
        state = _run(recordings, learner, state, replay, done, float(noise), (seed, 3, done))
        for recording in recordings:
            recording.save(folder / "buffer", done)
            done += 1
            progress(done, episodes)
        _save(folder, done, state)
    (folder / _CHECKPOINT).unlink(missing_ok=True)


def _run(
    recordings: Sequence[Recording], learner: Learner, state: TrainState, replay: Replay, first: int, noise: float,
    seed: tuple[int, ...],
) -> TrainState:  # fmt: skip
    """Record parallel episodes from start to end, with updates in between, and return the learner after them."""
    random = np.random.default_rng(seed)
    steps, size = replay.domain.episode_length, replay.domain.action_size
    # Pink noise explores better than white or red noise (Eberhard et al. 2023, "Pink noise is all you need").
    noises = noise * np.stack([coloured_noise(random, steps, size, exponent=1.0) for _ in recordings], axis=1)
    for block in range(0, steps, _STRIDE):
        if not (playing := sum(not recording.has_ended for recording in recordings)):
            break
        for step in range(block, min(block + _STRIDE, steps)):
            observation = np.stack([recording.observation for recording in recordings])
            actions = np.asarray(learner.act(state, observation)) + noises[step]
            for recording, action in zip(recordings, actions, strict=True):
                recording.step(action)
        for number, recording in enumerate(recordings, start=first):
            replay.put(number, recording.rows, recording.steps)
        if replay.transitions > _WARM_UP:
            shape = (playing * _STRIDE // _TRANSITIONS_PER_UPDATE, _BATCH)
            state = learner.update(state, replay.sample(random, shape, learner.settings))
    return state


def _recall(folder: Path, domain: Domain, replay: Replay, done: int) -> None:
    """Fill the replay memory with the episodes of the saved learner."""
    if done == 0:
        return
    if isinstance(domain, ForeignDomain):
        for number in range(done):
            with explain_read_errors(f"{folder}: episode {number}", "remove the folder and start again"):
                (path,) = folder.glob(f"buffer/episode_{number:06d}_*.npz")
                episode = load_episode(path, domain)
            replay.put(number, episode, len(episode["reward"]) - 1)
        return
    with Archive(folder, domain) as archive:
        members = archive.members[:done]
        if [member.number for member in members] != list(range(done)):
            raise UserError(f"{folder}: one of the first {done} episodes is missing: remove the folder and start again")
        for member in members:
            replay.put(member.number, archive.read(member), member.length)


def _save(folder: Path, done: int, state: TrainState) -> None:
    content = io.BytesIO()
    np.savez(content, *map(np.asarray, jax.tree.leaves(state)), episodes=done)
    write_whole(folder / _CHECKPOINT, content.getvalue())


def _saved(folder: Path, state: TrainState) -> tuple[int, TrainState]:
    """Return the number of episodes and the state at the last save, or zero and `state` if there is none."""
    path = folder / _CHECKPOINT
    if not path.exists():
        return 0, state
    leaves, structure = jax.tree.flatten(state)
    try:
        with np.load(path, allow_pickle=False) as file:
            saved = [jnp.asarray(file[f"arr_{number}"]) for number in range(len(leaves))]
            if [(x.shape, x.dtype) for x in saved] != [(x.shape, x.dtype) for x in leaves]:
                raise ValueError("the arrays of another learner")
            return int(file["episodes"]), jax.tree.unflatten(structure, saved)
    except Exception as error:  # NumPy and zipfile raise nearly any exception for damaged bytes
        raise_unreadable(path, error)
        raise UserError(f"{path}: is damaged; remove it to start the collection again") from error
