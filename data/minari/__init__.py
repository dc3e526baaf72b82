"""Importing and exporting Minari datasets. Needs the extra `minari`."""

from ringrl.data.minari.exporter import export_minari
from ringrl.data.minari.importer import import_minari

__all__ = ["export_minari", "import_minari"]
