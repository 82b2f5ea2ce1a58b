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
    ExpstateError,
    InvalidArgumentError,
    SnapshotChangedError,
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
        return f"{self.location.url}: {self.reason}"


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
    """
    here, gone, remains = _look(record)
    if not force:
        check_unprotected(record, [storage for _, storage in here])
    if keep_tagged:
        _check_untagged(record, [storage for _, storage in here])
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
        _forget(catalog, record, gone)
    return tuple(remains)


def _look(record: Record) -> tuple[list[tuple[Location, Storage]], list[Location], list[Remains]]:
    """Where a snapshot lies, where it is no more, and where that cannot be told or changed from here."""
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
        except (ExpstateError, OSError) as error:
            remains.append(Remains(location, str(error), error))
            continue
        if found is None or found[0] != record.id:
            gone.append(location)
            _finish(storage)
        elif found[1] != location.digest:
            msg = f"what lies at {location.url!r} has the id {record.id[:8]} and is not what was recorded; run `expstate scan` on it first"
            raise SnapshotChangedError(msg)
        else:
            here.append((location, storage))
    return here, gone, remains


def _finish(storage: Storage) -> None:
    """Finish a deletion that was interrupted."""
    with contextlib.suppress(ExpstateError, OSError):
        collect.collect([storage], dry_run=False)


def check_unprotected(record: Record, storages: Sequence[Storage] = ()) -> None:
    """Refuse what is pinned or has an alias, as the record or one of these folders says."""
    reasons = ["is pinned"] if record.pinned else []
    reasons += [f"has the alias {alias!r}" for alias in record.aliases]
    if reasons:
        msg = f"snapshot {record.id[:8]} {' and '.join(reasons)}; take that back, or pass force=True"
        raise SnapshotPinnedError(msg)
    for storage in storages:
        annotate.check_removable(storage, record.id)


def _check_untagged(record: Record, storages: Sequence[Storage]) -> None:
    for storage in storages:
        found = annotate.read(storage, record.id)
        tags = [] if found is None else sorted(tag for tag, mark in found.tags.items() if mark.present)
        if tags:
            msg = f"snapshot {record.id[:8]} was tagged {tags[0]!r} in its folder"
            raise SnapshotPinnedError(msg)


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
