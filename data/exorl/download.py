"""Downloading the public ExoRL archives, and importing them into stores.

`datasets/walker/rnd.zip` is the archive and `datasets/walker/rnd.h5` its store. A whole archive or store is never
fetched or imported again.
"""

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from ringrl.data.exorl.archive import Archive, open_zip
from ringrl.data.exorl.importer import import_archive
from ringrl.data.exorl.transfer import PATIENT, Patience, Transfer
from ringrl.data.store import EpisodeStore
from ringrl.envs import DOMAINS, Domain, domain_named
from ringrl.errors import UserError

PUBLIC_ADDRESS = "https://dl.fbaipublicfiles.com/exorl"
ALGORITHMS = ("aps", "icm_apt", "diayn", "disagreement", "icm", "proto", "random", "rnd", "smm")
KNOWN_SIZES: Mapping[tuple[str, str], int] = MappingProxyType({("walker", "rnd"): 2_585_461_986})  # bytes
# Bytes of a store for each byte of its archive: 1.4 for cartpole, whose episodes compress best, 1.1 to 1.2 for the
# others. A first guess: the import itself reserves the exact size.
STORE_SHARE = 1.5

Progress = Callable[[int, int], None]
Notice = Callable[[str], None]


def _ignore(*_: object) -> None:
    """The progress and the notice of a caller who wants none."""


def download_archive(
    domain: str,
    algorithm: str,
    folder: str | Path = "datasets",
    *,
    url: str = PUBLIC_ADDRESS,
    spare: float = 0.0,
    patience: Patience = PATIENT,
    progress: Progress = _ignore,
    notice: Notice = _ignore,
) -> Path:
    """Fetch `{url}/{domain}/{algorithm}.zip` to `{folder}/{domain}/{algorithm}.zip` and return that path.

    An interrupted download is resumed, and a whole archive is not fetched again.

    `algorithm` is one of ALGORITHMS, and `folder` the parent folder of all archives. The other arguments are those of
    `Transfer`.

    Raises:
        UserError: unknown names, a file of that name that is not the archive, and the errors of `Transfer.run`.
    """
    found = domain_named(domain)
    path = _archive_path(found, algorithm, folder)
    known_size = KNOWN_SIZES.get((found.name, algorithm))
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
        notice(f"{path}: already exists and is whole")
        return path
    Transfer(
        f"{url.rstrip('/')}/{found.name}/{algorithm}.zip",
        path,
        check=_require_zip,
        known_size=known_size,
        spare=spare,
        advice=f"known are {', '.join(DOMAINS)} with {', '.join(ALGORITHMS)}, check --url",
        patience=patience,
        progress=progress,
        notice=notice,
    ).run()
    return path


def download_store(
    domain: str,
    algorithm: str,
    folder: str | Path = "datasets",
    *,
    delete_archive: bool = False,
    url: str = PUBLIC_ADDRESS,
    patience: Patience = PATIENT,
    progress: Progress = _ignore,
    import_progress: Progress = _ignore,
    notice: Notice = _ignore,
) -> EpisodeStore:
    """Fetch an archive and import it, without unpacking, into `{folder}/{domain}/{algorithm}.h5`.

    An existing store is opened, and nothing is fetched. `delete_archive` removes the archive after the whole store has
    been read back and compared with its checksums. `import_progress` is called with (episodes done, episodes in all).
    The other arguments are those of `download_archive`. Raises UserError as `download_archive` and `import_archive` do,
    and for an existing store of another dataset.
    """
    found = domain_named(domain)
    archive = _archive_path(found, algorithm, folder)
    path = archive.with_suffix(".h5")
    if path.exists():
        store = _the_store_of(archive, path, found)
        notice(f"{path}: already exists, imported from {store.source}")
    else:
        download_archive(
            domain, algorithm, folder, url=url, spare=STORE_SHARE, patience=patience, progress=progress, notice=notice
        )
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
    """Read the end of the file only. The import reads every byte and compares it with its checksum."""
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
    """Remove the archive if the store is whole and has all of its episodes."""
    store.verify()
    with Archive(archive, domain) as opened:
        episodes, listing = len(opened), opened.listing_sha256()
    if listing != store.provenance.source_sha256 or episodes != store.num_episodes:
        raise UserError(
            f"{archive}: {store.path} was not imported from all of its episodes. Archive kept, import it again"
        )
    archive.unlink()
