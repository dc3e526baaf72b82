"""Small real data, collected by RingRL itself: what all commands work on."""

import zipfile
from pathlib import Path

from fault_cases.process import run

TASK, DOMAIN = "jaco_reach_top_left", "jaco"
COLLECTED, COPIES = 12, 10  # episodes that are recorded, and how often each stands in the long archive
TINY = [
    "--model.layers=1", "--model.width=16", "--model.token-set=fused1", "--context.trajectories=2",
    "--optimiser.batch-size=2", "--optimiser.warmup-steps=2",
]  # fmt: skip


def make_material(folder: Path) -> Path:
    """A folder with `rnd.zip` (12 episodes), `long` (120, the same ones) and `jaco.h5`; one that is there stays.

    RuntimeError if that fails.
    """
    if (folder / "long").exists():
        return folder
    _run("data", "collect", TASK, "--output", str(folder / "collected"), "--episodes", str(COLLECTED))
    _run("data", "import", str(folder / "collected"), "--domain", DOMAIN, "--output", str(folder / "jaco.h5"))
    files = sorted((folder / "collected" / "buffer").iterdir())
    with zipfile.ZipFile(folder / "rnd.zip", "w") as archive:
        for file in files:
            archive.write(file, f"buffer/{file.name}")
    (folder / "long").mkdir()
    for number in range(COLLECTED * COPIES):
        file = files[number % COLLECTED]
        length = file.stem.rpartition("_")[2]
        (folder / "long" / f"episode_{number:06d}_{length}.npz").hardlink_to(file)
    return folder


def _run(*arguments: str) -> None:
    ended = run(arguments)
    if ended.code:
        raise RuntimeError(f"ringrl {' '.join(arguments)}: {ended.error}")
