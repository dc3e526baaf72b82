"""Local collection: datasets in the ExoRL format, recorded here in seconds instead of downloaded.

A dataset is the history of a small learner: a cross-entropy search over the parameters of a scripted controller, with
exploration noise, from poor episodes to good ones.
"""

from ringrl.data.collect.run import Progress, collect

__all__ = ["Progress", "collect"]
