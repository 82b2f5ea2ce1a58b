"""The scan: snapshots found in folders are entered into the catalog, so that it can be lost and built anew from them.

Gets a folder, or the folders that takes went to; reads every manifest there and the annotations beside it, and enters them in the order
in which they were taken. What cannot be read is reported and never stops a scan.
"""

from __future__ import annotations

import contextlib
import contextvars
import html
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa

from expstate import settings
from expstate.catalog import database as databases
from expstate.catalog import folders, mending, model, roots, rows, schema, sqlite
from expstate.catalog.folders import Problem, look
from expstate.catalog.provenance import current_project
from expstate.engine.report import counted
from expstate.errors import (
    CatalogCorruptError,
    CatalogError,
    CatalogUnavailableError,
    ExpstateError,
    InvalidArgumentError,
    SnapshotNotFoundError,
)
from expstate.format import names
from expstate.state import paths
from expstate.storage import registry
from expstate.storage.local import LocalStorage

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from expstate.catalog.catalog import Catalog
    from expstate.catalog.model import RecordData
    from expstate.storage.base import FileInfo, Storage

_GROUP = 200
"""Snapshots entered in one transaction: some tenths of a second, while takes wait."""
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class ScanReport:
    """What a scan found.

    Attributes
    ----------
    entered : tuple of str
        Where snapshots lie that were not recorded before.
    known : int
        Snapshots that were, at places old and new.
    replaced : tuple of str
        Places of recorded snapshots where another one is now.
    missing : tuple of str
        Places of recorded snapshots where none is any more.
    mended : int
        Records that did not say what their snapshots say, and do now.
    damaged : tuple of Problem
        What could not be read, with the reason.
    folders : int
        Folders that were looked into.
    seconds : float
        Time it took.
    put_aside : str or None
        Where the damaged catalog was moved that this one replaces.
    """

    entered: tuple[str, ...]
    known: int
    replaced: tuple[str, ...]
    missing: tuple[str, ...]
    mended: int
    damaged: tuple[Problem, ...]
    folders: int
    seconds: float
    put_aside: str | None = None

    def __str__(self) -> str:
        counts = [f"{len(self.entered):,} entered", f"{self.known:,} known"]
        counts += [f"{len(places):,} {what}" for what in ("replaced", "missing") if (places := getattr(self, what))]
        counts += [f"{self.mended:,} mended"] if self.mended else []
        lines = [f"scanned {counted(self.folders, 'folder')} in {self.seconds:.1f} s: {', '.join(counts)}"]
        if self.put_aside is not None:
            lines.append(f"the catalog was damaged and built anew; the old one is {paths.printable(self.put_aside)}")
        for what in ("replaced", "missing", "damaged"):
            found = [paths.printable(str(item)) for item in getattr(self, what)]
            lines += [f"  {what}: {item}" for item in found[:_SHOWN]]
            lines += [f"  ... and {len(found) - _SHOWN:,} more {what}"] if len(found) > _SHOWN else []
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


def scan(catalog: Catalog, url: str | os.PathLike[str] | None = None, *, storage_options: dict[str, Any] | None = None) -> ScanReport:
    """Enter the snapshots below a folder, or all that can be found; as ``Catalog.scan`` documents it.

    Raises
    ------
    SnapshotNotFoundError
        If there is no such folder.
    InvalidArgumentError
        If storage options are given without a folder.
    CatalogError
        If the catalog cannot be written.
    """
    if url is None and storage_options:
        msg = "storage_options are for the folder that is scanned: give its URL too"
        raise InvalidArgumentError(msg)
    start = None if url is None else _folder(url, storage_options)
    place = catalog.place
    before = None if place.path is None else sqlite.identity(place.path)
    try:
        if start is not None or _is_whole(catalog):
            return _Scan(catalog).run(start, everything=start is None)
    except CatalogCorruptError:
        if place.path is None:
            raise
    catalog.close()
    aside = databases.put_aside(place, lambda: place.path is not None and sqlite.identity(place.path) == before)
    report = _Scan(catalog).run(start, everything=True)
    return replace(report, put_aside=None if aside is None else str(aside))


