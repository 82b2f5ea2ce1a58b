"""A comparison as HTML for a notebook: counts, the heat-map, what changed most, and what else is known to differ.

Names and values come from files that anybody may have written: whatever they hold, they are text here.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from expstate.diff import show, summary
from expstate.diff.heatmap import as_svg
from expstate.state import paths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expstate.diff.report import EntryDiff, SnapshotDiff

_MOST_ROWS = 20
_MOST_FACTS = 30
_CELL = "text-align:left;padding:1px 12px 1px 0;vertical-align:top;"
_NAME = f"{_CELL}min-width:8em;overflow-wrap:anywhere"
_WORD = f"{_CELL}white-space:nowrap"
_ENTRY = (_NAME, _WORD, _NAME)
_FACT = (_NAME, _NAME, _NAME)
"""Styles of the cells of a row."""


def as_html(diff: SnapshotDiff) -> str:
    """Everything on one page, without scripts and styles of its own."""
    drawn = set(diff.drawn)
    rows = [row for change in ("changed", "added", "removed") for row in diff.entries(change) if row.renamed_to is None]
    rows = [row for row in rows if row.entry not in drawn]
    rows += diff.kept_otherwise()
    if diff.has_statistics:
        rows.sort(key=show.by_change)
    most = _MOST_ROWS if diff.top is None else diff.top
    facts = [
        (fact.name, "" if fact.change == "added" else show.text(fact.old), "" if fact.change == "removed" else show.text(fact.new))
        for fact in diff.metadata
    ]
    parts = [
        f'<div class="expstate-diff"><b>{_text(summary.sides(diff, "→"))}</b>: {_text(summary.counted(diff))}',
        as_svg(list(diff), has_statistics=diff.has_statistics) if rows else "",
        _table(("entry", "change", "what"), _ENTRY, [_row(row) for row in rows if not row.is_tensor], most),
        _table(("tensor", "change", "what"), _ENTRY, [_row(row) for row in rows if row.is_tensor], most),
        f"<div>random numbers were drawn: {', '.join(map(_text, diff.drawn))}</div>" if drawn else "",
        _table(("metadata", "old", "new"), _FACT, facts, _MOST_FACTS),
        "</div>",
    ]
    return "".join(parts)


def _row(row: EntryDiff) -> tuple[str, str, str]:
    return row.entry, row.change, show.row_text(row)


def _text(shown: str) -> str:
    return html.escape(paths.printable(shown))


def _table(heads: Sequence[str], styles: Sequence[str], rows: Sequence[Sequence[str]], most: int) -> str:
    if not rows:
        return ""
    head = _cells("th", styles, heads)
    body = "".join(_cells("td", styles, row) for row in rows[:most])
    more = f"<div>… and {len(rows) - most:,} more</div>" if len(rows) > most else ""
    return f'<table style="margin:8px 0 0 0"><thead>{head}</thead><tbody>{body}</tbody></table>{more}'


def _cells(tag: str, styles: Sequence[str], texts: Sequence[str]) -> str:
    cells = (f'<{tag} style="{style}">{_text(text)}</{tag}>' for style, text in zip(styles, texts, strict=True))
    return f"<tr>{''.join(cells)}</tr>"
