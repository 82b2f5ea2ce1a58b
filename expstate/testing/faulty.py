"""``FaultyStorage``: another storage whose n-th write, read or commit fails, lies or runs a function, to see what the caller does then.

It records every call. It has a URL of its own, so that ``Snapshot`` reaches it like any other storage.
"""

from __future__ import annotations

import fnmatch
import itertools
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from expstate.errors import InvalidArgumentError
from expstate.storage.base import FileInfo, FileReader, FileWriter, Storage
from expstate.storage.registry import register

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

Result = TypeVar("Result")

OPERATIONS = frozenset(
    (
        "create_file",
        "write",
        "finish",
        "open_file",
        "read_into",
        "create",
        "replace",
        "read",
        "stat",
        "list",
        "delete",
        "link_file",
        "links",
        "flush",
    )
)
"""What can be made to fail: methods of ``Storage``, and of its writers and readers."""

_WITH_DATA = {"write", "create", "replace"}
_READING = {"read_into", "read"}


@dataclass(frozen=True, slots=True)
class Call:
    """A call that was made: the operation, and the name of the file (empty where there is none)."""

    operation: str
    name: str


@dataclass(slots=True)
class _Fault:
    """Something to do at the calls of an operation that have these numbers and whose file's name matches."""

    operation: str
    nth: int | None
    names: str
    before: Callable[[], object] | None = None
    after: Callable[[], object] | None = None
    change: Callable[[bytes], bytes] | None = None
    seen: int = 0

    def is_due(self, call: Call) -> bool:
        if call.operation != self.operation or not fnmatch.fnmatchcase(call.name, self.names):
            return False
        self.seen += 1
        return self.nth in {None, self.seen}


class _Faults:
    """The faults of one storage, and the calls that it has seen."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[_Fault] = []
        self.calls: list[Call] = []

    def add(self, fault: _Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def due(self, operation: str, name: str) -> list[_Fault]:
        """Note a call; the faults that strike it."""
        call = Call(operation, name)
        with self._lock:
            self.calls.append(call)
            return [fault for fault in self._faults if fault.is_due(call)]

    def do(self, operation: str, name: str, action: Callable[[], Result]) -> Result:
        """Make a call that moves no bytes."""
        return struck(self.due(operation, name), action)


def struck(due: list[_Fault], action: Callable[[], Result]) -> Result:
    """Do it, with what the faults do before and after."""
    for fault in due:
        if fault.before is not None:
            fault.before()
    result = action()
    for fault in due:
        if fault.after is not None:
            fault.after()
    return result


def changed(due: list[_Fault], data: bytes) -> bytes:
    """What the faults make of these bytes."""
    for fault in due:
        if fault.change is not None:
            data = fault.change(data)
    return data


class FaultyStorage(Storage):
    """A storage with faults, which are set up by ``fail``, ``flip``, ``lose`` and ``run``.

    Faults count the calls of their operation, from 1, among those whose file's name matches ``names`` (``*`` stands for anything);
    ``nth=None`` means each of them. Operations are those of ``OPERATIONS``.

    Parameters
    ----------
    storage : Storage
        The one that does the work.

    Attributes
    ----------
    url : str
        ``faulty://`` and a number: what to give to ``Snapshot``, for as long as this object lives.
    calls : list of Call
        Every call so far, in order.

    Examples
    --------
    >>> import tempfile
    >>> from expstate import Snapshot, StateDict
    >>> from expstate.errors import StorageError
    >>> from expstate.storage.registry import open_storage
    >>> folder = tempfile.TemporaryDirectory()
    >>> storage = FaultyStorage(open_storage(folder.name))
    >>> storage.fail("create", names="snapshot.json", error=StorageError("the disk is broken"))
    >>> Snapshot.take(storage.url, {"progress": StateDict(step=3)})
    Traceback (most recent call last):
    expstate.errors.StorageError: the disk is broken
    >>> folder.cleanup()
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._faults = _Faults()
        self.alignment = storage.alignment
        self.data_file_bytes = storage.data_file_bytes
        self.calls = self._faults.calls
        number = str(next(_numbers))
        self.url = f"faulty://{number}"
        _known[number] = self

    # Setting up

    def _add(self, operation: str, nth: int | None, names: str, **what: Any) -> None:
        if operation not in OPERATIONS:
            msg = f"there is no operation {operation!r} (there are: {', '.join(sorted(OPERATIONS))})"
            raise InvalidArgumentError(msg)
        self._faults.add(_Fault(operation, nth, names, **what))

    def fail(self, operation: str, nth: int | None = 1, *, error: BaseException, names: str = "*", done: bool = False) -> None:
        """Raise ``error`` instead of doing it; with ``done=True`` do it and then raise, as when the reply is lost."""

        def strike() -> None:
            raise error

        self._add(operation, nth, names, **{"after" if done else "before": strike})

    def run(self, operation: str, nth: int | None = 1, *, function: Callable[[], object], names: str = "*") -> None:
        """Call ``function`` in the thread that makes the call, before it is done."""
        self._add(operation, nth, names, before=function)

    def flip(self, operation: str, nth: int | None = 1, *, byte: int = 0, bit: int = 0, names: str = "*") -> None:
        """Flip a bit of what is written, or of what has been read; ``byte`` counts from the first of the call, and wraps around."""

        def flipped(data: bytes) -> bytes:
            changed = bytearray(data)
            if changed:
                changed[byte % len(changed)] ^= 1 << bit
            return bytes(changed)

        self._only(operation, _WITH_DATA | _READING)
        self._add(operation, nth, names, change=flipped)

    def lose(self, operation: str, nth: int | None = 1, *, keep: int = 0, names: str = "*") -> None:
        """Say that all was written, and write the first ``keep`` bytes alone."""
        self._only(operation, {"write", "create", "replace"})
        self._add(operation, nth, names, change=lambda data: data[:keep])

    @staticmethod
    def _only(operation: str, allowed: set[str]) -> None:
        if operation not in allowed:
            msg = f"{operation!r} has no bytes to change (there are: {', '.join(sorted(allowed))})"
            raise InvalidArgumentError(msg)

    def heal(self) -> None:
        """Forget all faults."""
        self._faults.clear()

    # The interface

    def create_file(self, name: str, size: int) -> FileWriter:
        return self._faults.do("create_file", name, lambda: _FaultyWriter(self._faults, self._storage.create_file(name, size), name))

    def open_file(self, name: str, *, size: int | None = None) -> FileReader:
        return self._faults.do("open_file", name, lambda: _FaultyReader(self._faults, self._storage.open_file(name, size=size)))

    def create(self, name: str, data: bytes, *, token: str) -> None:
        due = self._faults.due("create", name)
        struck(due, lambda: self._storage.create(name, changed(due, data), token=token))

    def replace(self, name: str, data: bytes, *, token: str, expected: bytes | None = None) -> None:
        due = self._faults.due("replace", name)
        struck(due, lambda: self._storage.replace(name, changed(due, data), token=token, expected=expected))

    def read(self, name: str, *, limit: int | None = None) -> bytes:
        due = self._faults.due("read", name)
        return changed(due, struck(due, lambda: self._storage.read(name, limit=limit)))

    def stat(self, name: str) -> FileInfo:
        return self._faults.do("stat", name, lambda: self._storage.stat(name))

    def list(self) -> Iterator[FileInfo]:
        yield from self._faults.do("list", "", self._storage.list)

    def delete(self, name: str, *, expected: bytes | None = None) -> None:
        self._faults.do("delete", name, lambda: self._storage.delete(name, expected=expected))

    def link_file(self, name: str, source: Storage, source_name: str) -> bool:
        real = source._storage if isinstance(source, FaultyStorage) else source  # noqa: SLF001 - another of this class
        return self._faults.do("link_file", name, lambda: self._storage.link_file(name, real, source_name))

    def links(self, names: Sequence[str]) -> dict[str, tuple[Hashable, int]]:
        return self._faults.do("links", "", lambda: self._storage.links(names))

    def clock(self) -> float:
        return self._storage.clock()

    def prepare(self) -> bool:
        return self._storage.prepare()

    def flush(self) -> None:
        self._faults.do("flush", "", self._storage.flush)

    def remove_folder(self) -> None:
        self._storage.remove_folder()