def _is_whole(catalog: Catalog) -> bool:
    """Whether nothing is wrong with the database, or only its indexes were, and they are mended."""
    if databases.find_damage(catalog.place) is None:
        return True
    try:
        mending.repair_indexes(catalog)
    except CatalogUnavailableError:
        raise
    except CatalogError:  # the tables are damaged too
        return False
    return databases.find_damage(catalog.place) is None


def _folder(url: str | os.PathLike[str], storage_options: dict[str, Any] | None) -> Storage:
    storage = registry.open_storage(url, storage_options)
    if isinstance(storage, LocalStorage) and not os.path.isdir(storage.path):  # noqa: PTH112 - as the storage has it
        msg = f"there is no folder {storage.path!r} to scan"
        raise SnapshotNotFoundError(msg)
    return storage


class _Scan:
    """One scan: what it has come across so far."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._begun = time.perf_counter()
        self._looked_at: dict[str, _Seen | None] = {}
        self._problems: dict[str, Problem] = {}
        self._entered: list[str] = []
        self._known = 0
        self._mended = 0
        self._replaced: list[str] = []
        self._missing: list[str] = []
        self._project: str | None = None

    def run(self, start: Storage | None, *, everything: bool) -> ScanReport:
        """Look into the folder and all below it, and with ``everything`` into all folders that are known."""
        self._catalog.database.open()  # what is wrong with it is better known before all folders are read
        if start is not None:
            self._look(start.walk(on_error=self._on_error))
        locations: list[_Known] = []
        if everything:
            self._look(folders.near_roots(self._catalog.place, self._note))
            locations = self._known_locations()
            self._look(self._storages(locations))
        self._enter([found for found in self._looked_at.values() if found is not None])
        self._mark_missing(locations)
        if everything:
            self._mended += mending.mend(self._catalog)
        return ScanReport(
            entered=tuple(self._entered),
            known=self._known,
            replaced=tuple(self._replaced),
            missing=tuple(self._missing),
            mended=self._mended,
            damaged=tuple(self._problems.values()),
            folders=len(self._looked_at),
            seconds=time.perf_counter() - self._begun,
        )

    def _note(self, problem: Problem) -> None:
        self._problems.setdefault(problem.path, problem)

    def _on_error(self, path: str, error: ExpstateError) -> None:
        self._note(Problem(path, str(error)))

    # Looking

    def _look(self, storages: Iterable[Storage]) -> None:
        new = {storage.url: storage for storage in storages if storage.url not in self._looked_at}
        with ThreadPoolExecutor(settings.current().thread_count, "expstate-scan") as pool:
            # Settings are those in force here.
            context = contextvars.copy_context()
            self._looked_at |= zip(new, pool.map(lambda storage: context.copy().run(self._seen, storage), new.values()), strict=True)

    def _seen(self, storage: Storage) -> _Seen | None:
        # The manifest itself is not kept: there may be very many.
        found = look(storage, self._note)
        return None if found is None else _Seen(storage, found.info, found.data)

    def _known_locations(self) -> list[_Known]:
        table = schema.locations
        query = sa.select(table.c.record, table.c.url, table.c.host, table.c.status, table.c.seen_at)
        with self._catalog.database.reading() as connection:
            found = connection.execute(query.where(table.c.host.in_(["", model.this_host()]))).all()
        return [_Known(record, rows.restored_url(url), *rest) for record, url, *rest in found]

    def _storages(self, locations: Iterable[_Known]) -> Iterable[Storage]:
        for known in locations:
            if known.url not in self._looked_at:
                try:
                    yield folders.open_location(known.url)
                except ExpstateError as error:
                    self._note(Problem(known.url, str(error)))

    # Entering

    def _enter(self, found: Sequence[_Seen]) -> None:
        ordered = _in_order(found)
        for first in range(0, len(ordered), _GROUP):
            group = ordered[first : first + _GROUP]
            try:
                self._put_all(group)
            except (CatalogUnavailableError, CatalogCorruptError):
                raise
            except _REFUSALS:
                # One that the database does not take does not keep the others out.
                for each in group:
                    self._put_alone(each)

    def _put_alone(self, found: _Seen) -> None:
        try:
            self._put_all([found])
        except (CatalogUnavailableError, CatalogCorruptError):
            raise
        except _REFUSALS as error:
            self._note(Problem(found.data.url, f"the catalog does not take it: {error}"))

    def _put_all(self, group: Sequence[_Seen]) -> None:
        entered: list[str] = []
        replaced: list[str] = []
        known = mended = 0
        with self._catalog.database.writing() as connection:
            before = mending.stored(connection, [found.data.id for found in group])
            ids = set(before)
            for found in group:
                if not found.is_there_still():
                    continue  # replaced or deleted since: whoever did that tells the catalog
                data = self._with_project(found.data)
                replaced += [data.url] if _is_held_by_another(connection, data) else []
                row = before.get(data.id)
                if row is not None and not mending.tells_right(row, found.data):
                    mended += mending.enter_anew(connection, row.seq, data)
                    del before[data.id]
                rows.put(connection, data)
                if data.id in ids:
                    known += 1
                else:
                    entered.append(data.url)
                    ids.add(data.id)
        for url in entered:
            with contextlib.suppress(OSError):
                roots.add(self._catalog.place, url)  # so that it is found again if the catalog is lost
        self._entered += entered
        self._replaced += replaced
        self._known += known
        self._mended += mended

    def _with_project(self, data: RecordData) -> RecordData:
        if data.project:
            return data
        if self._project is None:
            self._project = current_project()
        return msgspec.structs.replace(data, project=self._project)

    def _mark_missing(self, locations: Iterable[_Known]) -> None:
        gone = [
            known
            for known in locations
            if known.status == "present" and known.url not in self._problems and self._looked_at.get(known.url, known) is None
        ]
        for first in range(0, len(gone), _GROUP):
            with self._catalog.database.writing() as connection:
                for known in gone[first : first + _GROUP]:
                    if known.is_as_it_was(connection):
                        rows.set_location_status(connection, known.record, known.url, known.host, "missing")
                        self._missing.append(known.url)


_REFUSALS = (CatalogError, ExpstateError, sa.exc.SQLAlchemyError, ArithmeticError, ValueError, TypeError)
"""What entering a record that nobody can have taken may end in."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """A snapshot in a folder: its manifest's stamp before it was read, and what the catalog keeps of it."""

    storage: Storage
    info: FileInfo
    data: RecordData

    def is_there_still(self) -> bool:
        """Whether the manifest is the one that was read."""
        try:
            return self.storage.stat(names.MANIFEST) == self.info
        except (ExpstateError, OSError):
            return False


