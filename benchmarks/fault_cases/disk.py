"""A disk that can be filled: a small tmpfs where one may be mounted, else a limit on the size of files."""

import os
import resource
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

SIZE = 64 * 2**20  # bytes
PAGE = 4096  # what a file takes of a tmpfs at least
_MOUNT = ("mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs")


def go_on_in_own_namespace() -> None:
    """Start this script anew in a mount namespace: what is mounted there is seen by, and ends with, it alone.

    Returns where that is not allowed, and nothing may be mounted.
    """
    flags = ["--mount"] if os.geteuid() == 0 else ["--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") and not subprocess.run(["unshare", *flags, *_MOUNT, "/mnt"], check=False).returncode:
        os.execvp("unshare", ["unshare", *flags, sys.executable, *sys.argv, "--inside"])


class Disk:
    """A folder on a file system that can be filled, and emptied again."""

    kind = "a tmpfs of 64 MiB"

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        subprocess.run([*_MOUNT, folder], check=True)
        self._ballast = folder / "ballast"

    def fill(self, pid: int, leave: int = 0) -> None:
        """Take all of it but so many bytes."""
        free = os.statvfs(self.folder).f_bavail * PAGE
        # Where the command is quicker than this, the rest is filled page by page.
        with self._ballast.open("ab") as file, suppress(OSError):
            os.posix_fallocate(file.fileno(), file.tell(), max(PAGE, free - leave - 16 * PAGE))
        while os.statvfs(self.folder).f_bavail * PAGE > leave:
            with self._ballast.open("ab") as file:
                try:
                    file.write(bytes(PAGE))
                except OSError:
                    return

    def free(self) -> None:
        """Give all that was taken."""
        self._ballast.unlink(missing_ok=True)


class Limit(Disk):
    """No disk is filled, but files may not grow: writing fails with EFBIG where it would with ENOSPC."""

    kind = "a limit on the size of files (RLIMIT_FSIZE)"

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder

    def fill(self, pid: int, leave: int = 0) -> None:
        """Of the process alone, not of those that it has started."""
        resource.prlimit(pid or os.getpid(), resource.RLIMIT_FSIZE, (leave, resource.RLIM_INFINITY))

    def free(self) -> None:
        """Nothing is taken."""
