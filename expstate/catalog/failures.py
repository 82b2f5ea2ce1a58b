"""The errors of SQLite, PostgreSQL and SQLAlchemy as errors of ours: what is wrong, in words, and what to do.

Gets what was raised and the catalog's place. No message holds a URL with user info, or a value that was bound to a statement.
"""

from __future__ import annotations

import os
import sqlite3
from typing import TYPE_CHECKING

import sqlalchemy as sa

from expstate.errors import CatalogCorruptError, CatalogError, CatalogUnavailableError

if TYPE_CHECKING:
    from pathlib import Path

    from expstate.catalog.place import CatalogPlace

RAW = (sa.exc.SQLAlchemyError, sqlite3.Error, UnicodeError, OverflowError)
"""What a database may raise; psycopg's own errors reach us inside SQLAlchemy's."""

_PASSING = {"40001", "40P01", "57P01", "57P02", "57P03", "08000", "08003", "08006", "08001", "08004", "08007"}
_STALLED = "25P03"  # the server gave up waiting for this process
_SHORT = 300
_LOCKED = "is locked by another process; try again when that one is done"
_CLOSED = "; check the permissions of the file and of its folder, or name another by EXPSTATE_CATALOG"
READ_ONLY = f"is read-only{_CLOSED}"
_BROKEN = "cannot be read or written; free some room or look after the disk, and try again"
_OF_SQLITE = {
    "locked": _LOCKED,
    "busy": _LOCKED,
    "locking protocol": _LOCKED,
    "readonly": READ_ONLY,
    "read-only": READ_ONLY,
    "unable to open": f"cannot be opened{_CLOSED}",
    "full": _BROKEN,
    "i/o error": _BROKEN,
}
_DAMAGED = (
    "not a database",
    "malformed",
    "no such table",
    "no such column",
    "could not decode to utf-8",
    "unsupported file format",
    "file is encrypted",
)


def corrupt(place: CatalogPlace, reason: str) -> CatalogCorruptError:
    """The error for a catalog that cannot be read."""
    if place.path is None:
        return CatalogCorruptError(f"the catalog {place.shown!r} is damaged ({reason}); restore it from a backup, or name another database")
    return CatalogCorruptError(
        f"the catalog {place.shown!r} is damaged ({reason}); `expstate scan` puts it aside and builds it anew from the snapshots"
    )


def unavailable(place: CatalogPlace, reason: str) -> CatalogUnavailableError:
    """The error for a catalog that cannot be used now."""
    return CatalogUnavailableError(f"the catalog {place.shown!r} {reason}")


def is_passing(error: BaseException) -> bool:
    """Whether the same transaction may well succeed if it is tried again at once: the connection was lost, or two had the same in hand."""
    if isinstance(error, sa.exc.DBAPIError) and not isinstance(error.orig, sqlite3.Error):
        state = getattr(error.orig, "sqlstate", None)
        return error.connection_invalidated or state in _PASSING or (state is None and isinstance(error, sa.exc.OperationalError))
    return "locking protocol" in _text(error)


def is_of_another_state(error: BaseException) -> bool:
    """Whether a database is not what it was taken for: a table is not there, or a file cannot be written."""
    text = _text(error)
    signs = ("no such table", "readonly database", "unable to open")
    return getattr(getattr(error, "orig", None), "sqlstate", None) == "42P01" or any(sign in text for sign in signs)


def translate(error: BaseException, place: CatalogPlace) -> CatalogError:
    """Our error for one of the database's."""
    if place.path is None:
        return _of_server(error, place)
    text = _text(error)
    lower = text.lower()
    # What Python has no narrower class for is damage, sometimes without a word.
    is_bare = type(getattr(error, "orig", None) or error) is sqlite3.DatabaseError
    if is_bare or isinstance(error, UnicodeDecodeError) or any(sign in lower for sign in _DAMAGED):
        return corrupt(place, text)
    if _has_wrong_header(error, place.path):
        return corrupt(place, "its header says that it must not be written")
    reason = next((reason for sign, reason in _OF_SQLITE.items() if sign in lower), None)
    return _refused(place, text) if reason is None else unavailable(place, reason)


def _has_wrong_header(error: BaseException, path: Path) -> bool:
    """Whether SQLite does not write a file that everyone else may write. To read the header ourselves would undo SQLite's locks."""
    code = getattr(getattr(error, "orig", None) or error, "sqlite_errorname", None)
    # Python 3.10 does not tell the code; what else has these words is rare, and has been opened anew before.
    is_read_only = code == "SQLITE_READONLY" or (code is None and "readonly database" in _text(error))
    return is_read_only and all(os.access(each, os.W_OK) for each in (path, os.path.dirname(os.path.realpath(path))))  # noqa: PTH120 - as in ``sqlite``


def _refused(place: CatalogPlace, text: str) -> CatalogError:
    return CatalogError(f"the catalog {place.shown!r} does not take what was asked: {text}")


def _of_server(error: BaseException, place: CatalogPlace) -> CatalogError:
    state = getattr(getattr(error, "orig", None), "sqlstate", None) or ""
    text = _hidden(_text(error), place)
    if isinstance(error, sa.exc.DBAPIError) and not state:
        return unavailable(place, f"does not answer ({text}); check that its server runs and can be reached")
    if state == "55P03":
        return unavailable(place, _LOCKED)
    if state in {"42P01", "42703"}:
        return corrupt(place, "a table or column of it is missing")
    if state in {"25006", "42501"}:
        return unavailable(place, f"cannot be written: {text}; ask for the right to, or name another by EXPSTATE_CATALOG")
    if state == _STALLED or state[:2] in {"08", "28", "3D", "40", "53", "57", "58"}:
        return unavailable(place, f"cannot be used: {text}; check its URL and its server, and try again")
    return _refused(place, text)


def _text(error: BaseException) -> str:
    """The first line of what the database itself said."""
    origin = getattr(error, "orig", None) or error
    if isinstance(origin, UnicodeError):
        return "a text that is no text"  # what it holds is nobody's business
    lines = str(origin).strip().splitlines()
    return (lines[0] if lines else type(origin).__name__)[:_SHORT]


def _hidden(text: str, place: CatalogPlace) -> str:
    """A text without what the URL keeps secret."""
    url = sa.make_url(place.url)
    values = [one for value in url.query.values() for one in ([value] if isinstance(value, str) else value)]
    found = {url.username, url.password and str(url.password), *values}
    for secret in sorted(filter(None, found), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text