@dataclass(frozen=True, slots=True)
class _Known:
    """A location of the catalog before the folders were looked into."""

    record: int
    url: str
    host: str
    status: str
    seen_at: int

    def is_as_it_was(self, connection: sa.Connection) -> bool:
        table = schema.locations
        query = sa.select(table.c.status, table.c.seen_at).where(
            table.c.record == self.record, table.c.place == rows.place_key(self.url, self.host)
        )
        return connection.execute(query).first() == (self.status, self.seen_at)


def _in_order(found: Sequence[_Seen]) -> list[_Seen]:
    """By the time of the take, but each after its parent, whatever the clocks said."""
    by_id: dict[str, list[_Seen]] = {}
    for each in sorted(found, key=lambda each: (each.data.created_at, each.data.id, each.data.url)):
        by_id.setdefault(each.data.id, []).append(each)
    placed: dict[str, None] = {}
    for snapshot_id in by_id:
        line: dict[str, None] = {}
        ancestor: str | None = snapshot_id
        while ancestor in by_id and ancestor not in placed and ancestor not in line:
            line[ancestor] = None
            ancestor = by_id[ancestor][0].data.parent
        placed |= dict.fromkeys(reversed(line))
    return [each for snapshot_id in placed for each in by_id[snapshot_id]]


def _is_held_by_another(connection: sa.Connection, data: RecordData) -> bool:
    """Whether another record is believed to be at this place."""
    table = schema.locations
    where = (table.c.place == rows.place_key(data.url, data.host), table.c.status == "present", schema.records.c.id != data.id)
    return connection.execute(sa.select(table.c.record).join(schema.records).where(*where)).first() is not None
