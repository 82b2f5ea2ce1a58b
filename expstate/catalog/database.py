"""The catalog's database: opened, migrated, looked after; one transaction at a time.

Gets a ``CatalogPlace``, hands out connections of SQLAlchemy inside transactions, and turns the database's errors into ours.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa

from expstate.catalog import failures, forks, postgres, schema, spool, sqlite, versions
from expstate.errors import CatalogCorruptError, CatalogError, CatalogUnavailableError, CatalogWarning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from expstate.catalog.place import CatalogPlace

WAIT_SECONDS = 30.0
"""How long what people ask waits for others who write; takes wait for less."""

_SPOOL_SECONDS = 2.0
_REST_SECONDS = 60.0
_PAUSE_SECONDS = 0.2
_Result = TypeVar("_Result")


class _ChangedError(Exception):
    """The database is not what it was when it was opened: its tables are not those of this version, or it has become read-only."""


class Database:
    """A catalog's database; usable from several threads and after a fork.

    A connection is opened for each transaction and closed after it: that takes a millisecond, follows a file that was replaced and a
    server that was restarted, and leaves a file without a log beside it.

    Parameters
    ----------
    place : CatalogPlace
        Where it is.
    notify : callable, optional
        Is told what people should know about the place; by default they are warned once.

    Raises
    ------
    CatalogUnavailableError
        If the driver for the database is not installed.
    """

    def __init__(self, place: CatalogPlace, notify: Callable[[str], None] | None = None) -> None:
        self.place = place
        self._file = None if place.path is None else sqlite.SQLiteFile(place, notify or _warn_once)
        self._identity: tuple[int, int] | None = None
        self._lock = threading.RLock()
        self._local = threading.local()
        self._spool_rests_until = 0.0
        self._engine = self._make_engine()

    @property
    def dialect(self) -> str:
        """``sqlite`` or ``postgresql``."""
        return "postgresql" if self._file is None else "sqlite"

    def close(self) -> None:
        """Let go of what is known of it; it is opened again when it is used."""
        self._identity = None

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection that sees one state of the catalog.

        Raises
        ------
        CatalogError
            If it cannot be read.
        """
        with self._translated():
            self._empty_spool()
            with self._transaction(writes=False, timeout_seconds=WAIT_SECONDS) as connection:
                yield connection

    @contextlib.contextmanager
    def writing(self, timeout_seconds: float | None = None) -> Iterator[sa.Connection]:
        """A connection inside one transaction, committed at the end of the block; nobody else writes meanwhile.

        Parameters
        ----------
        timeout_seconds : float, optional
            How long to wait for others who write; default 30.

        Raises
        ------
        CatalogError
            If it cannot be written; then nothing of the block was.
        """
        with self._translated():
            self._empty_spool()
            with self._transaction(writes=True, timeout_seconds=_or_default(timeout_seconds)) as connection:
                yield connection

    def write(self, work: Callable[[sa.Connection], _Result], timeout_seconds: float | None = None) -> _Result:
        """Do something in one transaction; once more if the connection was lost in the middle of it.

        Parameters
        ----------
        work : callable
            Gets the connection; what it does may be done twice.
        timeout_seconds : float, optional
            How long to wait for others who write; default 30.

        Returns
        -------
        object
            What ``work`` gives.

        Raises
        ------
        CatalogError
            If it cannot be written.
        """
        timeout_seconds = _or_default(timeout_seconds)
        with self._translated():
            try:
                with self._transaction(writes=True, timeout_seconds=timeout_seconds) as connection:
                    return work(connection)
            except failures.RAW as error:
                if not failures.is_passing(error):
                    raise
            time.sleep(min(_PAUSE_SECONDS, timeout_seconds))
            with self._transaction(writes=True, timeout_seconds=timeout_seconds) as connection:
                return work(connection)

    def enter_spool(self) -> int:
        """Enter the records that wait in the spool.

        Returns
        -------
        int
            How many.

        Raises
        ------
        CatalogError
            If the catalog cannot be written; they go on waiting.
        """
        return spool.enter(self.place, self.write)

    # Opening

    def _make_engine(self) -> sa.Engine:
        options: dict[str, Any] = {"poolclass": sa.NullPool, "hide_parameters": True}
        if self._file is not None:
            engine = sa.create_engine("sqlite:////catalog", creator=self._connect_to_file, **options)
            sa.event.listen(engine, "begin", _begin)
            return engine
        try:
            engine = sa.create_engine(self.place.url, use_native_hstore=False, **options)
        except ImportError:
            raise failures.unavailable(self.place, "needs the package psycopg: pip install 'expstate[postgres]'") from None
        except sa.exc.ArgumentError:
            raise failures.unavailable(self.place, "has an URL that SQLAlchemy does not understand") from None
        sa.event.listen(engine, "do_connect", self._connect_to_server)
        return engine

    @property
    def _timeout_seconds(self) -> float:
        return getattr(self._local, "timeout_seconds", WAIT_SECONDS)

    def _connect_to_file(self) -> Any:
        assert self._file is not None
        return self._file.connect(self._timeout_seconds)

    def _connect_to_server(self, _dialect: Any, _record: Any, _arguments: Any, options: dict[str, Any]) -> None:
        options.update(postgres.connect_options(self._timeout_seconds))

    def open(self, timeout_seconds: float | None = None) -> None:
        """Look at the database, make it or migrate it, if that was not done yet, or it is another than it was.

        Raises
        ------
        CatalogError
            If it cannot be used.
        """
        with self._translated():
            self._open(_or_default(timeout_seconds))

    def _open(self, timeout_seconds: float) -> None:
        if self._is_open():
            return
        with forks.in_use(self.place.path), self._lock:
            if self._is_open():
                return
            self._identity = None
            self._look(timeout_seconds)
            self._identity = self._current_identity()

    def _is_open(self) -> bool:
        return self._identity is not None and self._identity == self._current_identity()

    def _current_identity(self) -> tuple[int, int] | None:
        return (0, 0) if self._file is None else sqlite.identity(self._file.path)

    def _look(self, timeout_seconds: float) -> None:
        file = self._file
        if file is not None:
            with contextlib.suppress(OSError):  # told by what follows
                file.path.parent.mkdir(parents=True, exist_ok=True)
            file.look()
        if self._is_current(timeout_seconds):
            return  # nobody who writes is waited for
        if file is not None and file.is_read_only:
            raise failures.unavailable(
                self.place, "is of another version, and cannot be migrated, as it is read-only; copy it to a folder of yours"
            )
        self._bring_up_to_date(timeout_seconds)

    def _is_current(self, timeout_seconds: float) -> bool:
        if self._file is not None and sqlite.identity(self._file.path) is None:
            return False
        try:
            with self._connected(writes=False, timeout_seconds=timeout_seconds) as connection, connection.begin():
                return versions.is_current(connection) and (
                    self._file is None or self._file.has_log(connection.connection.dbapi_connection)
                )
        except sa.exc.DBAPIError as error:
            if not failures.is_of_another_state(error):
                raise
            return False

    def _bring_up_to_date(self, timeout_seconds: float) -> None:
        with self._connected(writes=True, timeout_seconds=timeout_seconds) as connection:
            if self._file is not None:
                self._file.prepare(connection.connection.dbapi_connection)
            with connection.begin():
                if self._file is None:
                    postgres.begin_writing(connection, timeout_seconds)
                versions.bring_up_to_date(connection, self.place)

    # Transactions

    @contextlib.contextmanager
    def _connected(self, *, writes: bool, timeout_seconds: float) -> Iterator[sa.Connection]:
        with forks.in_use(self.place.path):
            self._local.timeout_seconds = timeout_seconds
            options: dict[str, Any]
            if self._file is None:
                options = postgres.WRITING if writes else postgres.READING
            else:
                options = {"begin": "BEGIN IMMEDIATE" if writes else "BEGIN"}
            with self._engine.connect().execution_options(**options) as connection:
                yield connection

    @contextlib.contextmanager
    def _transaction(self, *, writes: bool, timeout_seconds: float) -> Iterator[sa.Connection]:
        with contextlib.ExitStack() as stack:
            try:
                connection = self._begin(stack, timeout_seconds, writes=writes)
            except _ChangedError:
                stack.close()
                self._identity = None
                connection = self._begin(stack, timeout_seconds, writes=writes)
            yield connection

    def _begin(self, stack: contextlib.ExitStack, timeout_seconds: float, *, writes: bool) -> sa.Connection:
        self._open(timeout_seconds)
        if writes and self._file is not None and self._file.is_read_only:
            raise failures.unavailable(self.place, failures.READ_ONLY)
        try:
            connection = stack.enter_context(self._connected(writes=writes, timeout_seconds=timeout_seconds))
            stack.enter_context(connection.begin())
            if writes and self._file is None:
                postgres.begin_writing(connection, timeout_seconds)
            is_current = versions.is_current(connection)
        except sa.exc.DBAPIError as error:
            if not failures.is_of_another_state(error):
                raise
            is_current = False
        if not is_current:
            raise _ChangedError
        return connection

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except _ChangedError:  # twice
            raise failures.unavailable(self.place, "is being changed by another version of expstate; try again when that is done") from None
        except failures.RAW as error:
            # What they say may show the user name, and their chain the whole URL.
            raise failures.translate(error, self.place) from None

    def _empty_spool(self) -> None:
        """Enter what waits, before somebody looks; if that cannot be, they see what is there."""
        now = time.monotonic()
        if now < self._spool_rests_until or not spool.is_waiting(self.place):
            return
        if self._file is not None and self._file.is_read_only:
            return
        try:
            spool.enter(self.place, functools.partial(self.write, timeout_seconds=_SPOOL_SECONDS))
        except (CatalogError, OSError):
            self._spool_rests_until = now + _REST_SECONDS


