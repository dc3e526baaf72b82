"""Reading planned contexts: any rectangle of a batch, without the other rows of the store."""

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64

from ringrl.context import Context, Outcome
from ringrl.cores import available_cores
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.store.format import reward_key
from ringrl.data.store.reader import EpisodeStore


class ContextPlan(NamedTuple):
    """The trajectories of a batch of contexts: small, and the same on every host.

    Attributes:
      tasks: names of the tasks whose rewards are read (batch,).
      episodes: indices in the store, in the order of the context.
      targets: the first return-to-go of each trajectory; nan for zero throughout.
      completes: whether the return of each trajectory reaches its target.
      starts: time of the first step of each trajectory, and of the padding.
    """

    tasks: np.ndarray
    episodes: Int64[np.ndarray, "batch trajectories"]
    targets: Float64[np.ndarray, "batch trajectories"]
    completes: Bool[np.ndarray, "batch trajectories"]
    starts: Int64[np.ndarray, "batch trajectories_plus_1"]


class _Piece(NamedTuple):
    """Evenly spaced steps of one trajectory, and their place in the batch."""

    context: int
    trajectory: int
    place: int  # index of the first step on the time axis that is read
    length: int
    timestep: int  # of the first step, within the episode
    stride: int  # timesteps between two steps


def read_contexts(
    store: EpisodeStore, normalisation: Normalisation, plan: ContextPlan, times: Int[np.ndarray, " time"]
) -> Context:
    """Return the given time steps of all contexts of a plan, in the given order. Times beyond a context are padding.

    Only these steps' observations and actions are read, and the actions before them. Returns-to-go also need the
    earlier rewards of each episode. Every number is the same in whatever rectangle it is read.

    Raises:
      ValueError: a time below 0.
    """
    if len(times) and times.min() < 0:
        raise ValueError(f"times: expected no time below 0, got {times.min()}")
    reader = _Reader(store, normalisation, plan, times)
    pieces = list(_pieces(plan, times))
    threads = available_cores()
    with ThreadPoolExecutor(threads) as pool:  # NumPy lets other threads run while it copies and computes
        list(pool.map(reader.read, (pieces[i::threads] for i in range(threads))))
    return reader.out


