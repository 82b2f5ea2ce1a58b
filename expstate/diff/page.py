"""A comparison as HTML for a notebook: counts, the heat-map, what changed most, and what else is known to differ.

Names and values come from files that anybody may have written: whatever they hold, they are text here.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from expstate.diff import show
from expstate.diff.heatmap import as_svg

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from expstate.diff.report import SnapshotDiff

_MOST_ROWS = 20
_MOST_FACTS = 30
_CELL = "text-align:left;padding:1px 12px 1px 0;vertical-align:top"


def as_html(diff: SnapshotDiff) -> str:
    """Everything on one page, without scripts and styles of its own."""
    rows = [row for change in ("changed", "added", "removed") for row in diff.entries(change)]
    if diff.has_statistics:
        rows.sort(key=show.by_change)
    counts = ", ".join(f"{count:,} {change}" for change, count in diff.counts.items() if count)
    parts = [
        f'<div class="expstate-diff"><b>{_text(str(diff.old))} → {_text(str(diff.new))}</b>: {_text(counts or "no entries")}',
        as_svg(list(diff), has_statistics=diff.has_statistics) if diff else "",
        _table(("entry", "change", "what"), [(row.entry, row.change, show.row_text(row)) for row in rows[:_MOST_ROWS]], len(rows)),
        _table(
            ("known besides", "old", "new"),
            [
                (fact.name, "" if fact.change == "added" else show.text(fact.old), "" if fact.change == "removed" else show.text(fact.new))
                for fact in diff.metadata[:_MOST_FACTS]
            ],
            len(diff.metadata),
        ),
        "</div>",
    ]
    return "".join(parts)


def _text(shown: str) -> str:
    return html.escape(shown)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], total: int) -> str:
    shown = list(rows)
    if not shown:
        return ""
    head = "".join(f'<th style="{_CELL}">{_text(name)}</th>' for name in heads)
    body = "".join("<tr>" + "".join(f'<td style="{_CELL}">{_text(cell)}</td>' for cell in row) + "</tr>" for row in shown)
    more = f"<div>… and {total - len(shown):,} more</div>" if total > len(shown) else ""
    return f'<table style="margin:8px 0 0 0"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}'
