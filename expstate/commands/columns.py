"""The columns of a table of records: those that are asked for, or those that have something to say."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from expstate.commands.texts import age_text, joined, value_text
from expstate.commands.view import Column
from expstate.engine.report import bytes_text
from expstate.errors import InvalidArgumentError

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Callable, Sequence

    from expstate.catalog.model import Record

_METRICS = 4
_SHORT = 12
_WORD = re.compile(r"[^\s<>=!~()\"',:]+")

FIELDS: dict[str, Callable[[Record, dt.datetime], Any]] = {
    "id": lambda record, _: record.id[:8],
    "name": lambda record, _: record.name,
    "project": lambda record, _: record.project,
    "user": lambda record, _: record.user,
    "host": lambda record, _: record.host,
    "url": lambda record, _: record.url,
    "step": lambda record, _: record.step,
    "created": lambda record, _: f"{record.created_at:%Y-%m-%d %H:%M:%S}",
    "age": lambda record, now: age_text(record.created_at, now),
    "duration": lambda record, _: None if record.duration_seconds is None else f"{record.duration_seconds:.3g} s",
    "size": lambda record, _: bytes_text(record.nbytes),
    "written": lambda record, _: bytes_text(record.nbytes_written),
    "unique": lambda record, _: None if (nbytes := record.nbytes_unique) is None else bytes_text(nbytes),
    "world_size": lambda record, _: record.world_size,
    "tags": lambda record, _: joined(record.tags),
    "aliases": lambda record, _: joined(record.aliases),
    "pinned": lambda record, _: "pinned" if record.pinned else "",
    "note": lambda record, _: record.note,
    "parent": lambda record, _: None if record.parent is None else record.parent[:8],
    "digest": lambda record, _: record.digest,
    "status": lambda record, _: record.status,
    "commit": lambda record, _: _git(record, "commit"),
    "branch": lambda record, _: _git(record, "branch"),
}
"""What a column of this name shows of a record."""

_SYNONYMS = {
    "tag": "tags",
    "alias": "aliases",
    "pin": "pinned",
    "created_at": "created",
    "duration_seconds": "duration",
    "nbytes": "size",
    "nbytes_written": "written",
    "nbytes_unique": "unique",
}
_NUMBERS = frozenset({"step", "age", "duration", "size", "written", "unique", "world_size"})
_MARKS = ("written", "pinned", "aliases", "tags")
_ALWAYS = ("name", "id", "age", "size")
_USUAL = ("name", "id", "project", "age", "step", "size", "written", "tags", "aliases", "pinned", "status")


class RecordColumn:
    """A column of records: a field, a metric or a param."""

    def __init__(self, name: str, records: Sequence[Record]) -> None:
        name = _SYNONYMS.get(name, name)
        kind, _, rest = name.partition(".")
        self._field = FIELDS.get(name)
        self._source = ""
        self._name = name
        if self._field is None:
            if kind in {"metric", "param"} and rest:
                self._source, self._name = f"{kind}s", rest
            else:
                self._source = next(
                    (source for source in ("metrics", "params") if any(name in getattr(one, source) for one in records)), ""
                )
                if not self._source:
                    msg = f"no column {name!r}: none of these records has a metric or param of that name; there are {', '.join(FIELDS)}"
                    raise InvalidArgumentError(msg)
        values = [self._value(record) for record in records] if self._source else []
        is_number = bool(values) and all(
            value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)) for value in values
        )
        self.column = Column(name, is_number or name in _NUMBERS)

    @property
    def is_metric(self) -> bool:
        """Whether it is no field and no param."""
        return self._source == "metrics"

    def _value(self, record: Record) -> Any:
        return getattr(record, self._source).get(self._name)

    def cell(self, record: Record, now: dt.datetime) -> str:
        """What stands in it for a record."""
        return value_text(self._field(record, now) if self._field is not None else self._value(record))


def chosen(names: Sequence[str], records: Sequence[Record]) -> list[RecordColumn]:
    """The columns of these names.

    Raises
    ------
    InvalidArgumentError
        If one is no field, and no metric or param that any of the records has.
    """
    return [RecordColumn(name, records) for name in names]


def usual(records: Sequence[Record], question: str, *, with_project: bool) -> list[RecordColumn]:
    """The columns that have something to say of these records: fields that are not empty, and some metrics.

    Parameters
    ----------
    records : sequence of Record
        What is shown.
    question : str
        Query and sort: metrics in them come first.
    with_project : bool
        Whether there may be several projects.
    """
    names = [name for name in _USUAL if name in _ALWAYS or any(_has(name, record) for record in records)]
    if not with_project:
        names.remove("project")
    counts = Counter(name for record in records for name in record.metrics)
    asked = {word.removeprefix("metric.") for word in _WORD.findall(question)}
    order = {name: place for place, name in enumerate(counts)}
    metrics = sorted(counts, key=lambda name: (name not in asked, -counts[name], order[name]))[:_METRICS]
    columns = chosen(names, records)
    return columns + chosen([name if name not in FIELDS else f"metric.{name}" for name in metrics], records)


def to_leave_out(table: Sequence[RecordColumn]) -> RecordColumn | None:
    """The column that a terminal without room for all can do without first: a metric but for the first, then what marks a few."""
    metrics = [column for column in table if column.is_metric]
    marks = [column for name in _MARKS for column in table if column.column.title == name and not column.is_metric]
    return next(iter([*reversed(metrics[1:]), *marks]), None)


def _git(record: Record, name: str) -> str | None:
    git = record.provenance.get("git")
    found = git.get(name) if isinstance(git, dict) else None
    return found[:_SHORT] if isinstance(found, str) and name == "commit" else found if isinstance(found, str) else None


def _has(name: str, record: Record) -> bool:
    if name == "status":
        return record.status != "present"
    if name == "written":
        return record.nbytes_written < record.nbytes
    return getattr(record, name) not in {None, "", (), False}
