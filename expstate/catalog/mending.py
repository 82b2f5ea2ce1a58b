"""Whether the catalog agrees with itself and with the snapshots, and records made anew where it does not.

``check`` asks for what is wrong; a scan mends it: what is searched is made again from a record's body, the body from the snapshot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa

from expstate.catalog import rows, schema
from expstate.catalog.model import Body, Effective, RecordData, effective
from expstate.errors import ExpstateError
from expstate.format import annotations as added

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from expstate.catalog.catalog import Catalog
    from expstate.format.annotations import Annotations

UNREADABLE = "it cannot be read"
"""How what is said of a record begins that holds no record."""

_GROUP = 500
_body = msgspec.json.Decoder(Body).decode
_COMPARED = ("name", "user", "step", "created_at", "duration_seconds", "nbytes", "written_bytes", "world_size", "parent")
_STORED = sa.select(
    schema.records.c.id,
    schema.records.c.seq,
    schema.records.c.digest,
    schema.records.c.project,
    *(schema.records.c[name] for name in _COMPARED),
    schema.bodies.c.body,
    schema.bodies.c.annotations,
).outerjoin(schema.bodies)


def stored(connection: sa.Connection, ids: Sequence[str]) -> dict[str, Any]:
    """The rows of these snapshots, by id, for ``tells_right``."""
    return {row.id: row for row in connection.execute(_STORED.where(schema.records.c.id.in_(ids)))}


def tells_right(row: Any, data: RecordData) -> bool:
    """Whether a row can be read and says what the snapshot says; with a copy that has another manifest it is not compared."""
    if row.body is None or (row.annotations is not None and _annotations_of(row.annotations, row.id) is None):
        return False
    if row.digest != data.digest:
        return True
    # Provenance may have been switched off: what the manifest does not tell, the take knew.
    told = {name: getattr(data, name) for name in _COMPARED} | {"project": data.project or row.project, "user": data.user or row.user}
    expected = {name: rows.indexable(value) if isinstance(value, str) else value for name, value in told.items()}
    return all(getattr(row, name) == value for name, value in expected.items()) and row.body == msgspec.json.encode(data.body).decode()


def _annotations_of(text: str, snapshot_id: str) -> Annotations | None:
    """Annotations out of a body's row; None if they are none of this snapshot."""
    try:
        found = added.decode(text.encode())
    except (ExpstateError, ValueError):
        return None
    return found if found.id == snapshot_id else None


def numbers(connection: sa.Connection, project: str | None = None) -> Iterator[list[int]]:
    """The numbers of all records, or of a project's, in groups that a statement takes."""
    query = sa.select(schema.records.c.seq).order_by(schema.records.c.seq)
    if project is not None:
        query = query.where(schema.records.c.project == project)
    found = list(connection.execute(query).scalars())
    for first in range(0, len(found), _GROUP):
        yield found[first : first + _GROUP]


def disagreements(connection: sa.Connection, seqs: Sequence[int]) -> dict[int, str]:
    """What of these records is unreadable, or searched for as something else than it is."""
    records, bodies = schema.records, schema.bodies
    columns = (records.c.seq, records.c.id, records.c.project, records.c.pinned, records.c.note, bodies.c.body, bodies.c.annotations)
    query = sa.select(*columns).outerjoin(bodies).where(records.c.seq.in_(seqs))
    searched = _Searched(
        tags=_grouped(connection, sa.select(schema.tags.c.record, schema.tags.c.tag), schema.tags, seqs),
        metrics=_named(connection, schema.metrics, seqs),
        params=_named(connection, schema.params, seqs),
        aliases=_grouped(
            connection, sa.select(schema.aliases.c.record, schema.aliases.c.alias, schema.aliases.c.claimed_at), schema.aliases, seqs
        ),
    )
    found: dict[int, str] = {}
    for row in connection.execute(query).all():
        try:
            body = _body(row.body or "")
            annotations = None if row.annotations is None else _annotations_of(row.annotations, row.id)
            if annotations is None and row.annotations is not None:
                found[row.seq] = f"{UNREADABLE}: what was added to it is damaged"
                continue
            now_true = effective(body, annotations)
            problem = searched.problem(row, body, now_true) or _lost_alias(connection, row, now_true)
        except (msgspec.MsgspecError, ExpstateError, ValueError) as error:
            problem = f"{UNREADABLE}: {error}"
        if problem:
            found[row.seq] = problem
    return found


@dataclass(frozen=True, slots=True)
class _Searched:
    """What the tables that are searched say of some records."""

    tags: dict[int, dict[str, Any]]
    metrics: dict[int, dict[str, Any]]
    params: dict[int, dict[str, Any]]
    aliases: dict[int, dict[str, Any]]

    def problem(self, row: Any, body: Body, now_true: Effective) -> str | None:
        """Where that is not what is true."""
        index = rows.indexable
        metrics = {index(name): rows.sides_of(value) for name, value in now_true.metrics.items()}
        params = {index(name): rows.sides_of(value) for name, value in body.params.items()}
        claims = {(index(name), (at,)) for name, at in now_true.aliases.items()}
        if (row.pinned, row.note) != (now_true.pinned, rows.storable(now_true.note)):
            return "its pin or note"
        if self.tags.get(row.seq, {}).keys() != set(map(index, now_true.tags)):
            return "its tags"
        if self.metrics.get(row.seq, {}) != {name: (number, exact) for name, (number, _, exact) in metrics.items()}:
            return "its metrics"
        if self.params.get(row.seq, {}) != params:
            return "its params"
        return None if self.aliases.get(row.seq, {}).items() <= claims else "its aliases"


