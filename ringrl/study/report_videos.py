"""The videos that `ringrl evaluate --video` left beside the results, copied to beside the page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ringrl.evaluation.records import VIDEOS, Results, evaluation_name
from ringrl.study.report_cells import Grid
from ringrl.study.tables import describe

LABELS = ("first", "median", "best")
FOLDER = "videos"


@dataclass(frozen=True)
class Video:
    """One episode."""

    label: str  # first, median, best
    source: Path
    target: str  # relative to the page


@dataclass(frozen=True)
class Reel:
    """The videos of one method at one context length on one task, of one training seed."""

    task: str
    method: str
    seed: int
    videos: tuple[Video, ...]


def reels(read: Results, grid: Grid) -> list[Reel]:
    """Of each cell that has any, the videos of its lowest seed."""
    beside: Sequence[Path] = [source.with_suffix(VIDEOS) for source in read.sources]
    found = []
    for cell in grid.cells:
        for record in sorted(cell.records, key=lambda record: record.seed):
            name = evaluation_name(record)
            if not record.evaluation or Path(name).name != name:  # a name that leads elsewhere is none of ours
                continue
            folder = next((place / name for place in beside if (place / name).is_dir()), None)
            videos = [] if folder is None else _videos(folder, name)
            if videos:
                found.append(Reel(cell.task, describe(grid, cell), record.seed, tuple(videos)))
                break
    return found


def _videos(folder: Path, name: str) -> list[Video]:
    files = [(label, folder / f"{label}.mp4") for label in LABELS]
    return [
        Video(label, file, f"{FOLDER}/{name}.{label}.mp4")
        for label, file in files
        if file.is_file() and file.stat().st_size  # an empty one is half-written
    ]
