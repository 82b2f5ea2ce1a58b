"""The same bytes of two sides brought to one thread, verified, and compared there, piece by piece and within the budget.

Gets pairs of tensors of one shape; feeds each pair's sums, or only sees whether its bytes differ. Tensors cut into the same boxes are read
box by box, as they lie; others slab by slab.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

import msgspec
import torch

from expstate.diff.compare import placed
from expstate.diff.live import pieces
from expstate.diff.slabs import Slab, cut, slab_reads
from expstate.diff.stats import Scratch, Sums, same_bytes
from expstate.engine import crew
from expstate.engine.inplace import Piece, staging_for
from expstate.engine.memory import SLACK_BYTES
from expstate.engine.read import Read, check_block, windows
from expstate.engine.streams import SideStreams
from expstate.errors import SnapshotCorruptError
from expstate.format.manifest import BLOCK_BYTES, DIGEST_BYTES, Box, TensorEntry
from expstate.settings import MIB
from expstate.state import tensors, tree

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from expstate.engine.memory import Buffer
    from expstate.engine.source import SnapshotSource
    from expstate.progress import Progress

_PAGE = 4096
_GAP_BYTES = 64 * 1024
"""Unwanted bytes between two boxes that are read along with them rather than asked for apart."""


class Pair(msgspec.Struct):
    """A tensor on both sides: the snapshot's entry, the newer snapshot's or a live one's, and what is found.

    ``dtypes`` are those to compute with, and ``sums`` what is computed; both are None if only ``is_same`` is asked for.
    """

    old: TensorEntry
    new: TensorEntry
    array: tree.Array | None
    dtypes: tuple[torch.dtype, torch.dtype] | None = None
    sums: Sums | None = None
    is_same: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of both sides together."""
        return self.old.nbytes + self.new.nbytes

    def take(self, old: torch.Tensor, new: torch.Tensor, scratch: Scratch) -> None:
        """Compare the same elements of both sides, given as flat bytes."""
        if self.sums is None or self.dtypes is None:
            self.is_same = self.is_same and same_bytes(old, new)
            return
        self.sums.add(_as_dtype(old, self.dtypes[0]), _as_dtype(new, self.dtypes[1]), scratch)
        self.is_same = self.sums.changed == 0


