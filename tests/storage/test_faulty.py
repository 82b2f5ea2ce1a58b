"""A faulty storage fails where it was told to, and does nothing else to what goes through it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from expstate import Snapshot, StateDict
from expstate.errors import InvalidArgumentError, StorageError
from expstate.storage.base import Storage
from expstate.storage.local import LocalStorage
from expstate.storage.registry import open_storage
from expstate.testing import Call, FaultyStorage
from expstate.testing.cases import DATA, SMALL, TOKEN, aligned, random_bytes
from expstate.testing.data_files import DataFileTests
from expstate.testing.shared_files import SharedFileTests
from expstate.testing.small_files import SmallFileTests


class TestFaultyStorageWithoutFaults(DataFileTests, SmallFileTests, SharedFileTests):
    """It is as good as the storage under it."""

    # Another process cannot reach it.
    test_of_several_processes_that_create_a_file_one_wins = None

    def open(self, place: Path) -> Storage:
        return FaultyStorage(LocalStorage(str(place)))


@pytest.fixture
def faulty(tmp_path: Path) -> FaultyStorage:
    return FaultyStorage(LocalStorage(str(tmp_path)))


BROKEN = StorageError("broken", errno.EIO)


def test_the_chosen_call_fails_and_no_other(faulty: FaultyStorage) -> None:
    faulty.fail("create", 2, error=BROKEN)
    faulty.create("1.json", b"1", token=TOKEN)
    with pytest.raises(StorageError, match="broken"):
        faulty.create("2.json", b"2", token=TOKEN)
    faulty.create("3.json", b"3", token=TOKEN)

    assert ["1.json", "3.json"] == sorted(info.name for info in faulty.list())
    assert [Call("create", "1.json"), Call("create", "2.json"), Call("create", "3.json"), Call("list", "")] == faulty.calls


def test_calls_are_counted_among_those_of_matching_names(faulty: FaultyStorage) -> None:
    faulty.fail("create", 2, error=BROKEN, names="*.json")
    for name in ("1.json", "1.txt", "2.txt"):
        faulty.create(name, b"1", token=TOKEN)
    with pytest.raises(StorageError, match="broken"):
        faulty.create("2.json", b"2", token=TOKEN)


def test_every_call_fails_until_it_is_healed(faulty: FaultyStorage) -> None:
    faulty.fail("flush", None, error=BROKEN)
    for _ in range(3):
        with pytest.raises(StorageError, match="broken"):
            faulty.flush()
    faulty.heal()
    faulty.flush()


def test_a_call_may_fail_after_it_was_done(faulty: FaultyStorage) -> None:
    faulty.fail("create", error=BROKEN, done=True)
    with pytest.raises(StorageError, match="broken"):
        faulty.create(SMALL, b"there", token=TOKEN)

    assert b"there" == faulty.read(SMALL)


def test_bits_are_flipped_in_what_is_written_and_read(faulty: FaultyStorage, tmp_path: Path) -> None:
    faulty.flip("create", byte=1, bit=3)
    faulty.create(SMALL, b"\0\0\0", token=TOKEN)
    assert b"\0\x08\0" == (tmp_path / SMALL).read_bytes()
    faulty.flip("read", byte=-1)
    assert b"\0\x08\x01" == faulty.read(SMALL)
    assert b"\0\x08\0" == faulty.read(SMALL)

    faulty.flip("write", byte=4097, bit=7)
    writer = faulty.create_file(DATA, 8192)
    writer.write(0, aligned(bytes(8192)))
    writer.finish()
    written = (tmp_path / DATA).read_bytes()
    assert (4097, 0x80) == (written.index(b"\x80"), sum(written))
    faulty.flip("read_into", byte=0)
    with faulty.open_file(DATA) as reader:
        target = aligned(bytes(4096))
        reader.read_into(0, target)
        assert 1 == sum(target)
        reader.read_into(0, target)
        assert 0 == sum(target)


def test_lost_writes_are_not_there(faulty: FaultyStorage, tmp_path: Path) -> None:
    data = random_bytes(3 * 8192)
    faulty.lose("write", 2)
    faulty.lose("write", 3, keep=4096)
    writer = faulty.create_file(DATA, len(data))
    for start in range(0, len(data), 8192):
        writer.write(start, aligned(data[start : start + 8192]))

    assert [(8192, 16384), (20480, 24576)] == list(writer.finish())
    assert data[:8192] + bytes(8192) + data[16384:20480] + bytes(4096) == (tmp_path / DATA).read_bytes()


def test_a_function_runs_at_a_call(faulty: FaultyStorage) -> None:
    seen = []
    faulty.run("create", 2, function=lambda: seen.append(len(faulty.calls)))
    for number in range(3):
        faulty.create(f"{number}.json", b"", token=TOKEN)

    assert [2] == seen


def test_what_cannot_be_done_is_refused(faulty: FaultyStorage) -> None:
    with pytest.raises(InvalidArgumentError, match="no operation 'fsync'"):
        faulty.fail("fsync", error=BROKEN)
    with pytest.raises(InvalidArgumentError, match="no bytes"):
        faulty.flip("delete")
    with pytest.raises(InvalidArgumentError, match="no bytes"):
        faulty.lose("read_into")


def test_snapshots_reach_it_by_its_url(faulty: FaultyStorage) -> None:
    Snapshot.take(faulty.url, {"progress": StateDict(step=3)})

    assert 3 == Snapshot(faulty.url).read_object("progress/step")
    assert Call("create", SMALL) in faulty.calls
    assert faulty is open_storage(faulty.url)


def test_a_url_is_good_as_long_as_its_storage_lives(tmp_path: Path) -> None:
    url = FaultyStorage(LocalStorage(str(tmp_path))).url
    with pytest.raises(InvalidArgumentError, match="no storage of this process"):
        open_storage(url)
