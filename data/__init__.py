"""Datasets: the episode store, the ExoRL format, relabelling, sampling and Minari."""

from ringrl.data.exorl.importer import import_archive
from ringrl.data.foreign import write_episodes
from ringrl.data.relabel import relabel
from ringrl.data.store.reader import EpisodeStore

__all__ = ["EpisodeStore", "import_archive", "relabel", "write_episodes"]
