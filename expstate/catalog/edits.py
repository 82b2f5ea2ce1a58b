"""What people add to snapshots: tags, aliases, pins, notes and metrics, in every folder that can be reached and in the catalog.

The files are written first. A crash in between leaves a file that says more than the catalog, which the next scan, or the next edit of
that snapshot, enters; and a pin protects from the moment when it is in the file. Each item carries its time, later than what it replaces;
so it does not matter where else, or how often, it is merged.
"""

from __future__ import annotations

import contextlib
import difflib
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa

from expstate.catalog import opening, refs, rows, schema
from expstate.catalog.provenance import current_project, redact
from expstate.engine import annotate
from expstate.errors import (
    CatalogWarning,
    ExpstateError,
    InvalidArgumentError,
    InvalidNameError,
    ProvenanceWarning,
    RefNotFoundError,
    SnapshotCorruptError,
    TakePendingError,
    UnsupportedFormatError,
)
from expstate.format import annotations as added
from expstate.format import names
from expstate.format.annotations import Annotations, Mark, Text, Value
from expstate.format.metadata import make_metadata

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expstate.catalog.catalog import Catalog
    from expstate.catalog.model import Location, Record
    from expstate.storage.base import Storage

Change = Callable[[Annotations, int], Annotations]
"""What is added, from what was there before and the time."""

_read = msgspec.json.Decoder(Annotations).decode
_told = threading.Event()


def tag(catalog: Catalog, ref: str, tags: Sequence[str]) -> Record:
    """Add tags, as ``Catalog.tag`` documents it."""
    return _set_tags(catalog, ref, tags, present=True)


def untag(catalog: Catalog, ref: str, tags: Sequence[str]) -> Record:
    """Take tags away, as ``Catalog.untag`` documents it."""
    return _set_tags(catalog, ref, tags, present=False)


def _set_tags(catalog: Catalog, ref: str, tags: Sequence[str], *, present: bool) -> Record:
    labels = make_metadata(name=None, tags=tags, params=None, metrics=None, note=None, step=None).tags
    if not labels:
        msg = "no tag was given"
        raise InvalidArgumentError(msg)

    def change(before: Annotations, now: int) -> Annotations:
        marks = {label: Mark(added.after(now, before.tags.get(label)), present) for label in labels}
        return msgspec.structs.replace(added.empty(before.id), tags=marks)

    return _edit(catalog, refs.resolve(catalog, ref), change)


def pin(catalog: Catalog, ref: str) -> Record:
    """Protect from deletion, as ``Catalog.pin`` documents it."""
    return _set_pin(catalog, ref, present=True)


def unpin(catalog: Catalog, ref: str) -> Record:
    """End the protection, as ``Catalog.unpin`` documents it."""
    return _set_pin(catalog, ref, present=False)


def _set_pin(catalog: Catalog, ref: str, *, present: bool) -> Record:
    def change(before: Annotations, now: int) -> Annotations:
        return msgspec.structs.replace(added.empty(before.id), pin=Mark(added.after(now, before.pin), present))

    return _edit(catalog, refs.resolve(catalog, ref), change)


def note(catalog: Catalog, ref: str, text: str | None) -> Record:
    """Replace the note, as ``Catalog.note`` documents it; what looks like a secret is replaced by a hash."""
    given = make_metadata(name=None, tags=(), params=None, metrics=None, note=text, step=None).note or ""
    shown = redact.text(given)
    if shown != given:
        warnings.warn(
            "the note looks like a secret, or holds a URL with one; only a hash, or the URL without user info and query, was recorded",
            ProvenanceWarning,
            stacklevel=3,
        )

    def change(before: Annotations, now: int) -> Annotations:
        return msgspec.structs.replace(added.empty(before.id), note=Text(added.after(now, before.note), shown))

    return _edit(catalog, refs.resolve(catalog, ref), change)