def _pieces(plan: ContextPlan, times: np.ndarray) -> Iterator[_Piece]:
    for place, first, stride, count in _runs(times):
        # The run's j-th step is at first + j * stride; trajectory k has those from cuts[k] up to cuts[k + 1].
        cuts = np.clip(-((first - plan.starts) // stride), 0, count)
        context, trajectory = np.nonzero(np.diff(cuts, axis=1))
        begin, end = cuts[context, trajectory], cuts[context, trajectory + 1]
        timestep = first + begin * stride - plan.starts[context, trajectory]
        strides = np.full_like(begin, stride)
        columns = np.stack([context, trajectory, place + begin, end - begin, timestep, strides], axis=1)
        yield from (_Piece(*values) for values in columns.tolist())


def _runs(times: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """Split times into evenly spaced runs (place, first time, stride, count). Every ring layout gives few of them."""
    if len(times) == 0:
        return
    steps = np.diff(times)
    stride = max(1, int(np.partition(steps, len(steps) // 2)[len(steps) // 2])) if len(steps) else 1
    breaks = np.flatnonzero(steps != stride) + 1
    for place, end in pairwise([0, *breaks.tolist(), len(times)]):
        yield place, int(times[place]), stride, end - place


class _Reader:
    """Writes pieces of trajectories to the batch's arrays. Pieces do not overlap."""

    def __init__(self, store: EpisodeStore, normalisation: Normalisation, plan: ContextPlan, times: np.ndarray) -> None:
        self._observation, self._action = store.arrays["observation"], store.arrays["action"]
        self._rewards = [store.arrays[reward_key(task)] for task in plan.tasks.tolist()]
        self._normalisation = normalisation
        self._first_rows = store.offsets[:-1][plan.episodes].tolist()
        self._last_rows = (store.offsets[1:][plan.episodes] - 1).tolist()
        self._targets, self._completes = plan.targets.tolist(), plan.completes.tolist()
        self.out = _blank(len(plan.episodes), len(times), store.observation_size, store.action_size)
        self.out.position[:] = times

    def read(self, pieces: Iterable[_Piece]) -> None:
        """Copy the given pieces."""
        for piece in pieces:
            self._copy_steps(piece)
            self._fill_in_returns(piece)
            if piece.timestep == 0:
                self._look_back(piece)

    def _copy_steps(self, piece: _Piece) -> None:
        at = piece.context, slice(piece.place, piece.place + piece.length)
        row = self._first_rows[piece.context][piece.trajectory] + piece.timestep
        span = (piece.length - 1) * piece.stride + 1
        # A row of the store holds a state and the outcome of the step before: a step's own outcome is one row later.
        state, outcome = slice(row, row + span, piece.stride), slice(row + 1, row + 1 + span, piece.stride)
        out = self.out
        self._normalisation.observation(self._observation[state], out=np.asarray(out.observation)[at])
        out.action[at] = self._action[outcome]
        reward = self._rewards[piece.context]
        out.reward[at] = self._normalisation.reward(reward[outcome])
        out.previous.action[at] = self._action[state]
        out.previous.reward[at] = self._normalisation.reward(reward[state])
        out.timestep[at] = np.arange(piece.timestep, piece.timestep + span, piece.stride)
        out.trajectory[at] = piece.trajectory
        out.weight[at] = 1

    def _fill_in_returns(self, piece: _Piece) -> None:
        if math.isnan(self._targets[piece.context][piece.trajectory]):
            return
        at = piece.context, slice(piece.place, piece.place + piece.length)
        first, last = (rows[piece.context][piece.trajectory] for rows in (self._first_rows, self._last_rows))
        end = piece.timestep + (piece.length - 1) * piece.stride + 1
        earned = np.zeros(end)  # before each step
        np.cumsum(self._rewards[piece.context][first + 1 : first + end], out=earned[1:])
        left = self._targets[piece.context][piece.trajectory] - earned[piece.timestep :: piece.stride]
        self.out.return_to_go[at] = self._normalisation.return_to_go(left)
        place, rest = divmod(last - 1 - first - piece.timestep, piece.stride)
        if rest == 0 and place < piece.length:  # the piece has the trajectory's last step
            completes = self._completes[piece.context][piece.trajectory]
            self.out.completion[piece.context, piece.place + place] = completes

    def _look_back(self, piece: _Piece) -> None:
        """Set the outcome before a trajectory's first step: that of the trajectory before, or zeros."""
        context, place, previous = piece.context, piece.place, self.out.previous
        if piece.trajectory == 0:
            previous.action[context, place], previous.reward[context, place] = 0, 0
            return
        last = self._last_rows[context][piece.trajectory - 1]
        previous.action[context, place] = self._action[last : last + 1][0]
        previous.reward[context, place] = self._normalisation.reward(self._rewards[context][last : last + 1])[0]
        previous.completion[context, place] = self._completes[context][piece.trajectory - 1]


def _blank(batch: int, time: int, observation_size: int, action_size: int) -> Context:
    """Return a context of padding."""

    def zeros(*shape: int, dtype: type = np.float32) -> np.ndarray:
        return np.zeros((batch, time, *shape), dtype)

    return Context(
        observation=zeros(observation_size),
        action=zeros(action_size),
        reward=zeros(),
        return_to_go=zeros(),
        completion=zeros(),
        timestep=zeros(dtype=np.int32),
        trajectory=zeros(dtype=np.int32),
        position=zeros(dtype=np.int32),
        weight=zeros(),
        previous=Outcome(zeros(action_size), zeros(), zeros()),
    )
