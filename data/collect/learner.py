"""A TD3 learner whose memory is the dataset: it explores, learns, and every episode on the way is kept.

Rewarded by the task, its history runs from nothing to near the ceiling; rewarded by the novelty of states (random
network distillation), it explores and never learns what for.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ringrl.data.collect import rnd, td3
from ringrl.data.collect.noise import coloured_noise
from ringrl.data.collect.record import Recording, start_seed
from ringrl.data.collect.replay import Replay
from ringrl.data.exorl import Archive, save_episode
from ringrl.envs import Domain, domain_of
from ringrl.errors import UserError
from ringrl.files import write_whole

if TYPE_CHECKING:
    from ringrl.envs.simulation import Simulation

_ENVIRONMENTS = 4  # episodes side by side: the actor is asked once for all of them
_STRIDE = 25  # steps from one round of updates to the next; divides the length of every domain's episodes
_TRANSITIONS_PER_UPDATE = 2
_BATCH = 256
_WARM_UP = 2000  # transitions before the first update
_NOISE = (1.0, 0.2)  # standard deviation of the noise on the actions: from here to there,
_NOISE_FALLS = 0.5  # over this share of the collection
_CHECKPOINT = "learner.npz"


class LearnerState(NamedTuple):
    """The learner, and what rewards it if the task does not."""

    policy: td3.Td3State
    novelty: rnd.RndState | None


Update = Callable[[LearnerState, td3.Batch, jax.Array], LearnerState]


def learn(
    task: str,
    folder: Path,
    *,
    episodes: int,
    seed: int,
    is_reward_free: bool,
    progress: Callable[[int, int], None],
    settings: td3.Td3Settings | None = None,
) -> None:
    """Record the history of one learner into `folder`/buffer.

    After every few episodes the learner is saved beside them, so that a call after a kill goes on, bit for bit.

    Raises:
        UserError: the saved learner is damaged, or an episode that it has learned from is missing or damaged.
    """
    from ringrl.envs import load_simulation

    domain = domain_of(task)
    # Novelty is computed for one step at a time, when it is learned from, because it wears off.
    settings = settings or td3.Td3Settings(steps=1 if is_reward_free else 3)
    column = domain.recorded_tasks(task).index(task)
    simulations = [load_simulation(task) for _ in range(min(_ENVIRONMENTS, episodes))]
    update, replay = make_update(settings), Replay(domain, episodes)
    done, state = _saved(folder, initial_state(settings, domain, seed, is_reward_free))
    _recall(folder, domain, replay, column, done)
    while done < episodes:
        number = min(len(simulations), episodes - done)
        side_by_side = _Round(simulations[:number], replay, column, done, seed, episodes)
        state = side_by_side.run(state, update, settings)
        for recording in side_by_side.recordings:
            save_episode(folder / "buffer", done, recording.episode())
            done += 1
            progress(done, episodes)
        _save(folder, done, state)
    (folder / _CHECKPOINT).unlink(missing_ok=True)


def initial_state(settings: td3.Td3Settings, domain: Domain, seed: int, is_reward_free: bool) -> LearnerState:
    """The learner that knows nothing yet."""
    first, second = jax.random.split(_key(seed, 0))
    policy = td3.initial_state(settings, domain.observation_size, domain.action_size, first)
    return LearnerState(policy, rnd.initial_state(domain.observation_size, second) if is_reward_free else None)


def make_update(settings: td3.Td3Settings) -> Update:
    """A jitted function that makes one update per batch (number, batch, ...); the key is for the targets' noise."""

    def one(state: LearnerState, inputs: tuple[td3.Batch, jax.Array]) -> tuple[LearnerState, None]:
        batch, noise = inputs
        novelty = state.novelty
        if novelty is not None:
            novelty, bonus = rnd.update(novelty, batch.following)
            batch = batch._replace(reward=bonus)
        return LearnerState(td3.update(settings, state.policy, batch, noise), novelty), None

    def many(state: LearnerState, batches: td3.Batch, key: jax.Array) -> LearnerState:
        noise = jax.random.normal(key, batches.action.shape)
        return jax.lax.scan(one, state, (batches, noise))[0]

    return jax.jit(many, donate_argnums=0)


