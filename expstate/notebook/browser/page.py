"""The table that a saved or exported notebook shows in the widget's place: HTML without scripts, in which everything is text."""

from __future__ import annotations

import datetime as dt
import html
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MOST_ROWS = 30
_CELL = "padding:4px 8px;border-bottom:1px solid var(--jp-border-color2,#e3e6ea);white-space:nowrap;text-align:"
_MARK = "font-size:11px;padding:0 7px;margin-left:4px;border-radius:9px;border:1px solid var(--jp-border-color2,#e3e6ea)"
_TABLE = "border-collapse:collapse;font:13px/1.45 system-ui,sans-serif;color:var(--jp-ui-font-color1,inherit)"


def as_html(found: Mapping[str, Any], query: str) -> str:
    """The first rows of an answer of ``data.Table.search``.

    Parameters
    ----------
    found : mapping
        The answer.
    query : str
        What was asked.
    """
    columns: Sequence[Mapping[str, Any]] = found["columns"]
    rows = [row for row in found["rows"] or () if row is not None][:MOST_ROWS]
    asked = f"<code>{_text(query)}</code> · " if query.strip() else ""
    count = f"{found['count']:,} snapshots" if found["count"] != 1 else "1 snapshot"
    head = "".join(f'<th style="{_CELL}{_side(column)}">{_text(column["title"])}</th>' for column in ({"title": "name"}, *columns))
    body = "".join(f"<tr>{_name(row)}{''.join(map(_cell, columns, row['cells']))}</tr>" for row in rows)
    more = f"<div>… and {found['count'] - len(rows):,} more</div>" if found["count"] > len(rows) else ""
    return (
        f'<div class="expstate-browser-static"><div>{asked}{count}</div>'
        f'<table style="{_TABLE}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}</div>'
    )


def _side(column: Mapping[str, Any]) -> str:
    return "right" if column.get("numeric") else "left"


def _name(row: Mapping[str, Any]) -> str:
    marks = [*row["aliases"], *row["tags"], *(["◆ pinned"] if row["pinned"] else [])]
    shown = "".join(f'<span style="{_MARK}">{_text(mark)}</span>' for mark in marks)
    return f'<td style="{_CELL}left" title="{_text(row["id"])}">{_text(row["name"])}{shown}</td>'


def _cell(column: Mapping[str, Any], cell: Any) -> str:
    shown = f"{dt.datetime.fromtimestamp(cell, dt.timezone.utc):%Y-%m-%d %H:%M}" if column["time"] else str(cell)
    return f'<td style="{_CELL}{_side(column)}">{_text(shown)}</td>'


def _text(text: str) -> str:
    return html.escape(text)
