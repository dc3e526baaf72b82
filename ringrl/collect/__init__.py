"""Collection of datasets in the ExoRL format on this machine.

A dataset is the history of a learner, from poor episodes to good ones: a cross-entropy search over the parameters of a
scripted controller, or TD3.
"""

from ringrl.collect.collection import collect

__all__ = ["collect"]
