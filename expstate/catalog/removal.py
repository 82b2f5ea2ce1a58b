"""The removal of one recorded snapshot wherever it lies, and of its record.

Gets a record; looks at all its places before it touches one, removes only what has the recorded id and digest, and tells what remains.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from expstate.catalog import folders, mending, rows, schema
from expstate.catalog.provenance import current_project, current_user
from expstate.engine import annotate, attempt, collect
from expstate.errors import (
    CatalogError,
    ExpstateError,
    InvalidArgumentError,
    SnapshotChangedError,
    SnapshotCorruptError,
    SnapshotNotFoundError,
    SnapshotPinnedError,
    SnapshotReplacedError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expstate.catalog.catalog import Catalog
    from expstate.catalog.model import Location, Record
    from expstate.storage.base import Storage


def taker_if_not_us(record: Record) -> str | None:
    """Who took a snapshot, in words, if that was not the user of this process."""
    if record.user is None:
        return "nobody knows whom"
    return None if record.user == current_user() else repr(record.user)


def one_project(project: str | None) -> str:
    """The project that something is removed from: the named one, else the current one.

    Raises
    ------
    InvalidArgumentError
        If all are meant.
    """
    if project == "*":
        msg = "snapshots are removed from one project at a time: name it"
        raise InvalidArgumentError(msg)
    return current_project() if project is None else project


@dataclass(frozen=True, slots=True)
class Remains:
    """A place where a snapshot still lies, or may lie, and why."""

    location: Location
    reason: str
    error: Exception | None = None

    def __str__(self) -> str:
        return f"{self.location.url}: {self.reason.removeprefix(f'{self.location.url!r}: ')}"


def present(record: Record) -> bool:
    """Whether the recorded snapshot lies at one of its places that this machine reaches."""
    for location in record.locations:
        if folders.is_reachable(location, record.id):
            with contextlib.suppress(ExpstateError, OSError):
                if folders.identity(folders.open_location(location.url)) == (record.id, location.digest):
                    return True
    return False


def remove(catalog: Catalog, record: Record, *, force: bool, keep_tagged: bool = False) -> tuple[Remains, ...]:
    """Remove a snapshot at all places that can be reached, then its record; the record stays as long as something remains.

    Parameters
    ----------
    catalog : Catalog
        Where it is recorded.
    record : Record
        As it is now.
    force : bool
        Remove it though it is pinned or has an alias.
    keep_tagged : bool
        Refuse to remove what was tagged in its folder.

    Returns
    -------
    tuple of Remains
        What could not be removed.

    Raises
    ------
    SnapshotPinnedError
        If it is protected; nothing was removed.
    SnapshotChangedError
        If what lies at one of its places has its id and is not it; nothing was removed.
    CatalogError
        If the catalog cannot be written: nothing was removed, or the message says that the snapshot was.
    """
    here, gone, remains = _look(record, force=force)
    if keep_tagged:
        _check_untagged(record, [storage for _, storage in here])
    with catalog.database.writing():
        pass  # what cannot be recorded is better known before anything is gone
    for location in gone:
        _finish(location)
    try:
        for location, storage in here:
            try:
                attempt.delete(storage, force=force, expected=(record.id, location.digest))
            except (SnapshotNotFoundError, SnapshotReplacedError):
                pass  # someone else was first
            except SnapshotPinnedError:
                raise
            except (ExpstateError, OSError) as error:
                remains.append(Remains(location, str(error), error))
                continue
            gone.append(location)
    finally:
        # Whatever comes between, the catalog does not tell of what is gone.
        try:
            _forget(catalog, record, gone)
        except CatalogError as error:
            msg = f"snapshot {record.id[:8]} was deleted, but its record was not; delete {record.id} again to remove that too: {error}"
            raise type(error)(msg) from error
    return tuple(remains)


def foresee(record: Record, *, force: bool) -> tuple[Remains, ...]:
    """What ``remove`` would leave, and its errors; nothing is touched."""
    return tuple(_look(record, force=force)[2])


def _look(record: Record, *, force: bool) -> tuple[list[tuple[Location, Storage]], list[Location], list[Remains]]:
    """Where a snapshot lies, where it is no more, and where that cannot be told or changed from here; a protected one is refused."""
    here: list[tuple[Location, Storage]] = []
    gone: list[Location] = []
    remains: list[Remains] = []
    for location in record.locations:
        if not folders.is_reachable(location, record.id):
            remains.append(Remains(location, f"it is on the disk of {location.host!r}: delete it there"))
            continue
        try:
            storage = folders.open_location(location.url)
            found = folders.identity(storage)
        except SnapshotCorruptError as error:
            reason = f"{error}; put it back from a copy, or remove its files by hand and delete it again"
            remains.append(Remains(location, reason, type(error)(reason)))
            continue
        except (ExpstateError, OSError) as error:
            remains.append(Remains(location, str(error), error))
            continue
        if found is None or found[0] != record.id:
            gone.append(location)
        elif found[1] != location.digest:
            msg = f"what lies at {location.url!r} has the id {record.id[:8]} and is not what was recorded; run `expstate scan` on it first"
            raise SnapshotChangedError(msg)
        else:
            here.append((location, storage))
    if not force:
        annotate.check_unprotected(f"snapshot {record.id[:8]}", record.aliases, pinned=record.pinned)
        for _, storage in here:
            annotate.check_removable(storage, record.id)
    return here, gone, remains


def _finish(location: Location) -> None:
    """Finish a deletion that was interrupted."""
    with contextlib.suppress(ExpstateError, OSError):
        collect.collect([folders.open_location(location.url)], dry_run=False)


def _check_untagged(record: Record, storages: Sequence[Storage]) -> None:
    for storage in storages:
        found = annotate.read(storage, record.id)
        tags = [] if found is None else sorted(tag for tag, mark in found.tags.items() if mark.present)
        if tags:
            msg = f"snapshot {record.id[:8]} was tagged {tags[0]!r} in its folder"
            raise SnapshotPinnedError(msg)


def forget_place(catalog: Catalog, record: Record, url: str) -> None:
    """A snapshot is gone from a place of this machine, or one that every machine reaches; without any left its record goes too."""
    _forget(catalog, record, [location for location in record.locations if location.url == url])


def _forget(catalog: Catalog, record: Record, gone: Sequence[Location]) -> None:
    if gone or not record.locations:
        with catalog.database.writing() as connection:
            seq = connection.execute(sa.select(schema.records.c.seq).where(schema.records.c.id == record.id)).scalar()
            if seq is not None:
                forget(connection, seq, [rows.place_key(location.url, location.host) for location in gone])


def forget(connection: sa.Connection, seq: int, places: Sequence[str]) -> None:
    """Take places out of a record; without any left the record goes too."""
    table = schema.locations
    connection.execute(sa.delete(table).where(table.c.record == seq, table.c.place.in_(places)))
    left = connection.execute(sa.select(table.c.url, table.c.host, table.c.status).where(table.c.record == seq)).first()
    if left is None:
        mending.remove(connection, seq)
    else:
        url = rows.restored_url(left.url)
        rows.set_location_status(connection, seq, url, left.host, left.status)
