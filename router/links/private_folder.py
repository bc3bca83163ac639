"""A folder for sockets that only this user may enter."""

import os
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR, filemode


def make_private(directory: Path) -> None:
    """Create the folder if need be, closed to all others.

    Raises ValueError if it is there, and not one of this user, closed to all others, or a symbolic link.
    """
    with suppress(FileExistsError):  # whatever it is
        directory.mkdir(mode=0o700, parents=True)
    status = directory.lstat()
    if not S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ValueError(
            f"directory {str(directory)!r} (owner {status.st_uid}, mode {filemode(status.st_mode)}) must be "
            f"a folder of user {os.geteuid()}, closed to all others; run chmod 700 on it, or remove it"
        )
