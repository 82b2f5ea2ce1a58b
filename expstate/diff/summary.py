"""A comparison as a few lines of text: how much differs, what most, and what else is known to differ.

Gets a ``SnapshotDiff``; hands on lines that fit a terminal where names and values allow for it, the same for the same comparison.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from expstate.diff import show
from expstate.state import paths

if TYPE_CHECKING:
    from expstate.diff.report import EntryDiff, SnapshotDiff

_MOST_ENTRIES = 3
_MOST_VALUES = 6
_MOST_FACTS = 12
_COLUMNS = 80


def as_text(diff: SnapshotDiff) -> str:
    """What ``SnapshotDiff.summary`` documents."""
    changed = diff.entries("changed")
    measured = sorted((row for row in changed if row.statistics is not None), key=show.by_change)
    drawn = set(diff.drawn)
    others = [row for row in changed if row.statistics is None and row.entry not in drawn]
    few = _MOST_ENTRIES if diff.top is None else diff.top
    lines = [heading(diff)]
    lines += _listed("values", [str(row) for row in others if row.kind == "value"], _MOST_VALUES if diff.top is None else diff.top)
    lines += _listed("most changed", [f"{paths.printable(row.entry)} ({show.row_text(row)})" for row in measured], few)
    lines += _listed("tensors", [str(row) for row in others if row.is_tensor], few)
    lines += _listed("others", [str(row) for row in others if not row.is_tensor and row.kind != "value"], few)
    lines += _listed("random numbers were drawn", [paths.printable(path) for path in diff.drawn], few)
    lines += _listed("renamed", [f"{paths.printable(old)} -> {paths.printable(new)}" for old, new in diff.renamed], few)
    lines += _listed("added", [_with_twin(row) for row in diff.entries("added") if row.renamed_from is None], few)
    lines += _listed("removed", [_with_twin(row) for row in diff.entries("removed") if row.renamed_to is None], few)
    lines += _listed("the same", [f"{paths.printable(row.entry)} ({show.row_text(row)})" for row in diff.kept_otherwise()], few)
    lines += _listed("metadata", [show.fact_text(fact) for fact in diff.metadata], _MOST_FACTS)
    return "\n".join(lines)


def heading(diff: SnapshotDiff, arrow: str = "->") -> str:
    """Which two are compared, and how much differs."""
    return f"{sides(diff, arrow)}: {counted(diff)}"


def sides(diff: SnapshotDiff, arrow: str = "->") -> str:
    """Which two are compared; of two snapshots of one name their ids too."""
    old, new = str(diff.old), str(diff.new)
    if old == new and diff.old.id != diff.new.id:
        old, new = (f"{side} ({(side.id or '')[:8]})" for side in (diff.old, diff.new))
    return f"{old} {arrow} {new}"


def counted(diff: SnapshotDiff) -> str:
    """How many entries differ, and in what way."""
    counts = diff.counts
    renamed = f" ({len(diff.renamed):,} renamed)" if diff.renamed else ""
    parts = [
        f"{counts[change]:,} {change}{renamed if change == 'added' else ''}" for change in ("changed", "added", "removed") if counts[change]
    ]
    return ", ".join([*parts, f"{counts['same']:,} same"]) if parts else f"all {counts['same']:,} entries are the same"


def _with_twin(row: EntryDiff) -> str:
    twin = f" (same content as {paths.printable(row.same_content_as)})" if row.same_content_as is not None else ""
    return f"{paths.printable(row.entry)}{twin}"


def _listed(what: str, items: list[str], most: int) -> list[str]:
    """Items on one line if they fit there, else each on its own; of many the first."""
    if not items:
        return []
    shown = items[:most] if len(items) > most else items
    more = [f"and {len(items) - most:,} more"] if len(items) > most else []
    line = f"  {what}: {'; '.join([*shown, *more])}"
    return [line] if len(line) <= _COLUMNS else [f"  {what}:", *(f"    {item}" for item in [*shown, *more])]
