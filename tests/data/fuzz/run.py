"""Read fuzzed archives or stores in a separate process: python run.py archives|stores SEEDS FOLDER.

Prints one JSON object per case. The output ends at a case that takes too long or ends the process.
"""

import faulthandler
import json
import resource
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import archives
import stores

from ringrl.data import EpisodeStore, import_archive
from ringrl.data.store import Provenance, create_store
from ringrl.envs import DOMAINS
from ringrl.errors import UserError

SECONDS = 20


def main(what: str, seeds: int, folder: Path) -> None:
    """Try so many cases of every kind."""
    for kind, seed, outcome, message in (try_archives if what == "archives" else try_stores)(seeds, folder):
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            json.dumps({"kind": kind, "seed": seed, "outcome": outcome, "message": message, "kilobytes": grown}),
            flush=True,
        )


def good_episodes() -> archives.Good:
    """Return two episodes of random numbers that can be relabelled."""
    random, good = np.random.default_rng(0), {}
    for number in (0, 1):
        rows = {
            key: random.normal(size=(1001, width)) for key, width in zip(archives.KEYS, (5, 1, 1, 1, 4), strict=True)
        }
        episode = {key: array.astype("f8" if key == "physics" else "f4") for key, array in rows.items()}
        episode["action"][0] = episode["reward"][0] = 0
        episode["action"] = np.tanh(episode["action"])
        episode["discount"][:] = 1
        good[f"buffer/episode_{number:06d}_1000.npz"] = episode
    return good


def cases(kinds: tuple, seeds: int, folder: Path) -> Iterator[tuple]:
    """Yield (kind, seed, random generator, empty folder) of every case, with a time limit."""
    for number, kind in enumerate(kinds):
        for seed in range(seeds):
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            place = folder / "case"
            place.mkdir()
            yield kind, seed, np.random.default_rng([number, seed]), place
            shutil.rmtree(place)
    faulthandler.cancel_dump_traceback_later()


def try_archives(seeds: int, folder: Path) -> Iterator[tuple]:
    """Import every archive. The store must have all good episodes."""
    good = good_episodes()
    for kind, seed, random, place in cases(archives.KINDS, seeds, folder):
        source = kind(place, good, random)
        try:
            store = import_archive(source, place / "out" / "a.h5", "cartpole")
            store.verify()
            outcome, message = judge_import(store, list(good.values())), ""
        except UserError as error:
            left = list((place / "out").iterdir()) if (place / "out").exists() else []
            outcome, message = (f"fault: left {left}" if left else "rejected"), str(error)
        except Exception:
            outcome, message = "fault: traceback", traceback.format_exc()
        if (place / "trap").exists() or Path("trap").exists():
            outcome = "fault: a pickle or a header was run"
        yield kind.__name__, seed, outcome, message


def judge_import(store: EpisodeStore, good: list) -> str:
    """Return "same" for the good episodes in order, otherwise the fault."""
    found = []
    for index in range(store.num_episodes):
        rows = store.episode(index)
        same = [i for i, episode in enumerate(good) if all(np.array_equal(rows[key], episode[key]) for key in episode)]
        if not same:
            return f"fault: episode {index} has other content"
        found.append(same[0])
    return "same" if found == list(range(len(good))) else f"fault: holds {found}"


def try_stores(seeds: int, folder: Path) -> Iterator[tuple]:
    """Open and verify every store. A store without an error must have the good content."""
    path = folder / "good.h5"
    write_good_store(path)
    good = facts(EpisodeStore(path))
    for kind, seed, random, place in cases(stores.KINDS, seeds, folder):
        fuzzed = Path(shutil.copy(path, place / "fuzzed.h5"))
        kind(fuzzed, random)
        outcome, message = "rejected", ""
        try:
            store = EpisodeStore(fuzzed)
            outcome = "found by verify"
            store.verify()
            outcome = "same" if facts(store) == good else "fault: other content"
        except UserError as error:
            message = str(error)
        except Exception:
            outcome, message = "fault: traceback", traceback.format_exc()
        yield kind.__name__, seed, outcome, message


def write_good_store(path: Path) -> None:
    """Four short cartpole episodes of random numbers."""
    random, tasks, lengths = np.random.default_rng(0), DOMAINS["cartpole"].tasks, [20, 7, 1, 30]
    with create_store(path, DOMAINS["cartpole"], tasks, lengths, source=Provenance("made/up.zip")) as writer:
        for length in lengths:
            rows = {
                k: random.random((length + 1, w), np.float32) for k, w in zip(archives.KEYS, (5, 1, 1, 1), strict=False)
            }
            rows["physics"] = random.random((length + 1, 4))
            writer.append(rows | {f"reward/{task}": random.random(length + 1, np.float32) for task in tasks})
        writer.recorded_task = "cartpole_swingup"


def facts(store: EpisodeStore) -> dict:
    """Return all content of a store."""
    return {
        "arrays": {key: array.tobytes() for key, array in store.arrays.items()},
        "returns": {task: store.returns(task).tobytes() for task in store.tasks},
        "offsets": store.offsets.tolist(),
        "facts": (store.domain, store.tasks, store.recorded_task, store.fingerprint, store.provenance),
    }


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
