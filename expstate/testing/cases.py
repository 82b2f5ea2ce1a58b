"""What the tests of storages share: how one is opened, names and bytes to try it with, and threads that begin together."""

from __future__ import annotations

import mmap
import random
import threading
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from expstate.settings import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from expstate.storage.base import FileWriter, Storage

DATA = "model-00001-3f9a2c71.safetensors"
BASE = "base/model-00001-77777777.safetensors"
SMALL = "snapshot.json"
TOKEN = "3f9a2c71"  # noqa: S105 - no secret: the id of an attempt


def same_bytes(expected: bytes, found: bytes) -> bool:
    """Whether these are equal: in an assert of its own, so that a difference of megabytes is not spelled out."""
    return expected == found


def random_bytes(size: int, seed: int = 0) -> bytes:
    """Bytes that no storage holds by chance."""
    return random.Random(seed).randbytes(size)  # noqa: S311 - not for secrets


def aligned(data: bytes) -> memoryview:
    """The same bytes in memory that begins on a page, as the engine's buffers do."""
    view = memoryview(mmap.mmap(-1, max(1, len(data))))[: len(data)]
    view[:] = data
    return view


def together(count: int, action: Callable[[int], bool]) -> list[bool]:
    """What ``action`` gives in each of ``count`` threads that begin at the same time."""
    barrier = threading.Barrier(count)

    def run(number: int) -> bool:
        barrier.wait()
        return action(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


class StorageCase(ABC):
    """How a storage is opened, and small steps that tests of it share."""

    @abstractmethod
    def open(self, place: Path) -> Storage:
        """A new storage object for the folder that stands for ``place``, an empty folder of this test's own."""

    def url(self, place: Path) -> str:
        """The URL by which another process opens it."""
        return self.open(place).url

    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        """An empty folder of this test's own."""
        return tmp_path

    @pytest.fixture
    def storage(self, place: Path) -> Iterator[Storage]:
        """The storage under test, with nothing in it."""
        storage = self.open(place)
        storage.prepare()
        yield storage
        for info in list(storage.list()):
            storage.delete(info.name)
        storage.remove_folder()

    # Help

    @staticmethod
    def fill(writer: FileWriter, data: bytes, step: int) -> None:
        """Write all of a data file, ``step`` bytes at a time."""
        for start in range(0, len(data), step):
            writer.write(start, aligned(data[start : start + step]))

    @classmethod
    def put(cls, storage: Storage, name: str, data: bytes) -> None:
        """Make a data file."""
        writer = storage.create_file(name, len(data))
        cls.fill(writer, data, MIB)
        writer.finish()

    @staticmethod
    def read(storage: Storage, name: str, offset: int, length: int) -> bytes:
        """Read a range of a file."""
        target = aligned(bytes(length))
        with storage.open_file(name) as reader:
            reader.read_into(offset, target)
        return bytes(target)

    @staticmethod
    def names(storage: Storage) -> list[str]:
        """The names of all files, sorted."""
        return sorted(info.name for info in storage.list())
