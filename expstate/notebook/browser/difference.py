"""Two snapshots, or one and live state, compared: counts, a heat-map by layer, what differs most, and facts, as plain JSON.

Gets a ``SnapshotDiff``; hands on what the page draws. Colours and words are those of ``diff.heatmap`` and ``diff.show``.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from expstate.diff import heatmap, show
from expstate.diff.summary import sides
from expstate.engine.report import bytes_text
from expstate.notebook.browser import texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expstate.diff.heatmap import Line
    from expstate.diff.report import SnapshotDiff

_MOST_ENTRIES = 60
_MOST_FACTS = 60
_MOST_HEADS = 16
MEASURED_BYTES = 2**30
"""Changed bytes that are read without being asked for."""


def as_json(diff: SnapshotDiff) -> dict[str, Any]:
    """What the page shows of a comparison."""
    changed = diff.entries("changed")
    rows = [*changed, *(row for change in ("added", "removed") for row in diff.entries(change) if row.renamed_to is None)]
    if diff.has_statistics:
        rows.sort(key=show.by_change)
    drawn = set(diff.drawn)
    rows.sort(key=lambda row: row.entry in drawn)
    nbytes = sum(row.nbytes for row in changed if row.is_tensor and row.old is not None and row.old.shape == row.shape)
    lines = heatmap.lines(list(diff)) if rows else []
    return {
        "title": texts.clean(sides(diff, "→")),
        "counts": diff.counts,
        "measured": diff.has_statistics,
        "bytes": bytes_text(nbytes),
        "measures": nbytes > 0,
        "quick": nbytes <= MEASURED_BYTES,
        "heads": _heads(lines),
        "lines": [_line(line) for line in lines],
        "legend": [list(pair) for pair in heatmap.legend(lines)],
        "entries": [
            [
                texts.clean(row.entry, 1000),
                row.change,
                "random numbers were drawn" if row.entry in drawn else texts.clean(show.row_text(row), 400),
            ]
            for row in rows[:_MOST_ENTRIES]
        ],
        "more_entries": max(0, len(rows) - _MOST_ENTRIES),
        "facts": [
            [
                texts.clean(fact.name),
                "" if fact.change == "added" else texts.value(fact.old),
                "" if fact.change == "removed" else texts.value(fact.new),
            ]
            for fact in diff.metadata[:_MOST_FACTS]
        ],
        "more_facts": max(0, len(diff.metadata) - _MOST_FACTS),
    }


def _line(line: Line) -> dict[str, Any]:
    found = line.summary.rpartition(", ")[2].removeprefix("up to ")
    return {
        "name": texts.clean(line.name),
        "title": texts.clean(line.prefix, 1000),
        "summary": _percent(found) if line.summary != "same" else "same",
        "whole": texts.clean(line.summary),
        "cells": [[level, texts.clean(title, 400)] for level, title in line.cells],
    }


def _percent(text: str) -> str:
    """A relative change in per cent; what is none stays as it is.

    >>> _percent("0.0123"), _percent("2 of 4")
    ('1.2 %', '2 of 4')
    """
    try:
        value = 100 * float(text)
    except ValueError:
        return texts.clean(text)
    return f"{value:.0f} %" if value >= 10 else f"{value:.1f} %" if value >= 0.1 else f"{value:.1g} %"  # noqa: PLR2004 - two digits


def _heads(lines: Sequence[Line]) -> dict[str, Any] | None:
    """Names above the cells, where several lines one after the other have the same; ``at`` is the first of them."""
    counts = Counter(line.heads for line in lines if 1 < len(line.heads) <= _MOST_HEADS)
    if not counts:
        return None
    heads, count = counts.most_common(1)[0]
    if count < 2:  # noqa: PLR2004 - one line has titles on its cells
        return None
    return {"at": next(place for place, line in enumerate(lines) if line.heads == heads), "names": [_short(head) for head in heads]}


def _short(head: str) -> str:
    """The last part of a name, which tells it from its neighbours; of a number the part before it too.

    >>> _short("attention.query"), _short("blocks.0")
    ('query', 'blocks.0')
    """
    parts = head.replace("/", ".").split(".")
    return texts.clean(".".join(parts[-2:]) if parts[-1].isdecimal() else parts[-1], 24)
