"""Download of the public ExoRL archives, and their import into stores.

`datasets/walker/rnd.zip` is an archive and `datasets/walker/rnd.h5` its store. A whole archive is not downloaded again,
and a store is not imported again.
"""

import difflib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from ringrl.data.exorl.archive import Archive, open_zip
from ringrl.data.exorl.importer import import_archive
from ringrl.data.exorl.transfer import Transfer
from ringrl.data.store import EpisodeStore
from ringrl.data.store.writer import finished_store
from ringrl.envs import DOMAINS, Domain, domain_named
from ringrl.errors import UserError

PUBLIC_ADDRESS = "https://dl.fbaipublicfiles.com/exorl"
ALGORITHMS = ("aps", "icm_apt", "diayn", "disagreement", "icm", "proto", "random", "rnd", "smm")
KNOWN_SIZES = {("walker", "rnd"): 2_585_461_986}  # bytes
# Upper bound on the bytes of a store per byte of its archive: 1.4 for cartpole, 1.1 to 1.2 for other domains. The
# import reserves the exact size.
STORE_SHARE = 1.5

Progress = Callable[[int, int], None]
Notice = Callable[[str], None]


def _ignore(*_: object) -> None:
    """Ignore progress and notices."""


def download_archive(
    domain: str,
    algorithm: str,
    folder: str | Path = "datasets",
    *,
    url: str = PUBLIC_ADDRESS,
    spare: float = 0.0,
    timeout: float = 30.0,
    pause: float = 1.0,
    progress: Progress = _ignore,
    notice: Notice = _ignore,
) -> Path:
    """Download `{url}/{domain}/{algorithm}.zip` to `{folder}/{domain}/{algorithm}.zip` and return that path.

    An interrupted download resumes. An existing archive is kept. `algorithm` is one of ALGORITHMS. See `Transfer` for
    the other arguments.

    Raises:
        UserError: unknown names, another file in place of the archive, and the errors of `Transfer.run`.
    """
    found = domain_named(domain)
    path = _archive_path(found, algorithm, folder)
    known_size = KNOWN_SIZES.get((found.name, algorithm))
    transfer = Transfer(
        f"{url.rstrip('/')}/{found.name}/{algorithm}.zip",
        path,
        check=_require_zip,
        known_size=known_size,
        spare=spare,
        advice=f"known are {', '.join(DOMAINS)} with {', '.join(ALGORITHMS)}, check --url",
        timeout=timeout,
        pause=pause,
        progress=progress,
        notice=notice,
    )
    if path.exists():
        try:
            _require_zip(path)
        except UserError as error:
            raise UserError(f"{error} (or move it away to download it again)") from error
        size = path.stat().st_size
        if known_size not in (None, size):
            raise UserError(
                f"{path}: has {size:,} bytes, the public archive {known_size:,}: move it away or choose another "
                "--output"
            )
        with suppress(UserError):
            transfer.run()  # deletes what a kill left
        notice(f"{path}: already exists and is whole")
        return path
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
    progress: Progress = _ignore,
    import_progress: Progress = _ignore,
    notice: Notice = _ignore,
) -> EpisodeStore:
    """Download an archive and import it, without unpacking, into `{folder}/{domain}/{algorithm}.h5`.

    An existing store is opened without a download. `delete_archive` deletes the archive after all bytes of the store
    were compared with their checksums. `import_progress` is called with (finished episodes, total). See
    `download_archive` for the other arguments.

    Raises:
        UserError: as `download_archive` and `import_archive`, and for an existing store of another dataset.
    """
    found = domain_named(domain)
    archive = _archive_path(found, algorithm, folder)
    path = archive.with_suffix(".h5")
    if path.exists():
        store = _the_store_of(archive, path, found)
        finished_store(path, store.provenance)  # deletes what a kill left
        notice(f"{path}: already exists, imported from {store.source}")
    else:
        options: dict[str, Any] = {"timeout": timeout, "pause": pause, "progress": progress, "notice": notice}
        download_archive(domain, algorithm, folder, url=url, spare=STORE_SHARE, **options)
        store = import_archive(archive, path, found.name, progress=import_progress)
    if delete_archive and archive.exists():
        _delete_archive(archive, store, found)
        notice(f"{archive}: removed, its episodes are in {path}")
    return store


def _archive_path(domain: Domain, algorithm: str, folder: str | Path) -> Path:
    if algorithm not in ALGORITHMS:
        near = difflib.get_close_matches(algorithm.lower(), ALGORITHMS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(ALGORITHMS)}"
        raise UserError(f"unknown algorithm {algorithm!r}; {hint}")
    return Path(folder) / domain.name / f"{algorithm}.zip"


def _require_zip(path: Path) -> None:
    """Check the list of names only. The import compares all bytes with their checksums."""
    open_zip(path).close()


def _the_store_of(archive: Path, path: Path, domain: Domain) -> EpisodeStore:
    store = EpisodeStore(path)
    made = store.provenance
    if store.domain != domain.name or PurePosixPath(store.source).name != archive.name:
        raise UserError(
            f"{path}: was imported from {store.source} ({store.domain}), not from {domain.name}/{archive.name}: "
            "move it away or choose another --output"
        )
    if made.relabelling != "control_aware" or not made.subset.startswith("all "):
        raise UserError(
            f"{path}: holds {made.subset} with {made.relabelling} rewards, but this command imports all episodes with "
            "control_aware rewards: move it away or choose another --output"
        )
    return store


def _delete_archive(archive: Path, store: EpisodeStore, domain: Domain) -> None:
    """Delete the archive if the store is whole and has all episodes of the archive."""
    store.verify()
    with Archive(archive, domain) as opened:
        episodes, listing = len(opened), opened.listing_sha256()
    if listing != store.provenance.source_sha256 or episodes != store.num_episodes:
        raise UserError(
            f"{archive}: {store.path} was not imported from all of its episodes. Archive kept, import it again"
        )
    archive.unlink()
