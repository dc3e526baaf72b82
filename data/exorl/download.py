"""Download of the public ExoRL archives, and their import into stores.

`datasets/walker/rnd.zip` is an archive and `datasets/walker/rnd.h5` its store. A whole archive is not downloaded again,
and a store is not imported again.
"""

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from ringrl.data.exorl.archive import Archive, open_zip
from ringrl.data.exorl.importer import import_archive
from ringrl.data.exorl.transfer import Transfer
from ringrl.data.store import EpisodeStore
from ringrl.data.store.writer import finished_store
from ringrl.envs import domain_named
from ringrl.errors import UserError
from ringrl.pace import Progress, no_progress

PUBLIC_ADDRESS = "https://dl.fbaipublicfiles.com/exorl"
ALGORITHMS = ("aps", "icm_apt", "diayn", "disagreement", "icm", "proto", "random", "rnd", "smm")
# Upper bound on the bytes of a store per byte of its archive: 1.4 for cartpole, 1.1 to 1.2 for other domains. The
# import reserves the exact size.
STORE_SHARE = 1.5


def download_archive(
    domain: str,
    algorithm: str,
    folder: str | Path = "datasets",
    *,
    url: str = PUBLIC_ADDRESS,
    spare: float = 0.0,
    timeout: float = 30.0,
    pause: float = 1.0,
    progress: Progress = no_progress,
    notice: Callable[[str], None] = lambda event: None,
) -> Path:
    """Download `{url}/{domain}/{algorithm}.zip` to `{folder}/{domain}/{algorithm}.zip` and return that path.

    An interrupted download resumes. An existing archive is kept. `algorithm` is one of ALGORITHMS. See `Transfer` for
    the other arguments.

    Raises:
        UserError: unknown names, another file in place of the archive, and the errors of `Transfer.run`.
    """
    path = _archive_path(domain, algorithm, folder)
    address = f"{url.rstrip('/')}/{domain}/{algorithm}.zip"
    transfer = Transfer(address, path, spare, timeout, pause, progress, notice)
    if path.exists():
        open_zip(path).close()
        notice(f"{path}: already exists and is whole")
    else:
        transfer.run()
    return path


def download_store(
    domain: str,
    algorithm: str,
    folder: str | Path = "datasets",
    *,
    delete_archive: bool = False,
    url: str = PUBLIC_ADDRESS,
    timeout: float = 30.0,
    pause: float = 1.0,
    progress: Progress = no_progress,
    import_progress: Progress = no_progress,
    notice: Callable[[str], None] = lambda event: None,
) -> EpisodeStore:
    """Download an archive and import it, without unpacking, into `{folder}/{domain}/{algorithm}.h5`.

    An existing store is opened without a download. `delete_archive` deletes the archive after all bytes of the store
    were compared with their checksums. `import_progress` is called with (finished episodes, total). See
    `download_archive` for the other arguments.

    Raises:
        UserError: as `download_archive` and `import_archive`, and for an existing store of another dataset.
    """
    archive = _archive_path(domain, algorithm, folder)
    path = archive.with_suffix(".h5")
    if path.exists():
        store = _the_store_of(archive, path, domain)
        finished_store(path, store.provenance)  # deletes what a kill left
        notice(f"{path}: already exists, imported from {store.source}")
    else:
        options: dict[str, Any] = {"timeout": timeout, "pause": pause, "progress": progress, "notice": notice}
        download_archive(domain, algorithm, folder, url=url, spare=STORE_SHARE, **options)
        store = import_archive(archive, path, domain, progress=import_progress)
    if delete_archive and archive.exists():
        _delete_archive(archive, store)
        notice(f"{archive}: removed, its episodes are in {path}")
    return store


def _archive_path(domain: str, algorithm: str, folder: str | Path) -> Path:
    if algorithm not in ALGORITHMS:
        raise UserError(f"unknown algorithm {algorithm!r}; there are {', '.join(ALGORITHMS)}")
    return Path(folder) / domain_named(domain).name / f"{algorithm}.zip"


def _the_store_of(archive: Path, path: Path, domain: str) -> EpisodeStore:
    store = EpisodeStore(path)
    made = store.provenance
    if store.domain != domain or PurePosixPath(store.source).name != archive.name:
        raise UserError(
            f"{path}: was imported from {store.source} ({store.domain}), not from {domain}/{archive.name}: "
            "move it away or choose another --output"
        )
    if made.relabelling != "control_aware" or not made.subset.startswith("all "):
        raise UserError(
            f"{path}: holds {made.subset} with {made.relabelling} rewards, but this command imports all episodes with "
            "control_aware rewards: move it away or choose another --output"
        )
    return store


def _delete_archive(archive: Path, store: EpisodeStore) -> None:
    """Delete the archive if the store is whole and has all episodes of the archive."""
    store.verify()
    with Archive(archive, store.facts) as opened:
        episodes, listing = len(opened.members), opened.listing_sha256()
    if listing != store.provenance.source_sha256 or episodes != store.num_episodes:
        raise UserError(
            f"{archive}: {store.path} was not imported from all of its episodes. Archive kept, import it again"
        )
    archive.unlink()
