"""Records in and out of the tables, inside a transaction that the caller holds.

``put`` enters what is known of a snapshot, any number of times; ``annotate`` changes what people added; ``fetch`` gives records.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import numbers
import re
import time
from typing import TYPE_CHECKING, Any, overload

import msgspec
import sqlalchemy as sa

from expstate.catalog import schema
from expstate.catalog.model import Body, Location, Record, RecordData, effective, enum_text, microseconds, time_of, value_of
from expstate.errors import CatalogCorruptError, ExpstateError
from expstate.format import annotations as added
from expstate.format.annotations import Annotations

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_encode = msgspec.json.Encoder().encode
_body = msgspec.json.Decoder(Body).decode
_annotations = msgspec.json.Decoder(Annotations).decode
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_INDEXED_BYTES = 1000
_JSON = 'json:"'
_FIRST, _LAST = microseconds("0001-01-01T00:00:00"), microseconds("9999-12-31T23:59:59")
_GROUP = 500
"""Most bound values of one statement: SQLite has a limit."""


def now() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


def place_key(url: str, host: str) -> str:
    """What ``locations.place`` holds for a URL on a host."""
    return hashlib.sha256(f"{host}\0{url}".encode("utf-8", "surrogatepass")).hexdigest()


def put(connection: sa.Connection, data: RecordData, *, live: bool = False, seen_at: int | None = None) -> int:
    """Enter a snapshot, or what is new about one that is there: its place and its annotations.

    Parameters
    ----------
    connection : sqlalchemy.Connection
        Inside a transaction that nobody else writes in.
    data : RecordData
        What is known of it.
    live : bool, default False
        Whether it has just been taken: then it comes after all others of its project, whatever the clock says. Else it comes where the
        time of its take puts it, after its parent and before those that came from it.
    seen_at : int, optional
        When it was at its place, in microseconds since 1970; by default it is there now.

    Returns
    -------
    int
        Its row's number.
    """
    seq, parent, last, child, environment = connection.execute(_ENVIRONS, _environs(data)).one()
    if seq is None:
        order = _order(data, parent, last if live else None, child)
        seq = _insert(connection, data, order, environment_is_there=environment is not None)
        _put_location(connection, seq, data, seen_at, is_new=True)
    else:
        if data.annotations is not None:
            annotate(connection, seq, data.annotations)
        _put_location(connection, seq, data, seen_at, is_new=False)
    return int(seq)


def _alone(query: sa.Select[Any]) -> Any:
    return query.scalar_subquery()


_RECORDS = schema.records.c
_ENVIRONS = sa.select(
    _alone(sa.select(_RECORDS.seq).where(_RECORDS.id == sa.bindparam("id"))),
    _alone(sa.select(_RECORDS.ordered_at).where(_RECORDS.id == sa.bindparam("parent"))),
    _alone(sa.select(sa.func.max(_RECORDS.ordered_at)).where(_RECORDS.project == sa.bindparam("project"))),
    _alone(sa.select(sa.func.min(_RECORDS.ordered_at)).where(_RECORDS.parent == sa.bindparam("id"))),
    _alone(sa.select(schema.environments.c.digest).where(schema.environments.c.digest == sa.bindparam("environment"))),
)
"""What a new record has to know of the others: whether it is there; the places in the order of its parent, of the last of its project and
of the first that came from it; whether its packages are known."""


def _environs(data: RecordData) -> dict[str, Any]:
    return {"id": data.id, "parent": data.parent, "project": indexable(data.project), "environment": _environment(data)[0]}


def _order(data: RecordData, parent: int | None, last: int | None, child: int | None) -> int:
    """A place in the order of records."""
    order = max(_time(data), *(0 if other is None else other + 1 for other in (parent, last)))
    return order if child is None or last is not None else min(order, child - 1)


def _insert(connection: sa.Connection, data: RecordData, order: int, *, environment_is_there: bool) -> int:
    git = data.body.provenance.get("git")
    git = git if isinstance(git, dict) else {}
    now_true = effective(data.body, data.annotations)
    digest, packages = _environment(data)
    if digest and not environment_is_there:
        connection.execute(sa.insert(schema.environments), {"digest": digest, "packages": packages})
    project = indexable(data.project)
    values = {
        "id": data.id,
        "project": project,
        "name": indexable(data.name),
        "user": indexable(data.user),
        "host": indexable(_text(data.body.provenance.get("host"))),
        "step": None if data.step is None else _within(data.step),
        "created_at": _time(data),
        "ordered_at": _within(order),
        "duration_seconds": data.duration_seconds,
        "nbytes": _within(data.nbytes),
        "written_bytes": _within(data.written_bytes),
        "world_size": min(_within(data.world_size), 2**31 - 1),
        "parent": data.parent,
        "digest": data.digest,
        "pinned": now_true.pinned,
        "note": storable(now_true.note),
        "status": "present",
        "git_commit": indexable(_text(git.get("commit"))),
        "git_branch": indexable(_text(git.get("branch"))),
        "environment": digest,
    }
    seq: int = connection.execute(sa.insert(schema.records), values).inserted_primary_key[0]  # type: ignore[index]
    annotations = None if data.annotations is None else _encode(data.annotations).decode()
    body = {"record": seq, "body": _encode(data.body).decode(), "annotations": annotations}
    connection.execute(sa.insert(schema.bodies), body)
    sides = {("param", name): sides_of(value) for name, value in data.body.params.items()}
    sides |= {("metric", name): sides_of(value) for name, value in now_true.metrics.items()}
    _put_values(connection, seq, project, sides)
    _put_tags(connection, seq, now_true.tags)
    if now_true.aliases:
        _claim_aliases(connection, seq, project, now_true.aliases)
    return seq


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _within(value: int) -> int:
    """A whole number as far as a database holds it; more than that only a manifest claims that nobody should trust."""
    return max(-(2**63), min(value, 2**63 - 1))


def _time(data: RecordData) -> int:
    return max(_FIRST, min(data.created_at, _LAST))


@overload
def storable(text: str) -> str: ...
@overload
def storable(text: None) -> None: ...
def storable(text: str | None) -> str | None:
    """A text with a question mark in the place of what no database holds; the body has it as it is."""
    return None if text is None else _NO_TEXT.sub("\ufffd", text)


@overload
def indexable(text: str) -> str: ...
@overload
def indexable(text: None) -> None: ...
def indexable(text: str | None) -> str | None:
    """A text as a column holds it that has an index: PostgreSQL's hold no more than 2,700 bytes. What is longer keeps its beginning.

    >>> indexable("a project"), len(indexable("x" * 5000))
    ('a project', 433)
    """
    if text is None:
        return None
    text = storable(text)
    data = text.encode()
    if len(data) <= _INDEXED_BYTES:
        return text
    return f"{text[:400]}\u2026{hashlib.sha256(data).hexdigest()[:32]}"


def _environment(data: RecordData) -> tuple[str | None, str | None]:
    """Packages as one text, and its digest."""
    if not data.packages:
        return None, None
    text = _encode(dict(sorted(data.packages.items())))
    return hashlib.sha256(text).hexdigest(), text.decode()


def _put_location(connection: sa.Connection, seq: int, data: RecordData, seen_at: int | None, *, is_new: bool) -> None:
    table = schema.locations
    key = place_key(data.url, data.host)
    status = "present"
    others = sa.select(table.c.record, table.c.seen_at).where(table.c.place == key, table.c.record != seq, table.c.status == "present")
    for other, at in connection.execute(others).all():
        if seen_at is not None and at > seen_at:
            status = "replaced"  # the other has come since
        else:
            set_location_status(connection, other, data.url, data.host, "replaced")
    at_last = now() if seen_at is None else seen_at
    values = {"url": stored_url(data.url), "host": storable(data.host), "digest": data.digest, "status": status, "seen_at": at_last}
    where = (table.c.record == seq, table.c.place == key)
    if is_new or connection.execute(sa.select(table.c.record).where(*where)).first() is None:
        connection.execute(sa.insert(table), {"record": seq, "place": key} | values)
    elif seen_at is None:
        connection.execute(sa.update(table).where(*where).values(**values))
    if status != "present" or not is_new:
        _set_status(connection, seq)


def stored_url(url: str) -> str:
    """A URL as a column holds it: paths may have bytes that are no text."""
    return "json:" + json.dumps(url) if _NO_TEXT.search(url) or url.startswith(_JSON) else url


def restored_url(url: str) -> str:
    """A URL as ``stored_url`` was given it."""
    return str(json.loads(url[5:])) if url.startswith(_JSON) else url


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
    table = schema.bodies
    query = sa.select(table.c.annotations, schema.records.c.project, table.c.body).join(schema.records).where(table.c.record == seq)
    text, project, encoded = connection.execute(query).one()
    body = _body(encoded)
    merged = annotations if text is None else added.merge(_annotations(text), annotations)
    now_true = effective(body, merged)
    for index in (schema.tags, schema.metrics):
        connection.execute(sa.delete(index).where(index.c.record == seq))
    values = {"pinned": now_true.pinned, "note": storable(now_true.note)}
    connection.execute(sa.update(schema.records).where(schema.records.c.seq == seq).values(**values))
    connection.execute(sa.update(table).where(table.c.record == seq).values(annotations=_encode(merged).decode()))
    _put_tags(connection, seq, now_true.tags)
    _put_values(connection, seq, project, {("metric", name): sides_of(value) for name, value in now_true.metrics.items()})
    _claim_aliases(connection, seq, project, now_true.aliases)
    return merged


def _put_tags(connection: sa.Connection, seq: int, tags: Iterable[str]) -> None:
    rows = [{"record": seq, "tag": tag} for tag in dict.fromkeys(map(indexable, tags))]
    if rows:
        connection.execute(sa.insert(schema.tags), rows)


def _put_values(connection: sa.Connection, seq: int, project: str, sides: dict[tuple[str, str], tuple[Any, Any, Any]]) -> None:
    """Enter params and metrics under the numbers of their names, which are entered where they are new."""
    sides = {(kind, indexable(name)): value for (kind, name), value in sides.items()}
    table = schema.names
    known: dict[tuple[str, str], int] = {}
    for group in _groups(list({name for _, name in sides})):
        query = sa.select(table.c.kind, table.c.name, table.c.id).where(table.c.project == project, table.c.name.in_(group))
        known |= {(kind, name): number for kind, name, number in connection.execute(query)}
    for kind, name in sides:
        if (kind, name) not in known:
            inserted = connection.execute(sa.insert(table), {"project": project, "kind": kind, "name": name})
            known[kind, name] = inserted.inserted_primary_key[0]  # type: ignore[index]
    metrics, params = [], []
    for (kind, name), (number, text, exact) in sides.items():
        row = {"record": seq, "name": known[kind, name], "number": number, "exact": exact}
        if kind == "metric":
            metrics.append(row)
        else:
            params.append(row | {"text": text})
    if metrics:
        connection.execute(sa.insert(schema.metrics), metrics)
    if params:
        connection.execute(sa.insert(schema.params), params)


def _claim_aliases(connection: sa.Connection, seq: int, project: str, claims: dict[str, int]) -> None:
    """Give a record the aliases that it claims and nobody has claimed since, and take away those that it has given up."""
    table = schema.aliases
    claims = {indexable(str(name)): _within(at) for name, at in claims.items()}
    given_up = sa.or_(table.c.alias.not_in(claims), table.c.project != project)  # of another project: the file was damaged
    connection.execute(sa.delete(table).where(table.c.record == seq, given_up))
    for alias, at in claims.items():
        holder = connection.execute(
            sa.select(table.c.record, table.c.claimed_at).where(table.c.project == project, table.c.alias == alias)
        ).first()
        if holder is None:
            connection.execute(sa.insert(table), {"project": project, "alias": alias, "record": seq, "claimed_at": at})
        elif (holder.claimed_at, holder.record) < (at, seq):
            where = (table.c.project == project, table.c.alias == alias)
            connection.execute(sa.update(table).where(*where).values(record=seq, claimed_at=at))


def sides_of(encoded: Any) -> tuple[float | None, str | None, str | None]:
    """A value as a number and as a text, as far as it is one, and what the number does not tell."""
    value = enum_text(encoded) or value_of(encoded)
    if isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", "") == "b":
        return None, "true" if value else "false", None
    if isinstance(value, str):
        value = str.__str__(value)  # NumPy has texts of its own
        # What a database cannot hold is in the body alone.
        return None, None if _NO_TEXT.search(value) else value, None
    if isinstance(value, numbers.Real):
        number, exact = _number_of(int(value) if isinstance(value, numbers.Integral) else value)
        return number, None, exact
    return None, None, "none" if value is None else None


def _number_of(value: Any) -> tuple[float | None, str | None]:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    if math.isnan(number):
        return None, "nan"
    return number, None if not isinstance(value, int) or number == value else format(value, "x")


def _groups(items: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (items[start : start + _GROUP] for start in range(0, len(items), _GROUP))


_NAMES = "seq id name project user host step created_at duration_seconds nbytes written_bytes world_size parent digest status"
_COLUMNS = [*(schema.records.c[name] for name in _NAMES.split()), schema.bodies.c.body, schema.bodies.c.annotations]
_ROWS = sa.select(*_COLUMNS).join(schema.bodies)


def fetch(connection: sa.Connection, seqs: Sequence[int]) -> list[Record]:
    """Records by the numbers of their rows, in that order; those that are gone are left out."""
    found = fetch_by_row(connection, seqs)
    return [found[seq] for seq in seqs if seq in found]


def fetch_by_row(connection: sa.Connection, seqs: Sequence[int]) -> dict[int, Record]:
    """Records under the numbers of their rows; those that are gone are left out."""
    rows: dict[int, Any] = {}
    places: dict[int, list[Location]] = {}
    claimed: dict[int, list[str]] = {}
    for group in _groups(seqs):
        rows |= {row[0]: row for row in connection.execute(_ROWS.where(schema.records.c.seq.in_(group))).all()}
        table = schema.locations
        query = sa.select(table.c.record, table.c.url, table.c.host, table.c.digest, table.c.status).where(table.c.record.in_(group))
        for record, *place in connection.execute(query.order_by(table.c.status != "present", table.c.seen_at, table.c.place)).all():
            url, host, digest, status = place
            places.setdefault(record, []).append(Location(restored_url(url), host, digest, status))
        held = sa.select(schema.aliases.c.record, schema.aliases.c.alias).where(schema.aliases.c.record.in_(group))
        for record, alias in connection.execute(held.order_by(schema.aliases.c.alias)).all():
            claimed.setdefault(record, []).append(alias)
    return {seq: _checked_record(row, places.get(seq, []), claimed.get(seq, [])) for seq, row in rows.items()}


@functools.lru_cache(1024)  # kilobytes each
def _decoded(body: str, annotations: str | None) -> tuple[Body, Any]:
    decoded = _body(body)
    return decoded, effective(decoded, None if annotations is None else _annotations(annotations))


def _checked_record(row: Any, places: list[Location], aliases: list[str]) -> Record:
    try:
        return _record(row, places, aliases)
    except (msgspec.MsgspecError, ExpstateError, ArithmeticError, ValueError, TypeError, RecursionError) as error:
        msg = f"the record {row[1]!r} is damaged ({error}); `expstate scan` makes it anew from its snapshot"
        raise CatalogCorruptError(msg) from error


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
        nbytes_written=written,
        world_size=world_size,
        tags=now_true.tags,
        aliases=tuple(aliases),
        pinned=now_true.pinned,
        note=now_true.note,
        params={key: value_of(value) for key, value in body.params.items()},
        metrics={key: value_of(value) for key, value in now_true.metrics.items()},
        keys=body.keys,
        parent=parent,
        digest=digest,
        provenance=body.provenance,
        status=status,
    )
