"""The episode store: reading, writing and describing one file of episodes."""

from ringrl.data.store.format import Provenance, StoredDomain
from ringrl.data.store.reader import EpisodeStore
from ringrl.data.store.writer import create_store

__all__ = ["EpisodeStore", "Provenance", "StoredDomain", "create_store"]
