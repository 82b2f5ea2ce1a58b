"""``ram://``: snapshots in the memory of this process, for copies that need not outlive it: what is kept for an undo.

A folder is there until it is forgotten or removed. Data files lie in pages of their own, so that reads and writes are copies of memory.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import mmap
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from expstate import settings
from expstate.errors import InvalidArgumentError, ManifestTooLargeError, NoSpaceError, SnapshotCorruptError, UnsafePathError
from expstate.storage.base import FileInfo, FileReader, FileWriter, Storage
from expstate.storage.registry import register

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping, Sequence


class _File:
    """One file: its bytes, and when they were put there."""

    def __init__(self, name: str, data: memoryview) -> None:
        self.info = FileInfo(name, len(data), time.time())
        self.data = data


_folders: dict[str, dict[str, _File]] = {}
_lock = threading.Lock()


def forget(name: str) -> None:
    """Let go of everything in ``ram://NAME``; its memory is free when nobody reads it any more."""
    with _lock:
        _folders.pop(name, None)


def nbytes(name: str) -> int:
    """Bytes of all files in ``ram://NAME``; 0 if there is no such folder.

    >>> nbytes("nowhere")
    0
    """
    with _lock:
        return sum(file.info.size for file in _folders.get(name, {}).values())


def _pages(size: int) -> memoryview:
    """New memory of so many bytes that begins on a page, and is this process's alone: a forked child has a copy."""
    pages = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without it
            pages.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(pages)[:size]


def _move(target: memoryview, source: memoryview) -> None:
    """Copy all of ``source`` to ``target``, without the interpreter's lock where that is possible."""
    if source.readonly or not source:
        target[:] = source
    else:
        at, from_ = ((ctypes.c_ubyte * len(view)).from_buffer(view) for view in (target, source))
        ctypes.memmove(at, from_, len(source))


class _MemoryWriter(FileWriter):
    def __init__(self, data: memoryview) -> None:
        self._data = data

    def write(self, offset: int, data: memoryview) -> None:
        _move(self._data[offset : offset + len(data)], data)

    def finish(self) -> Sequence[tuple[int, int]]:
        return ()

    def abort(self) -> None:
        pass


class _MemoryReader(FileReader):
    def __init__(self, name: str, data: memoryview) -> None:
        self.name = name
        self.size = len(data)
        self._data = data

    def read_into(self, offset: int, target: memoryview) -> None:
        if offset > self.size:
            msg = f"file {self.name!r} ends after {self.size:,} bytes, before byte {offset:,}"
            raise SnapshotCorruptError(msg)
        part = self._data[offset : offset + len(target)]
        _move(target[: len(part)], part)

    def is_cached(self, offset: int, length: int) -> bool:  # noqa: ARG002 - all of it is
        return True

    def close(self) -> None:
        pass