def log_metric(catalog: Catalog, ref: str, name: str, value: Any) -> Record:
    """Record a value, as ``Catalog.log_metric`` documents it."""
    metrics = make_metadata(name=None, tags=(), params=None, metrics={name: value}, note=None, step=None).metrics

    def change(before: Annotations, now: int) -> Annotations:
        found = {key: Value(added.after(now, before.metrics.get(key)), encoded) for key, encoded in metrics.items()}
        return msgspec.structs.replace(added.empty(before.id), metrics=found)

    return _edit(catalog, refs.resolve(catalog, ref), change)


# Aliases


def alias(catalog: Catalog, ref: str, given: str) -> Record:
    """Give an alias, as ``Catalog.alias`` documents it; one that differs from another of the project only by case is refused."""
    label = names.check_label(given, "alias")
    record = _committed(refs.resolve(catalog, ref))
    with catalog.database.reading() as connection:
        claims = _claims(connection, record.project)
    twin = next((other for other in claims if other != label and other.casefold() == label.casefold()), None)
    if twin is not None:
        msg = f"alias {label!r} differs from {twin!r}, which project {record.project!r} has, only by case; use that one, or another word"
        raise InvalidNameError(msg)
    claimed_at = claims.get(label, 0)

    def change(before: Annotations, now: int) -> Annotations:
        claim = Mark(added.after(max(now, claimed_at + 1), before.aliases.get(label)), present=True)
        return msgspec.structs.replace(added.empty(before.id), aliases={label: claim})

    places = _Places(record)
    claim = places.write(_added(catalog, record), change)

    def enter(connection: sa.Connection) -> tuple[Annotations, list[int]]:
        seq = _seq(connection, record)
        mine = claim
        table = schema.aliases
        query = sa.select(table.c.record, table.c.claimed_at).where(table.c.project == record.project, table.c.alias == label)
        holders = connection.execute(query.where(table.c.record != seq)).all()
        for holder in holders:
            # It may have been claimed by someone else since: who comes last to the catalog has it.
            if holder.claimed_at >= mine.aliases[label].at:
                mine = change(mine, holder.claimed_at + 1)
        lost = Mark(mine.aliases[label].at, present=False)
        for holder in holders:
            holder_id = connection.execute(sa.select(schema.records.c.id).where(schema.records.c.seq == holder.record)).scalar_one()
            rows.annotate(connection, holder.record, msgspec.structs.replace(added.empty(holder_id), aliases={label: lost}))
        rows.annotate(connection, seq, added.merge(claim, mine))
        return mine, [holder.record for holder in holders]

    mine, losers = catalog.database.write(enter)
    if mine != claim:
        places.write(mine, lambda before, _: before)
    # Last, so that there is no moment at which nobody has it; until then, and after a crash, the newest claim is what counts.
    with catalog.database.reading() as connection:
        former = rows.fetch(connection, losers)
    for loser in former:
        theirs = _Places(loser)
        with contextlib.suppress(SnapshotCorruptError, UnsupportedFormatError):  # the next edit of that one says so
            theirs.write(_added(catalog, loser), lambda before, _: before)
        theirs.tell()
    places.tell()
    return _now(catalog, record)


def unalias(catalog: Catalog, given: str) -> Record:
    """Take an alias away, as ``Catalog.unalias`` documents it."""
    label, project = names.check_label(given, "alias"), current_project()
    table = schema.aliases
    with catalog.database.reading() as connection:
        query = sa.select(table.c.record).where(table.c.project == project, table.c.alias == label)
        found = rows.fetch(connection, connection.execute(query).scalars().all())
        if not found:
            near = difflib.get_close_matches(label, _claims(connection, project), n=5)
            hint = f"; the nearest {'is' if len(near) == 1 else 'are'} {', '.join(map(repr, near))}" if near else ""
            msg = f"no snapshot of project {project!r} has the alias {label!r}{hint}"
            raise RefNotFoundError(msg)

    def change(before: Annotations, now: int) -> Annotations:
        gone = Mark(added.after(now, before.aliases.get(label)), present=False)
        return msgspec.structs.replace(added.empty(before.id), aliases={label: gone})

    return _edit(catalog, found[0], change)


