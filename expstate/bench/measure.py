"""What one operation costs: wall and processor time, peak memory of the process; and files put into or out of the page cache.

Gets a ``with`` block or a folder; hands on seconds and bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import stat
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from expstate.bench.plan import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from typing_extensions import Self

_STATUS = Path("/proc/self/status")
_RESET_PEAK = Path("/proc/self/clear_refs")
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_SAMPLE_SECONDS = 0.005
_COLD_SHARE = 0.01
_STAT_BLOCK_BYTES = 512
_libc = ctypes.CDLL(None, use_errno=True)


def _memory_counters() -> dict[str, int]:
    """``VmHWM``, ``VmRSS``, ``RssAnon``, ``RssFile`` and ``RssShmem`` in bytes; empty where the system does not tell."""
    with contextlib.suppress(OSError):
        lines = (line.split() for line in _STATUS.read_text().splitlines())
        return {words[0][:-1]: int(words[1]) * KIB for words in lines if words[0].startswith(("VmHWM", "VmRSS", "Rss"))}
    return {}


class _Sampler(threading.Thread):
    """The highest memory of the process without mapped files, sampled."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._stop_now = threading.Event()
        self.peak = 0

    @staticmethod
    def now() -> int:
        counters = _memory_counters()
        return counters.get("RssAnon", 0) + counters.get("RssShmem", 0)

    def run(self) -> None:
        while not self._stop_now.wait(_SAMPLE_SECONDS):
            self.peak = max(self.peak, self.now())

    def stop(self) -> None:
        self._stop_now.set()
        self.join()
        self.peak = max(self.peak, self.now())


class Meter:
    """Measures a ``with`` block.

    Parameters
    ----------
    maps_files : bool
        Whether what is measured maps files, whose pages are page cache: then memory is sampled, else the kernel's peak is taken.
    synchronize : callable, optional
        Waits until the accelerator is idle.

    Attributes
    ----------
    seconds, cpu_seconds : float
        Wall time; user and system time of the process.
    peak_extra_bytes : int
        Highest resident memory less that at the beginning; mapped files do not count.

    Examples
    --------
    >>> with Meter() as meter:
    ...     block = bytearray(b"x") * 2**24
    >>> meter.seconds > 0, meter.peak_extra_bytes >= 2**23
    (True, True)
    """

    def __init__(self, *, maps_files: bool = False, synchronize: Callable[[], None] | None = None) -> None:
        self._maps_files = maps_files
        self._synchronize = synchronize or (lambda: None)
        self._sampler: _Sampler | None = None
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self.peak_extra_bytes = 0

    def __enter__(self) -> Self:
        gc.collect()
        if hasattr(_libc, "malloc_trim"):
            # Else freed memory that the allocator keeps would hide what the operation allocates.
            _libc.malloc_trim(0)
        self._synchronize()
        try:
            _RESET_PEAK.write_text("5")
        except OSError:
            self._maps_files = True
        self._before = _memory_counters()
        if self._maps_files:
            self._before_sampled = _Sampler.now()
            self._sampler = _Sampler()
            self._sampler.start()
        self._cpu = time.process_time()
        self._start = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._synchronize()
        self.seconds = time.perf_counter() - self._start
        self.cpu_seconds = time.process_time() - self._cpu
        if self._sampler is not None:
            self._sampler.stop()
            self.peak_extra_bytes = max(0, self._sampler.peak - self._before_sampled)
            return
        after = _memory_counters()
        # Code of libraries that is touched for the first time is page cache too.
        mapped = max(0, after.get("RssFile", 0) - self._before.get("RssFile", 0))
        self.peak_extra_bytes = max(0, after.get("VmHWM", 0) - self._before.get("VmRSS", 0) - mapped)


def _files(folder: Path) -> Iterator[tuple[int, int]]:
    """Descriptor and size of every file below a folder that is not empty."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            fd = os.open(path, os.O_RDONLY)
            try:
                size = os.fstat(fd).st_size
                if size:
                    yield fd, size
            finally:
                os.close(fd)


def _cached_pages(fd: int, size: int) -> int:
    vector = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    # Private and writable: ctypes takes addresses of writable memory only, and nothing is written.
    with mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        failed = _libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), vector)
        del first
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in bytes(vector))


def cached_bytes(folder: Path) -> int:
    """Bytes of the files below a folder that are in the page cache, in whole pages."""
    return sum(_cached_pages(fd, size) for fd, size in _files(folder)) * mmap.PAGESIZE


def _inodes(folder: Path) -> dict[tuple[int, int], os.stat_result]:
    """The files and folders below a folder, each once however many names it has."""
    found = (path.lstat() for path in folder.rglob("*"))
    return {(status.st_dev, status.st_ino): status for status in found}


def bytes_of_files(folder: Path, *others: Path) -> int:
    """Bytes of the files below a folder, but for those that are below one of the others too, under whatever name."""
    elsewhere = {inode for other in others for inode in _inodes(other)}
    return sum(status.st_size for inode, status in _inodes(folder).items() if stat.S_ISREG(status.st_mode) and inode not in elsewhere)


def disk_usage(folder: Path) -> int:
    """Bytes that the files and folders below a folder take up on the disk, as ``du`` counts them."""
    return sum(status.st_blocks * _STAT_BLOCK_BYTES for status in _inodes(folder).values())


def make_durable(folder: Path) -> None:
    """Flush every file below a folder, and the folders' names, to the disk."""
    for fd, _size in _files(folder):
        os.fsync(fd)
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def evict(folder: Path) -> int:
    """Put the files below a folder out of the page cache.

    Returns
    -------
    int
        Bytes that stayed in it: 0 when all is well.
    """
    if not hasattr(os, "posix_fadvise"):
        return sum(size for _, size in _files(folder))
    total = 0
    for fd, size in _files(folder):
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        total += size
    left = cached_bytes(folder)
    if left > _COLD_SHARE * total:
        with contextlib.suppress(OSError):
            _DROP_CACHES.write_text("1")
        left = cached_bytes(folder)
    return left


def warm(folder: Path) -> None:
    """Put the files below a folder into the page cache."""
    buffer = memoryview(bytearray(MIB))
    for fd, size in _files(folder):
        for offset in range(0, size, MIB):
            os.preadv(fd, [buffer], offset)