def _or_default(timeout_seconds: float | None) -> float:
    return WAIT_SECONDS if timeout_seconds is None else timeout_seconds


def _begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, CatalogWarning, stacklevel=2)


# Damage


def find_damage(place: CatalogPlace) -> str | None:
    """What is wrong with a catalog's file, all of it read; None if nothing is, or it is no file.

    Parameters
    ----------
    place : CatalogPlace
        Of the catalog.

    Raises
    ------
    CatalogError
        If it cannot be looked at: it is locked, or of a newer version.
    """
    if place.path is None or sqlite.identity(place.path) is None:
        return None
    database = Database(place)
    try:
        with database.reading() as connection:
            found = str(connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar())
            astray = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
            if found == "ok" and astray is not None:
                found = f"a row of {astray[0]} belongs to no record"
            for table in schema.metadata.sorted_tables:
                connection.execute(sa.select(table).limit(1)).first()
    except CatalogCorruptError as error:
        return str(error)
    return None if found == "ok" else found


def put_aside(place: CatalogPlace, is_damaged: Callable[[], bool] | None = None) -> Path | None:
    """Rename a damaged catalog to ``<name>.damaged-<time>``, with its log, so that a new one can be made.

    Parameters
    ----------
    place : CatalogPlace
        Of the catalog.
    is_damaged : callable, optional
        Whether it still has to go, asked when no other process can be at it; by default all of it is read.

    Returns
    -------
    Path or None
        Its new name; None if it is not damaged, or no longer.

    Raises
    ------
    CatalogUnavailableError
        If it cannot be renamed.
    """
    if place.path is None:
        return None
    try:
        return sqlite.put_aside(place, is_damaged or (lambda: find_damage(place) is not None))
    except OSError as error:
        msg = f"the damaged catalog {place.shown!r} cannot be renamed ({error.strerror}); check the permissions of its folder"
        raise CatalogUnavailableError(msg) from None
