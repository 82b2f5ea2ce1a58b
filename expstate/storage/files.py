"""Open files of a local disk: written and read past the page cache where the file system lets them, durable when they are finished.

``LocalWriter`` and ``LocalReader`` get file descriptors that ``local`` has opened; what the system raises becomes an error of ours here.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from typing import TYPE_CHECKING

from expstate.errors import (
    SnapshotCorruptError,
    SnapshotWriteError,
    StorageError,
    UnsafeFileError,
    from_os_error,
)
from expstate.storage.base import FileReader, FileWriter

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ALIGNMENT = 4096
O_DIRECT: int = getattr(os, "O_DIRECT", 0)
_libc = ctypes.CDLL(None, use_errno=True)


def _align_up(number: int) -> int:
    return -(-number // ALIGNMENT) * ALIGNMENT


@contextlib.contextmanager
def system_errors(action: str) -> Iterator[None]:
    """Turn the system's errors into ours, but for those that are part of the interface."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, StorageError):
        raise
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO}:
            msg = f"{action} failed: it is a link or a pipe, and only regular files are read"
            raise UnsafeFileError(msg) from error
        raise from_os_error(error, action) from error


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write until nothing is left; the system may take less at once."""
    while data:
        written = os.pwrite(fd, data, offset)
        if written == 0:
            msg = f"the file system wrote 0 of {len(data)} bytes at offset {offset}"
            raise SnapshotWriteError(msg)
        data = data[written:]
        offset += written


def write_durably(fd: int, data: bytes) -> None:
    """Write a new small file, see that it is there, and make it durable."""
    write_all(fd, memoryview(data), 0)
    os.fsync(fd)
    size = os.fstat(fd).st_size
    if size != len(data) or any(os.pread(fd, stop - start, start) != data[start:stop] for start, stop in _holes(fd, size)):
        msg = f"the file system holds {size:,} bytes, or others, after {len(data):,} were written: it lost a write"
        raise SnapshotWriteError(msg)


class LocalWriter(FileWriter):
    """A data file that was just created.

    Parameters
    ----------
    fd : int
        Open for reading and writing; closed by ``finish`` or ``abort``.
    path : str
        For messages.
    size : int
        Bytes that the file will have.
    direct : bool
        Whether to try to go past the page cache.
    """

    def __init__(self, fd: int, path: str, size: int, *, direct: bool) -> None:
        self._fd = fd
        self._path = path
        self._size = size
        self._direct = direct and _set_direct(fd, on=True)
        self._lock = threading.Lock()
        self._ends_on_page = self._direct
        if self._direct:
            self._allocate()

    def _allocate(self) -> None:
        # Tells at once that the disk is too small, and lets several threads write at the same time without extending the file.
        if self._size == 0:
            return
        try:
            os.posix_fallocate(self._fd, 0, _align_up(self._size))
        except OSError as error:
            if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
                free = os.fstatvfs(self._fd)
                raise from_os_error(
                    error, f"allocating {self._size:,} bytes for {self._path!r} ({free.f_bavail * free.f_frsize:,} bytes free)"
                ) from error

    def write(self, offset: int, data: memoryview) -> None:
        with system_errors(f"writing {self._path!r}"):
            whole = len(data) // ALIGNMENT * ALIGNMENT if self._direct else len(data)
            try:
                write_all(self._fd, data[:whole], offset)
                if whole < len(data):
                    self._write_last(offset + whole, data[whole:])
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                # The file system took the flag and not the writes: through the page cache then.
                with self._lock:
                    self._direct = False
                    _set_direct(self._fd, on=False)
                write_all(self._fd, data, offset)

    def _write_last(self, offset: int, data: memoryview) -> None:
        # The last part of a page is written as a whole page; ``finish`` cuts the file to its size.
        with mmap.mmap(-1, ALIGNMENT) as page:
            page[: len(data)] = data
            with memoryview(page) as view:
                write_all(self._fd, view, offset)

    def finish(self) -> Sequence[tuple[int, int]]:
        with system_errors(f"making {self._path!r} durable"):
            try:
                if self._ends_on_page:
                    os.ftruncate(self._fd, self._size)
                os.fsync(self._fd)
                size = os.fstat(self._fd).st_size
                if size != self._size:
                    msg = f"{self._path!r} has {size:,} bytes after {self._size:,} were written"
                    raise SnapshotWriteError(msg)
                return _holes(self._fd, size)
            finally:
                self.abort()

    def abort(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with contextlib.suppress(OSError):  # what counts was said by fsync
                os.close(fd)


def _set_direct(fd: int, *, on: bool) -> bool:
    if not O_DIRECT or fcntl is None:
        return False
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | O_DIRECT if on else flags & ~O_DIRECT)
    except OSError:
        return False
    return on


def _holes(fd: int, size: int) -> list[tuple[int, int]]:
    """Ranges without data: an ignored write leaves one, and so does a file system that stores zeros as holes."""
    if not hasattr(os, "SEEK_HOLE"):
        return []
    found = []
    position = 0
    try:
        while position < size:
            hole = os.lseek(fd, position, os.SEEK_HOLE)
            if hole >= size:
                break
            try:
                position = os.lseek(fd, hole, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                position = size
            found.append((hole, position))
    except OSError:
        return found  # not supported here
    return found


class _CacheRange(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _CacheStat(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted"))


_SYS_CACHESTAT = 451  # one number on every architecture


class LocalReader(FileReader):
    """A regular file that was just opened.

    Parameters
    ----------
    fd : int
        Open for reading; closed by ``close``.
    name, path : str
        Within the folder, and for messages.
    direct : bool
        Whether to try to go past the page cache.
    """

    def __init__(self, fd: int, name: str, path: str, *, direct: bool) -> None:
        self._fd = fd
        self._path = path
        self._direct_fd = -1
        self._lock = threading.Lock()
        self.name = name
        self.size = os.fstat(fd).st_size
        self.alignment = ALIGNMENT if direct and O_DIRECT and self._open_direct() else 1

    def _open_direct(self) -> bool:
        with contextlib.suppress(OSError):
            self._direct_fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | O_DIRECT | os.O_CLOEXEC)
        return self._direct_fd >= 0

    def read_into(self, offset: int, target: memoryview) -> None:
        self._read(offset, target, direct=self._direct_fd >= 0 and offset % ALIGNMENT == 0 and len(target) % ALIGNMENT == 0)

    def read_cached_into(self, offset: int, target: memoryview) -> None:
        self._read(offset, target, direct=False)

    def _read(self, offset: int, target: memoryview, *, direct: bool) -> None:
        wanted = min(len(target), self.size - offset)
        with system_errors(f"reading {self._path!r}"):
            done = 0
            while done < wanted:
                try:
                    count = os.preadv(self._direct_fd if direct else self._fd, [target[done:]], offset + done)
                except OSError as error:
                    if error.errno != errno.EINVAL or not direct:
                        raise
                    direct = False  # the address, or what is left, is not aligned
                    continue
                if count == 0:
                    msg = f"file {self.name!r} ends after {offset + done:,} bytes, and {offset + wanted:,} are needed"
                    raise SnapshotCorruptError(msg)
                done += count
                direct = direct and done % ALIGNMENT == 0

    def is_cached(self, offset: int, length: int) -> bool:
        first = offset // ALIGNMENT * ALIGNMENT
        last = min(self.size, offset + length)
        asked, found = _CacheRange(first, last - first), _CacheStat()
        if _libc.syscall(_SYS_CACHESTAT, self._fd, ctypes.byref(asked), ctypes.byref(found), 0) == 0:
            return bool(found.cached * mmap.PAGESIZE >= last - first)
        return self._has_cached_bytes(first, last)

    def _has_cached_bytes(self, first: int, last: int) -> bool:
        # Kernels before 6.5: ask for single bytes without waiting for the disk.
        nowait = getattr(os, "RWF_NOWAIT", None)
        if nowait is None:
            return False
        try:
            return all(os.preadv(self._fd, [bytearray(1)], at, nowait) == 1 for at in (first, (first + last) // 2, last - 1))
        except OSError:
            return False

    def close(self) -> None:
        with self._lock:
            for fd in (self._fd, self._direct_fd):
                if fd >= 0:
                    os.close(fd)
            self._fd = self._direct_fd = -1

    def __del__(self) -> None:
        self.close()
