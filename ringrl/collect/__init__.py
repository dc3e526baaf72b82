"""Collection of datasets in the ExoRL format on this machine: the histories of learners, from poor episodes to good."""

from ringrl.collect.collection import collect

__all__ = ["collect"]