def _as_dtype(flat: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    is_aligned = flat.data_ptr() % dtype.itemsize == 0 and flat.storage_offset() % dtype.itemsize == 0
    return (flat if is_aligned else flat.clone()).view(dtype)


class _Item(msgspec.Struct, frozen=True, gc=False):
    """The same elements of both sides: whole blocks of a stored box, or a piece of a live tensor."""

    pair: Pair
    old: Read
    new: Read | Piece


class PairReader:
    """Reads pairs by several threads.

    Parameters
    ----------
    old : SnapshotSource
        The older side, its files open.
    new : SnapshotSource or None
        The newer side; None if it is live.
    pairs : sequence of Pair
        What to compare.
    budget : int
        Bytes of host memory for buffers.
    threads : int
        Threads to use.
    progress : Progress
        Is told of the bytes of both sides.
    """

    def __init__(
        self, old: SnapshotSource, new: SnapshotSource | None, pairs: Sequence[Pair], budget: int, threads: int, progress: Progress
    ) -> None:
        self._old = old
        self._new = new
        self._pairs = pairs
        self._progress = progress
        self._threads = threads
        self._stop = crew.Stop()
        self._scratch = Scratch()
        # One thread at a time computes, while others read and digest: torch's short calls would only wait for each other's turn.
        self._computing = threading.Lock()
        views = [pair.array.tensor for pair in pairs if pair.array is not None]
        self._streams = SideStreams(view.device for view in views)
        least = 2 * MIB + SLACK_BYTES  # one buffer serves both sides, with a block of each
        self._staging = staging_for(views, max(budget, least), 2 if budget >= 2 * least else 1)
        self._half = self._staging.buffer_bytes // 2 // _PAGE * _PAGE
        self._room = (self._half - _PAGE) // BLOCK_BYTES * BLOCK_BYTES

    def run(self) -> None:
        """Read and compare all.

        Raises
        ------
        SnapshotCorruptError
            If bytes of a snapshot are damaged.
        """
        items: list[_Item] = []
        slabs: list[tuple[Pair, Slab]] = []
        for pair in self._pairs:
            if 0 in pair.old.shape:
                continue
            step = self._step(pair)
            if step:
                items += self._items(pair, step)
            else:
                slabs += ((pair, slab) for slab in self._slabs(pair))
        items.sort(key=lambda item: (item.old.file, item.old.offset))
        jobs: list[list[_Item] | tuple[Pair, Slab]] = [*self._joined(items), *slabs]
        try:
            crew.run(jobs, self._do, max(1, min(self._threads, self._staging.count, len(jobs))), self._stop, self._streams.on_device)
        finally:
            self._streams.join()
            self._staging.close()

    def _do(self, job: list[_Item] | tuple[Pair, Slab]) -> None:
        with self._staging.lend(self._stop) as buffer:
            if isinstance(job, tuple):
                self._do_slab(*job, buffer)
            else:
                self._do_items(job, buffer)

    # Cut alike: whole blocks as they lie

    def _step(self, pair: Pair) -> int:
        """Elements of a piece that is whole blocks on both sides; 0 if boxes, item sizes or buffers do not allow for such."""
        if pair.dtypes is None or (pair.array is None and placed(pair.old).keys() != placed(pair.new).keys()):
            return 0
        small, large = sorted(dtype.itemsize for dtype in pair.dtypes)
        unit = BLOCK_BYTES // small
        count = math.prod(pair.old.shape)
        return self._room // (unit * large) * unit or (count if count * large <= self._room else 0)

    def _items(self, pair: Pair, step: int) -> Iterator[_Item]:
        others = placed(pair.new)
        for place, box in placed(pair.old).items():
            old = _stored_pieces(self._old, pair.old, box, place[1], step)
            if pair.array is not None:
                live = pieces(pair.array, pair.new, place, step * pair.new.itemsize)
                yield from (_Item(pair, one, other) for one, other in zip(old, live, strict=True))
            elif self._new is not None:
                stored = _stored_pieces(self._new, pair.new, others[place], place[1], step)
                yield from (_Item(pair, one, other) for one, other in zip(old, stored, strict=True))

    def _joined(self, items: Sequence[_Item]) -> Iterator[list[_Item]]:
        """Items that lie near each other on both sides, as far as the halves of a buffer hold them."""
        job: list[_Item] = []
        staged = 0
        for item in items:
            room = item.new.nbytes if isinstance(item.new, Piece) else 0
            if job and not (self._fits(job, item) and staged + room <= self._room):
                yield job
                job, staged = [], 0
            job.append(item)
            staged += -(-room // 16) * 16
        if job:
            yield job

    def _fits(self, job: Sequence[_Item], item: _Item) -> bool:
        first, last = job[0], job[-1]
        if not self._follows(first.old, last.old, item.old):
            return False
        if not (isinstance(first.new, Read) and isinstance(last.new, Read) and isinstance(item.new, Read)):
            return True
        return self._follows(first.new, last.new, item.new)

    def _follows(self, first: Read, last: Read, read: Read) -> bool:
        gap = read.offset - last.offset - last.nbytes
        return read.file == last.file and 0 <= gap <= _GAP_BYTES and read.offset + read.nbytes - first.offset <= self._room

    def _do_items(self, job: Sequence[_Item], buffer: Buffer) -> None:
        old_at = _bring(self._old, [item.old for item in job], buffer.view[: self._half])
        stored = [item.new for item in job if isinstance(item.new, Read)]
        new_at = 0
        if stored and self._new is not None:
            new_at = _bring(self._new, stored, buffer.view[self._half :]) - self._half
        places = self._stage(job, buffer)
        with self._computing:
            for item, place in zip(job, places, strict=True):
                old = buffer.tensor[item.old.offset - old_at :][: item.old.nbytes]
                if isinstance(item.new, Read):
                    new = buffer.tensor[item.new.offset - new_at :][: item.new.nbytes]
                elif item.new.address is not None:
                    new = torch.frombuffer(tensors.memory(item.new.address, item.new.nbytes), dtype=torch.uint8)
                else:
                    new = buffer.tensor[place : place + item.new.nbytes]
                item.pair.take(old, new, self._scratch)
        self._progress.add(sum(item.old.nbytes + item.new.nbytes for item in job))

    def _stage(self, job: Sequence[_Item], buffer: Buffer) -> list[int]:
        """Copy what is live and not plain memory to the second half of the buffer; where each is."""
        places = []
        at = self._half
        with self._streams.entered() as events:
            for item in job:
                places.append(at)
                if isinstance(item.new, Piece) and item.new.address is None:
                    item.new.stage(buffer, at)
                    at += -(-item.new.nbytes // 16) * 16  # so that the next is aligned for its dtype
        for event in events:
            event.synchronize()
        return places

    # Cut otherwise: slab by slab

    def _slabs(self, pair: Pair) -> Iterator[Slab]:
        if pair.dtypes is None:
            return cut((*pair.old.shape, pair.old.itemsize), self._slab_room)
        return cut(pair.old.shape, self._slab_room // max(dtype.itemsize for dtype in pair.dtypes))

    @property
    def _window_bytes(self) -> int:
        """What is read at once for a slab, so that a buffer holds it and both sides of the slab."""
        return max(1, self._staging.window_bytes // BLOCK_BYTES // 2) * BLOCK_BYTES

    @property
    def _slab_room(self) -> int:
        return (self._staging.window_bytes - self._window_bytes) // 2 // _PAGE * _PAGE

    def _do_slab(self, pair: Pair, slab: Slab, buffer: Buffer) -> None:
        sides: list[torch.Tensor] = []
        count = math.prod(slab.sizes)
        for number, (entry, source) in enumerate(((pair.old, self._old), (pair.new, self._new))):
            itemsize = 1 if pair.dtypes is None else entry.itemsize
            at = number * self._slab_room
            dense = buffer.tensor[at : at + count * itemsize]
            if source is not None:
                self._fill(source, entry, slab, dense, buffer)
            elif pair.array is not None:
                start = slab.first * itemsize
                with self._streams.entered() as events:
                    Piece(pair.array.tensor, start, start + count * itemsize, None).stage(buffer, at)
                for event in events:
                    event.synchronize()
            sides.append(dense)
        with self._computing:
            pair.take(sides[0], sides[1], self._scratch)
        self._progress.add(sum(side.numel() for side in sides))

    def _fill(self, source: SnapshotSource, entry: TensorEntry, slab: Slab, dense: torch.Tensor, buffer: Buffer) -> None:
        begin = 2 * self._slab_room
        for window in windows(slab_reads(source, entry, slab, dense), self._window_bytes):
            base = begin - _bring(source, window, buffer.view[begin:])
            for read in window:
                assert read.target is not None
                nbytes = read.last - read.first
                address = buffer.address + base + read.offset + read.first
                if read.target.address is not None:
                    tensors.move_memory(read.target.address + read.at, address, nbytes)
                else:
                    tensors.copy_in(read.target.tensor, read.at, read.at + nbytes, address)


def _stored_pieces(source: SnapshotSource, entry: TensorEntry, box: Box, sizes: tuple[int, ...], step: int) -> Iterator[Read]:
    """A box in pieces of ``step`` elements, which are whole blocks but for the last."""
    nbytes, most = math.prod(sizes) * entry.itemsize, step * entry.itemsize
    for read in source.box_reads(entry.path, box, nbytes, 0, nbytes, None):
        for start in range(0, nbytes, most):
            block = start // BLOCK_BYTES * DIGEST_BYTES
            size = min(most, nbytes - start)
            digests = read.digests[block : block + -(-size // BLOCK_BYTES) * DIGEST_BYTES]
            yield Read(entry.path, read.file, read.offset + start, size, digests)


def _bring(source: SnapshotSource, reads: Sequence[Read], view: memoryview) -> int:
    """Read from the first of ``reads``, which follow each other in one file, to the last, and verify them; where the view then begins."""
    file = source.files[reads[0].file]
    assert file is not None, "files are open"
    start = reads[0].offset // file.alignment * file.alignment
    stop = max(read.offset + read.nbytes for read in reads)
    file.read_into(start, view[: -(-(stop - start) // file.alignment) * file.alignment])
    for read in reads:
        at = read.offset - start
        for first in range(0, read.nbytes, BLOCK_BYTES):
            damage = check_block(read, first, view[at + first : at + min(read.nbytes, first + BLOCK_BYTES)], file)
            if damage is not None:
                raise SnapshotCorruptError(str(damage))
    return start
