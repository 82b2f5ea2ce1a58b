"""What the machine can do at best: raw storage, memory and accelerator transfers, measured with nothing in their way.

Gets a total of bytes, a number of threads or streams and a ``Meter``; what is timed runs within the meter. ``COMPONENTS`` names them.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from blake3 import blake3

from expstate.bench.measure import make_durable
from expstate.bench.plan import MIB, SNAPSHOT
from expstate.state.tensors import memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from expstate.bench.measure import Meter

Item = TypeVar("Item")

PIECE_BYTES = 16 * MIB
_PAGE = 4096
_O_DIRECT: int = getattr(os, "O_DIRECT", 0)
_PINNED_PIECES = 8


@dataclass(frozen=True, slots=True)
class Job:
    """One measurement of a limit.

    Attributes
    ----------
    total_bytes : int
        How much is moved.
    workers : int
        Threads, or streams of the accelerator.
    device : str
        Where the state is.
    folder : Path
        Where files are written.
    kept : Path
        Folder of the raw file that is read.
    start : int
        First byte of it that is read, at the beginning of a page.
    """

    total_bytes: int
    workers: int
    device: str
    folder: Path
    kept: Path
    start: int = 0


def _pieces(start: int, total_bytes: int) -> deque[tuple[int, int]]:
    """First byte and length of every piece; threads take from it what comes next."""
    stop = start + total_bytes
    return deque((first, min(PIECE_BYTES, stop - first)) for first in range(start, stop, PIECE_BYTES))


def take_from(pieces: deque[Item]) -> Iterator[Item]:
    """What comes next, until there is nothing more; many threads take from one queue."""
    with contextlib.suppress(IndexError):
        while True:
            yield pieces.popleft()


class _Memory:
    """Touched host memory that begins at a page; ``view`` is valid as long as this lives."""

    def __init__(self, nbytes: int, *, random: bool = False) -> None:
        words = torch.empty(-(-nbytes // 8) + _PAGE // 8, dtype=torch.int64)
        self._owner = words.random_() if random else words.fill_(1)
        address = words.data_ptr()
        self.view = memory(address + -address % _PAGE, nbytes)


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Do the work in so many threads, each with a number of its own."""
    with ThreadPoolExecutor(count) as pool:
        for result in [pool.submit(work, number) for number in range(count)]:
            result.result()


def _open_direct(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | _O_DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o644)


def _page_up(number: int) -> int:
    return -(-number // _PAGE) * _PAGE


def write(job: Job, meter: Meter) -> None:
    """Direct writes of warm buffers into a preallocated file, flushed to the disk."""
    buffers = [_Memory(PIECE_BYTES, random=True) for _ in range(job.workers)]
    path = job.folder / SNAPSHOT
    pieces = _pieces(0, job.total_bytes)
    with meter:
        fd = _open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, _page_up(job.total_bytes))

            def work(number: int) -> None:
                for offset, length in take_from(pieces):
                    data = buffers[number].view[: _page_up(length)]
                    while data:
                        written = os.pwrite(fd, data, offset)
                        data, offset = data[written:], offset + written  # noqa: PLW2901 - the rest of a short write

            in_threads(job.workers, work)
            os.ftruncate(fd, job.total_bytes)
        finally:
            os.close(fd)
        make_durable(job.folder)


def _read_direct(job: Job, meter: Meter, start: int, total_bytes: int) -> None:
    buffers = [_Memory(PIECE_BYTES) for _ in range(job.workers)]
    pieces = _pieces(start, total_bytes)
    with meter:
        fd = _open_direct(job.kept / SNAPSHOT, os.O_RDONLY)
        try:

            def work(number: int) -> None:
                for offset, length in take_from(pieces):
                    _read_all(fd, buffers[number].view[: _page_up(length)], offset, length)

            in_threads(job.workers, work)
        finally:
            os.close(fd)


def _read_all(fd: int, target: memoryview, offset: int, length: int) -> None:
    done = 0
    while done < length:
        count = os.preadv(fd, [target[done:]], offset + done)
        if count == 0:
            msg = f"the raw file ends at byte {offset + done}, expected {offset + length}"
            raise EOFError(msg)
        done += count


def read(job: Job, meter: Meter) -> None:
    """Direct reads into warm buffers."""
    _read_direct(job, meter, job.start, job.total_bytes)