class _FaultyWriter(FileWriter):
    def __init__(self, faults: _Faults, writer: FileWriter, name: str) -> None:
        self._faults = faults
        self._writer = writer
        self._name = name

    def write(self, offset: int, data: memoryview) -> None:
        due = self._faults.due("write", self._name)
        if any(fault.change is not None for fault in due):
            # In the memory that was given: a copy would not lie where direct I/O wants it.
            spoiled = changed(due, bytes(data))
            data = data[: len(spoiled)]
            data[:] = spoiled
        struck(due, lambda: self._writer.write(offset, data) if data else None)

    def finish(self) -> Sequence[tuple[int, int]]:
        return self._faults.do("finish", self._name, self._writer.finish)

    def abort(self) -> None:
        self._writer.abort()


class _FaultyReader(FileReader):
    def __init__(self, faults: _Faults, reader: FileReader) -> None:
        self._faults = faults
        self._reader = reader
        self.name = reader.name
        self.size = reader.size
        self.alignment = reader.alignment

    def read_into(self, offset: int, target: memoryview) -> None:
        due = self._faults.due("read_into", self.name)
        struck(due, lambda: self._reader.read_into(offset, target))
        if any(fault.change is not None for fault in due):
            target[:] = changed(due, bytes(target))

    def is_cached(self, offset: int, length: int) -> bool:
        return self._reader.is_cached(offset, length)

    def close(self) -> None:
        self._reader.close()


_numbers = itertools.count(1)
_known: weakref.WeakValueDictionary[str, FaultyStorage] = weakref.WeakValueDictionary()


def _open(path: str, storage_options: Mapping[str, Any]) -> Storage:
    storage = _known.get(path)
    if storage is None or storage_options:
        msg = f"faulty://{path} is no storage of this process"
        raise InvalidArgumentError(msg)
    return storage


register("faulty", _open)
