"""The catalog as a file: how SQLite opens one so that nothing in it does harm, and how a damaged one is put aside.

Gets paths, gives connections of ``sqlite3``; ``database`` hands them to SQLAlchemy and holds the transactions.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import sqlite3
import sys
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from expstate.catalog import failures, filesystems, forks, locks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from expstate.catalog.place import CatalogPlace

APPLICATION_ID = 0x45585053
"""What a catalog of ours has in its header: EXPS."""

_MOST_BYTES_OF_A_VALUE = 256 * 1024**2
_TRIES, _PAUSE_SECONDS = 50, 0.01
_BESIDE = ("-wal", "-shm", "-journal", "")  # the file itself last: what is left of a log must never meet a new one


def identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from another that takes its place; None if there is nothing in it, or no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if found.st_size else None


class SQLiteFile:
    """A catalog's file, looked at once: whether it can be written, and how it must be locked.

    Parameters
    ----------
    place : CatalogPlace
        Of the catalog.
    notify : callable
        Is told what people should know about where it is.
    """

    def __init__(self, place: CatalogPlace, notify: Callable[[str], None]) -> None:
        assert place.path is not None
        self._place = place
        self._notify = notify
        self.path: Path = place.path
        self.is_read_only = False
        self.is_on_network = False
        self._options = ""

    def look(self) -> None:
        """Find out what kind of place it is in.

        Raises
        ------
        CatalogUnavailableError
            If nothing is there and nothing can be made, or this process cannot open it because it was forked.
        """
        if forks.is_inherited(self.path):
            raise failures.unavailable(
                self._place, "was in use when this process was forked, and must not be opened here; start processes by spawn"
            )
        exists = self.path.exists()
        folder = os.path.dirname(os.path.realpath(self.path))  # noqa: PTH120 - where SQLite puts its logs, if the path is a link
        self.is_read_only = not (os.access(folder, os.W_OK | os.X_OK) and (not exists or os.access(self.path, os.W_OK)))
        if self.is_read_only:
            if not exists:
                raise failures.unavailable(
                    self._place, "does not exist, and its folder is read-only; name another by EXPSTATE_CATALOG, or switch it off there"
                )
            self._options = self._readable()
            self._notify(f"the catalog {self._place.shown!r} is read-only: it is searched as it is, and nothing new is entered")
        self.is_on_network = filesystems.is_network(self.path)
        if self.is_on_network:
            self._notify(
                f"the catalog {self._place.shown!r} is on a network file system, where its processes wait for each other; "
                "a path on a disk of this machine, or PostgreSQL, named by EXPSTATE_CATALOG, is quicker and safer"
            )

    def _readable(self) -> str:
        """How to open it for reading: beside those who write if their log is there, else as a file that nobody changes."""
        for options in ("?mode=ro", "?mode=ro&immutable=1"):
            with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(self._uri(options), uri=True)) as found:
                found.execute("SELECT count(*) FROM sqlite_master").fetchone()
                return options
        return "?mode=ro&immutable=1"

    def _uri(self, options: str) -> str:
        return f"file:{quote(os.fsencode(self.path))}{options}"

    def connect(self, timeout_seconds: float) -> sqlite3.Connection:
        """A connection that waits so long for others, in which nothing that the file brings along is run.

        Raises
        ------
        CatalogCorruptError
            If it belongs to another program, or has triggers or views: a catalog has none.
        """
        connection = sqlite3.connect(
            self._uri(self._options), uri=True, timeout=timeout_seconds, isolation_level=None, check_same_thread=False
        )
        try:
            _guard(connection)
            for setting in ("trusted_schema=OFF", "cell_size_check=ON", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {setting}")
            if self.is_on_network and not self.is_read_only:
                connection.execute("PRAGMA journal_mode=TRUNCATE")
                connection.execute("PRAGMA synchronous=FULL")
            else:
                connection.execute("PRAGMA synchronous=NORMAL")
            self._check(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _check(self, connection: sqlite3.Connection) -> None:
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
            return
        (found,) = connection.execute("PRAGMA application_id").fetchone()
        if found != APPLICATION_ID:
            raise failures.corrupt(self._place, "it is an SQLite file of another program")
        strange = connection.execute("SELECT type, name FROM sqlite_master WHERE type NOT IN ('table', 'index')").fetchone()
        if strange:
            raise failures.corrupt(self._place, f"somebody has added the {strange[0]} {strange[1][:80]!r} to it")

    def has_log(self, connection: Any) -> bool:
        """Whether a file has the write-ahead log that it should have."""
        return self.is_read_only or self.is_on_network or connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)

    def prepare(self, connection: Any) -> None:
        """Make a connection fit for changing tables, outside any transaction; the file gets its write-ahead log."""
        # Tables that a migration makes anew would take those rows with them that point to theirs.
        connection.execute("PRAGMA foreign_keys=OFF")
        if not self.is_on_network:
            for _ in range(_TRIES):
                try:
                    connection.execute("PRAGMA journal_mode=WAL")
                except sqlite3.OperationalError:  # another process is at it; SQLite does not wait here
                    time.sleep(_PAUSE_SECONDS)
                else:
                    return


def _guard(connection: sqlite3.Connection) -> None:
    """Limits, where Python can set them."""
    if sys.version_info >= (3, 11):
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MOST_BYTES_OF_A_VALUE)
    if sys.version_info >= (3, 12):
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE, True)  # noqa: FBT003 - its only form


def put_aside(place: CatalogPlace, is_damaged: Callable[[], bool]) -> Path | None:
    """Rename a damaged file, with its log, so that a new one can be made in its place.

    Parameters
    ----------
    place : CatalogPlace
        Of the catalog.
    is_damaged : callable
        Looks at it again: another process may just have done the same.

    Returns
    -------
    Path or None
        Its new name; None if it was not damaged any more.

    Raises
    ------
    OSError
        If it cannot be renamed.
    """
    path = place.path
    assert path is not None
    with locks.locked(path.with_name(f"{path.name}.lock"), timeout_seconds=10):
        if not is_damaged():
            return None
        moment = dt.datetime.now(dt.timezone.utc).strftime("%Y%m%d-%H%M%S-%f")
        aside = path.with_name(f"{path.name}.damaged-{moment}")
        for ending in _BESIDE:
            with contextlib.suppress(FileNotFoundError):
                path.with_name(path.name + ending).rename(aside.with_name(aside.name + ending))
        return aside
