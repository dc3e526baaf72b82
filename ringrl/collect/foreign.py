"""Recording of episodes in environments of other packages, which may end before their limit of steps."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from ringrl.data.foreign import with_reset
from ringrl.data.store.format import Episode
from ringrl.envs import ForeignDomain, ForeignEnv
from ringrl.errors import UserError, brief
from ringrl.files import explain_read_errors, write_whole


class ForeignRecording:
    """An episode that is being recorded, from the seed `start`. Until it ends, nothing else may use the environment.

    Raises:
        UserError: the environment raised an exception, or gave a number that is not finite. The message names the step.
    """

    def __init__(self, environment: ForeignEnv, start: int) -> None:
        self.steps, self.has_ended = 0, False
        self._environment, self._start = environment, start
        domain, rows = environment.domain, environment.domain.episode_length + 1
        self._rows = _empty_rows(domain, rows)
        self._rows["observation"][0], _ = self._call("reset", seed=start)

    @property
    def observation(self) -> Float32[np.ndarray, " observation"]:
        """Observation of the current state."""
        return self._rows["observation"][self.steps]

    def step(self, action: Float[np.ndarray, " action"]) -> None:
        """Take a step and record it. The action is clipped to [-1, 1]. Nothing happens after the end."""
        if self.has_ended:
            return
        action = np.clip(action, -1, 1).astype(np.float32)
        observation, reward, terminated, truncated, _ = self._call("step", action)
        self.steps, self.has_ended = self.steps + 1, terminated or truncated
        rows = {"observation": observation, "action": action, "reward": reward, "discount": not terminated}
        for name, value in rows.items():
            self._rows[name][self.steps] = value

    def score(self) -> None:
        """Do nothing: `step` has recorded the rewards."""

    def episode(self) -> Episode:
        """Return arrays as `EpisodeRecording.episode`, without physics. Rows after the last step are zero."""
        return self._rows

    def save(self, folder: Path, number: int) -> None:
        """Write the episode as a file for `ringrl data import --format npz`: T + 1 observations, T actions and rewards.

        Actions are as the environment takes them.
        """
        steps, content = slice(1, self.steps + 1), io.BytesIO()
        np.savez_compressed(
            content,
            observation=self._rows["observation"][: self.steps + 1],
            action=self._environment.domain.taken(self._rows["action"][steps]),
            reward=self._rows["reward"][steps, 0],
            terminated=self._rows["discount"][steps, 0] == 0,
        )
        write_whole(folder / f"episode_{number:06d}_{self.steps}.npz", content.getvalue())

    def _call(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        try:
            observation, *others = getattr(self._environment, name)(*arguments, **keywords)
            if not np.isfinite(np.append(observation, others[0] if name == "step" else 0.0)).all():
                raise ValueError("its observation or reward is not finite")
            return observation, *others
        except (Exception, SystemExit) as error:  # an environment may raise anything
            where = f"{self._environment.task}: {name} {self.steps} of the episode from seed {self._start}"
            raise UserError(
                f"{where} failed ({type(error).__name__}: {brief(error)}); correct the environment"
            ) from error


def saved_episode(folder: Path, number: int, domain: ForeignDomain) -> tuple[Episode, int]:
    """Return the arrays of an episode that `ForeignRecording.save` wrote, and its steps. UserError if it is damaged."""
    with explain_read_errors(f"{folder}: episode {number}", "remove the folder and start again"):
        (path,) = folder.glob(f"episode_{number:06d}_*.npz")
        with np.load(path, allow_pickle=False) as file:
            given = {name: file[name] for name in file.files}
    rows = _empty_rows(domain, len(given["observation"]))
    rows["observation"][:] = given["observation"]
    rows["action"][:] = with_reset(domain.scaled(given["action"]))
    rows["reward"][1:, 0] = given["reward"]
    rows["discount"][1:, 0] = ~given["terminated"]
    return rows, len(given["reward"])


def _empty_rows(domain: ForeignDomain, rows: int) -> dict[str, np.ndarray]:
    widths = {"observation": domain.observation_size, "action": domain.action_size, "reward": 1}
    return {name: np.zeros((rows, width), np.float32) for name, width in widths.items()} | {
        "discount": np.ones((rows, 1), np.float32)
    }