class _Round:
    """Episodes side by side, the learner learning while they run."""

    def __init__(
        self, simulations: list[Simulation], replay: Replay, column: int, first: int, seed: int, episodes: int
    ) -> None:
        self._first, self._number = first, len(simulations)
        starts = [start_seed(seed, first + index) for index in range(self._number)]
        self.recordings = [Recording(*started) for started in zip(simulations, starts, strict=True)]
        self._replay, self._column = replay, column
        self._random = np.random.default_rng((seed, 3, first))
        self._key = _key(seed, 1 + first)
        self._domain = simulations[0].domain
        steps, size = self._domain.episode_length, self._domain.action_size
        # Pink: it neither trembles on the spot nor drifts into a corner (Eberhard et al. 2023, "Pink noise is all you
        # need").
        noise = [coloured_noise(self._random, steps, size, exponent=1.0) for _ in starts]
        self._noise = np.interp(first / episodes, (0, _NOISE_FALLS), _NOISE) * np.stack(noise, axis=1)

    def run(self, state: LearnerState, update: Update, settings: td3.Td3Settings) -> LearnerState:
        """Records the episodes from start to end and gives the learner after them."""
        for block in range(0, self._domain.episode_length, _STRIDE):
            # The updates begun after the last block went on while it was simulated; here they are waited for.
            self._simulate(jax.device_get(state.policy.actor), block)
            self._replay.grow(self._first, self._number, block + _STRIDE)
            if self._replay.transitions > _WARM_UP:
                shape = (self._number * _STRIDE // _TRANSITIONS_PER_UPDATE, _BATCH)
                batches = self._replay.sample(self._random, shape, settings.steps, settings.discount)
                state = update(state, batches, jax.random.fold_in(self._key, block))
        return state

    def _simulate(self, actor: td3.Network, block: int) -> None:
        for step in range(block, block + _STRIDE):
            observation = np.stack([recording.observation for recording in self.recordings])
            actions = td3.act(actor, observation) + self._noise[step]
            for recording, action in zip(self.recordings, actions, strict=True):
                recording.step(action)
        for index, recording in enumerate(self.recordings, start=self._first):
            recording.score()
            self._replay.put(index, recording.episode(), self._column)


def _key(seed: int, number: int) -> jax.Array:
    return jax.random.key(int(np.random.default_rng((seed, 4, number)).integers(2**32)))


def _recall(folder: Path, domain: Domain, replay: Replay, column: int, done: int) -> None:
    """Fills the replay with the episodes that the saved learner has learned from."""
    if done == 0:
        return
    with Archive(folder, domain) as archive:
        members = archive.members[:done]
        if [member.number for member in members] != list(range(done)):
            raise UserError(f"{folder}: one of the first {done} episodes is missing: remove the folder and start again")
        for member in members:
            replay.put(member.number, archive.read(member), column)


def _save(folder: Path, done: int, state: LearnerState) -> None:
    content = io.BytesIO()
    np.savez(content, *map(np.asarray, jax.tree.leaves(state)), episodes=done)
    write_whole(folder / _CHECKPOINT, content.getvalue())


def _saved(folder: Path, state: LearnerState) -> tuple[int, LearnerState]:
    """After how many episodes the learner was saved, and its state then; zero and `state` if it never was."""
    path = folder / _CHECKPOINT
    if not path.exists():
        return 0, state
    leaves, structure = jax.tree.flatten(state)
    try:
        with np.load(path, allow_pickle=False) as file:
            saved = [jnp.asarray(file[f"arr_{number}"]) for number in range(len(leaves))]
            if [array.shape for array in saved] != [leaf.shape for leaf in leaves]:
                raise ValueError("the arrays of another learner")
            return int(file["episodes"]), jax.tree.unflatten(structure, saved)
    except MemoryError:
        raise  # which says nothing about the file
    except Exception as error:  # NumPy and zipfile raise nearly anything when the bytes are damaged
        raise UserError(f"{path}: is damaged; remove it, and the collection begins anew") from error
