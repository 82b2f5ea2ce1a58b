"""How much room snapshots take up, and how much their deletion frees, is what the disk says before and after."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.engine.space import Space, nbytes_unique
from expstate.errors import StorageError
from expstate.storage import memory
from expstate.storage.base import Storage
from expstate.storage.local import LocalStorage
from expstate.storage.registry import open_storage
from expstate.testing import FaultyStorage
from tests.engine.shared import SIZE, room, take_shared

COUNT = 4


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("gone", [range(COUNT), range(COUNT)[::-1], (2, 0, 3, 1)], ids=str)
def test_what_is_unique_is_what_a_deletion_frees(runs: Path, gone: tuple[int, ...]) -> None:
    """One after the other: the last that shares a file frees it."""
    taken = take_shared(runs, COUNT)
    for step in gone:
        before, unique = room(runs), taken[step].nbytes_unique
        taken[step].delete()
        assert before - room(runs) == unique

    assert 0 == room(runs)


@pytest.mark.parametrize("count", range(1, COUNT + 1))
def test_a_shared_file_counts_if_all_that_share_it_go(runs: Path, count: int) -> None:
    """Of every choice of snapshots."""
    taken = take_shared(runs, COUNT)
    everything = room(runs)
    for chosen in itertools.combinations(taken, count):
        space = Space()
        assert all(space.add(open_storage(snapshot.path), snapshot.id) for snapshot in chosen)
        sizes = sum(path.stat().st_size for snapshot in chosen for path in Path(snapshot.path).rglob("*") if path.stat().st_nlink == 1)
        assert (everything if count == COUNT else sizes) == space.nbytes_unique
        assert (count == COUNT) == (space.nbytes_unique > 4 * SIZE)


def test_a_snapshot_that_shares_nothing_is_unique(runs: Path) -> None:
    """Data files, manifest and annotations; not what others keep in its folder."""
    (snapshot,) = take_shared(runs, 1)
    before = room(runs)
    (runs / "0" / "notes.txt").write_bytes(bytes(1000))
    (runs / "0" / "annotations.json").write_bytes(b"{}")

    assert before + 2 == snapshot.nbytes_unique
    assert before > snapshot.nbytes_written > snapshot.nbytes


def test_what_was_written_is_what_lies_outside_of_base(runs: Path) -> None:
    """It stays what it was whatever becomes of the others."""
    first, second = take_shared(runs, 2)
    for snapshot in (first, second):
        files = [path for path in Path(snapshot.path).glob("*.safetensors") if path.parent.name != "base"]
        assert sum(path.stat().st_size for path in files) == snapshot.nbytes_written
    assert first.nbytes == second.nbytes > second.nbytes_written
    written = second.nbytes_written
    first.delete()
    assert written == Snapshot(second.path).nbytes_written


def test_a_link_that_is_no_snapshots_counts_too(runs: Path, tmp_path: Path) -> None:
    """Such as that of a backup: the bytes do not get free."""
    (snapshot,) = take_shared(runs, 1)
    whole = snapshot.nbytes_unique
    (file,) = (runs / "0").glob("frozen*")
    os.link(file, tmp_path / "backup")

    assert whole is not None
    assert whole - file.stat().st_size == snapshot.nbytes_unique


def test_a_folder_that_comes_twice_counts_once(runs: Path) -> None:
    (snapshot,) = take_shared(runs, 1)
    space = Space()
    for _ in range(2):
        assert space.add(open_storage(snapshot.path), snapshot.id)

    assert snapshot.nbytes_unique == space.nbytes_unique


def test_of_a_snapshot_that_is_not_there_nothing_is_known(runs: Path) -> None:
    """Whether it was deleted or another lies there."""
    first, second = take_shared(runs, 2)
    assert nbytes_unique(open_storage(first.path), second.id) is None
    Snapshot(first.path).delete()

    assert first.nbytes_unique is None
    assert second.nbytes_unique == room(runs)


@pytest.mark.parametrize("operation", ["list", "links", "open_file"])
def test_of_a_folder_that_cannot_be_read_nothing_is_known(runs: Path, operation: str) -> None:
    (snapshot,) = take_shared(runs, 1)
    faulty = FaultyStorage(LocalStorage(snapshot.path))
    faulty.fail(operation, None, error=StorageError("broken"))

    assert nbytes_unique(faulty, snapshot.id) is None
    faulty.heal()
    assert room(runs) == nbytes_unique(faulty, snapshot.id)


@pytest.fixture(params=["ram", "memory"])
def elsewhere(request: pytest.FixtureRequest) -> Iterator[Storage]:
    """Storages that are no disk."""
    storage = open_storage(f"{request.param}://tests/{request.node.name}")
    yield storage
    for info in list(storage.list()):
        storage.delete(info.name)
    memory.forget(f"tests/{request.node.name}")


def test_where_nothing_is_shared_all_of_it_is_unique(elsewhere: Storage) -> None:
    """On object stores and in memory."""
    snapshot = Snapshot.take(elsewhere.url, {"head": StateDict(w=torch.ones(3000))})

    assert sum(info.size for info in elsewhere.list()) == snapshot.nbytes_unique
    assert 12_000 == snapshot.nbytes < snapshot.nbytes_written < (snapshot.nbytes_unique or 0)
