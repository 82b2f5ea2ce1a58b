"""Storage to tensors: pieces read by several threads, verified block by block, and put where they belong.

Gets reads (bytes of a box and where they go) and open files; calls back when the reads of a target are done. What is in the page
cache already is read from there, straight into its place where that is plain memory, the rest by direct I/O through aligned buffers; a
target may also be none, to verify only.
"""

from __future__ import annotations

import operator
import threading
from typing import TYPE_CHECKING

import msgspec
from blake3 import blake3

from expstate import collector
from expstate.engine import crew
from expstate.engine.streams import SideStreams
from expstate.errors import SnapshotCorruptError, StorageError
from expstate.format.manifest import BLOCK_BYTES, DIGEST_BYTES
from expstate.state import tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

    from expstate.engine.memory import Buffer, Staging
    from expstate.progress import Progress
    from expstate.storage.base import FileReader

_JOIN_GAP_BYTES = 64 * 1024
_REMOTE_GAP_BYTES = BLOCK_BYTES
"""Unwanted bytes between two reads that are read along with them rather than asked for apart."""


class Target(msgspec.Struct, frozen=True, gc=False):
    """A tensor to fill with the bytes of an entry, or part of it; made by ``target``.

    ``dtype`` is the stored dtype if it is not the tensor's. ``address`` is where the stored bytes can be put as they are, in plain host
    memory, or None. With ``within``, the sizes of a box and where in it the tensor begins, the stored form is that of the box, and what
    of it is no part of the tensor is left out.
    """

    tensor: torch.Tensor
    dtype: torch.dtype | None = None
    address: int | None = None
    within: tuple[tuple[int, ...], tuple[int, ...]] | None = None


