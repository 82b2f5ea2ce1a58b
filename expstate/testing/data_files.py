"""Tests of data files: what is written is there, in whatever order it came, and is read back by ranges."""
# ruff: noqa: SIM300 - the expected value stands first

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from expstate.errors import ExpstateError
from expstate.settings import MIB
from expstate.testing.cases import BASE, DATA, SMALL, TOKEN, StorageCase, aligned, random_bytes, same_bytes, together

if TYPE_CHECKING:
    from expstate.storage.base import Storage

SIZES = [0, 1, 100, 4095, 4096, 4097, 12_288, MIB, MIB + 1, 3 * MIB + 5000]


class DataFileTests(StorageCase):
    """What the engine relies on in data files."""

    @pytest.mark.parametrize("size", SIZES)
    def test_a_data_file_holds_what_was_written(self, storage: Storage, size: int) -> None:
        """Whatever its size, and it has just that size."""
        data = random_bytes(size)
        self.put(storage, DATA, data)

        assert same_bytes(data, self.read(storage, DATA, 0, size))
        assert same_bytes(data, storage.read(DATA))
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

        assert same_bytes(data, storage.read(DATA))
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

        assert same_bytes(data, storage.read(DATA))

    def test_a_data_file_is_created_once(self, storage: Storage) -> None:
        """A name that is taken is refused, at the latest when the file is finished, and what has it stays."""
        self.put(storage, DATA, b"first")
        with pytest.raises(FileExistsError):
            self.put(storage, DATA, b"second")

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

        assert [DATA] == self.names(storage)

    def test_a_data_file_of_the_base_folder_is_a_file_like_others(self, storage: Storage) -> None:
        """It is written, listed, read and removed by its name."""
        data = random_bytes(5000)
        self.put(storage, BASE, data)
        storage.flush()

        assert [BASE] == self.names(storage)
        assert same_bytes(data, self.read(storage, BASE, 0, len(data)))
        assert len(data) == storage.stat(BASE).size
        storage.delete(BASE)
        assert [] == self.names(storage)

    # Reading

    def test_any_range_of_a_file_is_read(self, storage: Storage) -> None:
        """Aligned or not, from the first byte to the last."""
        data = random_bytes(3 * MIB + 777)
        self.put(storage, DATA, data)
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
                dice.choice([reader.read_into, reader.read_cached_into])(offset, target)
                expected = data[offset : offset + length]
                assert same_bytes(expected, bytes(target[: len(expected)]))
                assert isinstance(reader.is_cached(offset, length), bool)

    def test_a_read_that_goes_beyond_the_end_stops_there(self, storage: Storage) -> None:
        """What lies after the file's last byte in the target is anything."""
        data = random_bytes(5000)
        self.put(storage, DATA, data)

        assert same_bytes(data, self.read(storage, DATA, 0, 8192)[:5000])
        assert same_bytes(data[4096:], self.read(storage, DATA, 4096, 4096)[:904])

    def test_a_file_is_read_by_several_threads(self, storage: Storage) -> None:
        """One reader serves them all."""
        data = random_bytes(4 * MIB)
        self.put(storage, DATA, data)
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
                assert same_bytes(old, bytes(target))

    def test_what_is_not_there_is_not_found(self, storage: Storage) -> None:
        """By every way of looking."""
        for look in (storage.open_file, storage.read, storage.stat):
            with pytest.raises(FileNotFoundError):
                look("nothing-00001-3f9a2c71.safetensors")
