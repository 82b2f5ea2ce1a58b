"""Snapshots on a local disk: direct I/O past the page cache, durable and exclusive creation, no step through a link.

``LocalStorage`` opens every file relative to its folder without following links below it. Data files are written and read by ``O_DIRECT``
where the file system has it; small files are made whole without a name and linked to it, so that no crash leaves half of one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import time
from typing import TYPE_CHECKING

from expstate import settings
from expstate.errors import (
    ExpstateError,
    ManifestTooLargeError,
    UnsafeFileError,
    UnsafePathError,
)
from expstate.storage.base import FileInfo, FileReader, FileWriter, Storage
from expstate.storage.files import ALIGNMENT, O_DIRECT, LocalReader, LocalWriter, system_errors, write_all, write_durably
from expstate.storage.sharing import is_regular, share

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

_O_TMPFILE: int = getattr(os, "O_TMPFILE", 0)
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_CREATE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_FOLDER_FLAGS = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL, errno.EXDEV, errno.ENOENT}
_RENAME_NOREPLACE = 1
_libc = ctypes.CDLL(None, use_errno=True)


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
        self.alignment = ALIGNMENT if self._direct and O_DIRECT else 1

    @contextlib.contextmanager
    def _folder(self, name: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """The open folder that holds ``name`` and the last part of the name; no link below the snapshot's folder is followed.

        With ``make`` a folder in between that is missing is made.
        """
        *folders, last = name.split("/")
        if any(part in {"", ".", ".."} for part in (*folders, last)) or "\0" in name:
            msg = f"file name {name!r} points outside the snapshot"
            raise UnsafePathError(msg)
        fd = os.open(self.path, _FOLDER_FLAGS)
        try:
            for part in folders:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, dir_fd=fd)
                try:
                    inner = os.open(part, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=fd)
                except NotADirectoryError:
                    msg = f"{part!r} in {self.path!r} is a link, or no folder"
                    raise UnsafeFileError(msg) from None
                os.close(fd)
                fd = inner
            yield fd, last
        finally:
            os.close(fd)

    def prepare(self) -> bool:
        with system_errors(f"making the folder {self.path!r}"):
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
        with system_errors(f"creating {name!r} in {self.path!r}"), self._folder(name, make=True) as (folder, last):
            fd = os.open(last, _CREATE_FLAGS, 0o444, dir_fd=folder)
            try:
                return LocalWriter(fd, f"{self.path}/{name}", size, direct=self._direct)
            except BaseException:
                os.close(fd)
                os.unlink(last, dir_fd=folder)
                raise

    def open_file(self, name: str, *, size: int | None = None) -> FileReader:  # noqa: ARG002 - it is known here
        path = f"{self.path}/{name}"
        with system_errors(f"opening {path!r}"), self._folder(name) as (folder, last):
            fd = os.open(last, _READ_FLAGS, dir_fd=folder)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                msg = f"{path!r} is not a regular file"
                raise UnsafeFileError(msg)
            return LocalReader(fd, name, path, direct=self._direct)

    def create(self, name: str, data: bytes, *, token: str) -> None:
        with system_errors(f"creating {name!r} in {self.path!r}"), self._folder(name) as (folder, last):
            if not self._create_unnamed(folder, last, data):
                self._create_renamed(folder, last, data, token)
            os.fsync(folder)

    def _create_unnamed(self, folder: int, last: str, data: bytes) -> bool:
        """Write a file without a name, then give it one; False where the file system cannot."""
        if not _O_TMPFILE:
            return False
        try:
            fd = os.open(".", _O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o444, dir_fd=folder)
        except OSError as error:
            if error.errno in {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL}:
                return False
            raise
        try:
            write_durably(fd, data)
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
            write_durably(fd, data)
        except BaseException:
            os.unlink(temporary, dir_fd=folder)
            raise
        finally:
            os.close(fd)
        return temporary

    def replace(self, name: str, data: bytes, *, token: str, expected: bytes | None = None) -> None:
        with system_errors(f"replacing {name!r} in {self.path!r}"), self._folder(name) as (folder, last):
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
        with system_errors(f"looking at {name!r} in {self.path!r}"), self._folder(name) as (folder, last):
            found = os.stat(last, dir_fd=folder, follow_symlinks=False)
            if not stat.S_ISREG(found.st_mode):
                msg = f"{self.path}/{name} is not a regular file"
                raise UnsafeFileError(msg)
            return FileInfo(name, found.st_size, found.st_mtime)

    def list(self) -> Iterator[FileInfo]:
        yield from self._list("")
        with contextlib.suppress(FileNotFoundError, UnsafeFileError):  # no such folder, or someone else's link of that name
            yield from self._list("base/")

    def _list(self, prefix: str) -> Sequence[FileInfo]:
        found = []
        with system_errors(f"listing {self.path!r}"), self._folder(f"{prefix}x") as (folder, _), os.scandir(folder) as items:
            for item in items:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    if item.is_file(follow_symlinks=False):
                        status = item.stat(follow_symlinks=False)
                        found.append(FileInfo(prefix + item.name, status.st_size, status.st_mtime))
        return found

    def delete(self, name: str, *, expected: bytes | None = None) -> None:
        with (
            system_errors(f"removing {name!r} from {self.path!r}"),
            contextlib.suppress(FileNotFoundError),
            self._folder(name) as (folder, last),
        ):
            if expected is not None:
                self._expect(folder, name, expected)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(last, dir_fd=folder)
            self._leave(name)

    def _leave(self, name: str) -> None:
        """Remove the folder in between that a file was in, or was to be in, if nothing else is."""
        if "/" in name:
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(f"{self.path}/{name.rpartition('/')[0]}")  # noqa: PTH106 - strings throughout

    def link_file(self, name: str, source: Storage, source_name: str) -> bool:
        if not isinstance(source, LocalStorage):
            return False
        action = f"linking {source_name!r} of {source.path!r} to {name!r} in {self.path!r}"
        with system_errors(action), contextlib.ExitStack() as opened:
            try:
                source_folder, source_last = opened.enter_context(source._folder(source_name))  # noqa: SLF001 - another of this class
            except (FileNotFoundError, UnsafeFileError):
                return False
            if not is_regular(source_folder, source_last):  # before a folder is made for it
                return False
            folder, last = opened.enter_context(self._folder(name, make=True))
            is_shared = share(source_folder, source_last, folder, last)
            if not is_shared:
                self._leave(name)
            return is_shared

    def links(self, names: Sequence[str]) -> dict[str, tuple[Hashable, int]]:
        found: dict[str, tuple[Hashable, int]] = {}
        for name in names:
            with (
                system_errors(f"looking at {name!r} in {self.path!r}"),
                contextlib.suppress(FileNotFoundError, UnsafeFileError),
                self._folder(name) as (folder, last),
            ):
                status = os.stat(last, dir_fd=folder, follow_symlinks=False)
                if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                    found[name] = ((status.st_dev, status.st_ino), status.st_nlink)
        return found

    def flush(self) -> None:
        with system_errors(f"making {self.path!r} durable"):
            _sync_folder(self.path)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                _sync_folder(f"{self.path}/base")

    def remove_folder(self) -> None:
        for folder in (f"{self.path}/base", self.path):
            with contextlib.suppress(OSError):  # missing, or not empty
                os.rmdir(folder)  # noqa: PTH106 - strings throughout

    def walk(self, *, depth: int | None = None, on_error: Callable[[str, ExpstateError], object] | None = None) -> Iterator[Storage]:
        waiting = [(self.path, 0)]
        while waiting:
            path, level = waiting.pop()
            yield LocalStorage(path)
            if level == depth:
                continue
            try:
                with system_errors(f"listing {path!r}"), os.scandir(path) as items:
                    below = sorted((item.path for item in items if item.is_dir(follow_symlinks=False)), reverse=True)
            except FileNotFoundError:
                continue
            except ExpstateError as error:
                if on_error is not None:
                    on_error(path, error)
                continue
            waiting += [(folder, level + 1) for folder in below]

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
            write_all(fd, memoryview(copy.read()), 0)
        os.fsync(fd)
    except BaseException:
        os.unlink(target, dir_fd=folder)
        raise
    finally:
        os.close(fd)
    os.unlink(source, dir_fd=folder)
