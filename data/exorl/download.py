"""Download of the public ExoRL archives."""

from collections.abc import Callable
from pathlib import Path

from ringrl.data.exorl.archive import open_zip
from ringrl.data.exorl.transfer import Transfer
from ringrl.envs import domain_named
from ringrl.errors import UserError
from ringrl.pace import Progress, no_progress

PUBLIC_ADDRESS = "https://dl.fbaipublicfiles.com/exorl"
ALGORITHMS = ("aps", "icm_apt", "diayn", "disagreement", "icm", "proto", "random", "rnd", "smm")


def download_archive(
    domain: str,
    algorithm: str,
    folder: str | Path = "datasets",
    *,
    url: str = PUBLIC_ADDRESS,
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
    if algorithm not in ALGORITHMS:
        raise UserError(f"unknown algorithm {algorithm!r}; algorithms: {', '.join(ALGORITHMS)}")
    path = Path(folder) / domain_named(domain).name / f"{algorithm}.zip"
    address = f"{url.rstrip('/')}/{domain}/{algorithm}.zip"
    transfer = Transfer(address, path, timeout, pause, progress, notice)
    if path.exists():
        open_zip(path).close()
        notice(f"{path}: already exists and is whole")
    else:
        transfer.run()
    return path
