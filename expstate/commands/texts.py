"""Values in the words of a table: ages, sizes, numbers, short texts. JSON has them whole; these are for eyes."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any

from expstate.engine.report import bytes_text, size_text
from expstate.format.manifest import AliasEntry, ContainerEntry, Entry, ObjectEntry, TensorEntry
from expstate.state.values import decode

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Iterable

    from expstate.catalog.model import Record

_AGES = (("y", 365 * 86400), ("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
_MOST_DIGITS = 300


def age_text(when: dt.datetime, now: dt.datetime) -> str:
    """How long ago it was, in its largest unit.

    >>> import datetime as dt
    >>> now = dt.datetime(2026, 11, 24, 12, tzinfo=dt.timezone.utc)
    >>> [age_text(now - dt.timedelta(seconds=seconds), now) for seconds in (5, 90, 7200, 10**6, 10**8)]
    ['5s', '1m', '2h', '11d', '3y']
    """
    seconds = max(0, int((now - when).total_seconds()))
    unit, size = next(((unit, size) for unit, size in _AGES if seconds >= size), _AGES[-1])
    return f"{seconds // size}{unit}"


def value_text(value: Any) -> str:
    """A metric or param: numbers to six digits, texts as they are, long values cut short.

    >>> value_text(0.123456789), value_text("adam"), value_text(None), value_text(True)
    ('0.123457', 'adam', '', 'true')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        # Python refuses to write a number of thousands of digits out.
        return str(value) if value.bit_length() <= _MOST_DIGITS else reprlib.repr(hex(value)).strip("'")
    return value if isinstance(value, str) else str(value)


def unique_here(record: Record) -> int | None:
    """What no other snapshot has, of one that lies on disks alone; None of others, so that nobody waits for a network."""
    return record.nbytes_unique if all(place.host for place in record.locations) else None


def sizes_text(record: Record) -> str:
    """The size of a snapshot; what its take wrote, and what no other snapshot has, where that is less."""
    unique = unique_here(record)
    more = f", {bytes_text(unique)} in no other snapshot" if unique is not None and unique < record.nbytes else ""
    return size_text(record.nbytes, record.nbytes_written) + more


def joined(items: Iterable[str]) -> str:
    """Words in one cell."""
    return ", ".join(items)


def entry_row(entry: Entry) -> tuple[str, str, str, str, str]:
    """An entry: path, kind, dtype or class, shape or value, size."""
    if isinstance(entry, TensorEntry):
        return entry.path, entry.kind, entry.dtype, f"({', '.join(map(str, entry.shape))})", bytes_text(entry.nbytes)
    if isinstance(entry, ObjectEntry):
        return entry.path, "object", entry.type, "needs trust" if entry.needs_trust else "", bytes_text(entry.nbytes)
    if isinstance(entry, AliasEntry):
        return entry.path, "tied", "", f"to {entry.target}", ""
    if isinstance(entry, ContainerEntry):
        return entry.path, "container", entry.type, "", ""
    value = decode(entry.value)
    return entry.path, "value", type(value).__name__, value_text(value) if isinstance(value, (str, float)) else reprlib.repr(value), ""
