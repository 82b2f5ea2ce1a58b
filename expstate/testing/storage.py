"""The tests that every storage must pass: subclass ``StorageTests``, say how a storage is opened, and let pytest collect the class.

``FolderStorageTests`` adds what must hold where the files lie in a folder of this machine, so that links and pipes can be put there.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from expstate.errors import ExpstateError, ManifestTooLargeError, UnsafeFileError
from expstate.settings import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from expstate.storage.base import FileWriter, Storage

DATA = "model-00001-3f9a2c71.safetensors"
BASE = "base/model-00001-77777777.safetensors"
SMALL = "snapshot.json"
TOKEN = "3f9a2c71"  # noqa: S105 - no secret: the id of an attempt
UNSAFE = ["", ".", "..", "/", "/etc/hostname", "../x", "a/../../x", "a/./x", "a//x", "a/", "nul\0x"]
SIZES = [0, 1, 100, 4095, 4096, 4097, 12_288, MIB, MIB + 1, 3 * MIB + 5000]

_ROUNDS = 25
_PROCESSES = 4
# Each process creates file after file as soon as the parent says so, and prints those that it was the one to create.
_RACER = """
import sys
from expstate.storage.registry import open_storage
storage = open_storage(sys.argv[1])
for line in sys.stdin:
    name = line.strip()
    try:
        storage.create(name, f"{sys.argv[2]} {name}".encode(), token=f"{int(sys.argv[2]):08x}")
        print("won", flush=True)
    except FileExistsError:
        print("lost", flush=True)
"""


def random_bytes(size: int, seed: int = 0) -> bytes:
    """Bytes that no storage holds by chance."""
    return random.Random(seed).randbytes(size)  # noqa: S311 - not for secrets


def aligned(data: bytes) -> memoryview:
    """The same bytes in memory that begins on a page, as the engine's buffers do."""
    import mmap  # noqa: PLC0415 - kept with its one use

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


