"""Draws the pictures of docs/attention.md: python docs/draw_attention.py"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from ringrl.attention import LAYOUTS, to_layout

IMAGES = Path(__file__).parent / "images"
DEVICES = 4
COLOURS = ["#4c78a8", "#f58518", "#54a24b", "#b279a2"]


def draw_ring(axes: Axes) -> None:
    """Four devices: queries stay, blocks of keys and values travel."""
    axes.set(xlim=(-1.75, 1.75), ylim=(-1.6, 1.6), aspect="equal")
    axes.axis("off")
    angles = np.pi / 4 + np.arange(DEVICES) * -np.pi / 2
    for device, angle in enumerate(angles):
        x, y = 1.2 * np.cos(angle), 1.0 * np.sin(angle)
        following = angles[(device + 1) % DEVICES]
        arrow = {"arrowstyle": "-|>", "color": COLOURS[device], "lw": 2, "shrinkA": 34, "shrinkB": 34}
        axes.annotate("", (1.2 * np.cos(following), 1.0 * np.sin(following)), (x, y), arrowprops=arrow)
        box = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": COLOURS[device], "lw": 2}
        text = f"device {device}\nkeeps q{device}\nsends k{device}, v{device}"
        axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=box)
    axes.set_title("A hop: attend to the block held while it is on its way", fontsize=10)


def draw_layout(axes: Axes, layout: str) -> None:
    """Causal work: which device computes which queries, and how much of each device's row is visible."""
    tokens = 16
    order = np.asarray(to_layout(np.arange(tokens), layout, DEVICES, axis=0))
    device = np.empty(tokens, int)
    device[order] = np.repeat(np.arange(DEVICES), tokens // DEVICES)
    for query in range(tokens):
        axes.barh(query, query + 1, height=0.9, color=COLOURS[device[query]])
    work = [sum(int(q) + 1 for q in np.flatnonzero(device == d)) for d in range(DEVICES)]
    axes.invert_yaxis()
    axes.set(title=f"{layout}\nwork {' : '.join(map(str, work))}", xlabel="keys seen", xticks=[], yticks=[])
    axes.title.set_fontsize(10)
    axes.spines[:].set_visible(False)


def main() -> None:
    """Write both pictures."""
    plt.rcParams["svg.hashsalt"] = "ringrl"
    figure, axes = plt.subplots(figsize=(4.6, 4.2))
    draw_ring(axes)
    figure.savefig(IMAGES / "attention_ring.svg", bbox_inches="tight", metadata={"Date": None})
    figure, row = plt.subplots(1, len(LAYOUTS), figsize=(9, 3.2), layout="constrained")
    for axes, layout in zip(row, LAYOUTS, strict=True):
        draw_layout(axes, layout)
    row[0].set_ylabel("queries, first to last")
    figure.savefig(IMAGES / "attention_layouts.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
