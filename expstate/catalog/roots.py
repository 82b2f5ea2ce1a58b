"""The folders that takes went to: ``roots.txt`` outside the database, to which lines are only ever added.

With it a scan finds all snapshots when the catalog is lost.
"""

from __future__ import annotations

import json
import os
import re
import threading
from typing import TYPE_CHECKING

from expstate.catalog import locks

if TYPE_CHECKING:
    from pathlib import Path

    from expstate.catalog.place import CatalogPlace

_LOCK_SECONDS = 1.0
_UNFIT = re.compile("[\0-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")
_lock = threading.Lock()
_known: dict[Path, tuple[tuple[int, int], int, set[str]]] = {}


def root_of(url: str) -> str:
    """The folder that a snapshot's folder is in.

    >>> root_of("/data/run-7/step-1"), root_of("s3://bucket/step-1"), root_of("/step-1")
    ('/data/run-7', 's3://bucket', '/')
    """
    scheme, separator, rest = url.rpartition("://")
    folder, slash, _ = rest.rstrip("/").rpartition("/")
    return scheme + separator + (folder or slash or rest)


def add(place: CatalogPlace, url: str) -> None:
    """Remember where a snapshot was taken to.

    Parameters
    ----------
    place : CatalogPlace
        Of the catalog that its record goes to.
    url : str
        The snapshot's.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    root = root_of(url)
    with _lock:
        if root in _roots(place.roots):
            return
        place.roots.parent.mkdir(parents=True, exist_ok=True)
        with locks.locked(place.roots, os.O_RDWR | os.O_CREAT | os.O_APPEND, _LOCK_SECONDS) as fd:
            if fd is None:
                msg = f"another process does not let go of {str(place.roots)!r}"
                raise TimeoutError(msg)
            size = os.fstat(fd).st_size
            start = "\n" if size and os.pread(fd, 1, size - 1) != b"\n" else ""
            os.write(fd, f"{start}{_written(root)}\n".encode())
        _roots(place.roots).add(root)


def read(place: CatalogPlace) -> tuple[str, ...]:
    """All folders that takes went to, in the order in which they came."""
    try:
        text = place.roots.read_text("utf-8", errors="replace")
    except OSError:
        return ()
    return tuple(dict.fromkeys(_read(line) for line in text.split("\n") if line))


def _roots(path: Path) -> set[str]:
    """The folders in a file, which is read when it is not the one that this process knows, or has become shorter."""
    try:
        found = path.stat()
    except OSError:
        return set()
    known = _known.get(path)
    if known is None or known[0] != (found.st_dev, found.st_ino) or known[1] > found.st_size:
        lines = path.read_text("utf-8", errors="replace").split("\n")
        known = _known[path] = ((found.st_dev, found.st_ino), found.st_size, {_read(line) for line in lines if line})
    return known[2]


def _written(root: str) -> str:
    """A folder as one line: paths may hold line breaks, and bytes that are no text."""
    return json.dumps(root) if _UNFIT.search(root) or root.startswith('"') else root


def _read(line: str) -> str:
    if line.startswith('"'):
        try:
            found = json.loads(line)
        except ValueError:
            return line
        return found if isinstance(found, str) else line
    return line


def _forget() -> None:
    global _lock  # noqa: PLW0603 - the parent's may be held by a thread that the child does not have
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