def _claims(connection: sa.Connection, project: str) -> dict[str, int]:
    """The aliases of a project, and since when."""
    table = schema.aliases
    return {row.alias: row.claimed_at for row in connection.execute(sa.select(table).where(table.c.project == project))}


# Files and catalog


def _edit(catalog: Catalog, record: Record, change: Change) -> Record:
    """Add something to a snapshot, and give its record as it is then."""
    places = _Places(_committed(record))
    after = places.write(_added(catalog, record), change)
    catalog.database.write(lambda connection: rows.annotate(connection, _seq(connection, record), after))
    places.tell()
    return _now(catalog, record)


def _committed(record: Record) -> Record:
    if record.status == "pending":
        msg = f"the take to {record.url!r} goes on, so nothing can be added to the snapshot yet; wait() for it first"
        raise TakePendingError(msg)
    return record


def _added(catalog: Catalog, record: Record) -> Annotations:
    """What the catalog knows that was added to a snapshot."""
    records, bodies = schema.records, schema.bodies
    query = sa.select(bodies.c.annotations).join(records, records.c.seq == bodies.c.record).where(records.c.id == record.id)
    with catalog.database.reading() as connection:
        text = connection.execute(query).scalar()
    return added.empty(record.id) if text is None else _read(text)


def _seq(connection: sa.Connection, record: Record) -> int:
    seq: int | None = connection.execute(sa.select(schema.records.c.seq).where(schema.records.c.id == record.id)).scalar()
    if seq is None:
        msg = f"the record of snapshot {record.id[:8]} is gone: it was deleted meanwhile"
        raise RefNotFoundError(msg)
    return seq


def _now(catalog: Catalog, record: Record) -> Record:
    with catalog.database.reading() as connection:
        return rows.fetch(connection, [_seq(connection, record)])[0]


class _Places:
    """The folders of one snapshot that can be reached from here."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._storages: list[Storage] = []
        self._left_out: list[str] = []
        for location in record.locations:
            if location.status == "present":
                self._add(location)
        if not self._storages and not self._left_out:
            places = "; ".join(f"the snapshot is not at {location.url!r} any more" for location in record.locations)
            self._left_out.append(places or f"no folder of snapshot {record.id[:8]} is known")

    def _add(self, location: Location) -> None:
        try:
            storage = opening.storage_of(location)
            found = annotate.committed_id(storage)
        except ExpstateError as error:
            self._left_out.append(str(error))
            return
        if found == self._record.id:
            self._storages.append(storage)
        elif opening.is_elsewhere(location):
            self._left_out.append(f"{location.url!r} is on the disk of host {location.host!r}")

    def write(self, before: Annotations, change: Change) -> Annotations:
        """Merge what the files hold with what was added before and is added now, and write it to all of them.

        Raises
        ------
        SnapshotCorruptError, UnsupportedFormatError
            If a file cannot be understood; then none is written.
        """
        for storage in self._storages:
            found = annotate.read(storage, self._record.id)
            if found is not None:
                before = added.merge(before, found)
        after = added.merge(before, change(before, rows.now()))
        for storage in self._storages:
            try:
                after = annotate.update(storage, after)
            except (SnapshotCorruptError, UnsupportedFormatError):
                raise
            except (ExpstateError, OSError) as error:
                self._left_out.append(str(error))
        return after

    def tell(self) -> None:
        """Say, once, that something could not be written; when all that could be done is done."""
        if self._left_out and not _told.is_set():
            _told.set()
            warnings.warn(
                "what is added to snapshots stays in the catalog alone where their folders cannot be written "
                f"({'; '.join(self._left_out)}); a catalog that is built anew will not have it, and a pin does not protect where it is "
                "not written. This is said once",
                CatalogWarning,
                stacklevel=5,
            )
