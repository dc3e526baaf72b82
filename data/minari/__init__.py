"""Import and export of Minari datasets. Needs the extra `minari`."""

from ringrl.data.minari.convert import export_minari, import_minari

__all__ = ["export_minari", "import_minari"]