def _lost_alias(connection: sa.Connection, row: Any, now_true: Effective) -> str | None:
    """Whether a claim of a record is known to nobody."""
    table = schema.aliases
    for name, at in now_true.aliases.items():
        where = (table.c.project == row.project, table.c.alias == rows.indexable(name))
        holder = connection.execute(sa.select(table.c.claimed_at, table.c.record).where(*where)).first()
        if holder is None or tuple(holder) < (at, row.seq):
            return "its aliases"
    return None


def _named(connection: sa.Connection, table: sa.Table, seqs: Sequence[int]) -> dict[int, dict[str, Any]]:
    values = [column for column in table.c if column.name not in {"record", "name"}]
    joined = table.join(schema.names, table.c.name == schema.names.c.id)
    return _grouped(connection, sa.select(table.c.record, schema.names.c.name, *values).select_from(joined), table, seqs)


def _grouped(connection: sa.Connection, query: sa.Select[Any], table: sa.Table, seqs: Sequence[int]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for seq, name, *values in connection.execute(query.where(table.c.record.in_(seqs))):
        found.setdefault(seq, {})[name] = tuple(values)
    return found


def repair_indexes(catalog: Catalog) -> None:
    """Have SQLite make its indexes anew from its tables, where these are whole; raises what it finds else."""
    with catalog.database.writing() as connection:
        connection.exec_driver_sql("REINDEX")


def mend(catalog: Catalog) -> int:
    """Make records that are searched for as something else than they are anew from their bodies; how many."""
    with catalog.database.reading() as connection:
        wrong = [seq for group in numbers(connection) for seq in disagreements(connection, group)]
    count = 0
    for seq in wrong:
        with catalog.database.writing() as connection:
            if disagreements(connection, [seq]):
                count += enter_anew(connection, seq)
    return count


def enter_anew(connection: sa.Connection, seq: int, data: RecordData | None = None) -> bool:
    """Make all of a record again, from the snapshot or else from its body; False if that cannot be read.

    Its places, its place in the order of records and what was added to it stay.
    """
    old = connection.execute(sa.select(schema.records).where(schema.records.c.seq == seq)).mappings().one()
    places = connection.execute(sa.select(schema.locations).where(schema.locations.c.record == seq)).mappings().all()
    body, annotations = _texts(connection, seq, old["id"])
    if data is None:
        if body is None:
            return False
        packages = connection.execute(sa.select(schema.environments.c.packages).where(schema.environments.c.digest == old["environment"]))
        data = RecordData(
            **{name: old[name] for name in ("id", "digest", "project", *_COMPARED)},
            url="",
            host="",
            body=body,
            packages=msgspec.json.decode(packages.scalar() or b"{}"),
        )
    if annotations is not None:
        merged = annotations if data.annotations is None else added.merge(annotations, data.annotations)
        data = msgspec.structs.replace(data, annotations=merged)
    remove(connection, seq)
    # At no place, or what is there now would count as replaced.
    known = {"project": data.project or old["project"], "user": data.user or old["user"]}
    new = rows.put(connection, msgspec.structs.replace(data, **known, url="", host=""))
    connection.execute(sa.delete(schema.locations).where(schema.locations.c.record == new))
    for place in places:
        connection.execute(sa.insert(schema.locations).values({**place, "record": new}))
    values = {"ordered_at": old["ordered_at"], "status": old["status"]}
    connection.execute(sa.update(schema.records).where(schema.records.c.seq == new).values(values))
    return True


def _texts(connection: sa.Connection, seq: int, snapshot_id: str) -> tuple[Body | None, Annotations | None]:
    """Body and annotations of a record, as far as they can be read."""
    table = schema.bodies
    row = connection.execute(sa.select(table.c.body, table.c.annotations).where(table.c.record == seq)).first()
    if row is None:
        return None, None
    try:
        body = _body(row.body)
    except (msgspec.MsgspecError, ValueError):
        body = None
    return body, None if row.annotations is None else _annotations_of(row.annotations, snapshot_id)


def remove(connection: sa.Connection, seq: int) -> None:
    """Remove a record and all that belongs to it."""
    for table in reversed(schema.metadata.sorted_tables):
        if "record" in table.c:
            connection.execute(sa.delete(table).where(table.c.record == seq))
    connection.execute(sa.delete(schema.records).where(schema.records.c.seq == seq))


def ids(connection: sa.Connection, seqs: Sequence[int]) -> dict[int, str]:
    """The ids of records by their numbers."""
    table = schema.records
    return {row.seq: row.id for row in connection.execute(sa.select(table.c.seq, table.c.id).where(table.c.seq.in_(seqs)))}


def is_known(connection: sa.Connection, data: RecordData) -> bool:
    """Whether a record tells of this snapshot at this place."""
    table = schema.locations
    query = sa.select(table.c.record).join(schema.records).where(table.c.place == rows.place_key(data.url, data.host))
    return connection.execute(query.where(schema.records.c.id == data.id, table.c.status == "present")).first() is not None


def annotations_of(connection: sa.Connection, snapshot_id: str) -> Annotations | None:
    """What the catalog knows to have been added to a snapshot."""
    query = sa.select(schema.records.c.seq).where(schema.records.c.id == snapshot_id)
    seq = connection.execute(query).scalar()
    return None if seq is None else _texts(connection, seq, snapshot_id)[1]
