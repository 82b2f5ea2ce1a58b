"""Values and names as text for people: short, on one line, and harmless to a terminal whatever a file says."""

from __future__ import annotations

import math
import reprlib
from typing import TYPE_CHECKING, Any

import msgspec

from expstate.errors import ExpstateError
from expstate.state import paths
from expstate.state.values import decode

if TYPE_CHECKING:
    from expstate.diff.facts import FactDiff
    from expstate.diff.report import EntryDiff, EntryForm
    from expstate.diff.stats import Statistics

_LONGEST = 80
_MOST_BYTES = 32


class Unreadable(msgspec.Struct, frozen=True):
    """Stands for a value that cannot be had in this process: an enum whose class is not imported, or a form that nobody writes."""

    form: str

    def __repr__(self) -> str:
        return f"<{self.form}>"


class _Short(reprlib.Repr):
    """Long and deep values cut short, dicts in their own order; of long bytes nobody reads any."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxstring = self.maxother = self.maxlong = _LONGEST
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = self.maxdict = 8

    def repr_bytes(self, value: bytes, level: int) -> str:
        del level
        return repr(value) if len(value) <= _MOST_BYTES else f"<{len(value):,} bytes>"


_short = _Short()


def decoded(encoded: Any) -> Any:
    """The value of a form of ``state.values``; one that cannot be had here is ``Unreadable``."""
    try:
        return decode(encoded)
    except ExpstateError:
        return Unreadable(paths.printable(str(encoded))[:_LONGEST])


def text(value: Any) -> str:
    r"""A value on one line.

    >>> text(0.001), text("a\x1b[31m"), text([1] * 9), text(None)
    ('0.001', "'a\\x1b[31m'", '[1, 1, 1, 1, 1, 1, 1, 1, ...]', 'None')
    """
    try:
        shown = _short.repr(value)
    except Exception as error:  # noqa: BLE001 - a repr of anybody's class, which may do anything
        shown = f"<{type(value).__name__}: {type(error).__name__}>"
    shown = paths.printable(shown)
    return shown if len(shown) <= 2 * _LONGEST else f"{shown[: 2 * _LONGEST - 3]}..."


def number(value: float) -> str:
    """A statistic in a few digits.

    >>> number(0.0), number(0.123456), number(3e-9), number(float("nan"))
    ('0', '0.123', '3e-09', '-')
    """
    return "-" if math.isnan(value) else f"{value:.3g}"


def plain(value: Any) -> Any:
    """A value as JSON can hold it: numbers, texts, booleans and lists of them as they are, all else as text.

    Floats that are not finite, which JSON has not, become ``"nan"``, ``"inf"`` and ``"-inf"``.

    >>> plain([1, "a", float("inf"), 2 + 1j])
    [1, 'a', 'inf', '(2+1j)']
    """
    if value is None or type(value) in {bool, int}:
        return value
    if type(value) is str:
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode("utf-8")
    if type(value) is float:
        return value if math.isfinite(value) else str(value)
    if type(value) in {list, tuple}:
        return [plain(item) for item in value]
    if type(value) is dict:
        return {str(plain(name)): plain(item) for name, item in value.items()}
    return text(value)


# Rows of a comparison


def row_text(row: EntryDiff) -> str:
    """What there is to say of an entry besides its path."""
    parts = _changed_text(row) if row.change == "changed" else [row.change]
    if row.change in {"added", "removed"}:
        parts = [row.kind, *([form_text(row.form)] if form_text(row.form) else [])]
    if row.statistics is not None:
        parts = [*(part for part in parts if part != "content differs"), statistics_text(row.statistics)]
    if row.change == "same" and "layout" in row.differs:
        parts.append("layout differs")
    for what, path in (("renamed from", row.renamed_from), ("renamed to", row.renamed_to), ("same content as", row.same_content_as)):
        if path is not None:
            parts.append(f"{what} {paths.printable(path)}")
    return ", ".join([*parts, *_tie_text(row)])


def _changed_text(row: EntryDiff) -> list[str]:
    old, new, differs = row.old, row.new, row.differs
    assert old is not None
    assert new is not None
    parts = []
    if "value" in differs:
        parts.append(f"{text(old.value)} -> {text(new.value)}")
    for name, before, after in (
        ("kind", old.kind, new.kind),
        ("dtype", old.dtype, new.dtype),
        ("shape", old.shape, new.shape),
        ("class", old.type, new.type),
        ("codec", old.type, new.type),
    ):
        if name in differs:
            parts.append(f"{name} {paths.printable(str(before))} -> {paths.printable(str(after))}")
    if "requires_grad" in differs:
        parts.append("requires_grad differs")
    if "metadata" in differs:
        parts.append(f"metadata of its {paths.printable(str(new.type))} differs")
    parts += [f"{what} differs" for what in ("content", "layout") if what in differs]
    return parts


def form_text(form: EntryForm) -> str:
    """Shape and dtype, value, or class."""
    if form.shape is not None:
        return f"{form.shape} {form.dtype}"
    if form.kind == "value":
        return text(form.value)
    return paths.printable(form.type or "")


def statistics_text(found: Statistics) -> str:
    """The statistics that matter most on one line."""
    if math.isnan(found.max_abs):
        return ", ".join(["no number on both sides", *odd_texts(found)])
    relative = "was zero" if math.isinf(found.relative) else f"relative {number(found.relative)}"
    return ", ".join([relative, f"max {number(found.max_abs)}", *odd_texts(found)])


def odd_texts(found: Statistics) -> list[str]:
    """How many elements are NaN and infinite, where there are any."""
    parts = []
    for what, before, after in (("NaN", found.nan_old, found.nan_new), ("inf", found.inf_old, found.inf_new)):
        if before or after:
            parts.append(f"{what} {before:,} -> {after:,}" if before != after else f"{what} {after:,}")
    return parts


def _tie_text(row: EntryDiff) -> list[str]:
    before = row.old.tied_to if row.old is not None else None
    after = row.new.tied_to if row.new is not None else None
    if before == after:
        return []
    found = []
    if before is not None and row.new is not None:
        found.append(f"no longer tied to {paths.printable(before)}")
    if after is not None:
        found.append(f"tied to {paths.printable(after)}")
    return found


def by_change(row: EntryDiff) -> tuple[int, float]:
    """A key to sort by: what people look for first.

    Tensors in which NaN or infinities have come; what changed and cannot be measured, such as plain values; measured tensors, those that
    changed most first; those that were zero before, for which no relative change can be told; single numbers, such as an optimizer's
    count of its steps; all else.
    """
    found = row.statistics
    if found is None:
        return (1 if row.change == "changed" else 5), 0.0
    if found.has_new_odd:
        return 0, -float(found.nan_new + found.inf_new)
    if math.isnan(found.relative):
        return 5, 0.0
    if found.elements == 1:
        return 4, -found.relative
    return (3, -found.max_abs) if math.isinf(found.relative) else (2, -found.relative)


def fact_text(fact: FactDiff) -> str:
    """A fact and its values on one line."""
    name = paths.printable(fact.name)
    if fact.change == "changed":
        return f"{name} {text(fact.old)} -> {text(fact.new)}"
    return f"{name} {text(fact.new if fact.change == 'added' else fact.old)} {fact.change}"