class StorageTests(ABC):
    """What the engine relies on in any storage.

    Examples
    --------
    A storage is tested by a class of this form, in a file that pytest collects::

        class TestMyStorage(StorageTests):
            def open(self, place):
                return MyStorage(f"my://{place}")
    """

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
    def _fill(writer: FileWriter, data: bytes, step: int) -> None:
        for start in range(0, len(data), step):
            writer.write(start, aligned(data[start : start + step]))

    @classmethod
    def _put(cls, storage: Storage, name: str, data: bytes) -> None:
        writer = storage.create_file(name, len(data))
        cls._fill(writer, data, MIB)
        writer.finish()

    @staticmethod
    def _read(storage: Storage, name: str, offset: int, length: int) -> bytes:
        target = aligned(bytes(length))
        with storage.open_file(name) as reader:
            reader.read_into(offset, target)
        return bytes(target)

    @staticmethod
    def _names(storage: Storage) -> list[str]:
        return sorted(info.name for info in storage.list())

    # Data files

    @pytest.mark.parametrize("size", SIZES)
    def test_a_data_file_holds_what_was_written(self, storage: Storage, size: int) -> None:
        """Whatever its size, and it has just that size."""
        data = random_bytes(size)
        self._put(storage, DATA, data)

        assert data == self._read(storage, DATA, 0, size)
        assert data == storage.read(DATA)
        assert size == storage.stat(DATA).size

    def test_a_data_file_is_written_by_several_threads_in_any_order(self, storage: Storage) -> None:
        """Parts may come backwards and at the same time."""
        step = max(storage.alignment, 64 * 1024)
        data = random_bytes(20 * step + 123)
        writer = storage.create_file(DATA, len(data))
        starts = list(range(0, len(data), step))[::-1]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda start: writer.write(start, aligned(data[start : start + step])), starts))
        doubtful = writer.finish()

        assert data == storage.read(DATA)
        assert all(0 <= first < last <= len(data) for first, last in doubtful)

    def test_the_bytes_of_a_part_are_taken_before_the_write_returns(self, storage: Storage) -> None:
        """The buffer may be used again at once."""
        data = random_bytes(2 * MIB)
        writer = storage.create_file(DATA, len(data))
        buffer = aligned(bytes(MIB))
        for start in (0, MIB):
            buffer[:] = data[start : start + MIB]
            writer.write(start, buffer)
        buffer[:] = bytes(MIB)
        writer.finish()

        assert data == storage.read(DATA)

    def test_a_data_file_is_created_once(self, storage: Storage) -> None:
        """A name that is taken is refused, and what has it stays."""
        self._put(storage, DATA, b"first")
        with pytest.raises(FileExistsError):
            storage.create_file(DATA, 6)

        assert b"first" == storage.read(DATA)

    def test_of_several_creators_of_a_data_file_one_wins(self, storage: Storage) -> None:
        """However close together they come."""

        def create(_: int) -> bool:
            try:
                storage.create_file(DATA, 0).finish()
            except FileExistsError:
                return False
            return True

        assert 1 == sum(together(8, create))

    def test_an_aborted_data_file_can_be_deleted(self, storage: Storage) -> None:
        """Letting go twice, or after the end, does nothing."""
        writer = storage.create_file(DATA, 2 * MIB)
        writer.write(0, aligned(random_bytes(MIB)))
        writer.abort()
        writer.abort()
        storage.delete(DATA)
        finished = storage.create_file(DATA, 0)
        finished.finish()
        finished.abort()

        assert [DATA] == self._names(storage)

    def test_a_data_file_of_the_base_folder_is_a_file_like_others(self, storage: Storage) -> None:
        """It is written, listed, read and removed by its name."""
        data = random_bytes(5000)
        self._put(storage, BASE, data)
        storage.flush()

        assert [BASE] == self._names(storage)
        assert data == self._read(storage, BASE, 0, len(data))
        assert len(data) == storage.stat(BASE).size
        storage.delete(BASE)
        assert [] == self._names(storage)

    # Reading

    def test_any_range_of_a_file_is_read(self, storage: Storage) -> None:
        """Aligned or not, from the first byte to the last."""
        data = random_bytes(3 * MIB + 777)
        self._put(storage, DATA, data)
        dice = random.Random(1)  # noqa: S311 - not for secrets
        with storage.open_file(DATA) as reader:
            assert len(data) == reader.size
            assert DATA == reader.name
            for _ in range(50):
                offset = dice.randrange(len(data))
                length = dice.choice([1, 100, 4096, 8192, MIB])
                if dice.random() < 0.5:  # noqa: PLR2004 - every other time
                    offset = offset // reader.alignment * reader.alignment
                target = aligned(bytes(length))
                reader.read_into(offset, target)
                expected = data[offset : offset + length]
                assert expected == bytes(target[: len(expected)])
                assert isinstance(reader.is_cached(offset, length), bool)

    def test_a_read_that_goes_beyond_the_end_stops_there(self, storage: Storage) -> None:
        """What lies after the file's last byte in the target is anything."""
        data = random_bytes(5000)
        self._put(storage, DATA, data)

        assert data == self._read(storage, DATA, 0, 8192)[:5000]
        assert data[4096:] == self._read(storage, DATA, 4096, 4096)[:904]

    def test_a_file_is_read_by_several_threads(self, storage: Storage) -> None:
        """One reader serves them all."""
        data = random_bytes(4 * MIB)
        self._put(storage, DATA, data)
        with storage.open_file(DATA) as reader:

            def is_right(number: int) -> bool:
                target = aligned(bytes(MIB))
                reader.read_into(number % 4 * MIB, target)
                return data[number % 4 * MIB :][:MIB] == target

            assert all(together(8, is_right))

    @pytest.mark.parametrize("change", ["replace", "delete"])
    def test_an_open_file_stays_what_it_was(self, storage: Storage, change: str) -> None:
        """What a reader gives does not change when the name gets another file; a storage that cannot keep it says so."""
        old, new = random_bytes(8192), random_bytes(8192, seed=1)
        storage.create(SMALL, old, token=TOKEN)
        with storage.open_file(SMALL) as reader:
            if change == "replace":
                storage.replace(SMALL, new, token=TOKEN)
            else:
                storage.delete(SMALL)
            target = aligned(bytes(8192))
            try:
                reader.read_into(0, target)
            except ExpstateError:
                pass
            else:
                assert old == bytes(target)

    def test_what_is_not_there_is_not_found(self, storage: Storage) -> None:
        """By every way of looking."""
        for look in (storage.open_file, storage.read, storage.stat):
            with pytest.raises(FileNotFoundError):
                look("nothing-00001-3f9a2c71.safetensors")

    # Small files

    def test_a_small_file_is_created_once(self, storage: Storage) -> None:
        """Whole; a second one is refused and leaves nothing."""
        data = random_bytes(300_000)
        storage.create(SMALL, data, token=TOKEN)
        with pytest.raises(FileExistsError):
            storage.create(SMALL, b"second", token="77777777")  # noqa: S106 - no secret

        assert data == storage.read(SMALL)
        assert [SMALL] == self._names(storage)

    def test_of_several_threads_that_create_a_file_one_wins(self, storage: Storage) -> None:
        """And the file is the winner's."""
        for number in range(_ROUNDS):
            name = f"race-{number}.json"

            def create(thread: int, name: str = name) -> bool:
                try:
                    storage.create(name, b"%d" % thread * 5000, token=f"{thread:08x}")
                except FileExistsError:
                    return False
                return True

            won = together(6, create)
            assert 1 == sum(won)
            assert b"%d" % won.index(True) * 5000 == storage.read(name)

    def test_of_several_processes_that_create_a_file_one_wins(self, storage: Storage, place: Path) -> None:
        """And nothing of the others remains."""
        commands = [[sys.executable, "-c", _RACER, self.url(place), str(number)] for number in range(_PROCESSES)]
        racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for command in commands]  # noqa: S603
        names = [f"race-{number}.json" for number in range(_ROUNDS)]
        winners = {}
        for name in names:
            for racer in racers:
                assert racer.stdin is not None
                racer.stdin.write(f"{name}\n")
                racer.stdin.flush()
            answers = [racer.stdout.readline().strip() for racer in racers if racer.stdout is not None]
            assert ["lost"] * (_PROCESSES - 1) + ["won"] == sorted(answers)
            winners[name] = answers.index("won")
        for racer in racers:
            racer.communicate()
            assert 0 == racer.returncode

        assert sorted(names) == self._names(storage)
        assert {name: f"{winner} {name}".encode() for name, winner in winners.items()} == {name: storage.read(name) for name in names}

    def test_a_small_file_is_replaced(self, storage: Storage) -> None:
        """Whole, whether it is there or not, and longer or shorter than before."""
        for data in (b"first", random_bytes(100_000), b"third"):
            storage.replace(SMALL, data, token=TOKEN)
            assert data == storage.read(SMALL)
        assert [SMALL] == self._names(storage)

    @pytest.mark.parametrize("found", [None, b"other", b"expected and more", b""])
    def test_a_file_is_replaced_only_if_it_is_what_was_expected(self, storage: Storage, found: bytes | None) -> None:
        """Else it stays as it is."""
        if found is not None:
            storage.create(SMALL, found, token=TOKEN)
        with pytest.raises(FileExistsError):
            storage.replace(SMALL, b"new", token=TOKEN, expected=b"expected")

        assert ([] if found is None else [SMALL]) == self._names(storage)
        assert found is None or found == storage.read(SMALL)
        storage.replace(SMALL, b"expected", token=TOKEN)
        storage.replace(SMALL, b"new", token=TOKEN, expected=b"expected")
        assert b"new" == storage.read(SMALL)

    def test_of_several_that_replace_what_they_expect_one_wins(self, storage: Storage, place: Path) -> None:
        """So that no committed file is replaced unseen."""
        storage.create(SMALL, b"old", token=TOKEN)
        for number in range(_ROUNDS):
            before = storage.read(SMALL)

            def replace(thread: int, before: bytes = before, number: int = number) -> bool:
                try:
                    self.open(place).replace(SMALL, b"%d %d" % (number, thread), token=f"{thread:08x}", expected=before)
                except FileExistsError:
                    return False
                return True

            won = together(6, replace)
            assert 1 == sum(won)
            assert b"%d %d" % (number, won.index(True)) == storage.read(SMALL)

    def test_a_reader_sees_the_old_file_or_the_new_one(self, storage: Storage) -> None:
        """Never nothing, and never a part of either."""
        contents = [bytes([letter]) * size for letter, size in ((65, 100_000), (66, 50_000), (67, 200_000))]
        storage.create(SMALL, contents[0], token=TOKEN)
        is_over = threading.Event()

        def write() -> None:
            for number in range(30):
                storage.replace(SMALL, contents[number % 3], token=TOKEN)
            is_over.set()

        writer = threading.Thread(target=write)
        writer.start()
        seen = []
        while not is_over.is_set():
            seen.append(storage.read(SMALL))
        writer.join()

        assert seen
        assert set(seen) <= set(contents)

    def test_a_file_that_is_too_large_is_not_read(self, storage: Storage) -> None:
        """One of just the limit is."""
        storage.create(SMALL, bytes(1000), token=TOKEN)
        with pytest.raises(ManifestTooLargeError):
            storage.read(SMALL, limit=999)

        assert bytes(1000) == storage.read(SMALL, limit=1000)

    # The folder

    def test_the_list_shows_what_was_just_written(self, storage: Storage, place: Path) -> None:
        """To every storage object of the folder, with sizes and times."""
        self._put(storage, DATA, random_bytes(5000))
        storage.create(SMALL, b"12345", token=TOKEN)
        other = self.open(place)
        infos = {info.name: info for info in other.list()}

        assert {DATA: 5000, SMALL: 5} == {name: info.size for name, info in infos.items()}
        assert infos[DATA] == other.stat(DATA)
        storage.delete(DATA)
        assert [SMALL] == self._names(other)

    def test_times_are_those_of_the_storages_clock(self, storage: Storage) -> None:
        """So that ages can be told without the clock of this machine."""
        before = storage.clock()
        storage.create(SMALL, b"12345", token=TOKEN)
        first = storage.stat(SMALL).modified_at
        time.sleep(0.05)
        storage.replace(SMALL, b"54321", token=TOKEN)
        after = storage.clock()

        # Stamps are as coarse as the tick of a clock.
        assert before - 2 <= first <= storage.stat(SMALL).modified_at <= after + 2

    def test_deletion(self, storage: Storage) -> None:
        """What is gone is gone, and what was not there is no error."""
        self._put(storage, DATA, random_bytes(100))
        storage.delete(DATA)
        storage.delete(DATA)
        storage.flush()

        assert [] == self._names(storage)
        with pytest.raises(FileNotFoundError):
            storage.stat(DATA)

    def test_a_file_is_deleted_only_if_it_is_what_was_expected(self, storage: Storage) -> None:
        """So that a file that someone else has put there meanwhile stays."""
        with pytest.raises(FileExistsError):
            storage.delete(SMALL, expected=b"old")
        storage.create(SMALL, b"new", token=TOKEN)
        with pytest.raises(FileExistsError):
            storage.delete(SMALL, expected=b"old")

        assert b"new" == storage.read(SMALL)
        storage.delete(SMALL, expected=b"new")
        assert [] == self._names(storage)

    @pytest.mark.parametrize("name", UNSAFE)
    def test_names_that_lead_elsewhere_are_refused(self, storage: Storage, name: str) -> None:
        """By every operation, before anything is touched."""
        operations: list[Callable[[], object]] = [
            lambda: storage.create_file(name, 1),
            lambda: storage.create(name, b"x", token=TOKEN),
            lambda: storage.replace(name, b"x", token=TOKEN),
            lambda: storage.open_file(name),
            lambda: storage.read(name),
            lambda: storage.stat(name),
            lambda: storage.delete(name),
        ]
        for operation in operations:
            with pytest.raises(ExpstateError):
                operation()
        assert [] == self._names(storage)

    def test_a_folder_with_files_is_not_removed(self, storage: Storage) -> None:
        """However often it is asked for."""
        storage.create(SMALL, b"12345", token=TOKEN)
        storage.remove_folder()

        assert b"12345" == storage.read(SMALL)

    def test_a_storage_says_what_the_engine_needs_to_know(self, storage: Storage) -> None:
        """Its URL, how writes are aligned, and how large a data file should be."""
        assert storage.url
        assert storage.alignment >= 1
        assert storage.alignment & (storage.alignment - 1) == 0
        assert storage.data_file_bytes >= MIB


