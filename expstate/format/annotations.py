"""What people add to a snapshot after the take: ``annotations.json``, and the rule by which two versions of it become one.

Every item carries the time of its last change in microseconds since 1970, removals too; of two versions of an item the newer wins.
So the order in which versions meet does not matter, and a lost race is mended by merging again.
"""

from __future__ import annotations

from typing import Any

import msgspec

from expstate.errors import SnapshotCorruptError, UnsupportedFormatError

FORMAT = 1
MAX_BYTES = 64 * 1024**2


class Mark(msgspec.Struct, array_like=True, frozen=True, order=True):
    """Whether a tag, alias or pin is there, since when."""

    at: int
    present: bool


class Text(msgspec.Struct, array_like=True, frozen=True, order=True):
    """A note, since when; empty when it was taken away."""

    at: int
    text: str


class Value(msgspec.Struct, array_like=True, frozen=True):
    """A metric in the form of ``state.values``, since when."""

    at: int
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


def merge(one: Annotations, other: Annotations) -> Annotations:
    """Both versions in one; of each item the newer.

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
    return msgspec.json.format(msgspec.json.encode(annotations), indent=1) + b"\n"


def decode(data: bytes) -> Annotations:
    """The annotations in these bytes.

    Raises
    ------
    SnapshotCorruptError
        If they are none.
    UnsupportedFormatError
        If they are of a newer format.
    """
    try:
        found = msgspec.json.decode(data, type=Annotations)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        msg = f"annotations.json is damaged: {error}; remove it to go on without what was added to the snapshot"
        raise SnapshotCorruptError(msg) from error
    if found.format > FORMAT:
        msg = f"annotations.json has format {found.format}, and this version reads up to {FORMAT}; upgrade expstate"
        raise UnsupportedFormatError(msg)
    return found
