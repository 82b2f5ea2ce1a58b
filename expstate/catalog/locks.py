"""Locks between processes on small files beside the catalog: the spool, and what is put aside.

They are ``flock``'s: the system lets go of them when a process dies. Where a file system has none, nothing is locked.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from typing import TYPE_CHECKING

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PAUSE_SECONDS = 0.005


@contextlib.contextmanager
def locked(path: Path, flags: int = os.O_RDWR | os.O_CREAT, timeout_seconds: float = 0.0) -> Iterator[int | None]:
    """Open a file and be the only one that has locked it.

    Parameters
    ----------
    path : Path
        The file. One that is removed or renamed while this waits is not it any more, and is opened anew.
    flags : int
        How to open it.
    timeout_seconds : float, default 0
        How long to try.

    Yields
    ------
    int or None
        Its descriptor; None if another has it for so long.

    Raises
    ------
    OSError
        If it cannot be opened.
    """
    until = time.monotonic() + timeout_seconds
    while True:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
        try:
            if _lock(fd) and _is_at(fd, path):
                yield fd
                return
        finally:
            os.close(fd)
        if time.monotonic() >= until:
            yield None
            return
        time.sleep(_PAUSE_SECONDS)


def _lock(fd: int) -> bool:
    if sys.platform != "win32":
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in {errno.EWOULDBLOCK, errno.EACCES, errno.EINTR}
    return True


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
