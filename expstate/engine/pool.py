"""More files open for reading than a process may have open: the snapshot of a thousand ranks.

``FilePool`` gives readers that share a limited number of handles: which file was not read for the longest time is closed, and opened anew
when it is read again.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from typing import TYPE_CHECKING

from expstate.errors import StorageError
from expstate.storage.base import FileReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MOST_FILES = 200
"""Files of one operation that are open at once: a process may have a thousand handles, and a local file takes two."""


class FilePool:
    """Open files, of which only the last used stay open.

    Parameters
    ----------
    most : int
        So many, and those that are being read.
    """

    def __init__(self, most: int = MOST_FILES) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._open: dict[_PooledReader, FileReader] = {}
        self._readers: Counter[_PooledReader] = Counter()

    def add(self, file: FileReader, reopen: Callable[[], FileReader]) -> FileReader:
        """A reader in place of an open file, which is the pool's to close from here on."""
        reader = _PooledReader(self, file, reopen)
        with self._lock:
            self._open[reader] = file
            self._close_some()
        return reader

    @contextlib.contextmanager
    def lent(self, reader: _PooledReader) -> Iterator[FileReader]:
        """The open file of a reader, which stays open meanwhile."""
        with self._lock:
            # The last used is the last of the dict.
            file = self._open.pop(reader, None) or reader.opened_anew()
            self._open[reader] = file
            self._readers[reader] += 1
            self._close_some()
        try:
            yield file
        finally:
            with self._lock:
                self._readers[reader] -= 1

    def _close_some(self) -> None:
        for reader in list(self._open)[: max(0, len(self._open) - self._most)]:
            if not self._readers[reader]:
                self._open.pop(reader).close()

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()


class _PooledReader(FileReader):
    def __init__(self, pool: FilePool, file: FileReader, reopen: Callable[[], FileReader]) -> None:
        self._pool = pool
        self._reopen = reopen
        self.name = file.name
        self.size = file.size
        self.alignment = file.alignment
        self.is_remote = file.is_remote

    def opened_anew(self) -> FileReader:
        try:
            return self._reopen()
        except FileNotFoundError:
            msg = f"file {self.name!r} is gone: the snapshot was deleted or replaced while it was read"
            raise StorageError(msg) from None

    def read_into(self, offset: int, target: memoryview) -> None:
        with self._pool.lent(self) as file:
            file.read_into(offset, target)

    def is_cached(self, offset: int, length: int) -> bool:
        with self._pool.lent(self) as file:
            return file.is_cached(offset, length)

    def read_cached_into(self, offset: int, target: memoryview) -> None:
        with self._pool.lent(self) as file:
            file.read_cached_into(offset, target)

    def close(self) -> None:
        """Nothing: the pool closes its files."""