def target(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Target:
    """A target for bytes that were stored with ``dtype``.

    Parameters
    ----------
    tensor : torch.Tensor
        Strided, any device; its elements do not share memory.
    dtype : torch.dtype, optional
        The stored dtype; values are converted if it is not the tensor's.
    """
    if dtype is not None and dtype != tensor.dtype:
        return Target(tensor, dtype)
    return Target(tensor, None, tensor.data_ptr() if tensors.is_plain_memory(tensor) else None)


class Read(msgspec.Struct, frozen=True, gc=False):
    """Whole blocks of a box to read.

    ``offset`` and ``nbytes`` say where they lie in ``file``, ``digests`` what they are. Of these, the bytes from ``first`` to
    ``last`` go to ``target``, where they begin at byte ``at`` of its stored form.
    """

    path: str
    file: int
    offset: int
    nbytes: int
    digests: bytes
    target: Target | None = None
    first: int = 0
    last: int = 0
    at: int = 0


class Damage(msgspec.Struct, frozen=True):
    """Bytes that are not what was taken.

    Attributes
    ----------
    entry : str
        Path of the entry, or empty for a file as a whole.
    file : str
        Name of the data file.
    offset : int
        First byte of the damaged block in the file.
    nbytes : int
        Bytes in the block.
    reason : str
        What was found.
    """

    entry: str
    file: str
    offset: int
    nbytes: int
    reason: str

    def __str__(self) -> str:
        whose = f"entry {self.entry!r} is damaged" if self.entry else "a file is damaged"
        return f"{whose}: {self.nbytes:,} bytes at {self.offset:,} of file {self.file!r}: {self.reason}"


def _pieces(read: Read, window_bytes: int) -> Iterable[Read]:
    """A read cut into pieces that fit a buffer."""
    step = window_bytes // BLOCK_BYTES * BLOCK_BYTES
    for start in range(0, read.nbytes, step):
        nbytes = min(step, read.nbytes - start)
        first, last = max(read.first, start), min(read.last, start + nbytes)
        block = start // BLOCK_BYTES * DIGEST_BYTES
        digests = read.digests[block : block + -(-nbytes // BLOCK_BYTES) * DIGEST_BYTES]
        wanted = max(first, min(last, start + nbytes))
        yield Read(
            read.path,
            read.file,
            read.offset + start,
            nbytes,
            digests,
            read.target,
            first - start,
            wanted - start,
            read.at + first - read.first,
        )


def windows(reads: Iterable[Read], window_bytes: int, gap_bytes: int = _JOIN_GAP_BYTES) -> list[list[Read]]:
    """Reads that lie near each other in a file, joined as far as a buffer holds them."""
    cut: list[Read] = []
    for read in reads:
        if read.nbytes <= window_bytes:
            cut.append(read)
        else:
            cut += _pieces(read, window_bytes)
    cut.sort(key=operator.attrgetter("file", "offset"))
    joined: list[list[Read]] = []
    window: list[Read] = []
    file, start, end = -1, 0, 0
    for piece in cut:
        offset = piece.offset
        stop = offset + piece.nbytes
        if piece.file == file and offset - end <= gap_bytes and stop - start <= window_bytes:
            window.append(piece)
            end = stop if stop > end else end  # noqa: FURB136 - runs once for each of many tensors
        else:
            window = [piece]
            joined.append(window)
            file, start, end = piece.file, offset, stop
    return joined


class PieceReader:
    """Reads pieces.

    Parameters
    ----------
    files : sequence of FileReader
        The open files, by number.
    staging : Staging
        Buffers.
    threads : int
        Threads to use.
    verify : bool
        Whether to check digests.
    progress : Progress
        Told of every read.
    stop : crew.Stop
        Ends the work.
    on_damage : callable, optional
        Is given each damage; without it the first is raised as ``SnapshotCorruptError``.
    """

    def __init__(
        self,
        files: Sequence[FileReader | None],
        staging: Staging,
        threads: int,
        progress: Progress,
        stop: crew.Stop,
        *,
        verify: bool = True,
        on_damage: Callable[[Damage], None] | None = None,
    ) -> None:
        self._files = files
        self._staging = staging
        self._threads = threads
        self._verify = verify
        self._progress = progress
        self._stop = stop
        self._on_damage = on_damage
        self._lock = threading.Lock()
        self._streams = SideStreams([])
        self._left: dict[int, list[Read]] = {}
        self._has_begun = False

    def unfinished(self) -> set[str] | None:
        """Paths of entries whose bytes are not all in place; None before any are."""
        return None if not self._has_begun else {read.path for window in self._left.values() for read in window}

    def run(self, reads: Sequence[Read]) -> None:
        """Do all reads; returns when the values are in place, or on an accelerator when what is queued next will see them."""
        self._streams = SideStreams(read.target.tensor.device for read in reads if read.target is not None and read.target.address is None)
        with collector.paused():
            is_remote = any(file is not None and file.is_remote for file in self._files)
            jobs = windows(reads, self._staging.window_bytes, _REMOTE_GAP_BYTES if is_remote else _JOIN_GAP_BYTES)
        self._left = {id(job): job for job in jobs}
        self._has_begun = True
        try:
            threads = max(1, min(self._threads, self._staging.count, len(jobs)))
            crew.run(jobs, self._do, threads, self._stop, self._streams.on_device)
        finally:
            self._streams.join()

    def _do(self, window: list[Read]) -> None:
        file = self._files[window[0].file]
        if file is None:
            return  # its absence is reported by whoever opened the files
        try:
            if not (len(window) == 1 and self._read_in_place(window[0], file)):
                self._read_by_buffer(window, file)
        except (SnapshotCorruptError, StorageError) as error:
            if self._on_damage is None:
                raise
            for read in window:
                self._on_damage(Damage(read.path, file.name, read.offset, read.nbytes, str(error)))
        self._progress.add(sum(read.nbytes for read in window))
        with self._lock:
            del self._left[id(window)]

    def _read_in_place(self, read: Read, file: FileReader) -> bool:
        """Read into the target's own memory: block by block, each digested while it is in the cache, or by one request."""
        target = read.target
        if target is None or target.address is None or (read.first, read.last) != (0, read.nbytes):
            return False
        address = target.address + read.at
        in_step = (address | read.offset | read.nbytes) % file.alignment == 0
        is_cached = file.is_cached(read.offset, read.nbytes)
        if not in_step and not is_cached:
            return False
        read_into = file.read_cached_into if is_cached else file.read_into
        whole = tensors.memory(address, read.nbytes)
        if file.is_remote or not self._verify:
            read_into(read.offset, whole)
        if not self._verify:
            return True
        for start in range(0, read.nbytes, BLOCK_BYTES):
            view = whole[start : start + BLOCK_BYTES]
            if not file.is_remote:
                read_into(read.offset + start, view)
            self._check(read, start, view, file)
        return True

    def _read_by_buffer(self, window: list[Read], file: FileReader) -> None:
        start = window[0].offset // file.alignment * file.alignment
        stop = max(read.offset + read.nbytes for read in window)
        # Who only verifies wants to know what is on the storage, not what is left of it in memory.
        is_cached = window[0].target is not None and file.is_cached(start, stop - start)
        read_into = file.read_cached_into if is_cached else file.read_into
        with self._staging.lend(self._stop) as buffer:
            read_into(start, buffer.view[: -(-(stop - start) // file.alignment) * file.alignment])
            view, address = buffer.view, buffer.address
            with self._streams.entered() as events:
                for read in window:
                    at, nbytes, target = read.offset - start, read.nbytes, read.target
                    # Small tensors come in hundreds of thousands: the common case is spelled out.
                    if self._verify and (nbytes > BLOCK_BYTES or blake3(view[at : at + nbytes]).digest() != read.digests):
                        for first in range(0, nbytes, BLOCK_BYTES):
                            self._check(read, first, view[at + first : at + min(nbytes, first + BLOCK_BYTES)], file)
                    if target is None:
                        continue
                    if target.address is not None:
                        wanted = read.last - read.first
                        move = tensors.move_small if wanted <= tensors.SMALL_BYTES else tensors.move_memory
                        move(target.address + read.at, address + at + read.first, wanted)
                    elif read.last > read.first:
                        _put(read, target, buffer, at + read.first)
            for event in events:
                event.synchronize()

    def _check(self, read: Read, start: int, view: memoryview, file: FileReader) -> None:
        damage = check_block(read, start, view, file)
        if damage is None:
            return
        if self._on_damage is None:
            raise SnapshotCorruptError(str(damage))
        self._on_damage(damage)


def check_block(read: Read, start: int, view: memoryview, file: FileReader) -> Damage | None:
    """Compare a block that was read into ``view``, byte ``start`` of a read on, with its digest; what is wrong with it, if anything is."""
    block = start // BLOCK_BYTES * DIGEST_BYTES
    expected = read.digests[block : block + DIGEST_BYTES]
    if blake3(view).digest() == expected:
        return None
    # Once more: what went wrong on the way may go right now; what is wrong on the storage stays wrong.
    file.read_into(read.offset + start, view)
    if blake3(view).digest() == expected:
        return None
    return Damage(read.path, file.name, read.offset + start, len(view), "its bytes are not those that were taken")


def _put(read: Read, target: Target, buffer: Buffer, at: int) -> None:
    """Copy what was read to where it belongs, which is no plain host memory; on an accelerator that only begins here."""
    nbytes = read.last - read.first
    if target.within is not None:
        sizes, starts = target.within
        tensors.copy_part_in(target.tensor, sizes, starts, read.at, read.at + nbytes, buffer.address + at, target.dtype)
        return
    source = None if target.tensor.is_cpu else buffer.tensor[at : at + nbytes]
    tensors.copy_in(target.tensor, read.at, read.at + nbytes, buffer.address + at, source, target.dtype)