def read_one(job: Job, meter: Meter) -> None:
    """One direct read of 1 MiB in the middle of the file."""
    _read_direct(job, meter, job.total_bytes // 2 // _PAGE * _PAGE, min(MIB, job.total_bytes // 2))


def read_cached(job: Job, meter: Meter) -> None:
    """Reads from the page cache into warm memory of the state's size."""
    _read_cached(job, meter, lambda _piece: None)


def read_cached_verified(job: Job, meter: Meter) -> None:
    """The same, with the BLAKE3 of the same bytes."""
    _read_cached(job, meter, lambda piece: blake3(piece).digest())


def _read_cached(job: Job, meter: Meter, digest: Callable[[memoryview], object]) -> None:
    target = _Memory(job.total_bytes)
    pieces = _pieces(0, job.total_bytes)
    with meter:
        fd = os.open(job.kept / SNAPSHOT, os.O_RDONLY)
        try:

            def work(_number: int) -> None:
                for offset, length in take_from(pieces):
                    piece = target.view[offset : offset + length]
                    _read_all(fd, piece, offset, length)
                    digest(piece)

            in_threads(job.workers, work)
        finally:
            os.close(fd)


def digest(job: Job, meter: Meter) -> None:
    """BLAKE3 of warm host memory."""
    source = _Memory(job.total_bytes)
    pieces = _pieces(0, job.total_bytes)

    def work(_number: int) -> None:
        for offset, length in take_from(pieces):
            blake3(source.view[offset : offset + length]).digest()

    with meter:
        in_threads(job.workers, work)


def copy(job: Job, meter: Meter) -> None:
    """``copy_`` from host memory into warm host memory."""
    source = torch.empty(job.total_bytes, dtype=torch.uint8).fill_(1)
    target = torch.empty(job.total_bytes, dtype=torch.uint8).fill_(2)
    copy_memory([(source, target)], job.workers, meter)


def copy_memory(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], workers: int, meter: Meter) -> None:
    """Copies of flat bytes in host memory from the first to the second of each pair, by so many threads."""
    pieces = deque((source, target, *piece) for source, target in pairs for piece in _pieces(0, source.numel()))
    # The threads here are the parallelism; PyTorch's own would come on top.
    torch.set_num_threads(1)

    def work(_number: int) -> None:
        for source, target, offset, length in take_from(pieces):
            target[offset : offset + length].copy_(source[offset : offset + length])

    with meter:
        in_threads(workers, work)


def digest_blocks(sources: Sequence[torch.Tensor], workers: int, meter: Meter) -> None:
    """BLAKE3 of flat bytes in host memory, of each block of 1 MiB by itself, by so many threads."""
    views = [memory(source.data_ptr(), source.numel()) for source in sources]
    blocks = deque(view[start : start + MIB] for view in views for start in range(0, len(view), MIB))

    def work(_number: int) -> None:
        for block in take_from(blocks):
            blake3(block).digest()

    with meter:
        in_threads(workers, work)


def _on_streams(job: Job, meter: Meter, move: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
    """Move every piece of device memory to or from pinned memory, the pieces dealt to the streams in turn."""
    device: Any = torch.get_device_module(job.device)
    state = torch.empty(job.total_bytes, dtype=torch.uint8, device=job.device).fill_(1)
    pinned = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True).fill_(2) for _ in range(_PINNED_PIECES)]
    streams = [device.Stream() for _ in range(job.workers)]
    move(state[:PIECE_BYTES], pinned[0][: min(PIECE_BYTES, job.total_bytes)])
    with meter:
        for number, (offset, length) in enumerate(_pieces(0, job.total_bytes)):
            with device.stream(streams[number % job.workers]):
                move(state[offset : offset + length], pinned[number % _PINNED_PIECES][:length])


def to_host(job: Job, meter: Meter) -> None:
    """Transfers from the accelerator to pinned host memory."""
    _on_streams(job, meter, lambda state, pinned: pinned.copy_(state, non_blocking=True))


def to_device(job: Job, meter: Meter) -> None:
    """Transfers from pinned host memory to the accelerator."""
    _on_streams(job, meter, lambda state, pinned: state.copy_(pinned, non_blocking=True))


def copy_device(job: Job, meter: Meter) -> None:
    """A copy of the state's size on the accelerator."""
    source = torch.empty(job.total_bytes, dtype=torch.uint8, device=job.device).fill_(1)
    target = torch.empty(job.total_bytes, dtype=torch.uint8, device=job.device).fill_(2)
    target.copy_(source)
    with meter:
        target.copy_(source)


COMPONENTS: dict[str, Callable[[Job, Meter], None]] = {
    component.__name__: component
    for component in (write, read, read_one, read_cached, read_cached_verified, digest, copy, to_host, to_device, copy_device)
}
