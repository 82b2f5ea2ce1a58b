"""What a take tells the catalog: never an error, never a long wait.

A record that cannot be entered in time goes to the spool file beside the catalog, or is left to a scan; one warning says so. All work is
done by a thread, so that a disk or a server that hangs holds up nobody for longer than the setting ``catalog_timeout_seconds``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
import warnings
from typing import TYPE_CHECKING

from expstate import settings
from expstate.catalog import forks, roots, spool
from expstate.catalog.place import CatalogPlace, catalog_place, package_missing
from expstate.errors import CatalogCorruptError, CatalogUnavailableError, CatalogWarning, ExpstateError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

    from expstate.catalog.catalog import Catalog
    from expstate.catalog.database import Database
    from expstate.catalog.model import RecordData

REST_SECONDS = 60.0
"""How long a catalog that has failed is left alone; records go to the spool meanwhile."""

_SHARE_OF_CATALOG = 0.8  # of the time that a take may be delayed; the rest is for the spool
_SHARE_OF_LOCK = 0.9  # of that, so that it is the catalog that says what it waits for
_LEAST_SECONDS, _MOST_SECONDS = 0.2, 24 * 3600.0  # no clock counts to infinity
_log = logging.getLogger("expstate")


class _Desk:
    """What this process knows of one catalog: its database, once it is open, and how long it is left alone."""

    def __init__(self, place: CatalogPlace) -> None:
        self.place = place
        self._lock = threading.Lock()
        self._database: Database | None = None
        self._rests_until = 0.0
        self._stuck: _Job | None = None
        self.is_warm = False
        self.notices: list[str] = []

    @property
    def rests(self) -> bool:
        """Whether it is not to be tried: it has failed a short time ago, or still has not answered."""
        return time.monotonic() < self._rests_until or (self._stuck is not None and not self._stuck.is_done)

    def let_rest(self, job: _Job) -> None:
        """Leave it alone for some time."""
        self._rests_until = time.monotonic() + REST_SECONDS
        self._stuck = job
        self.is_warm = False

    def database(self) -> Database:
        """The database, for which SQLAlchemy is imported the first time."""
        with self._lock:
            if self._database is None:
                try:
                    from expstate.catalog.database import Database  # noqa: PLC0415 - takes 0.2 s, and is absent on some machines
                except ImportError as error:
                    raise package_missing(error) from None
                self._database = Database(self.place, self.notices.append)
            return self._database

    def prepare(self, timeout_seconds: float) -> None:
        """Open it; what goes wrong will be found again, and told, when there is something to record."""
        try:
            self.database().open(timeout_seconds)
            from expstate.catalog import rows  # noqa: F401, PLC0415 - imported here so that the record need not wait for it

            self.is_warm = True
        except Exception as error:  # noqa: BLE001 - as said
            _log.debug("the catalog is not ready: %s", error)

    def enter(self, data: RecordData, timeout_seconds: float, *, taken_now: bool) -> None:
        """Enter a record: as the newest of its project, or where the time of its take puts it."""
        database = self.database()
        from expstate.catalog import rows  # noqa: PLC0415 - needs SQLAlchemy

        database.write(lambda connection: rows.put(connection, data, live=taken_now), timeout_seconds)
        self.is_warm = True

    def enter_spool(self) -> None:
        """Enter what earlier takes had to leave behind."""
        try:
            if spool.is_waiting(self.place):
                self.database().enter_spool()
        except Exception as error:  # noqa: BLE001 - it goes on waiting
            _log.debug("the spool was not entered: %s", error)

    def add_root(self, url: str) -> None:
        """Remember the folder that a snapshot is in."""
        try:
            roots.add(self.place, url)
        except OSError as error:
            _log.debug("the folder of %r was not added to %r: %s", url, str(self.place.roots), error)


_desks: dict[CatalogPlace, _Desk] = {}
_is_warned = False


def _desk(place: CatalogPlace) -> _Desk:
    return _desks.setdefault(place, _Desk(place))


def forget() -> None:
    """Begin anew, as in a new process."""
    global _is_warned  # noqa: PLW0603 - one warning per process
    _desks.clear()
    _is_warned = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_desks.clear)


class _Job:
    """Work that is done by a thread, so that whoever waits for it may leave it alone."""

    def __init__(self, work: Callable[[], None], then: Callable[[], None] | None = None) -> None:
        self._work = work
        self._then = then
        self._done = threading.Event()
        self.failure: BaseException | None = None

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    def _run(self) -> None:
        with forks.in_use(None):
            try:
                self._work()
            except BaseException as error:  # noqa: BLE001 - told by whoever waits
                self.failure = error
            self._done.set()
            if self._then is not None and self.failure is None:
                self._then()

    def start(self) -> None:
        """Begin, in a thread that nobody waits for at exit; at once where the interpreter is ending and starts none any more."""
        try:
            threading.Thread(target=self._run, name="expstate-catalog", daemon=True).start()
        except RuntimeError:
            self._run()

    def wait(self, seconds: float) -> None:
        """Wait so long; raise what went wrong."""
        if not self._done.wait(seconds):
            msg = f"it does not answer within {seconds:g} s"
            raise TimeoutError(msg)
        if self.failure is not None:
            raise self.failure


class Recorder:
    """Enters the records of takes.

    Parameters
    ----------
    place : CatalogPlace
        The catalog's.
    """

    def __init__(self, place: CatalogPlace) -> None:
        self._place = place
        self._desk = _desk(place)
        self._timeout_seconds = min(settings.current().catalog_timeout_seconds, _MOST_SECONDS)

    @property
    def place(self) -> CatalogPlace:
        """The catalog's."""
        return self._place

    def prepare(self) -> None:
        """Import and open what recording needs, while the data is being written; never raises."""
        if not self._desk.is_warm and not self._desk.rests:
            _Job(functools.partial(self._desk.prepare, self._timeout_seconds)).start()

    def record(self, data: RecordData, *, taken_now: bool = True) -> None:
        """Enter a record, or keep it in the spool; raises nothing, and waits no longer than the setting allows.

        An interrupt by the user passes, when the record is safe.

        Parameters
        ----------
        data : RecordData
            The record.
        taken_now : bool, default True
            Whether it is of a take, and not of a copy.
        """
        if self._desk.rests:
            self._keep(data, "it has failed a short time ago")
            return
        patience = self._timeout_seconds * _SHARE_OF_CATALOG
        job = _Job(functools.partial(self._enter, data, patience * _SHARE_OF_LOCK, taken_now=taken_now), self._desk.enter_spool)
        try:
            job.start()
            job.wait(patience)
        except Exception as error:  # noqa: BLE001 - whatever it is, the snapshot was taken
            self._desk.let_rest(job)
            self._desk.notices.clear()  # this says more
            self._keep(data, error)
        except BaseException:
            with contextlib.suppress(Exception):
                self._append(data)
            raise
        while self._desk.notices:
            _warn(self._desk.notices.pop())

    def _enter(self, data: RecordData, timeout_seconds: float, *, taken_now: bool) -> None:
        self._desk.add_root(data.url)
        self._desk.enter(data, timeout_seconds, taken_now=taken_now)

    def _append(self, data: RecordData) -> None:
        """Put a record into the spool."""

        def append() -> None:
            self._desk.add_root(data.url)
            spool.append(self._place, data)

        job = _Job(append)
        job.start()
        job.wait(max(_LEAST_SECONDS, self._timeout_seconds * (1 - _SHARE_OF_CATALOG)))

    def _keep(self, data: RecordData, failure: Exception | str) -> None:
        """Put a record into the spool, and say once what has happened."""
        if isinstance(failure, CatalogCorruptError):
            mending = "run `expstate scan`: it builds the catalog anew, and enters the record"
        else:
            mending = "the record waits beside it, and is entered when the catalog is next used; `expstate status` tells what waits"
        try:
            self._append(data)
        except Exception as error:  # noqa: BLE001 - a scan will find the snapshot
            folder = roots.root_of(data.url)
            mending = f"nor can the record be kept ({_reason(error)}); run `expstate scan {folder!r}` when the catalog works"
        _say_once(
            f"the snapshot at {data.url!r} is safe, but was not entered into the catalog {self._place.shown!r}: "
            f"{_reason(failure)}; {mending}"
        )