class FolderStorageTests(StorageTests):
    """What must hold besides where the files of a storage are files of this machine."""

    def folder(self, place: Path) -> Path:
        """The folder that the files are in."""
        return place

    def test_the_folder_is_made_and_removed(self, place: Path) -> None:
        """With those above it; only the first to make it is told so."""
        inner = place / "a" / "b"
        assert self.open(inner).prepare()
        assert not self.open(inner).prepare()
        self.open(inner).remove_folder()

        assert not self.folder(inner).exists()

    def test_listing_a_folder_that_is_not_there(self, place: Path) -> None:
        """It is not found, rather than empty."""
        with pytest.raises(FileNotFoundError):
            list(self.open(place / "nowhere").list())

    def test_other_folders_links_and_pipes_are_not_listed(self, storage: Storage, place: Path) -> None:
        """Snapshots may nest, and people keep other things there."""
        folder = self.folder(place)
        storage.create(SMALL, b"12345", token=TOKEN)
        (folder / "nested").mkdir()
        (folder / "nested" / SMALL).write_bytes(b"another snapshot")
        (folder / "link").symlink_to("/etc/hostname")
        os.mkfifo(folder / "pipe")
        names = self._names(storage)
        for name in ("link", "pipe"):
            (folder / name).unlink()

        assert [SMALL] == names

    @pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "device", "folder"])
    def test_what_is_no_regular_file_is_refused(self, storage: Storage, place: Path, kind: str) -> None:
        """At once: a pipe that nobody writes to would wait for ever."""
        path = self.folder(place) / DATA
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to({"link": "/etc/hostname", "dangling link": "/nowhere/at/all", "device": "/dev/zero"}[kind])
        for look in (storage.open_file, storage.read, storage.stat):
            with pytest.raises(UnsafeFileError):
                look(DATA)
        for create in (lambda: storage.create_file(DATA, 1), lambda: storage.create(DATA, b"x", token=TOKEN)):
            with pytest.raises(FileExistsError):
                create()
        if kind != "folder":
            storage.delete(DATA)
            assert not path.is_symlink()
            assert not path.exists()

    def test_links_to_folders_are_not_followed(self, storage: Storage, place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        """A ``base`` that leads elsewhere is neither read nor written through nor listed."""
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        name = BASE.removeprefix("base/")
        (elsewhere / name).write_bytes(b"theirs")
        (self.folder(place) / "base").symlink_to(elsewhere)
        for operation in (storage.open_file, storage.read, storage.stat, lambda name: storage.create_file(f"{name}.new", 1)):
            with pytest.raises(UnsafeFileError):
                operation(BASE)
        names = self._names(storage)
        with pytest.raises(UnsafeFileError):
            storage.delete(BASE)
        (self.folder(place) / "base").unlink()

        assert [] == names
        assert [name] == sorted(item.name for item in elsewhere.iterdir())
        assert b"theirs" == (elsewhere / name).read_bytes()
