"""Local collection: datasets in the ExoRL format, recorded here instead of downloaded.

A dataset is the history of a learner, from poor episodes to good ones: a cross-entropy search over the parameters of a
scripted controller (scripted), TD3 under the task's reward (td3), or TD3 under the novelty of states (rnd).
"""

from ringrl.data.collect.run import PRESETS, Method, Preset, Progress, collect, preset_episodes

__all__ = ["PRESETS", "Method", "Preset", "Progress", "collect", "preset_episodes"]