def _reason(failure: Exception | str) -> str:
    if isinstance(failure, (str, ExpstateError, TimeoutError)):
        return str(failure)
    return f"{type(failure).__name__}: {failure}"


def _say_once(message: str) -> None:
    global _is_warned  # noqa: PLW0603 - one warning per process
    if _is_warned:
        _log.info("%s", message)
        return
    _is_warned = True
    _warn(f"{message} (said once per process)")


def _warn(message: str) -> None:
    try:
        warnings.warn(message, CatalogWarning, stacklevel=2)
    except CatalogWarning:  # where warnings are errors: the snapshot was taken all the same
        _log.error("%s", message)


def recorder(option: Catalog | str | os.PathLike[str] | bool | None) -> Recorder | None:
    """The recorder for ``catalog=...`` of a take; None if nothing is to be recorded.

    Raises
    ------
    InvalidArgumentError
        If the option names no catalog.
    """
    if option is False:
        return None
    if option is True:
        msg = "catalog must be a Catalog, a path or URL, False, or None for the default one"
        raise InvalidArgumentError(msg)
    if option is None or isinstance(option, (str, os.PathLike)):
        try:
            place = catalog_place(option)
        except CatalogUnavailableError as error:
            _say_once(f"{error}; the take is not recorded")
            return None
    elif isinstance(getattr(option, "place", None), CatalogPlace):
        place = option.place
    else:
        msg = f"catalog must be a Catalog, a path or URL, False, or None for the default one, got {type(option).__name__}"
        raise InvalidArgumentError(msg)
    return None if place is None else Recorder(place)
