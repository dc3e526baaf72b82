"""The ExoRL format: reading, checking, importing and downloading archives."""

from ringrl.data.exorl.archive import Archive, save_episode
from ringrl.data.exorl.importer import import_archive

__all__ = ["Archive", "import_archive", "save_episode"]
