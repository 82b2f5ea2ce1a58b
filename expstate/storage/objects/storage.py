"""Snapshots in an object store: a folder is a prefix of keys, a data file an object, and the commit one conditional request.

``ObjectStorage`` gets an ``ObjectClient`` and tries its requests again. A reply that was lost is told from a refusal by the write id that
each conditional request leaves with its object.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
import warnings
from typing import TYPE_CHECKING, TypeVar

from expstate import settings
from expstate.errors import (
    CommitUnknownError,
    ExpstateError,
    SnapshotCorruptError,
    SnapshotReplacedError,
    StorageError,
    StoragePermissionError,
    UnsafePathError,
    WeakStorageWarning,
)
from expstate.storage.base import FileInfo, FileReader, FileWriter, Storage
from expstate.storage.objects.client import ABSENT, TransientError
from expstate.storage.objects.retry import persist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from expstate.storage.objects.client import Buffer, ObjectClient, ObjectInfo

_Result = TypeVar("_Result")

_LEAST_THREADS = 16
_FEW_FILES = 3
"""So many sizes are asked for one by one; of more, the folder is listed."""
_MOST_PARTS = 10_000


class _ObjectWriter(FileWriter):
    """A data file on its way: an object put whole when its last bytes come, or in parts where it is larger than one.

    What a call brings is uploaded in that call, without a copy if it completes a part; else it is kept until the part is complete.
    """

    def __init__(self, storage: ObjectStorage, key: str, size: int, part_bytes: int) -> None:
        self._storage = storage
        self._key = key
        self._size = size
        self._part_bytes = part_bytes
        self._in_parts = size > part_bytes
        self._lock = threading.Lock()
        self._kept: dict[int, dict[int, bytes]] = {}
        self._upload_id: str | None = None
        self._parts: dict[int, str] = {}
        self._is_stored = False

    def write(self, offset: int, data: memoryview) -> None:
        while data:
            number = offset // self._part_bytes
            stop = min(self._size, (number + 1) * self._part_bytes)
            piece, data = data[: stop - offset], data[stop - offset :]
            whole = self._complete(number, stop - number * self._part_bytes, offset, piece)
            if whole is not None:
                self._put(number, whole)
            offset += len(piece)

    def _complete(self, number: int, size: int, offset: int, piece: memoryview) -> list[Buffer] | None:
        """The buffers of a part if this piece completes it; else the piece is kept."""
        with self._lock:
            kept = self._kept.setdefault(number, {})
            if sum(map(len, kept.values())) + len(piece) < size:
                kept[offset] = bytes(piece)
                return None
            del self._kept[number]
        buffers: dict[int, Buffer] = {**kept, offset: piece}
        return [buffers[start] for start in sorted(buffers)]

    def _put(self, number: int, data: list[Buffer]) -> None:
        if not self._in_parts:
            self._storage.put_new(self._key, data)
            self._is_stored = True
            return
        client = self._storage.client
        with self._lock:
            if self._upload_id is None:
                self._upload_id = _asked(f"beginning an upload of {self._key!r}", lambda: client.begin_upload(self._key), may_lack=False)
        upload_id = self._upload_id
        what = f"writing part {number + 1} of {self._key!r}"
        part = _asked(what, lambda: client.put_part(self._key, upload_id, number + 1, data), may_lack=False)
        with self._lock:
            self._parts[number + 1] = part

    def finish(self) -> Sequence[tuple[int, int]]:
        if self._size == 0:
            self._storage.put_new(self._key, [])
        elif self._in_parts and self._upload_id is not None and not self._kept:
            upload_id, client = self._upload_id, self._storage.client
            _asked(f"completing {self._key!r}", lambda: client.finish_upload(self._key, upload_id, self._parts), may_lack=False)
            self._upload_id = None
        elif not self._is_stored:
            msg = f"not all of {self._key!r} was written"
            raise StorageError(msg)
        return ()

    def abort(self) -> None:
        upload_id, self._upload_id = self._upload_id, None
        self._kept.clear()
        if upload_id is not None:
            with contextlib.suppress(ExpstateError, OSError):  # what remains is found by gc
                self._storage.client.abort_upload(self._key, upload_id)


class _ObjectReader(FileReader):
    is_remote = True

    def __init__(self, storage: ObjectStorage, key: str, name: str, size: int, version: str | None) -> None:
        self._storage = storage
        self._key = key
        self._version = version
        self.name = name
        self.size = size

    def read_into(self, offset: int, target: memoryview) -> None:
        if offset > self.size:
            msg = f"file {self.name!r} ends after {self.size:,} bytes, before byte {offset:,}"
            raise SnapshotCorruptError(msg)
        wanted = min(len(target), self.size - offset)
        if not wanted:
            return
        try:
            data = persist(f"reading {self._key!r}", lambda: self._read(offset, wanted))
        except (FileExistsError, FileNotFoundError):
            msg = f"{self._storage.url}/{self.name} was replaced or removed while it was read: open the snapshot anew"
            raise SnapshotReplacedError(msg) from None
        target[:wanted] = memoryview(data).cast("B")

    def _read(self, offset: int, length: int) -> Buffer:
        data = self._storage.client.get(self._key, offset, offset + length, version=self._version)
        if len(data) != length:
            # Silent in the clients, where the server says that this is all that it sends.
            msg = f"{len(data):,} bytes came of the {length:,} from byte {offset:,} on that were asked for"
            raise TransientError(msg)
        return data

    def close(self) -> None:
        pass


def _asked(what: str, action: Callable[[], _Result], *, may_lack: bool = True) -> _Result:
    """``persist`` for requests without a condition. None can be refused for one, and only what ``may_lack`` an object can miss it."""
    try:
        return persist(what, action)
    except FileExistsError as error:
        raise StorageError(str(error)) from error
    except FileNotFoundError as error:
        if may_lack:
            raise
        raise StorageError(str(error)) from error


class _Put:
    """One object to store by a condition, in as many tries as it takes.

    A refusal may be of an earlier try whose reply was lost: the id that each try leaves with the object tells. Where ids are not kept, an
    object of the same content is taken for that of an earlier try, if one was without a reply.

    Attributes
    ----------
    write_id : str
        What is left with the object.
    is_unclear : bool
        Whether a try was without a reply, so that it may have been done.
    """

    def __init__(self, client: ObjectClient, key: str, data: Sequence[Buffer], condition: str | None) -> None:
        self._client = client
        self._key = key
        self._data = data
        self._condition = condition
        self.write_id = uuid.uuid4().hex
        self.is_unclear = False

    def once(self) -> None:
        """Try once."""
        try:
            self._client.put(self._key, self._data, condition=self._condition, write_id=self.write_id)
        except TransientError:
            self.is_unclear = True
            raise
        except FileExistsError:
            try:
                is_mine = self.is_mine()
            except FileNotFoundError:
                if self._condition == ABSENT:
                    # Two requests met, and the server let neither through: some clients take that for an object that is there.
                    msg = "the server refused to create it, and nothing is there"
                    raise TransientError(msg) from None
                is_mine = False
            if not is_mine:
                raise

    def is_mine(self) -> bool:
        """Whether the object that is there was stored by a try of this one; ``FileNotFoundError`` if none is."""
        found = self._client.write_id(self._key)
        if found is not None:
            return found == self.write_id
        return self.is_unclear and self._client.get_whole(self._key)[0] == b"".join(self._data)


class ObjectStorage(Storage):
    """A snapshot's folder in an object store.

    Parameters
    ----------
    connect : callable
        Gives the client of the bucket for this process.
    prefix : str
        The folder: what the keys of its objects begin with, without a ``/`` at either end.
    """

    def __init__(self, connect: Callable[[], ObjectClient], prefix: str) -> None:
        now = settings.current()
        client = connect()
        self._connect = connect
        self.prefix = prefix
        self.url = f"{client.url}/{prefix}" if prefix else client.url
        self.data_file_bytes = now.object_file_bytes
        self.thread_count = now.io_threads or max(_LEAST_THREADS, now.thread_count)
        self._start = f"{prefix}/" if prefix else ""

    copies = 1

    @property
    def client(self) -> ObjectClient:
        """The bucket; a child process has a client of its own."""
        return self._connect()

    def _key(self, name: str) -> str:
        if any(part in {"", ".", ".."} for part in name.split("/")) or "\0" in name:
            msg = f"file name {name!r} points outside the snapshot"
            raise UnsafePathError(msg)
        return self._start + name

    # Data files

    def create_file(self, name: str, size: int) -> FileWriter:
        least = self.client.least_part_bytes
        # With its header a full data file is a little larger than it should be: that is no reason for parts.
        is_whole = least is None or size <= 2 * self.data_file_bytes
        part_bytes = size if is_whole else max(least or 0, self.data_file_bytes, -(-size // _MOST_PARTS))
        return _ObjectWriter(self, self._key(name), size, max(1, part_bytes))

    def open_file(self, name: str, *, size: int | None = None) -> FileReader:
        key = self._key(name)
        if size is not None:
            return _ObjectReader(self, key, name, size, None)
        info = self._head(key)
        return _ObjectReader(self, key, name, info.size, info.version or None)

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        if len(names) <= _FEW_FILES:
            return {}
        wanted = set(names)
        return {info.name: info.size for info in self.list() if info.name in wanted}

    def put_new(self, key: str, data: Sequence[Buffer]) -> None:
        """Store an object that must not be there yet; ``FileExistsError`` if another is."""
        self._put(key, data, ABSENT)

    def _put(self, key: str, data: Sequence[Buffer], condition: str | None) -> str:
        """Store an object, again and again until it is known what became of it; gives the id that was left with it."""
        request = _Put(self.client, key, data, condition)
        try:
            persist(f"writing {key!r}", request.once)
        except CommitUnknownError:
            raise
        except FileNotFoundError as error:
            if condition not in {None, ABSENT}:
                raise
            raise StorageError(str(error)) from error  # the bucket is gone
        except StorageError as error:
            try:
                is_done = request.is_unclear and persist(f"looking at {key!r}", request.is_mine)
            except FileNotFoundError:
                is_done = False
            except ExpstateError as unknown:
                msg = f"whether {key!r} was written cannot be told: {error}; and then: {unknown}"
                raise CommitUnknownError(msg) from error
            if not is_done:
                raise
        return request.write_id

    # Small files

    def create(self, name: str, data: bytes, *, token: str) -> None:  # noqa: ARG002 - no temporary object is needed
        key = self._key(name)
        if not self.client.is_conditional:
            with contextlib.suppress(FileNotFoundError):
                self._head(key)
                raise FileExistsError(key)
        write_id = self._put(key, [data], ABSENT)
        if self.client.is_conditional and not self.client.is_proven:
            self._prove(key, data, write_id)

    def _prove(self, key: str, data: bytes, write_id: str) -> None:
        """See once that the server keeps conditions: what has just been created must be refused when it is created again."""
        client = self.client
        try:
            persist(f"writing {key!r}", lambda: client.put(key, [data], condition=ABSENT, write_id=write_id))
        except FileExistsError:
            client.is_proven = True
            return
        client.is_conditional = False
        msg = (
            f"{client.url} has no conditional writes: of two takes to one path at the same moment both may believe that they were first. "
            "Take each snapshot to a path of its own"
        )
        warnings.warn(msg, WeakStorageWarning, stacklevel=2)

    def replace(self, name: str, data: bytes, *, token: str, expected: bytes | None = None) -> None:  # noqa: ARG002 - as for create
        key = self._key(name)
        version = None if expected is None else self._version_of(key, expected)
        self._put(key, [data], (version or None) if self.client.is_conditional else None)

    def _version_of(self, key: str, expected: bytes) -> str:
        """The version of an object that holds these bytes; ``FileExistsError`` if it does not."""
        try:
            found, version = _asked(f"reading {key!r}", lambda: self.client.get_whole(key))
        except FileNotFoundError:
            raise FileExistsError(key) from None
        if found != expected:
            raise FileExistsError(key)
        return version

    def read(self, name: str, *, limit: int | None = None) -> bytes:
        key = self._key(name)
        return _asked(f"reading {key!r}", lambda: self.client.get_whole(key, limit))[0]

    # All files

    def _head(self, key: str) -> ObjectInfo:
        return _asked(f"looking at {key!r}", lambda: self.client.head(key))

    def stat(self, name: str) -> FileInfo:
        info = self._head(self._key(name))
        return FileInfo(name, info.size, info.modified_at)

    def _listed(self) -> list[ObjectInfo]:
        """All objects below the folder, at any depth."""
        return _asked(f"listing {self.url!r}", lambda: list(self.client.list(self._start)), may_lack=False)

    def list(self) -> Iterator[FileInfo]:
        for info in self._listed():
            name = info.key[len(self._start) :]
            # What ends in a slash stands for a folder: consoles make such objects.
            if name and not name.endswith("/") and "/" not in name.removeprefix("base/"):
                yield FileInfo(name, info.size, info.modified_at)

    def delete(self, name: str, *, expected: bytes | None = None) -> None:
        key = self._key(name)
        version = (self._version_of(key, expected) or None) if expected is not None else None
        remove = persist if version else _asked
        remove(f"removing {key!r}", lambda: self.client.delete(key, version=version))

    def may_link(self, source: Storage) -> bool:
        return isinstance(source, ObjectStorage) and source.client.store == self.client.store

    def copy_file(self, name: str, source: Storage, source_name: str) -> bool:
        if not isinstance(source, ObjectStorage) or not self.may_link(source):
            return False
        key, source_key = self._key(name), source._key(source_name)  # noqa: SLF001 - another of this class
        return _asked(f"copying {source_key!r} to {key!r}", lambda: self.client.copy(source.client, source_key, key))

    def clock(self) -> float:
        # The server's, as it stamps an object that is there for a moment. If it cannot be removed, ``gc`` knows it by its name.
        key = self._key(f".clock-{uuid.uuid4().hex}")
        try:
            _asked(f"writing {key!r}", lambda: self.client.put(key, [b"clock"]), may_lack=False)
            return _asked(f"looking at {key!r}", lambda: self.client.head(key), may_lack=False).modified_at
        except StoragePermissionError:
            return time.time()  # who may only read; in any other case a wrong clock would be taken for the server's
        finally:
            with contextlib.suppress(ExpstateError, OSError):
                self.client.delete(key)

    def end_uploads(self, older_than: float) -> int:
        found = _asked(f"listing the uploads to {self.url!r}", lambda: list(self.client.uploads(self._start)), may_lack=False)
        ended = [upload for upload in found if upload.begun_at < older_than]
        for upload in ended:
            _asked(f"ending an upload to {upload.key!r}", lambda: self.client.abort_upload(upload.key, upload.upload_id))  # noqa: B023 - called at once
        return len(ended)

    def walk(self, *, depth: int | None = None, on_error: Callable[[str, ExpstateError], object] | None = None) -> Iterator[Storage]:
        try:
            keys = [info.key[len(self._start) :] for info in self._listed()]
        except ExpstateError as error:
            yield self
            if on_error is not None:
                on_error(self.url, error)
            return
        folders = {""}
        for key in keys:
            parts = key.split("/")[:-1]
            folders.update("/".join(parts[:count]) for count in range(1, len(parts) + 1))
        for folder in sorted(folders, key=lambda path: path.split("/")):
            if depth is None or (folder.count("/") + 1 if folder else 0) <= depth:
                yield ObjectStorage(self._connect, f"{self._start}{folder}".rstrip("/"))
