"""Datasets: the ExoRL format, relabelling, the episode store, context sampling and local collection."""

from ringrl.data.importer import import_archive
from ringrl.data.relabel import relabel
from ringrl.data.store import EpisodeStore

__all__ = ["EpisodeStore", "import_archive", "relabel"]
