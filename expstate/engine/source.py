"""A committed snapshot as the engine reads it: entries by path, open files, digests of blocks, and reads made of entries.

``SnapshotSource`` is made of a validated manifest; ``opened`` opens its files for the length of an operation and sees that they have
the sizes that the manifest says.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from typing import TYPE_CHECKING

import msgspec
from blake3 import blake3

from expstate.engine.attempt import read_committed
from expstate.engine.pool import MOST_FILES, FilePool
from expstate.engine.read import Damage, Read, Target, target
from expstate.errors import EntryNotFoundError, SnapshotCorruptError, SnapshotReplacedError, StorageError, UnsafeFileError
from expstate.format.manifest import BLOCK_BYTES, DIGEST_BYTES, AliasEntry, Box, Entry, Manifest, ObjectEntry, TensorEntry
from expstate.state import paths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import torch

    from expstate.storage.base import FileReader, Storage


class SnapshotSource:
    """What a restore reads from.

    Parameters
    ----------
    storage : Storage
        The snapshot's folder.
    manifest : Manifest
        Validated.
    data : bytes
        The manifest's bytes, to notice that it was replaced.
    rank : int, default 0
        Whose entries are seen, of those that only one rank has.

    Attributes
    ----------
    entries : sequence of Entry
        Those of all ranks and those of this one, in order.
    by_path : dict of str to Entry
        The same.
    """

    def __init__(self, storage: Storage, manifest: Manifest, data: bytes, rank: int = 0) -> None:
        self.storage = storage
        self.manifest = manifest
        self._data = data
        self.rank = rank
        self.entries: Sequence[Entry] = manifest.entries
        if manifest.world_size > 1:
            self.entries = [entry for entry in manifest.entries if entry.rank is None or entry.rank == rank]
        self.by_path: dict[str, Entry] = {entry.path: entry for entry in self.entries}
        self.files: list[FileReader | None] = []

    def subtree(self, path: str) -> list[Entry]:
        """The entry at ``path`` and all below it, in order; ``EntryNotFoundError`` if there is none."""
        if not isinstance(path, str) or path not in self.by_path:
            raise EntryNotFoundError(_not_found(path, self.by_path))
        below = f"{path}/"
        return [entry for entry in self.entries if entry.path == path or entry.path.startswith(below)]

    def of_rank(self, rank: int) -> SnapshotSource:
        """The same snapshot as another rank sees it."""
        return self if rank == self.rank or self.manifest.world_size == 1 else SnapshotSource(self.storage, self.manifest, self._data, rank)

    def resolve(self, entry: Entry) -> Entry:
        """The entry itself, or the tensor that an alias is tied to."""
        return self.by_path[entry.target] if isinstance(entry, AliasEntry) else entry

    @contextlib.contextmanager
    def opened(self, numbers: set[int] | None = None, on_damage: Callable[[Damage], None] | None = None) -> Iterator[SnapshotSource]:
        """The snapshot with the files of these numbers, or all, open for one operation.

        Each operation has its own, so that several can go on at once.

        Raises
        ------
        SnapshotReplacedError
            If one is gone because the snapshot was replaced or deleted.
        SnapshotCorruptError
            If one is missing or of another size; with ``on_damage`` it is told instead.
        """
        session = copy.copy(self)
        session.files = [None] * len(self.manifest.files)
        wanted = range(len(session.files)) if numbers is None else sorted(numbers)
        sizes = self.storage.sizes([self.manifest.files[number].name for number in wanted])
        with contextlib.ExitStack() as stack:
            pool = FilePool() if len(wanted) > MOST_FILES else None
            if pool is not None:
                stack.callback(pool.close)
            for number in wanted:
                try:
                    problem = session._open(number, stack, sizes, pool)  # noqa: SLF001 - another of this class
                except (UnsafeFileError, StorageError) as error:
                    if on_damage is None:
                        raise
                    record = self.manifest.files[number]
                    problem = Damage("", record.name, 0, record.size, str(error))
                if problem and on_damage is None:
                    raise SnapshotCorruptError(str(problem))
                if problem and on_damage is not None:
                    on_damage(problem)
            yield session

    def _open(self, number: int, stack: contextlib.ExitStack, sizes: Mapping[str, int], pool: FilePool | None) -> Damage | None:
        record = self.manifest.files[number]
        open_file = functools.partial(self.storage.open_file, record.name, size=sizes.get(record.name))
        try:
            file = stack.enter_context(open_file()) if pool is None else pool.add(open_file(), open_file)
        except FileNotFoundError:
            if read_committed(self.storage) != self._data:
                msg = f"the snapshot at {self.storage.url!r} was replaced or deleted meanwhile; open it anew"
                raise SnapshotReplacedError(msg) from None
            return Damage("", record.name, 0, record.size, "the file is missing")
        self.files[number] = file
        if file.size != record.size:
            return Damage(
                "", record.name, min(file.size, record.size), record.size, f"it has {file.size:,} bytes and should have {record.size:,}"
            )
        return None

    # Digests

    def block_digests(self, path: str, box: Box, nbytes: int) -> bytes:
        """The digests of a box's blocks, one after the other, checked against the box's own; the files must be open."""
        count = -(-nbytes // BLOCK_BYTES)
        if count <= 1:
            return box.digest
        if isinstance(box.blocks, bytes):
            blocks = box.blocks
        else:
            assert box.blocks is not None
            number, offset = box.blocks
            file = self.files[number]
            if file is None:
                msg = f"entry {path!r}: the file with its digests, {self.manifest.files[number].name!r}, is missing"
                raise SnapshotCorruptError(msg)
            if file.size < offset + count * DIGEST_BYTES:
                msg = f"entry {path!r}: the file with its digests, {file.name!r}, ends at {file.size:,}"
                raise SnapshotCorruptError(msg)
            data = bytearray(count * DIGEST_BYTES)
            file.read_into(offset, memoryview(data))
            blocks = bytes(data)
        if blake3(blocks).digest() != box.digest:
            msg = f"entry {path!r}: the digests of its blocks are damaged"
            raise SnapshotCorruptError(msg)
        return blocks

    # Reads

    def files_of(self, entries: Iterable[Entry]) -> set[int]:
        """Numbers of the files that hold the bytes and digests of entries."""
        numbers: set[int] = set()
        for entry in entries:
            resolved = self.resolve(entry)
            if isinstance(resolved, (TensorEntry, ObjectEntry)):
                for box in resolved.boxes:
                    numbers.add(box.file)
                    if isinstance(box.blocks, tuple):
                        numbers.add(box.blocks[0])
        return numbers

    @staticmethod
    def files_of_regions(entry: TensorEntry, regions: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> set[int]:
        """Numbers of the files that hold some boxes of a tensor, each where it begins and its sizes, and the digests of these."""
        numbers: set[int] = set()
        for box in entry.boxes:
            at, counts = box.starts or (0,) * len(entry.shape), box.sizes or entry.shape
            if any(_meet(starts, sizes, at, counts) for starts, sizes in regions):
                numbers.add(box.file)
                if isinstance(box.blocks, tuple):
                    numbers.add(box.blocks[0])
        return numbers

    @staticmethod
    def box_sizes(entry: TensorEntry | ObjectEntry) -> Iterator[tuple[Box, int]]:
        """The boxes of an entry and their bytes."""
        if isinstance(entry, ObjectEntry):
            yield entry.boxes[0], entry.nbytes
            return
        itemsize = entry.itemsize
        for box in entry.boxes:
            yield box, math.prod(entry.shape if box.sizes is None else box.sizes) * itemsize

    def reads(
        self, entry: TensorEntry | ObjectEntry, tensor: torch.Tensor | None, dtype: torch.dtype | None = None, address: int | None = None
    ) -> Iterator[Read]:
        """The reads that fill ``tensor`` with the whole entry, or verify it if there is none."""
        box = entry.boxes[0]
        if len(entry.boxes) == 1 and box.starts is None and 0 < (nbytes := entry.nbytes) <= BLOCK_BYTES:
            # By far the most entries are of this kind.
            goal = None if tensor is None else target(tensor, dtype) if address is None else Target(tensor, None, address)
            yield Read(entry.path, box.file, box.offset, nbytes, box.digest, goal, 0, nbytes, 0)
            return
        if tensor is not None and isinstance(entry, TensorEntry) and entry.boxes[0].starts is not None:
            tensor = shaped(entry, tensor, entry.shape)
        for box, nbytes in self.box_sizes(entry):
            goal = None
            if tensor is not None:
                goal = target(tensor if box.starts is None else region(tensor, box.starts, box.sizes or ()), dtype)
            yield from self.box_reads(entry.path, box, nbytes, 0, nbytes, goal)

    def row_reads(self, entry: TensorEntry, rows: range, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Iterator[Read]:
        """The reads that fill ``tensor`` with some rows of the entry: only the blocks that hold them."""
        tensor = shaped(entry, tensor, (len(rows), *entry.shape[1:]))
        for box in entry.boxes:
            starts = box.starts or (0,) * len(entry.shape)
            sizes = box.sizes or entry.shape
            first, last = max(rows.start, starts[0]), min(rows.stop, starts[0] + sizes[0])
            if first >= last:
                continue
            row_bytes = math.prod(sizes[1:]) * entry.itemsize
            part = region(tensor, (first - rows.start, *starts[1:]), (last - first, *sizes[1:]))
            begin, end = (first - starts[0]) * row_bytes, (last - starts[0]) * row_bytes
            yield from self.box_reads(entry.path, box, sizes[0] * row_bytes, begin, end, target(part, dtype))

    def region_reads(
        self, entry: TensorEntry, starts: tuple[int, ...], tensor: torch.Tensor, dtype: torch.dtype | None = None
    ) -> Iterator[Read]:
        """The reads that fill ``tensor`` with the box of the entry at ``starts`` that has its shape: only the blocks that hold it."""
        shape = tuple(tensor.shape)
        for box in entry.boxes:
            at, sizes = box.starts or (0,) * len(entry.shape), box.sizes or entry.shape
            if not _meet(starts, shape, at, sizes):
                continue
            nbytes = math.prod(sizes) * entry.itemsize
            first = tuple(map(max, starts, at))
            counts = tuple(
                min(start + count, low + size) - begin
                for start, count, low, size, begin in zip(starts, shape, at, sizes, first, strict=True)
            )
            part = region(tensor, tuple(begin - start for begin, start in zip(first, starts, strict=True)), counts)
            if counts == sizes:
                yield from self.box_reads(entry.path, box, nbytes, 0, nbytes, target(part, dtype))
                continue
            within = tuple(begin - low for begin, low in zip(first, at, strict=True))
            ranges = list(_byte_ranges(sizes, within, counts, entry.itemsize))
            if len(ranges) == 1 and counts[1:] == sizes[1:]:
                ((start, stop),) = ranges
                yield from self.box_reads(entry.path, box, nbytes, start, stop, target(part, dtype))
                continue
            for start, stop in _whole_blocks(ranges, nbytes):
                goal = Target(part, dtype, None, (sizes, within))
                for read in self.box_reads(entry.path, box, nbytes, start, stop, goal):
                    yield msgspec.structs.replace(read, at=start)

    def box_reads(self, path: str, box: Box, nbytes: int, start: int, stop: int, goal: Target | None) -> Iterator[Read]:
        """The read of bytes ``start`` to ``stop`` of a box, widened to whole blocks."""
        if start >= stop:
            return
        if nbytes <= BLOCK_BYTES:
            yield Read(path, box.file, box.offset, nbytes, box.digest, goal, start, stop, 0)
            return
        blocks = self.block_digests(path, box, nbytes)
        first = start // BLOCK_BYTES * BLOCK_BYTES
        last = min(nbytes, -(-stop // BLOCK_BYTES) * BLOCK_BYTES)
        digests = blocks[first // BLOCK_BYTES * DIGEST_BYTES : -(-last // BLOCK_BYTES) * DIGEST_BYTES]
        yield Read(path, box.file, box.offset + first, last - first, digests, goal, start - first, stop - first, 0)


def _meet(starts: tuple[int, ...], sizes: tuple[int, ...], others: tuple[int, ...], other_sizes: tuple[int, ...]) -> bool:
    """Whether two boxes have elements in common."""
    for start, size, other, other_size in zip(starts, sizes, others, other_sizes, strict=True):
        if not (size and other_size and start < other + other_size and other < start + size):
            return False
    return True


def _byte_ranges(
    sizes: tuple[int, ...], starts: tuple[int, ...], counts: tuple[int, ...], itemsize: int, base: int = 0
) -> Iterator[tuple[int, int]]:
    """Bytes of a box that hold a part of it, in order; what lies between them is left out where it is long."""
    row_bytes = math.prod(sizes[1:]) * itemsize
    used_bytes = math.prod(counts[1:]) * itemsize
    if len(sizes) == 1 or counts[1:] == sizes[1:] or row_bytes - used_bytes < BLOCK_BYTES:
        begin, end = ((row * row_bytes) + base for row in (starts[0], starts[0] + counts[0]))
        if counts[1:] != sizes[1:]:
            # From the first element to the last.
            strides = [math.prod(sizes[number + 1 :]) * itemsize for number in range(1, len(sizes))]
            begin += sum(start * stride for start, stride in zip(starts[1:], strides, strict=True))
            last = sum((start + count - 1) * stride for start, count, stride in zip(starts[1:], counts[1:], strides, strict=True))
            end += last + itemsize - row_bytes
        yield begin, end
        return
    for row in range(starts[0], starts[0] + counts[0]):
        yield from _byte_ranges(sizes[1:], starts[1:], counts[1:], itemsize, base + row * row_bytes)


def _whole_blocks(ranges: Iterable[tuple[int, int]], nbytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole blocks that hold these ranges, each block once."""
    begin = end = -1
    for start, stop in ranges:
        first, last = start // BLOCK_BYTES * BLOCK_BYTES, min(nbytes, -(-stop // BLOCK_BYTES) * BLOCK_BYTES)
        if end < 0:
            begin, end = first, last
        elif first <= end:
            end = max(end, last)
        else:
            yield begin, end
            begin, end = first, last
    if end >= 0:
        yield begin, end


def shaped(entry: TensorEntry, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor with the entry's dimensions: arrays come as flat bytes, whose items become one more dimension."""
    return tensor.view(*shape, entry.itemsize) if entry.kind == "numpy" and tensor.numel() else tensor


def region(tensor: torch.Tensor, starts: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    """The part of a tensor that begins at ``starts`` and has ``sizes``."""
    for dimension, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        tensor = tensor.narrow(dimension, start, size)
    return tensor


def _not_found(path: str, known: dict[str, Entry]) -> str:
    import difflib  # noqa: PLC0415 - only for the message

    is_quick = isinstance(path, str) and len(known) <= 20_000  # noqa: PLR2004 - it takes a second beyond
    near = difflib.get_close_matches(path, known, n=3) if is_quick else []
    hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
    return f"no entry {path!r} in the snapshot{hint}"


def find_key(manifest: Manifest, key: str) -> str:
    """The path of a key; ``EntryNotFoundError`` naming those there are."""
    if any(record.key == key for record in manifest.keys):
        return paths.quote(key)
    msg = f"no key {key!r} in the snapshot (it has: {', '.join(repr(record.key) for record in manifest.keys) or 'none'})"
    raise EntryNotFoundError(msg)
