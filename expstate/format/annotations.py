"""What people add to a snapshot after the take: ``annotations.json``, and the rule by which two versions of it become one.

Every item carries the time of its last change in microseconds since 1970, removals too; of two versions of an item the newer wins.
So the order in which versions meet does not matter, and a lost race is mended by merging again.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from expstate.errors import ManifestError, SnapshotCorruptError, UnknownClassError, UnsupportedFormatError
from expstate.format import names
from expstate.state import values

FORMAT = 1
MAX_BYTES = 64 * 1024**2
LAST = 2**63 - 1
"""The latest time there is: what a database's number holds."""

Time = Annotated[int, msgspec.Meta(ge=0, le=LAST)]


class Mark(msgspec.Struct, array_like=True, frozen=True, order=True):
    """Whether a tag, alias or pin is there, since when."""

    at: Time
    present: bool


class Text(msgspec.Struct, array_like=True, frozen=True, order=True):
    """A note, since when; empty when it was taken away."""

    at: Time
    text: str


class Value(msgspec.Struct, array_like=True, frozen=True):
    """A metric in the form of ``state.values``, since when."""

    at: Time
    value: Any


class Annotations(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that was added to the snapshot ``id``."""

    format: int
    id: str
    tags: dict[str, Mark] = {}
    aliases: dict[str, Mark] = {}
    pin: Mark | None = None
    note: Text | None = None
    metrics: dict[str, Value] = {}

    @property
    def pinned(self) -> bool:
        """Whether it is protected by a pin."""
        return self.pin is not None and self.pin.present

    @property
    def alias_names(self) -> tuple[str, ...]:
        """The aliases it has."""
        return tuple(sorted(name for name, mark in self.aliases.items() if mark.present))


def empty(snapshot_id: str) -> Annotations:
    """Nothing was added yet."""
    return Annotations(format=FORMAT, id=snapshot_id)


def after(now: int, *items: Mark | Text | Value | None) -> int:
    """The time of an edit made now: later than what it replaces, whatever the clock said then.

    >>> after(5, Mark(3, True), None), after(5, Mark(7, True))
    (5, 8)
    """
    return min(LAST, max(now, *(item.at + 1 for item in items if item is not None), 0))


def merge(one: Annotations, other: Annotations) -> Annotations:
    """Both versions in one; of each item the newer. They are of the same snapshot.

    >>> a = Annotations(format=1, id="0" * 32, pin=Mark(1, True))
    >>> b = Annotations(format=1, id="0" * 32, pin=Mark(2, False))
    >>> merge(a, b) == merge(b, a) == b
    True
    """
    return Annotations(
        format=FORMAT,
        id=one.id,
        tags=_newer(one.tags, other.tags),
        aliases=_newer(one.aliases, other.aliases),
        pin=max((mark for mark in (one.pin, other.pin) if mark is not None), default=None),
        note=max((note for note in (one.note, other.note) if note is not None), default=None),
        metrics=_newer(one.metrics, other.metrics),
    )


def _newer(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    found = dict(one)
    for name, item in other.items():
        if name not in found or _order(item) > _order(found[name]):
            found[name] = item
    return found


def _order(item: Any) -> tuple[int, bytes]:
    return item.at, msgspec.json.encode(item)


def encode(annotations: Annotations) -> bytes:
    """The bytes of ``annotations.json``."""
    return msgspec.json.format(msgspec.json.encode(annotations, order="deterministic"), indent=1) + b"\n"


class _Head(msgspec.Struct):
    format: int


_head = msgspec.json.Decoder(_Head).decode
_decode = msgspec.json.Decoder(Annotations).decode


def decode(data: bytes) -> Annotations:
    """The annotations in these bytes, which anybody may have written.

    Raises
    ------
    SnapshotCorruptError
        If they are none, or hold what no edit writes.
    UnsupportedFormatError
        If they are of a newer format.
    """
    try:
        written = _head(data).format
        found = _decode(data) if written <= FORMAT else None
        problem = None if found is None else _problem(found)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _damaged(str(error)) from error
    if found is None:
        msg = f"annotations.json has format {written}, and this version reads up to {FORMAT}; upgrade expstate"
        raise UnsupportedFormatError(msg)
    if problem:
        raise _damaged(problem)
    return found


def _damaged(problem: str) -> SnapshotCorruptError:
    return SnapshotCorruptError(f"annotations.json is damaged: {problem}; remove it to go on without what was added to the snapshot")


def _problem(found: Annotations) -> str | None:
    """What is in them that no edit writes."""
    if not names.is_id(found.id):
        return "it has no snapshot's id"
    for what, labels in (("tag", found.tags), ("alias", found.aliases)):
        for label in labels:
            if names.check_label(label, what) != label:
                return f"{what} {label[:80]!r} is not in normal form"
    for name, metric in found.metrics.items():
        try:
            value = values.decode(metric.value)
        except (ManifestError, UnknownClassError):
            value = None
        if not name or not isinstance(value, (int, float)) or isinstance(value, bool):
            return f"metric {name[:80]!r} is no number"
    return None
