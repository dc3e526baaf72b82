"""How the scripts' figures are saved."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_svg(figure: "Figure", path: Path) -> None:
    """As SVG whose text stays text, and whose bytes are the same for the same figure."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ringrl"}):
        figure.savefig(path)
