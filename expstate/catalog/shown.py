"""Records for people: a short table as text and as HTML, in which nothing from a catalog is more than text."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from expstate.engine.report import bytes_text
from expstate.state import paths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expstate.catalog.model import Record

_COLUMNS = ("id", "name", "step", "created (UTC)", "size", "written", "tags", "metrics")
_METRICS = 4
_WIDEST = 40
_LONGEST_DIGITS = 100
_CELL = "text-align:left;padding:2px 8px;border-bottom:1px solid var(--jp-border-color2,#ccc)"


def value_text(value: Any) -> str:
    """A metric or param in few characters.

    >>> value_text(0.123456), value_text(7), value_text("adam"), value_text(2**4000)[:3]
    ('0.1235', '7', 'adam', '0x1')
    """
    if isinstance(value, float):
        return format(value, ".4g")
    if isinstance(value, int) and value.bit_length() > _LONGEST_DIGITS:
        return _cut(hex(value))
    return _cut(str(value))


def _cut(text: str) -> str:
    return paths.printable(text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}...")


def _cells(record: Record) -> tuple[str, ...]:
    marks = [*(["pinned"] if record.pinned else []), *(f"@{alias}" for alias in record.aliases), *record.tags]
    metrics = [f"{_cut(name)}={value_text(value)}" for name, value in list(record.metrics.items())[:_METRICS]]
    more = [f"and {len(record.metrics) - _METRICS} more"] if len(record.metrics) > _METRICS else []
    return (
        _cut(record.id[:8]),
        _cut(record.name or ""),
        "" if record.step is None else str(record.step),
        f"{record.created_at:%Y-%m-%d %H:%M}",
        bytes_text(record.nbytes),
        bytes_text(record.nbytes_written),
        _cut(", ".join(marks)),
        ", ".join([*metrics, *more]),
    )


def _table(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Titles and rows; what was written is of interest where it is less than all."""
    rows = [_COLUMNS, *map(_cells, records)]
    if any(record.nbytes_written < record.nbytes for record in records):
        return rows
    place = _COLUMNS.index("written")
    return [(*row[:place], *row[place + 1 :]) for row in rows]


def as_text(records: Sequence[Record], count: int) -> str:
    """The first records of ``count``, one a line."""
    if not records:
        return "no records"
    rows = _table(records)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *_more(records, count)])


def as_html(records: Sequence[Record], count: int) -> str:
    """The first records of ``count`` as a table; everything is escaped."""
    if not records:
        return "<i>no records</i>"
    titles, *rows = _table(records)
    head = "".join(f'<th style="{_CELL}">{html.escape(name)}</th>' for name in titles)
    body = "".join("<tr>" + "".join(f'<td style="{_CELL}">{html.escape(cell)}</td>' for cell in row) + "</tr>" for row in rows)
    style = "border-collapse:collapse;color:var(--jp-ui-font-color1,inherit)"
    more = "".join(f"<br><i>{line}</i>" for line in _more(records, count))
    return f'<table style="{style}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}'


def _more(records: Sequence[Record], count: int) -> list[str]:
    return [f"and {count - len(records):,} more"] if count > len(records) else []
