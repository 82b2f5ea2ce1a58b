"""The state of the catalog at a glance: what it holds, what waits to be entered, and takes that are not finished.

Gets a catalog, changes nothing that a person could see; a catalog that cannot be opened is part of what is told.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa

from expstate.catalog import folders, model, schema, spool
from expstate.engine.lease import LEASE_SECONDS, decode_lease, is_dead
from expstate.engine.report import bytes_text, counted
from expstate.errors import CatalogError, ExpstateError
from expstate.format import names
from expstate.state import paths

if TYPE_CHECKING:
    from collections.abc import Iterator

    from expstate.catalog.catalog import Catalog
    from expstate.storage.base import FileInfo, Storage

_LEASE_BYTES = 2**26
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A take, copy or deletion that has not come to its end.

    Attributes
    ----------
    path : str
        The folder.
    action : str
        ``take``, ``copy`` or ``delete``.
    id : str
        Of the snapshot; only its beginning where the lease does not tell.
    host : str or None
        The machine of the process.
    pid : int or None
        The process.
    alive : bool
        Whether it may still be at work.
    age_seconds : float
        Since it last gave a sign.
    """

    path: str
    action: str
    id: str
    host: str | None
    pid: int | None
    alive: bool
    age_seconds: float

    def __str__(self) -> str:
        elsewhere = f" on {self.host}" if self.host not in {None, model.this_host()} else ""
        who = f"pid {self.pid}{elsewhere}" if self.pid is not None else "an unknown process"
        state = "alive" if self.alive else "dead"
        return paths.printable(f"1 unfinished {self.action} by {who} ({state}), {_age_text(self.age_seconds)} old: {self.path}")


@dataclass(frozen=True, slots=True)
class Status:
    """The state of a catalog.

    Attributes
    ----------
    url : str
        Where it is.
    nbytes : int or None
        Bytes of the database; None if that cannot be told.
    version : str or None
        Of its tables.
    records : dict of str to int
        Records by project.
    missing, replaced : int
        Records whose snapshot is not where it was.
    spooled : int
        Records that wait to be entered.
    roots : int
        Folders that takes went to.
    unfinished : tuple of Unfinished
        Takes, copies and deletions in those folders that have not come to their end.
    problem : str or None
        Why the catalog cannot be opened.
    """

    url: str
    nbytes: int | None
    version: str | None
    records: dict[str, int]
    missing: int
    replaced: int
    spooled: int
    roots: int
    unfinished: tuple[Unfinished, ...]
    problem: str | None

    def __str__(self) -> str:
        if self.problem is None:
            size = "" if self.nbytes is None else f", {bytes_text(self.nbytes)}"
            held = f"{counted(sum(self.records.values()), 'record')} in {counted(len(self.records), 'project')}"
            lines = [f"catalog {paths.printable(self.url)}: version {self.version}{size}, {held}"]
            lines += [f"{what}: {found:,}" for what in ("missing", "replaced") if (found := getattr(self, what))]
        else:
            lines = [f"catalog {paths.printable(self.url)}: {paths.printable(self.problem.removeprefix(f'the catalog {self.url!r} '))}"]
        if self.spooled:
            lines.append(f"waiting to be entered: {counted(self.spooled, 'record')}")
        lines += [str(unfinished) for unfinished in self.unfinished]
        if any(not unfinished.alive for unfinished in self.unfinished):
            lines.append("`expstate gc --all` shows what the dead left, and removes it with --yes")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


def status(catalog: Catalog) -> Status:
    """The state of a catalog and of the folders that takes went to; never an error because of either.

    Examples
    --------
    >>> import tempfile
    >>> from expstate import Catalog
    >>> from expstate.catalog.status import status
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = status(Catalog(f"{folder}/catalog.db"))
    >>> found.records, found.spooled, found.unfinished
    ({}, 0, ())
    """
    spooled = spool.pending(catalog.place)  # before it is entered, which opening does
    problem, counted = None, _Counted(None, None, {}, 0, 0)
    try:
        counted = _count(catalog)
        spooled = spool.pending(catalog.place)
    except CatalogError as error:
        problem = str(error)
    return Status(
        url=catalog.url,
        nbytes=counted.nbytes,
        version=counted.version,
        records=counted.records,
        missing=counted.missing,
        replaced=counted.replaced,
        spooled=spooled,
        roots=len(folders.roots_of(catalog.place)),
        unfinished=tuple(unfinished_in(folders.near_roots(catalog.place, lambda _: None))),
        problem=problem,
    )


@dataclass(frozen=True, slots=True)
class _Counted:
    nbytes: int | None
    version: str | None
    records: dict[str, int]
    missing: int
    replaced: int


def _count(catalog: Catalog) -> _Counted:
    table = schema.records
    count = sa.func.count()
    with catalog.database.reading() as connection:
        by_project = connection.execute(sa.select(table.c.project, count).group_by(table.c.project).order_by(table.c.project))
        records: dict[str, int] = {project: found for project, found in by_project}  # noqa: C416 - rows are no pairs to mypy
        by_state = connection.execute(sa.select(table.c.status, count).group_by(table.c.status))
        states: dict[str, int] = {state: found for state, found in by_state}  # noqa: C416 - as above
        version = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
        if catalog.database.dialect == "sqlite":
            size = "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()"
        else:
            size = "SELECT pg_database_size(current_database())"
        nbytes = connection.exec_driver_sql(size).scalar()
    return _Counted(nbytes, version, records, states.get("missing", 0), states.get("replaced", 0))


def unfinished_in(storages: Iterator[Storage]) -> Iterator[Unfinished]:
    """What has not come to its end in these folders; what cannot be read is left out."""
    for storage in storages:
        try:
            files = [info for info in storage.list() if names.attempt_of_lease(info.name) is not None]
            for info in files:
                yield _unfinished(storage, info)
        except (ExpstateError, OSError):
            continue


def _unfinished(storage: Storage, info: FileInfo) -> Unfinished:
    lease = decode_lease(storage.read(info.name, limit=_LEASE_BYTES))
    now = storage.clock()
    age = max(0.0, now - info.modified_at)
    if lease is None:  # it was not written to its end
        return Unfinished(
            storage.url, "take", names.attempt_of_lease(info.name) or "", None, None, alive=age <= LEASE_SECONDS, age_seconds=age
        )
    alive = not is_dead(lease, info.modified_at, now)
    return Unfinished(storage.url, lease.action, lease.id, lease.host, lease.pid, alive=alive, age_seconds=age)


def _age_text(seconds: float) -> str:
    for unit, name in ((_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"
