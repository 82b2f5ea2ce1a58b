"""A comparison as a table and as plain data: for pandas, which is imported only here and now, and for JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from expstate.diff import show

if TYPE_CHECKING:
    import pandas as pd

    from expstate.diff.report import DiffSide, EntryDiff, EntryForm, SnapshotDiff

_NUMBERS = ("l2", "relative", "max_abs", "cosine", "changed")
_COUNTS = ("nan_old", "nan_new", "inf_old", "inf_new")


def as_frame(diff: SnapshotDiff) -> pd.DataFrame:
    """The table that ``SnapshotDiff.to_pandas`` documents."""
    import pandas as pd  # noqa: PLC0415 - heavy, and not on every machine

    rows = list(diff)
    text = pd.StringDtype("python")  # the same with and without pyarrow
    columns: dict[str, Any] = {
        "entry": pd.array([row.entry for row in rows], dtype=text),
        "change": pd.array([row.change for row in rows], dtype=text),
        "kind": pd.array([_both(row, "kind") for row in rows], dtype=text),
        "shape": pd.array([_both(row, "shape") for row in rows], dtype=text),
        "dtype": pd.array([_both(row, "dtype") for row in rows], dtype=text),
        "nbytes": pd.array([row.nbytes for row in rows], dtype="int64"),
    }
    if diff.has_statistics:
        found = [row.statistics for row in rows]
        columns |= {name: pd.array([_number(item, name) for item in found], dtype="float64") for name in _NUMBERS}
        columns |= {name: pd.array([getattr(item, name, None) for item in found], dtype="Int64") for name in _COUNTS}
    frame: pd.DataFrame = pd.DataFrame(columns)
    return frame


def _both(row: EntryDiff, name: str) -> str | None:
    """What it is, or what it was and is."""
    old, new = (None if form is None else getattr(form, name) for form in (row.old, row.new))
    if row.change == "changed" and old != new:
        return f"{'none' if old is None else old} -> {'none' if new is None else new}"
    found = getattr(row.form, name)
    return None if found is None else str(found)


def _number(found: object, name: str) -> float:
    return float(getattr(found, name, "nan"))


def as_dict(diff: SnapshotDiff) -> dict[str, Any]:
    """What ``SnapshotDiff.to_dict`` documents."""
    rows = [row for change in ("changed", "added", "removed") for row in diff.entries(change)]
    return {
        "old": _side(diff.old),
        "new": _side(diff.new),
        "is_same": diff.is_same,
        "counts": diff.counts,
        "entries": [_row(row) for row in rows],
        "renamed": [{"old": old, "new": new} for old, new in diff.renamed],
        "metadata": [
            {"name": fact.name, "change": fact.change, "old": show.plain(fact.old), "new": show.plain(fact.new)} for fact in diff.metadata
        ],
    }


def _side(side: DiffSide) -> dict[str, Any]:
    return {"live": side.id is None, "id": side.id, "name": side.name, "path": side.path}


def _row(row: EntryDiff) -> dict[str, Any]:
    found: dict[str, Any] = {"entry": row.entry, "change": row.change, "differs": list(row.differs)}
    found |= {"old": _form(row.old), "new": _form(row.new)}
    for name in ("renamed_from", "renamed_to", "same_content_as"):
        if getattr(row, name) is not None:
            found[name] = getattr(row, name)
    if row.statistics is not None:
        found["statistics"] = {name: show.plain(value) for name, value in msgspec.structs.asdict(row.statistics).items()}
    return found


def _form(form: EntryForm | None) -> dict[str, Any] | None:
    if form is None:
        return None
    found: dict[str, Any] = {"kind": form.kind}
    if form.shape is not None:
        found |= {"dtype": form.dtype, "shape": list(form.shape)}
    if form.kind == "value":
        found["value"] = show.plain(form.value)
    if form.type is not None:
        found["type"] = form.type
    if form.tied_to is not None:
        found["tied_to"] = form.tied_to
    return found | {"nbytes": form.nbytes}
