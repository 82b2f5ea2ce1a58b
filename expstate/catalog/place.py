"""Where a catalog lives: what ``EXPSTATE_CATALOG``, ``Catalog(url)`` and ``take(catalog=...)`` name, and the files beside it.

Nothing is opened or made here.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from expstate import settings
from expstate.errors import CatalogUnavailableError, InvalidArgumentError

FILE_NAME = "catalog.db"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SERVER = re.compile(r"(?:\[[0-9a-fA-F:.%]+\]|[A-Za-z0-9._-]*)(?::[0-9]*)?(?:/[^/]*)?")


@dataclass(frozen=True, slots=True)
class CatalogPlace:
    """A catalog's place.

    Attributes
    ----------
    path : Path or None
        The SQLite file; None for a database server.
    url : str
        SQLAlchemy's URL; may hold a password and is never shown.
    shown : str
        The path, or the URL without user info and query.
    spool : Path
        The file for records that could not be entered.
    roots : Path
        The list of folders that takes went to.
    """

    path: Path | None
    url: str
    shown: str
    spool: Path
    roots: Path

    def __repr__(self) -> str:
        return f"CatalogPlace({self.shown!r})"


def user_folder() -> Path:
    """The folder of this user's own catalog.

    Raises
    ------
    CatalogUnavailableError
        If the user has no home.
    """
    try:
        import platformdirs  # noqa: PLC0415 - absent on machines that only take and restore
    except ImportError:
        data = os.environ.get("XDG_DATA_HOME", "").strip() or "~/.local/share"  # what it says on Linux
        found = Path(os.path.expanduser(data)) / "expstate"  # noqa: PTH111 - Path's raises where there is no home
    else:
        try:
            found = Path(platformdirs.user_data_dir("expstate", appauthor=False))
        except RuntimeError:  # what newer versions say of a user without a home
            found = Path()
    if not found.is_absolute():
        msg = "the user has no home folder for a catalog; name one by EXPSTATE_CATALOG, or switch it off by EXPSTATE_CATALOG=off"
        raise CatalogUnavailableError(msg)
    return found


def catalog_place(given: str | os.PathLike[str] | None = None) -> CatalogPlace | None:
    """The place that is named, or by the setting ``catalog``, or the user's own; None if that is ``off``.

    Parameters
    ----------
    given : str or os.PathLike, optional
        A path or an SQLAlchemy URL of SQLite or PostgreSQL.

    Raises
    ------
    InvalidArgumentError
        If it names another kind of database.
    CatalogUnavailableError
        If it is the user's own and the user has no home, or a relative path and the working folder was removed.
    """
    text = os.fspath(given) if given is not None else settings.current().catalog
    if not isinstance(text, str) or "\0" in text:
        found = "one with a NUL" if isinstance(text, str) else type(text).__name__  # not shown: a URL may hold a password
        msg = f"a catalog is named by a path or a URL, got {found}"
        raise InvalidArgumentError(msg)
    if text.lower() == "off":
        return None
    if not text:
        return _file(user_folder() / FILE_NAME)
    scheme = _SCHEME.match(text)
    if scheme is None:
        return _file(_absolute(os.path.expanduser(text)))  # noqa: PTH111 - Path's raises where there is no home
    kind = scheme.group()[:-3].lower()
    if kind in {"sqlite", "sqlite+pysqlite"}:
        name = text[scheme.end() :]
        if not name.startswith("/") or len(name) == 1 or "?" in name:
            msg = "a catalog in memory, on a host or with options is of no use, name a file: sqlite:///relative or sqlite:////absolute"
            raise InvalidArgumentError(msg)
        return _file(_absolute(name[1:]))
    if kind in {"postgresql", "postgresql+psycopg"}:
        # All before the last @ is nobody's business, whatever a password is made of.
        where = _SERVER.fullmatch(text[scheme.end() :].rpartition("@")[2].partition("?")[0])
        if where is None:
            msg = "the URL of a catalog is postgresql+psycopg://user:password@host:port/database, and the one given cannot be read"
            raise InvalidArgumentError(msg)
        shown = f"postgresql+psycopg://{where.group()}"
        try:
            folder = user_folder()
        except CatalogUnavailableError:  # a server is of use without a home; only nothing can be kept beside it
            folder = Path(os.devnull) / "expstate"
        spool = folder / f"spool-{hashlib.sha256(shown.encode()).hexdigest()[:16]}.jsonl"
        return CatalogPlace(None, "postgresql+psycopg" + text[len(scheme.group()) - 3 :], shown, spool, folder / "roots.txt")
    msg = f"a catalog is an SQLite file or a PostgreSQL database, got {kind}://"
    raise InvalidArgumentError(msg)


def package_missing(error: ImportError) -> CatalogUnavailableError:
    """What to raise where a package of the catalog is not installed, as on a machine that only trains."""
    return CatalogUnavailableError(
        f"the catalog needs a package that is missing: pip install {(error.name or 'expstate').partition('.')[0]}"
    )


def _absolute(path: str) -> Path:
    """A path that a later chdir does not move."""
    try:
        return Path(os.path.abspath(path))  # noqa: PTH100 - Path's follows links
    except FileNotFoundError:
        msg = f"the catalog {path!r} is named by a relative path, and the working folder was removed"
        raise CatalogUnavailableError(msg) from None


def _file(path: Path) -> CatalogPlace:
    return CatalogPlace(path, f"sqlite:///{path}", str(path), path.with_name(f"{path.name}.spool.jsonl"), path.with_name("roots.txt"))
