"""``null://``: a storage that takes data files at the speed of memory and forgets them, to see how fast everything else is.

Small files (leases, manifests) are kept in this process, one folder per URL, so that takes commit and their manifests can be looked at.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from expstate import settings
from expstate.errors import InvalidArgumentError, ManifestTooLargeError, StorageError, UnsafePathError
from expstate.storage.base import FileInfo, FileReader, FileWriter, Storage
from expstate.storage.registry import register

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_ALIGNMENT = 4096


class _Folder:
    """What is kept of one URL: the small files, and the sizes of the data files."""

    def __init__(self) -> None:
        self.small: dict[str, bytes] = {}
        self.infos: dict[str, FileInfo] = {}


_folders: dict[str, _Folder] = {}
_lock = threading.Lock()


class _NullWriter(FileWriter):
    def write(self, offset: int, data: memoryview) -> None:
        pass

    def finish(self) -> Sequence[tuple[int, int]]:
        return ()

    def abort(self) -> None:
        pass


class _BytesReader(FileReader):
    def __init__(self, name: str, data: bytes) -> None:
        self.name = name
        self.size = len(data)
        self._data = data

    def read_into(self, offset: int, target: memoryview) -> None:
        part = self._data[offset : offset + len(target)]
        target[: len(part)] = part

    def close(self) -> None:
        pass


class NullStorage(Storage):
    """A folder that forgets its data files; ``null://NAME`` once ``expstate.testing`` is imported.

    A take to it does all that a take does but for the writes. Its data files have sizes and cannot be read back: that is a
    ``StorageError``.

    Parameters
    ----------
    path : str
        The name of the folder. Storages of one name share what is in it, for as long as the process lives.

    Examples
    --------
    >>> import expstate.testing
    >>> from expstate import Snapshot, StateDict
    >>> snapshot = Snapshot.take("null://doctest", {"progress": StateDict(step=3)})
    >>> snapshot.read_object("progress/step")
    3
    >>> snapshot.delete()
    """

    def __init__(self, path: str) -> None:
        self.url = f"null://{path}"
        self.alignment = _ALIGNMENT
        self.data_file_bytes = settings.current().data_file_bytes
        self._path = path

    @staticmethod
    def _check(name: str) -> None:
        if any(part in {"", ".", ".."} for part in name.split("/")) or "\0" in name:
            msg = f"file name {name!r} points outside the snapshot"
            raise UnsafePathError(msg)

    def _folder(self, name: str) -> _Folder:
        self._check(name)
        folder = _folders.get(self._path)
        if folder is None:
            raise FileNotFoundError(name)
        return folder

    def _put(self, name: str, data: bytes | None, size: int) -> None:
        folder = self._folder(name)
        folder.infos[name] = FileInfo(name, size, time.time())
        if data is not None:
            folder.small[name] = data

    def create_file(self, name: str, size: int) -> FileWriter:
        with _lock:
            if name in self._folder(name).infos:
                raise FileExistsError(name)
            self._put(name, None, size)
        return _NullWriter()

    def _small(self, name: str) -> bytes:
        folder = self._folder(name)
        if name in folder.infos and name not in folder.small:
            msg = f"{self.url!r} keeps no data files: {name!r} was written and cannot be read back"
            raise StorageError(msg)
        try:
            return folder.small[name]
        except KeyError:
            raise FileNotFoundError(name) from None

    def open_file(self, name: str, *, size: int | None = None) -> FileReader:  # noqa: ARG002 - it is known here
        with _lock:
            return _BytesReader(name, self._small(name))

    def create(self, name: str, data: bytes, *, token: str) -> None:  # noqa: ARG002 - no temporary file is needed
        with _lock:
            if name in self._folder(name).infos:
                raise FileExistsError(name)
            self._put(name, bytes(data), len(data))

    def replace(self, name: str, data: bytes, *, token: str, expected: bytes | None = None) -> None:  # noqa: ARG002 - as for create
        with _lock:
            self._expect(name, expected)
            self._put(name, bytes(data), len(data))

    def _expect(self, name: str, expected: bytes | None) -> None:
        if expected is not None and self._folder(name).small.get(name) != expected:
            raise FileExistsError(name)

    def read(self, name: str, *, limit: int | None = None) -> bytes:
        with _lock:
            data = self._small(name)
        if limit is not None and len(data) > limit:
            msg = f"{self.url}/{name} has {len(data):,} bytes, more than the {limit:,} that are read"
            raise ManifestTooLargeError(msg)
        return data

    def stat(self, name: str) -> FileInfo:
        with _lock:
            info = self._folder(name).infos.get(name)
        if info is None:
            raise FileNotFoundError(name)
        return info

    def list(self) -> Iterator[FileInfo]:
        with _lock:
            infos = [*self._folder("x").infos.values()]
        yield from (info for info in infos if "/" not in info.name.removeprefix("base/"))

    def delete(self, name: str, *, expected: bytes | None = None) -> None:
        self._check(name)
        with _lock:
            if expected is not None and self._path in _folders:
                self._expect(name, expected)
            if self._path in _folders:
                _folders[self._path].small.pop(name, None)
                _folders[self._path].infos.pop(name, None)

    def link_file(self, name: str, source: Storage, source_name: str) -> bool:
        if not isinstance(source, NullStorage):
            return False
        with _lock:
            try:
                info = source._folder(source_name).infos[source_name]  # noqa: SLF001 - another of this class
            except (FileNotFoundError, KeyError):
                return False
            if name in self._folder(name).infos:
                raise FileExistsError(name)
            self._put(name, source._folder(source_name).small.get(source_name), info.size)  # noqa: SLF001 - as above
        return True

    def clock(self) -> float:
        return time.time()

    def prepare(self) -> bool:
        with _lock:
            made = self._path not in _folders
            _folders.setdefault(self._path, _Folder())
        return made

    def remove_folder(self) -> None:
        with _lock:
            if self._path in _folders and not _folders[self._path].infos:
                del _folders[self._path]


def _open(path: str, storage_options: Mapping[str, Any]) -> Storage:
    if storage_options:
        msg = f"null:// takes no storage options, got {', '.join(map(str, storage_options))}"
        raise InvalidArgumentError(msg)
    return NullStorage(path)


register("null", _open)
