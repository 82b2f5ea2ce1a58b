"""Records that could not be entered: lines of JSON in a file beside the catalog, until somebody opens it.

A line is appended under a lock. Who enters them first renames the file, so that nobody waits, enters all in one transaction, and then
removes it; if that is interrupted at any point, the next one does it again: entering is idempotent.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import msgspec

from expstate.catalog import locks
from expstate.catalog.model import RecordData  # noqa: TC001 - msgspec reads the annotation
from expstate.errors import CatalogCorruptError, CatalogError, CatalogUnavailableError, CatalogVersionError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from expstate.catalog.place import CatalogPlace

_TAKEN_OVER = "entering"
_LOCK_SECONDS = 1.0


class Line(msgspec.Struct, frozen=True):
    """A record and when it was put here, in microseconds since 1970."""

    at: int
    record: RecordData


# Makes known to msgspec, now and in one thread, what a line is: it crashes where several come at once to a type that was never decoded.
msgspec.json.Decoder(Line)


def append(place: CatalogPlace, data: RecordData, timeout_seconds: float = _LOCK_SECONDS) -> None:
    """Keep a record until the catalog can be written.

    Parameters
    ----------
    place : CatalogPlace
        Of the catalog.
    data : RecordData
        The record.
    timeout_seconds : float
        How long to wait for others who append; nobody keeps the file for longer than a line takes.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    # Not msgspec's: paths may hold bytes that are no text.
    line = json.dumps(msgspec.to_builtins(Line(time.time_ns() // 1000, data)), separators=(",", ":")).encode() + b"\n"
    place.spool.parent.mkdir(parents=True, exist_ok=True)
    with locks.locked(place.spool, os.O_RDWR | os.O_CREAT | os.O_APPEND, timeout_seconds) as fd:
        if fd is None:
            msg = f"another process does not let go of {str(place.spool)!r}"
            raise TimeoutError(msg)
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":  # someone was killed while writing
            line = b"\n" + line
        while line:
            line = line[os.write(fd, line) :]


def is_waiting(place: CatalogPlace) -> bool:
    """Whether there may be something to enter."""
    return place.spool.exists() or bool(_taken_over(place))


def pending(place: CatalogPlace) -> int:
    """How many records wait to be entered."""
    return sum(len(_lines(path)) for path in (place.spool, *_taken_over(place)))


def enter(place: CatalogPlace, write: Callable[[Callable[[Any], int]], int]) -> int:
    """Enter all that waits.

    Parameters
    ----------
    place : CatalogPlace
        Of the catalog.
    write : callable
        Runs a function in one transaction.

    Returns
    -------
    int
        How many records were entered.

    Raises
    ------
    CatalogError
        If they cannot be; they go on waiting.
    """
    entered = 0
    for path in (*_taken_over(place), *_take_over(place)):
        with contextlib.suppress(FileNotFoundError), locks.locked(path, os.O_RDWR) as fd:
            if fd is not None:  # else somebody is at it
                entered += _enter(_lines(path), write)
                path.unlink()
    return entered


def _enter(lines: Sequence[Line], write: Callable[[Callable[[Any], int]], int]) -> int:
    from expstate.catalog import rows  # noqa: PLC0415 - what appends needs no SQLAlchemy

    def put_all(connection: Any) -> int:
        for line in lines:
            rows.put(connection, line.record, seen_at=line.at)
        return len(lines)

    if not lines:
        return 0
    try:
        return write(put_all)
    except (CatalogUnavailableError, CatalogCorruptError, CatalogVersionError):
        raise
    except CatalogError:
        if len(lines) == 1:
            return 0  # the catalog does not take it, whatever is done; a scan finds the snapshot
    return sum(_enter([line], write) for line in lines)


def _taken_over(place: CatalogPlace) -> list[Path]:
    """Files that somebody has taken over and not removed: that one is at it, or was killed."""
    folder = place.spool.parent
    try:
        return sorted(path for path in folder.iterdir() if path.name.startswith(f"{place.spool.name}.{_TAKEN_OVER}-"))
    except OSError:
        return []


def _take_over(place: CatalogPlace) -> list[Path]:
    """Rename the spool, so that what is appended from now on is in a file of its own."""
    with contextlib.suppress(FileNotFoundError), locks.locked(place.spool, os.O_RDWR, _LOCK_SECONDS) as fd:
        if fd is not None:
            taken = place.spool.with_name(f"{place.spool.name}.{_TAKEN_OVER}-{uuid4().hex[:8]}")
            place.spool.rename(taken)
            return [taken]
    return []


def _lines(path: Path) -> list[Line]:
    """The records in a file; a line that was not written to its end is none."""
    found = []
    try:
        data = path.read_bytes()
    except OSError:
        return []
    for line in data.splitlines():
        with contextlib.suppress(ValueError, msgspec.ValidationError, RecursionError):
            found.append(msgspec.convert(json.loads(line), Line))
    return found