class MemoryStorage(Storage):
    """A folder in the memory of this process; ``ram://NAME`` once this module is imported.

    It is for copies of live state that are kept for a while, such as what a restore has overwritten. Nothing in it is durable: it ends with
    the process, and no other process sees it.

    Parameters
    ----------
    path : str
        The name of the folder. Storages of one name share what is in it.

    Examples
    --------
    >>> from expstate import Snapshot, StateDict
    >>> snapshot = Snapshot.take("ram://doctest", {"progress": StateDict(step=3)})
    >>> snapshot.read_object("progress/step")
    3
    >>> forget("doctest")
    """

    def __init__(self, path: str) -> None:
        self.url = f"ram://{path}"
        self.data_file_bytes = settings.current().data_file_bytes
        self._path = path

    def _folder(self, name: str) -> dict[str, _File]:
        """The files of the folder, if a file may have this name; to be asked for, and used, under the lock."""
        if any(part in {"", ".", ".."} for part in name.split("/")) or "\0" in name:
            msg = f"file name {name!r} points outside the snapshot"
            raise UnsafePathError(msg)
        folder = _folders.get(self._path)
        if folder is None:
            raise FileNotFoundError(name)
        return folder

    def _file(self, name: str) -> _File:
        with _lock:
            found = self._folder(name).get(name)
        if found is None:
            raise FileNotFoundError(name)
        return found

    def create_file(self, name: str, size: int) -> FileWriter:
        with _lock:
            folder = self._folder(name)
            if name in folder:
                raise FileExistsError(name)
            try:
                data = _pages(size)
            except (OSError, OverflowError) as error:
                msg = f"creating {name!r} in {self.url!r} failed: there is no memory for its {size:,} bytes"
                raise NoSpaceError(msg) from error
            folder[name] = _File(name, data)
        return _MemoryWriter(data)

    def open_file(self, name: str, *, size: int | None = None) -> FileReader:  # noqa: ARG002 - it is known here
        return _MemoryReader(name, self._file(name).data)

    def create(self, name: str, data: bytes, *, token: str) -> None:  # noqa: ARG002 - no temporary file is needed
        with _lock:
            folder = self._folder(name)
            if name in folder:
                raise FileExistsError(name)
            folder[name] = _File(name, memoryview(bytes(data)))

    def replace(self, name: str, data: bytes, *, token: str, expected: bytes | None = None) -> None:  # noqa: ARG002 - as for create
        with _lock:
            folder = self._folder(name)
            _expect(folder, name, expected)
            folder[name] = _File(name, memoryview(bytes(data)))

    def read(self, name: str, *, limit: int | None = None) -> bytes:
        data = self._file(name).data
        if limit is not None and len(data) > limit:
            msg = f"{self.url}/{name} has {len(data):,} bytes, more than the {limit:,} that are read"
            raise ManifestTooLargeError(msg)
        return bytes(data)

    def stat(self, name: str) -> FileInfo:
        return self._file(name).info

    def list(self) -> Iterator[FileInfo]:
        with _lock:
            infos = [file.info for file in self._folder("x").values()]
        yield from (info for info in infos if "/" not in info.name.removeprefix("base/"))

    def delete(self, name: str, *, expected: bytes | None = None) -> None:
        with _lock, contextlib.suppress(FileNotFoundError):
            folder = self._folder(name)
            _expect(folder, name, expected)
            folder.pop(name, None)

    def link_file(self, name: str, source: Storage, source_name: str) -> bool:
        if not isinstance(source, MemoryStorage):
            return False
        with _lock:
            try:
                data = source._folder(source_name)[source_name].data  # noqa: SLF001 - another of this class
            except (FileNotFoundError, KeyError):
                return False
            folder = self._folder(name)
            if name in folder:
                raise FileExistsError(name)
            folder[name] = _File(name, data)
        return True

    def links(self, names: Sequence[str]) -> dict[str, tuple[Hashable, int]]:
        with _lock:
            places = collections.Counter(id(file.data) for folder in _folders.values() for file in folder.values())
            files = {name: file for name in names if (file := _folders.get(self._path, {}).get(name)) is not None}
            return {name: (key, places[key]) for name, file in files.items() if places[key := id(file.data)] > 1}

    def clock(self) -> float:
        return time.time()

    def prepare(self) -> bool:
        with _lock:
            made = self._path not in _folders
            _folders.setdefault(self._path, {})
        return made

    def remove_folder(self) -> None:
        with _lock:
            if not _folders.get(self._path, True):
                del _folders[self._path]


def _expect(folder: Mapping[str, _File], name: str, expected: bytes | None) -> None:
    if expected is not None and (name not in folder or folder[name].data != expected):
        raise FileExistsError(name)


def _open(path: str, storage_options: Mapping[str, Any]) -> Storage:
    if storage_options:
        msg = f"ram:// takes no storage options, got {', '.join(map(str, storage_options))}"
        raise InvalidArgumentError(msg)
    return MemoryStorage(path)


def _unlock() -> None:
    global _lock  # noqa: PLW0603 - the parent's may be held by a thread that the child does not have
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)

register("ram", _open)
