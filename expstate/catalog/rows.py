"""Records in and out of the tables, inside a transaction that the caller holds.

``put`` enters what is known of a snapshot, any number of times; ``annotate`` changes what people added; ``fetch`` gives records.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa

from expstate.catalog import schema
from expstate.catalog.model import Body, Location, Record, RecordData, effective, time_of
from expstate.format import annotations as added
from expstate.format.annotations import Annotations
from expstate.state.values import decode

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_encode = msgspec.json.Encoder().encode
_body = msgspec.json.Decoder(Body).decode
_annotations = msgspec.json.Decoder(Annotations).decode
_GROUP = 500
"""Most bound values of one statement: SQLite has a limit."""


def now() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


def place_key(url: str, host: str) -> str:
    """What ``locations.place`` holds for a URL on a host."""
    return hashlib.sha256(f"{host}\0{url}".encode("utf-8", "surrogatepass")).hexdigest()


def put(connection: sa.Connection, data: RecordData) -> int:
    """Enter a snapshot, or what is new about one that is there: its place and its annotations.

    Returns
    -------
    int
        Its row's number.
    """
    found = connection.execute(sa.select(schema.records.c.seq, schema.records.c.annotations).where(schema.records.c.id == data.id)).first()
    if found is None:
        seq = _insert(connection, data)
    else:
        seq = found[0]
        if data.annotations is not None:
            annotate(connection, seq, data.annotations)
    _put_location(connection, seq, data)
    return seq


def _insert(connection: sa.Connection, data: RecordData) -> int:
    git = data.body.provenance.get("git")
    git = git if isinstance(git, dict) else {}
    values = {
        "id": data.id,
        "project": data.project,
        "name": data.name,
        "user": data.user,
        "host": _text(data.body.provenance.get("host")),
        "step": data.step,
        "created_at": data.created_at,
        "ordered_at": _order(connection, data),
        "duration_seconds": data.duration_seconds,
        "nbytes": data.nbytes,
        "written_bytes": data.written_bytes,
        "world_size": data.world_size,
        "parent": data.parent,
        "digest": data.digest,
        "pinned": False,
        "status": "present",
        "git_commit": _text(git.get("commit")),
        "git_branch": _text(git.get("branch")),
        "environment": _put_environment(connection, data.packages),
        "body": _encode(data.body).decode(),
    }
    seq: int = connection.execute(sa.insert(schema.records).values(values)).inserted_primary_key[0]  # type: ignore[index]
    params = [
        {"record": seq, "name": name, "number": number, "text": text}
        for name, (number, text) in _by_id(
            connection, data.project, "param", {name: _sides(value) for name, value in data.body.params.items()}
        )
    ]
    if params:
        connection.execute(sa.insert(schema.params), params)
    _index(connection, seq, data.project, data.body, data.annotations)
    return seq


def _order(connection: sa.Connection, data: RecordData) -> int:
    """A place in the order of records: the time of the take, but after its parent, whatever the clock said."""
    column = schema.records.c.ordered_at
    parent = connection.execute(sa.select(column).where(schema.records.c.id == data.parent)).scalar() if data.parent else None
    return data.created_at if parent is None else max(data.created_at, parent + 1)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _put_environment(connection: sa.Connection, packages: dict[str, str]) -> str | None:
    if not packages:
        return None
    text = _encode(dict(sorted(packages.items())))
    digest = hashlib.sha256(text).hexdigest()
    table = schema.environments
    if connection.execute(sa.select(table.c.digest).where(table.c.digest == digest)).first() is None:
        connection.execute(sa.insert(table).values(digest=digest, packages=text.decode()))
    return digest


def _put_location(connection: sa.Connection, seq: int, data: RecordData) -> None:
    table = schema.locations
    key = place_key(data.url, data.host)
    # Whatever was there before is there no more.
    others = connection.execute(sa.select(table.c.record).where(table.c.place == key, table.c.record != seq, table.c.status == "present"))
    for (other,) in others.all():
        set_location_status(connection, other, data.url, data.host, "replaced")
    where = (table.c.record == seq, table.c.place == key)
    values = {"digest": data.digest, "status": "present", "seen_at": now()}
    if connection.execute(sa.select(table.c.record).where(*where)).first() is None:
        connection.execute(sa.insert(table).values(record=seq, place=key, url=data.url, host=data.host, **values))
    else:
        connection.execute(sa.update(table).where(*where).values(**values))
    _set_status(connection, seq)


def set_location_status(connection: sa.Connection, seq: int, url: str, host: str, status: str) -> None:
    """Say that a snapshot is at a place no more (``replaced``, ``missing``), or again (``present``)."""
    table = schema.locations
    where = (table.c.record == seq, table.c.place == place_key(url, host))
    connection.execute(sa.update(table).where(*where).values(status=status, seen_at=now()))
    _set_status(connection, seq)


def _set_status(connection: sa.Connection, seq: int) -> None:
    table = schema.locations
    found = set(connection.execute(sa.select(table.c.status).where(table.c.record == seq)).scalars())
    status = next((status for status in ("present", "replaced") if status in found), "missing")
    connection.execute(sa.update(schema.records).where(schema.records.c.seq == seq).values(status=status))


def annotate(connection: sa.Connection, seq: int, annotations: Annotations) -> Annotations:
    """Merge what people added into a record.

    Returns
    -------
    Annotations
        Those that the record has now.
    """
    table = schema.records
    text, project, body = connection.execute(sa.select(table.c.annotations, table.c.project, table.c.body).where(table.c.seq == seq)).one()
    merged = annotations if text is None else added.merge(_annotations(text), annotations)
    for index in (schema.tags, schema.metrics):
        connection.execute(sa.delete(index).where(index.c.record == seq))
    _index(connection, seq, project, _body(body), merged)
    return merged


def _index(connection: sa.Connection, seq: int, project: str, body: Body, annotations: Annotations | None) -> None:
    """Fill the tables that are searched with what is true of a record now."""
    now_true = effective(body, annotations)
    values = {
        "pinned": now_true.pinned,
        "note": now_true.note,
        "annotations": None if annotations is None else _encode(annotations).decode(),
    }
    connection.execute(sa.update(schema.records).where(schema.records.c.seq == seq).values(**values))
    if now_true.tags:
        connection.execute(sa.insert(schema.tags), [{"record": seq, "tag": tag} for tag in now_true.tags])
    metrics = [
        {"record": seq, "name": name, "number": number}
        for name, number in _by_id(connection, project, "metric", {name: _sides(value)[0] for name, value in now_true.metrics.items()})
    ]
    if metrics:
        connection.execute(sa.insert(schema.metrics), metrics)
    _claim_aliases(connection, seq, project, now_true.aliases)


def _claim_aliases(connection: sa.Connection, seq: int, project: str, claims: dict[str, int]) -> None:
    """Give a record the aliases that it claims and nobody has claimed since, and take away those that it has given up."""
    table = schema.aliases
    connection.execute(sa.delete(table).where(table.c.record == seq, table.c.alias.not_in(claims)))
    for alias, at in claims.items():
        holder = connection.execute(
            sa.select(table.c.record, table.c.claimed_at).where(table.c.project == project, table.c.alias == alias)
        ).first()
        if holder is None:
            connection.execute(sa.insert(table).values(project=project, alias=alias, record=seq, claimed_at=at))
        elif (holder.claimed_at, holder.record) < (at, seq):
            where = (table.c.project == project, table.c.alias == alias)
            connection.execute(sa.update(table).where(*where).values(record=seq, claimed_at=at))


def _by_id(connection: sa.Connection, project: str, kind: str, values: dict[str, Any]) -> list[tuple[int, Any]]:
    """Values under the numbers of their names, which are entered where they are new."""
    table = schema.names
    known: dict[str, int] = {}
    for group in _groups(list(values)):
        query = sa.select(table.c.name, table.c.id).where(table.c.project == project, table.c.kind == kind, table.c.name.in_(group))
        known |= {name: number for name, number in connection.execute(query)}
    for name in values.keys() - known.keys():
        inserted = connection.execute(sa.insert(table).values(project=project, kind=kind, name=name))
        known[name] = inserted.inserted_primary_key[0]  # type: ignore[index]
    return [(known[name], value) for name, value in values.items()]


def _sides(encoded: Any) -> tuple[float | None, str | None]:
    """A value as a number and as a text, as far as it is one."""
    value = decode(encoded)
    if isinstance(value, bool):
        return None, "true" if value else "false"
    if isinstance(value, str):
        return None, value
    if isinstance(value, (int, float)):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf if value > 0 else -math.inf
        return (None if math.isnan(number) else number), None
    return None, None


def _groups(items: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (items[start : start + _GROUP] for start in range(0, len(items), _GROUP))


_COLUMNS = [
    schema.records.c[name]
    for name in (
        "seq id name project user host step created_at duration_seconds nbytes written_bytes world_size parent digest status body annotations"
    ).split()
]


def fetch(connection: sa.Connection, seqs: Sequence[int]) -> list[Record]:
    """Records by the numbers of their rows, in that order; those that are gone are left out."""
    rows: dict[int, Any] = {}
    places: dict[int, list[Location]] = {}
    claimed: dict[int, list[str]] = {}
    for group in _groups(seqs):
        rows |= {row[0]: row for row in connection.execute(sa.select(*_COLUMNS).where(schema.records.c.seq.in_(group))).all()}
        table = schema.locations
        query = sa.select(table.c.record, table.c.url, table.c.host, table.c.digest, table.c.status).where(table.c.record.in_(group))
        for record, *place in connection.execute(query.order_by(table.c.status != "present", table.c.seen_at)).all():
            places.setdefault(record, []).append(Location(*place))
        query = sa.select(schema.aliases.c.record, schema.aliases.c.alias).where(schema.aliases.c.record.in_(group))
        for record, alias in connection.execute(query.order_by(schema.aliases.c.alias)).all():
            claimed.setdefault(record, []).append(alias)
    return [_record(rows[seq], places.get(seq, []), claimed.get(seq, [])) for seq in seqs if seq in rows]


@functools.lru_cache(4096)
def _decoded(body: str, annotations: str | None) -> tuple[Body, Any]:
    decoded = _body(body)
    return decoded, effective(decoded, None if annotations is None else _annotations(annotations))


def _record(row: Any, places: list[Location], aliases: list[str]) -> Record:
    (
        seq,
        snapshot_id,
        name,
        project,
        user,
        host,
        step,
        created_at,
        duration,
        nbytes,
        written,
        world_size,
        parent,
        digest,
        status,
        *rest,
    ) = row
    del seq
    body, now_true = _decoded(*rest)
    return Record(
        id=snapshot_id,
        name=name,
        project=project,
        user=user,
        host=host,
        url=places[0].url if places else "",
        locations=tuple(places),
        step=step,
        created_at=time_of(created_at),
        duration_seconds=duration,
        nbytes=nbytes,
        written_bytes=written,
        world_size=world_size,
        tags=now_true.tags,
        aliases=tuple(aliases),
        pinned=now_true.pinned,
        note=now_true.note,
        params={key: decode(value) for key, value in body.params.items()},
        metrics={key: decode(value) for key, value in now_true.metrics.items()},
        keys=body.keys,
        parent=parent,
        digest=digest,
        provenance=body.provenance,
        status=status,
    )
