"""What each rank has written, put together: the files and entries of one manifest.

Gets the ``RankPart`` of every rank. An entry that all ranks have alike, or that they hold together, stands there once, for all; what only
one rank has, or has otherwise, stands there with its rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from expstate.errors import AppStateError
from expstate.format.manifest import AliasEntry, Box, ContainerEntry, Entry, FileRecord, ObjectEntry, TensorEntry, ValueEntry

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class RankPart(msgspec.Struct, frozen=True):
    """The files that one rank has written, and its entries.

    In boxes, files are counted from the rank's own first. An array or object that belongs to all ranks has no rank, and the boxes that this
    rank has written of it, which may be none; everything else has the rank's number.
    """

    files: tuple[FileRecord, ...]
    entries: tuple[Entry, ...]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(RankPart)


def encode(part: RankPart) -> bytes:
    """A rank's part, to be sent to the first rank."""
    return _encoder.encode(part)


def decode(data: bytes) -> RankPart:
    """A rank's part, as ``encode`` has made it."""
    return _decoder.decode(data)


def merge(parts: Iterable[RankPart]) -> tuple[tuple[FileRecord, ...], tuple[Entry, ...]]:
    """The files and entries of all ranks together.

    Parameters
    ----------
    parts : iterable of RankPart
        In the order of the ranks; each is let go of before the next is asked for.

    Raises
    ------
    AppStateError
        If ranks say of one entry what does not fit together; the message names it and them.
    """
    files: list[FileRecord] = []
    found: dict[str, list[Entry]] = {}
    order = _Order()
    size = 0
    for part in parts:
        first = len(files)
        files += part.files
        order.add([entry.path for entry in part.entries])
        for entry in part.entries:
            moved = _moved(entry, first) if first else entry
            before = found.get(entry.path)
            if before is None:
                found[entry.path] = [moved]
            else:
                before.append(moved)
        size += 1
    entries: list[Entry] = []
    shared: set[str] = set()
    for path in order.paths():
        of_path = _together(path, found.pop(path), size, shared)
        if len(of_path) == 1 and of_path[0].rank is None:
            shared.add(path)
        entries += of_path
    return tuple(files), tuple(entries)


def _moved(entry: Entry, first: int) -> Entry:
    """An entry whose boxes count files from the first of all ranks."""
    if not isinstance(entry, (TensorEntry, ObjectEntry)) or not entry.boxes:
        return entry
    boxes = tuple(
        Box(
            box.file + first,
            box.offset,
            box.digest,
            (box.blocks[0] + first, box.blocks[1]) if isinstance(box.blocks, tuple) else box.blocks,
            box.starts,
            box.sizes,
            box.fingerprint,
        )
        for box in entry.boxes
    )
    return msgspec.structs.replace(entry, boxes=boxes)


def _together(path: str, of_ranks: list[Entry], size: int, shared: set[str]) -> list[Entry]:
    """The records of one path: one for all ranks, or one for each that has it."""
    first = of_ranks[0]
    kinds = {type(entry) for entry in of_ranks}
    if kinds == {TensorEntry, AliasEntry}:
        # A rank with nothing of a tensor cannot see what it is tied to.
        aliases = [entry for entry in of_ranks if isinstance(entry, AliasEntry)]
        if not any(isinstance(entry, TensorEntry) and (entry.boxes or entry.rank is not None) for entry in of_ranks):
            return [AliasEntry(path, aliases[0].target)]
    for_all = sum(entry.rank is None for entry in of_ranks)
    if for_all == 0:
        if len(of_ranks) == size and len(kinds) == 1 and _is_alike(of_ranks, shared):
            return [msgspec.structs.replace(first, rank=None)]
        return of_ranks
    if for_all < len(of_ranks) or len(kinds) > 1:
        others = ", ".join(str(entry.rank) for entry in of_ranks if entry.rank is not None)
        msg = f"entry {path!r} belongs to all ranks on some, and to one rank on others ({others})"
        raise AppStateError(msg)
    return [_joined(path, of_ranks)]


def _is_alike(of_ranks: Sequence[Entry], shared: set[str]) -> bool:
    first = of_ranks[0]
    if isinstance(first, ValueEntry):
        # As it is written: 1 and True are equal.
        told = msgspec.json.encode(first.value)
        return all(isinstance(entry, ValueEntry) and msgspec.json.encode(entry.value) == told for entry in of_ranks[1:])
    if isinstance(first, ContainerEntry):
        told = msgspec.json.encode((first.type, first.meta))
        return all(isinstance(entry, ContainerEntry) and msgspec.json.encode((entry.type, entry.meta)) == told for entry in of_ranks[1:])
    if isinstance(first, AliasEntry):
        return first.target in shared and all(isinstance(entry, AliasEntry) and entry.target == first.target for entry in of_ranks)
    return False


def _joined(path: str, of_ranks: Sequence[Entry]) -> Entry:
    """One entry with what all ranks have written of it."""
    first = of_ranks[0]
    boxes: dict[tuple[tuple[int, ...], tuple[int, ...]], Box] = {}
    for rank, entry in enumerate(of_ranks):
        assert isinstance(entry, (TensorEntry, ObjectEntry))
        # Meshes that are parts of one may each have all of a tensor, and none knows of the others.
        for box in entry.boxes:
            boxes.setdefault((box.starts or (), box.sizes or ()), box)
        if isinstance(first, TensorEntry) and isinstance(entry, TensorEntry) and (entry.shape, entry.dtype) != (first.shape, first.dtype):
            told = [f"{one.dtype} {one.shape}" for one in (first, entry)]
            msg = f"entry {path!r} is one tensor of all ranks: {told[0]} on rank 0, and {told[1]} on rank {rank}"
            raise AppStateError(msg)
    if isinstance(first, ObjectEntry):
        written = next((entry for entry in of_ranks if isinstance(entry, ObjectEntry) and entry.boxes), first)
        return msgspec.structs.replace(written, rank=None)
    return msgspec.structs.replace(first, boxes=tuple(sorted(boxes.values(), key=lambda box: box.starts or ())), rank=None)


class _Order:
    """Paths in an order in which each rank finds its own: what only some have comes behind what it follows on them."""

    def __init__(self) -> None:
        self._next: dict[str, str] = {}
        self._same: list[str] | None = None
        self._first = ""

    def add(self, paths: list[str]) -> None:
        if paths == self._same:
            return
        if self._same is None:
            self._same = paths
        before = self._first
        for path in paths:
            if path not in self._next:
                self._next[path] = self._next.get(before, "")
                self._next[before] = path
            before = path

    def paths(self) -> Iterable[str]:
        path = self._next.get(self._first, "")
        while path:
            yield path
            path = self._next[path]
