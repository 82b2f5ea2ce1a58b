"""Snapshots on a local disk: direct I/O past the page cache, durable and exclusive creation, no step through a link.

``LocalStorage`` opens every file relative to its folder without following links below it. Data files are written and read by ``O_DIRECT``
where the file system has it; small files are made whole without a name and linked to it, so that no crash leaves half of one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import stat
import threading
import time
from typing import TYPE_CHECKING

from expstate import settings
from expstate.errors import (
    ManifestTooLargeError,
    SnapshotCorruptError,
    SnapshotWriteError,
    StorageError,
    UnsafeFileError,
    UnsafePathError,
    from_os_error,
)
from expstate.storage.base import FileInfo, FileReader, FileWriter, Storage

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_ALIGNMENT = 4096
_O_DIRECT: int = getattr(os, "O_DIRECT", 0)
_O_TMPFILE: int = getattr(os, "O_TMPFILE", 0)
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_CREATE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_FOLDER_FLAGS = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL, errno.EXDEV, errno.ENOENT}
_RENAME_NOREPLACE = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _align_up(number: int) -> int:
    return -(-number // _ALIGNMENT) * _ALIGNMENT


@contextlib.contextmanager
def _system_errors(action: str) -> Iterator[None]:
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


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        if written == 0:
            msg = f"the file system wrote 0 of {len(data)} bytes at offset {offset}"
            raise SnapshotWriteError(msg)
        data = data[written:]
        offset += written


class _LocalWriter(FileWriter):
    def __init__(self, fd: int, path: str, size: int, *, direct: bool) -> None:
        self._fd = fd
        self._path = path
        self._size = size
        self._direct = direct and _set_direct(fd, on=True)
        self._lock = threading.Lock()
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
        with _system_errors(f"writing {self._path!r}"):
            whole = len(data) // _ALIGNMENT * _ALIGNMENT if self._direct else len(data)
            try:
                _write_all(self._fd, data[:whole], offset)
                if whole < len(data):
                    self._write_last(offset + whole, data[whole:])
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                # The file system took the flag and not the writes: through the page cache then.
                with self._lock:
                    self._direct = False
                    _set_direct(self._fd, on=False)
                _write_all(self._fd, data, offset)

    def _write_last(self, offset: int, data: memoryview) -> None:
        # The last part of a page is written as a whole page; ``finish`` cuts the file to its size.
        with mmap.mmap(-1, _ALIGNMENT) as page:
            page[: len(data)] = data
            with memoryview(page) as view:
                _write_all(self._fd, view, offset)

    def finish(self) -> Sequence[tuple[int, int]]:
        with _system_errors(f"making {self._path!r} durable"):
            try:
                if self._direct:
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
            os.close(fd)


def _set_direct(fd: int, *, on: bool) -> bool:
    if not _O_DIRECT or fcntl is None:
        return False
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | _O_DIRECT if on else flags & ~_O_DIRECT)
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


class _LocalReader(FileReader):
    def __init__(self, fd: int, name: str, path: str, *, direct: bool) -> None:
        self._fd = fd
        self._path = path
        self._direct_fd = -1
        self._lock = threading.Lock()
        self.name = name
        self.size = os.fstat(fd).st_size
        self.alignment = _ALIGNMENT if direct and _O_DIRECT and self._open_direct() else 1

    def _open_direct(self) -> bool:
        with contextlib.suppress(OSError):
            self._direct_fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | _O_DIRECT | os.O_CLOEXEC)
        return self._direct_fd >= 0

    def read_into(self, offset: int, target: memoryview) -> None:
        wanted = min(len(target), self.size - offset)
        direct = self._direct_fd >= 0 and offset % _ALIGNMENT == 0 and len(target) % _ALIGNMENT == 0
        with _system_errors(f"reading {self._path!r}"):
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
                direct = direct and done % _ALIGNMENT == 0

    def is_cached(self, offset: int, length: int) -> bool:
        first = offset // _ALIGNMENT * _ALIGNMENT
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


class LocalStorage(Storage):
    """A snapshot's folder on a disk that the operating system mounts.

    Parameters
    ----------
    path : str
        The folder; need not exist yet.
    """

    def __init__(self, path: str) -> None:
        now = settings.current()
        # Absolute from here on: a later chdir must not move a snapshot.
        self.path = os.path.abspath(path)  # noqa: PTH100 - keeps links in the path as they are
        self.url = self.path
        self.data_file_bytes = now.data_file_bytes
        self._direct = now.direct_io
        self.alignment = _ALIGNMENT if self._direct and _O_DIRECT else 1

    @contextlib.contextmanager
    def _folder(self, name: str) -> Iterator[tuple[int, str]]:
        """The open folder that holds ``name`` and the last part of the name; no link below the snapshot's folder is followed."""
        *folders, last = name.split("/")
        if any(part in {"", ".", ".."} for part in (*folders, last)) or "\0" in name:
            msg = f"file name {name!r} points outside the snapshot"
            raise UnsafePathError(msg)
        fd = os.open(self.path, _FOLDER_FLAGS)
        try:
            for part in folders:
                inner = os.open(part, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=fd)
                os.close(fd)
                fd = inner
            yield fd, last
        finally:
            os.close(fd)

    def prepare(self) -> bool:
        with _system_errors(f"making the folder {self.path!r}"):
            missing = []
            path = self.path
            while not os.path.isdir(path):  # noqa: PTH112 - strings throughout
                missing.append(path)
                path = os.path.dirname(path)  # noqa: PTH120 - strings throughout
            for folder in reversed(missing):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder)  # noqa: PTH102 - strings throughout
                _sync_folder(os.path.dirname(folder))  # noqa: PTH120 - strings throughout
            if not os.path.isdir(self.path):  # noqa: PTH112 - strings throughout
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), self.path)
        return bool(missing)

    def create_file(self, name: str, size: int) -> FileWriter:
        with _system_errors(f"creating {name!r} in {self.path!r}"), self._folder(name) as (folder, last):
            fd = os.open(last, _CREATE_FLAGS, 0o444, dir_fd=folder)
            try:
                return _LocalWriter(fd, f"{self.path}/{name}", size, direct=self._direct)
            except BaseException:
                os.close(fd)
                os.unlink(last, dir_fd=folder)
                raise

    def open_file(self, name: str) -> FileReader:
        path = f"{self.path}/{name}"
        with _system_errors(f"opening {path!r}"), self._folder(name) as (folder, last):
            fd = os.open(last, _READ_FLAGS, dir_fd=folder)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                msg = f"{path!r} is not a regular file"
                raise UnsafeFileError(msg)
            return _LocalReader(fd, name, path, direct=self._direct)

    def create(self, name: str, data: bytes, *, token: str) -> None:
        with _system_errors(f"creating {name!r} in {self.path!r}"), self._folder(name) as (folder, last):
            if not self._create_unnamed(folder, last, data):
                self._create_renamed(folder, last, data, token)
            os.fsync(folder)

    def _create_unnamed(self, folder: int, last: str, data: bytes) -> bool:
        """Write a file without a name, then give it one; False where the file system cannot."""
        if not _O_TMPFILE:
            return False
        try:
            fd = os.open(".", _O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o444, dir_fd=folder)
        except OSError as error:
            if error.errno in {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL}:
                return False
            raise
        try:
            _write_all(fd, memoryview(data), 0)
            os.fsync(fd)
            os.link(f"/proc/self/fd/{fd}", last, dst_dir_fd=folder, follow_symlinks=True)
        except OSError as error:
            if error.errno in _NO_LINKS:
                return False
            raise
        finally:
            os.close(fd)
        return True

    def _create_renamed(self, folder: int, last: str, data: bytes, token: str) -> None:
        """Write under a temporary name, then rename unless the name is taken."""
        temporary = self._write_temporary(folder, last, data, token)
        try:
            try:
                os.link(temporary, last, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                _rename_exclusive(folder, temporary, last)
                return
        except BaseException:
            os.unlink(temporary, dir_fd=folder)
            raise
        os.unlink(temporary, dir_fd=folder)

    @staticmethod
    def _write_temporary(folder: int, last: str, data: bytes, token: str) -> str:
        temporary = f".{last}.{token}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
        fd = os.open(temporary, _CREATE_FLAGS, 0o444, dir_fd=folder)
        try:
            _write_all(fd, memoryview(data), 0)
            os.fsync(fd)
        except BaseException:
            os.unlink(temporary, dir_fd=folder)
            raise
        finally:
            os.close(fd)
        return temporary

    def replace(self, name: str, data: bytes, *, token: str, expected: bytes | None = None) -> None:
        with _system_errors(f"replacing {name!r} in {self.path!r}"), self._folder(name) as (folder, last):
            temporary = self._write_temporary(folder, last, data, token)
            try:
                if expected is not None:
                    self._expect(folder, name, expected)
                os.rename(temporary, last, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)
                raise
            os.fsync(folder)

    def _expect(self, folder: int, name: str, expected: bytes) -> None:
        """See that a file holds these bytes, and go on doing so until the folder is closed, which lets go of the lock."""
        if fcntl is not None:
            fcntl.flock(folder, fcntl.LOCK_EX)
        try:
            found = self.read(name)
        except FileNotFoundError:
            found = None
        if found != expected:
            raise FileExistsError(errno.EEXIST, "it was changed by someone else meanwhile", name)

    def read(self, name: str, *, limit: int | None = None) -> bytes:
        with self.open_file(name) as reader:
            if limit is not None and reader.size > limit:
                msg = f"{self.path}/{name} has {reader.size:,} bytes, more than the {limit:,} that are read"
                raise ManifestTooLargeError(msg)
            data = bytearray(reader.size)
            reader.read_into(0, memoryview(data))
            return bytes(data)

    def stat(self, name: str) -> FileInfo:
        with _system_errors(f"looking at {name!r} in {self.path!r}"), self._folder(name) as (folder, last):
            found = os.stat(last, dir_fd=folder, follow_symlinks=False)
            if not stat.S_ISREG(found.st_mode):
                msg = f"{self.path}/{name} is not a regular file"
                raise UnsafeFileError(msg)
            return FileInfo(name, found.st_size, found.st_mtime)

    def list(self) -> Iterator[FileInfo]:
        for prefix in ("", "base/"):
            try:
                with _system_errors(f"listing {self.path!r}"), self._folder(f"{prefix}x") as (folder, _), os.scandir(folder) as found:
                    for item in found:
                        if item.is_file(follow_symlinks=False):
                            status = item.stat(follow_symlinks=False)
                            yield FileInfo(prefix + item.name, status.st_size, status.st_mtime)
            except FileNotFoundError:  # noqa: PERF203 - two rounds
                if not prefix:
                    raise

    def delete(self, name: str, *, expected: bytes | None = None) -> None:
        with (
            _system_errors(f"removing {name!r} from {self.path!r}"),
            contextlib.suppress(FileNotFoundError),
            self._folder(name) as (folder, last),
        ):
            if expected is not None:
                self._expect(folder, name, expected)
            os.unlink(last, dir_fd=folder)

    def flush(self) -> None:
        with _system_errors(f"making {self.path!r} durable"):
            _sync_folder(self.path)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                _sync_folder(f"{self.path}/base")

    def remove_folder(self) -> None:
        for folder in (f"{self.path}/base", self.path):
            with contextlib.suppress(OSError):  # missing, or not empty
                os.rmdir(folder)  # noqa: PTH106 - strings throughout

    def clock(self) -> float:
        # The stamp of a new file without a name: on a network disk it is the server's clock that counts.
        try:
            fd = os.open(self.path, _O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600) if _O_TMPFILE else -1
        except OSError:
            fd = -1
        if fd < 0:
            return time.time()
        try:
            return os.fstat(fd).st_mtime
        finally:
            os.close(fd)


def _sync_folder(path: str) -> None:
    fd = os.open(path, _FOLDER_FLAGS)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _rename_exclusive(folder: int, source: str, target: str) -> None:
    rename = getattr(_libc, "renameat2", None)
    if rename is not None and rename(folder, os.fsencode(source), folder, os.fsencode(target), _RENAME_NOREPLACE) == 0:
        return
    number = ctypes.get_errno() if rename is not None else errno.ENOSYS
    if number not in {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}:
        raise OSError(number, os.strerror(number), target)
    # Neither links nor exclusive renames: create under the name itself. A crash leaves it torn, which readers see by its missing digest.
    fd = os.open(target, _CREATE_FLAGS, 0o444, dir_fd=folder)
    try:
        with open(os.open(source, _READ_FLAGS, dir_fd=folder), "rb") as copy:
            _write_all(fd, memoryview(copy.read()), 0)
        os.fsync(fd)
    except BaseException:
        os.unlink(target, dir_fd=folder)
        raise
    finally:
        os.close(fd)
    os.unlink(source, dir_fd=folder)
