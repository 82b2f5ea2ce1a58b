"""What earlier snapshots hold, found by content: the bases of an incremental take.

Gets snapshots; ``prepare`` indexes their boxes of the sizes that a take has, and ``find`` gives one by its digest, whatever its name is
there. Nothing of a base is read but its manifest and the digests that it keeps in files.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import msgspec

from expstate.errors import ExpstateError
from expstate.format.manifest import DIGEST_BYTES, Box, ObjectEntry, TensorEntry

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from expstate.engine.source import SnapshotSource


class Held(msgspec.Struct, frozen=True, gc=False):
    """A box that a base holds: the base's number, the entry's path and dtype, the box with its sizes and bytes."""

    base: int
    path: str
    dtype: str
    sizes: tuple[int, ...]
    box: Box
    nbytes: int

    @property
    def file(self) -> tuple[int, int]:
        """Numbers of the base and of the file there that it lies in."""
        return self.base, self.box.file


class Bases:
    """Snapshots that unchanged boxes may be taken from, the first that has one first.

    Parameters
    ----------
    sources : sequence of SnapshotSource
        The snapshots; none finds nothing.
    """

    def __init__(self, sources: Sequence[SnapshotSource]) -> None:
        self.sources = sources
        self._sizes: set[int] = set()
        self._first: set[tuple[int, bytes]] = set()
        self._by_digest: dict[tuple[int, bytes], list[Held]] = {}
        self._by_fingerprint: dict[tuple[str, tuple[int, ...], bytes], list[Held]] = {}
        self._without_fingerprint: set[tuple[str, tuple[int, ...]]] = set()

    @property
    def fingerprint_key(self) -> bytes | None:
        """The key that the first base with any has made its fingerprints with."""
        keys = (source.manifest.fingerprint_key for source in self.sources)
        return next((bytes.fromhex(key) for key in keys if key is not None), None)

    def prepare(self, sizes: Collection[int], fingerprint_key: bytes | None) -> None:
        """Index the boxes that have one of these numbers of bytes."""
        for number, source in enumerate(self.sources):
            found = [held for held in _boxes(number, source) if held.nbytes in sizes]
            is_same_key = fingerprint_key is not None and source.manifest.fingerprint_key == fingerprint_key.hex()
            for held in found:
                self._sizes.add(held.nbytes)
                self._by_digest.setdefault((held.nbytes, held.box.digest), []).append(held)
                if held.box.fingerprint is not None and is_same_key:
                    self._by_fingerprint.setdefault((held.dtype, held.sizes, held.box.fingerprint), []).append(held)
                else:
                    self._without_fingerprint.add((held.dtype, held.sizes))
            self._note_first_blocks(source, found)

    def _note_first_blocks(self, source: SnapshotSource, found: Sequence[Held]) -> None:
        in_files: list[Held] = []
        for held in found:
            blocks = held.box.blocks
            if isinstance(blocks, tuple):
                in_files.append(held)
            else:
                self._first.add((held.nbytes, held.box.digest if blocks is None else blocks[:DIGEST_BYTES]))
        if not in_files:
            return
        digest = bytearray(DIGEST_BYTES)
        # A base that cannot be read any more, because someone deleted it, is a base that holds nothing.
        with contextlib.suppress(ExpstateError), source.opened({_table(held)[0] for held in in_files}) as opened:
            for held in in_files:
                number, offset = _table(held)
                file = opened.files[number]
                if file is not None and offset + DIGEST_BYTES <= file.size:
                    file.read_into(offset, memoryview(digest))
                    self._first.add((held.nbytes, bytes(digest)))

    def has_size(self, nbytes: int) -> bool:
        """Whether a base has a box with so many bytes."""
        return nbytes in self._sizes

    def may_hold(self, nbytes: int, first_block: bytes) -> bool:
        """Whether a base has a box with so many bytes and this digest of its first block."""
        return (nbytes, first_block) in self._first

    def find(self, nbytes: int, digest: bytes, path: str) -> Held | None:
        """A box with this digest, that of the same entry if it is among them."""
        return _best(self._by_digest.get((nbytes, digest), ()), path)

    def find_by_fingerprint(self, dtype: str, sizes: tuple[int, ...], fingerprint: bytes, path: str) -> Held | None:
        """A box with this dtype, these sizes and this fingerprint."""
        return _best(self._by_fingerprint.get((dtype, sizes, fingerprint), ()), path)

    def is_told_by_fingerprint(self, dtype: str, sizes: tuple[int, ...]) -> bool:
        """Whether a box of this dtype and these sizes that no fingerprint has found is in no base."""
        return (dtype, sizes) not in self._without_fingerprint

    def blocks(self, held: Held) -> bytes | None:
        """The digests of a box's blocks; None if they cannot be read."""
        source = self.sources[held.base]
        if not isinstance(held.box.blocks, tuple):
            return held.box.blocks or (held.box.digest if held.nbytes else b"")
        with contextlib.suppress(ExpstateError), source.opened({held.box.blocks[0]}) as opened:
            return opened.block_digests(held.path, held.box, held.nbytes)
        return None


def _table(held: Held) -> tuple[int, int]:
    assert isinstance(held.box.blocks, tuple)
    return held.box.blocks


def _boxes(number: int, source: SnapshotSource) -> list[Held]:
    found = []
    for entry in source.manifest.entries:
        if isinstance(entry, TensorEntry):
            itemsize = entry.itemsize
            for box in entry.boxes:
                sizes = entry.shape if box.sizes is None else box.sizes
                found.append(Held(number, entry.path, entry.dtype, sizes, box, math.prod(sizes) * itemsize))
        elif isinstance(entry, ObjectEntry):
            found.append(Held(number, entry.path, "", (), entry.boxes[0], entry.nbytes))
    return found


def _best(found: Sequence[Held], path: str) -> Held | None:
    return next((held for held in found if held.path == path), found[0] if found else None)
