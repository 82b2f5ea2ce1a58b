"""Keeping and throwing away: deletion by ref, and clean-up of what the dead left. ``plan`` is that of ``prune``.

Names, aliases and clean-up are those of one project; only the current user's snapshots are removed unless it is said otherwise.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import sqlalchemy as sa

from expstate.catalog import folders, model, refs, roots, rows, schema
from expstate.catalog.provenance import current_project
from expstate.catalog.prune import PrunePlan as PrunePlan  # noqa: PLC0414 - what ``plan`` gives
from expstate.catalog.prune import plan as plan  # noqa: PLC0414 - what ``from expstate.catalog import keep`` is for
from expstate.catalog.removal import foresee, forget, one_project, remove, taker_if_not_us
from expstate.engine.collect import GcReport, collect
from expstate.errors import CatalogWarning, ExpstateError, InvalidArgumentError, SnapshotNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from expstate.catalog.catalog import Catalog
    from expstate.catalog.model import Record
    from expstate.engine.collect import Leftover
    from expstate.storage.base import Storage


def delete(
    catalog: Catalog, ref: str, *, force: bool = False, project: str | None = None, any_user: bool = False, dry_run: bool = False
) -> Record:
    """Delete a snapshot wherever it lies, and its record; as ``Catalog.delete`` documents it.

    Raises
    ------
    RefNotFoundError
        If no snapshot goes by the ref.
    InvalidArgumentError
        If it is another user's, of another project, or still being taken.
    SnapshotPinnedError
        If it is pinned or has an alias.
    SnapshotChangedError
        If what lies at one of its places is not what was recorded.
    SnapshotNotFoundError, StorageError
        If it can be removed at none of its places from here.

    Warns
    -----
    CatalogWarning
        If it remains at some of its places; the record then stays.
    """
    named = one_project(project)
    record = refs.resolve(catalog, ref, project=named)
    _check_ours(record, named, any_user=any_user)
    remains = foresee(record, force=force) if dry_run else remove(catalog, record, force=force)
    if remains and len(remains) == len(record.locations):
        if isinstance(remains[0].error, (ExpstateError, OSError)):
            raise remains[0].error
        msg = f"snapshot {record.id[:8]} cannot be deleted: {remains[0]}"
        raise SnapshotNotFoundError(msg)
    if remains and not dry_run:
        warnings.warn(
            f"snapshot {record.id[:8]} was not deleted everywhere, so its record stays: {'; '.join(map(str, remains))}",
            CatalogWarning,
            stacklevel=3,
        )
    return record


def _check_ours(record: Record, project: str, *, any_user: bool) -> None:
    if record.status == "pending":
        msg = f"snapshot {record.id[:8]} is still being taken; cancel the take, or wait for it"
        raise InvalidArgumentError(msg)
    if record.project != project:
        msg = f"snapshot {record.id[:8]} is of project {record.project!r}, not of {project!r}; pass project={record.project!r} to delete it"
        raise InvalidArgumentError(msg)
    who = taker_if_not_us(record)
    if who is not None and not any_user:
        msg = f"snapshot {record.id[:8]} was taken by {who}; pass any_user=True to delete it"
        raise InvalidArgumentError(msg)


def gc(catalog: Catalog, *, dry_run: bool = False, project: str | None = None) -> GcReport:
    """Remove what the dead left in the folders of a project's snapshots; as ``Catalog.gc`` documents it.

    Returns
    -------
    GcReport
        Of all folders together; those that could not be read are among ``damaged``.
    """
    removed: list[Leftover] = []
    alive: list[str] = []
    damaged: list[str] = []
    seen: set[str] = set()
    for storage in _folders(catalog, current_project() if project is None else project):
        if storage.url in seen:
            continue
        seen.add(storage.url)
        try:
            report = collect([storage], dry_run=dry_run)
        except (ExpstateError, OSError):
            damaged.append(storage.url)
            continue
        removed += report.removed
        alive += report.alive
        damaged += report.damaged
    deleted = [leftover for leftover in removed if leftover.action == "delete"]
    if deleted and not dry_run:
        _forget(catalog, deleted)
    return GcReport(tuple(removed), tuple(alive), tuple(damaged))


def _folders(catalog: Catalog, project: str) -> Iterator[Storage]:
    table = schema.locations
    query = sa.select(table.c.url, schema.records.c.project).join(schema.records).where(table.c.host.in_(["", model.this_host()]))
    with catalog.database.reading() as connection:
        found = [(rows.restored_url(url), of) for url, of in connection.execute(query.order_by(table.c.url))]
    ours = dict.fromkeys(url for url, of in found if project in {"*", of})
    # Of which project a dead take was, nobody knows: it is that of the snapshots beside it, and everybody's where there are none.
    theirs = {roots.root_of(url) for url, _ in found} - set(map(roots.root_of, ours))
    yield from folders.near_roots(catalog.place, lambda _: None, but=theirs)
    for url in ours:
        try:
            yield folders.open_location(url)
        except ExpstateError:
            continue  # one that this machine cannot open


def _forget(catalog: Catalog, deleted: list[Leftover]) -> None:
    """Take the places of snapshots whose deletion was finished just now out of the catalog."""
    table = schema.locations
    with catalog.database.writing() as connection:
        for leftover in deleted:
            key = rows.place_key(leftover.url, model.host_of(leftover.url))
            query = sa.select(table.c.record).join(schema.records)
            query = query.where(table.c.place == key, schema.records.c.id.startswith(leftover.attempt, autoescape=True))
            for seq in connection.execute(query).scalars().all():
                if not _is_back(leftover):
                    forget(connection, seq, [key])


def _is_back(leftover: Leftover) -> bool:
    """Whether the deleted snapshot lies there again, or that cannot be told."""
    try:
        found = folders.identity(folders.open_location(leftover.url))
    except (ExpstateError, OSError):
        return True
    return found is not None and found[0].startswith(leftover.attempt)
