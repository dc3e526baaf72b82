"""The report's colours, and Matplotlib drawings turned into SVG and PDF.

Only Matplotlib's object interface is used, so that nothing global changes. Every colour comes from PALETTE; for the
page the light colour is replaced by a CSS variable of the same name: one drawing serves light and dark.
"""

import io
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import matplotlib
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# name -> (light, dark); no two light colours are equal, for they are told apart by their value.
PALETTE: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "paper": ("#fdfdfc", "#14161a"),
        "ink": ("#1c2128", "#e6e8eb"),
        "muted": ("#646b76", "#9aa2ad"),
        "line": ("#e3e5e8", "#2a2f37"),
        "series-1": ("#2458c5", "#7ea8ff"),
        "series-2": ("#c2541b", "#f39a63"),
        "series-3": ("#19806a", "#50c8ab"),
        "series-4": ("#8447b3", "#c79bea"),
        "series-5": ("#b0335b", "#f28cac"),
        "series-6": ("#7a6914", "#d9c45c"),
    }
)
SERIES = tuple(name for name in PALETTE if name.startswith("series"))

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: the page's own font, searchable, small
    "pdf.fonttype": 42,  # whole letters, as publishers ask
    "svg.hashsalt": "ringrl",  # the same drawing gives the same file
    "font.family": ["sans-serif"],
    "font.size": 9,
    "axes.linewidth": 0.8,
    "text.parse_math": False,  # a name with a dollar sign is a name
}


def colour(name: str) -> str:
    """The light colour of this name in PALETTE."""
    return PALETTE[name][0]


def settings() -> Any:
    """Context in which figures are made and rendered; outside of it Matplotlib is as it was."""
    return matplotlib.rc_context(_SETTINGS)


def to_svg(figure: Figure) -> str:
    """A figure as an SVG file without a background, the same text for the same figure."""
    figure.patch.set_visible(False)
    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    return re.sub(r"(\d\.\d\d)\d+", r"\1", text.getvalue())  # hundredths of a point are enough, in a third of the size


def to_pdf(figure: Figure) -> bytes:
    """The same as a PDF file."""
    figure.patch.set_visible(False)
    content = io.BytesIO()
    FigureCanvasPdf(figure).print_pdf(content, metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return content.getvalue()


def for_page(svg: str, prefix: str) -> str:
    """An SVG for inside the page: colours from CSS variables, size from its place, ids that no other figure has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for name, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{name})")
    for reference in ('id="', 'href="#', "url(#"):
        svg = svg.replace(reference, f"{reference}{prefix}-")
    head, body = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} aria-hidden="true">{body}'.replace("sans-serif", "inherit")
