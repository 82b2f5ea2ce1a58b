"""Records as a pandas table: plain tuples from the database into columns, without a record for each row.

Gets a connection and the numbers of rows, hands on a ``DataFrame`` whose dtypes do not depend on what is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pandas as pd
import sqlalchemy as sa

from expstate.catalog import rows as stored_rows
from expstate.catalog import schema
from expstate.catalog.model import Body, effective, value_of
from expstate.format.annotations import Annotations

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_GROUP = 5000
_MISSING: Any = None
_INT64 = range(-(2**63), 2**63)
_STRING = pd.StringDtype("python")


class _Values(msgspec.Struct, frozen=True):
    """The part of a body that the table shows."""

    tags: tuple[str, ...] = ()
    params: dict[str, Any] = {}
    metrics: dict[str, Any] = {}


_values = msgspec.json.Decoder(_Values).decode
_annotations = msgspec.json.Decoder(Annotations).decode
_records = schema.records.c
# Names of the columns in the table and their dtypes; those without a column of the database come from elsewhere.
_FIELDS: dict[str, tuple[str, sa.Column[Any] | None]] = {
    "id": ("string", _records.id),
    "name": ("string", _records.name),
    "project": ("string", _records.project),
    "user": ("string", _records.user),
    "host": ("string", _records.host),
    "url": ("string", None),
    "step": ("Int64", _records.step),
    "created_at": ("time", _records.created_at),
    "duration_seconds": ("float64", _records.duration_seconds),
    "nbytes": ("int64", _records.nbytes),
    "nbytes_written": ("int64", _records.written_bytes),
    "world_size": ("int64", _records.world_size),
    "tags": ("object", None),
    "aliases": ("object", None),
    "pinned": ("bool", _records.pinned),
    "note": ("string", _records.note),
    "parent": ("string", _records.parent),
    "digest": ("string", _records.digest),
    "status": ("string", _records.status),
    "commit": ("string", _records.git_commit),
    "branch": ("string", _records.git_branch),
}
_STORED = [name for name, (_, column) in _FIELDS.items() if column is not None]


def frame(connection: sa.Connection, rows: Sequence[int]) -> pd.DataFrame:
    """The records of rows, in that order; those that are gone are left out.

    Parameters
    ----------
    connection : Connection
        To read from.
    rows : sequence of int
        Numbers of rows of ``records``.
    """
    found: dict[int, tuple[Any, ...]] = {}
    urls: dict[int, str] = {}
    aliases: dict[int, list[str]] = {}
    for start in range(0, len(rows), _GROUP):
        group = rows[start : start + _GROUP]
        found.update((row[0], row[1:]) for row in _stored(connection, group))
        for record, url in _urls(connection, group):
            urls.setdefault(record, stored_rows.restored_url(url))
        for record, alias in _aliases(connection, group):
            aliases.setdefault(record, []).append(alias)
    there = [row for row in rows if row in found]
    stored = list(zip(*(found[row] for row in there), strict=True)) or [()] * (len(_STORED) + 2)
    fields: dict[str, Sequence[Any]] = dict(zip(_STORED, stored, strict=False))
    params, metrics, tags = _measured(stored[-2], stored[-1])
    fields |= {"tags": tags, "url": [urls.get(row) for row in there], "aliases": [tuple(aliases.get(row, ())) for row in there]}
    columns = {name: _field(kind, fields[name]) for name, (kind, _) in _FIELDS.items()}
    columns |= {f"metric.{name}": _any(values) for name, values in sorted(metrics.items())}
    columns |= {f"param.{name}": _any(values) for name, values in sorted(params.items())}
    table: pd.DataFrame = pd.DataFrame(columns, index=pd.RangeIndex(len(there)))
    return table


def _stored(connection: sa.Connection, group: Sequence[int]) -> Iterable[Any]:
    columns = [_FIELDS[name][1] for name in _STORED]
    query = sa.select(_records.seq, *columns, schema.bodies.c.body, schema.bodies.c.annotations).join(schema.bodies)  # type: ignore[arg-type]
    return connection.execute(query.where(_records.seq.in_(group))).all()


def _urls(connection: sa.Connection, group: Sequence[int]) -> Iterable[Any]:
    """The first of each record's places first, as ``rows.fetch`` has them."""
    table = schema.locations.c
    query = sa.select(table.record, table.url).where(table.record.in_(group))
    return connection.execute(query.order_by(table.status != "present", table.seen_at, table.place)).all()


def _aliases(connection: sa.Connection, group: Sequence[int]) -> Iterable[Any]:
    table = schema.aliases.c
    return connection.execute(sa.select(table.record, table.alias).where(table.record.in_(group)).order_by(table.alias)).all()


def _measured(
    bodies: Sequence[str], annotated: Sequence[str | None]
) -> tuple[dict[str, list[Any]], dict[str, list[Any]], list[tuple[str, ...]]]:
    """Params and metrics by name, with None where a record has none, and the tags."""
    params: dict[str, list[Any]] = {}
    metrics: dict[str, list[Any]] = {}
    tags = []
    for place, (body, added) in enumerate(zip(bodies, annotated, strict=True)):
        values = _values(body)
        if added is None:
            tags.append(tuple(sorted(values.tags)))
            measured = values.metrics
        else:
            now_true = effective(Body(tags=values.tags, metrics=values.metrics), _annotations(added))
            tags.append(now_true.tags)
            measured = now_true.metrics
        _spread(metrics, measured, place, len(bodies))
        _spread(params, values.params, place, len(bodies))
    return params, metrics, tags


def _spread(columns: dict[str, list[Any]], values: dict[str, Any], place: int, count: int) -> None:
    for name, value in values.items():
        column = columns.get(name)
        if column is None:
            column = columns[name] = [_MISSING] * count
        column[place] = value


def _field(kind: str, values: Sequence[Any]) -> Any:
    if kind == "string":
        return pd.array(list(values), dtype=_STRING)
    if kind == "time":
        return pd.DatetimeIndex(np.array(values, dtype="int64").view("datetime64[us]")).tz_localize("UTC")
    if kind == "Int64":
        return _integers(values)
    if kind == "object":
        return _objects(values)
    return np.array([np.nan if value is None else value for value in values], dtype=kind)


def _any(values: Sequence[Any]) -> Any:
    """A column of a metric or param, of the dtype that all its values fit."""
    kinds = set(map(type, values)) - {type(None)}
    if kinds & {dict, list}:
        values = [_of_python(value_of(value)) for value in values]
        kinds = set(map(type, values)) - {type(None)}
    if not kinds <= {int, float} or not kinds:
        if kinds == {str}:
            return pd.array([None if value is None else value for value in values], dtype=_STRING)
        return pd.array(list(values), dtype="boolean") if kinds == {bool} else _objects(values)
    if any(type(value) is int and value not in _INT64 for value in values):
        return _objects(values)
    if kinds == {int}:
        return _integers(values)
    return np.array([np.nan if value is None else value for value in values], dtype="float64")


def _of_python(value: Any) -> Any:
    """Numbers of NumPy as Python's, so that they are in one column with these."""
    return value.item() if isinstance(value, np.generic) and value.dtype.kind in "biufU" else value


def _integers(values: Sequence[Any]) -> Any:
    missing = np.array([value is None for value in values], dtype=bool)
    return pd.arrays.IntegerArray(np.array([value or 0 for value in values], dtype="int64"), missing)


def _objects(values: Sequence[Any]) -> Any:
    column = np.empty(len(values), dtype=object)
    for place, value in enumerate(values):  # NumPy would make a second dimension of tuples
        column[place] = value
    return column
