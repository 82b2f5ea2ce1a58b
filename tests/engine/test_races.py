"""Several at one place: one wins, the others are told so and leave nothing; and several at many places do not meet."""

from __future__ import annotations

import functools
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Snapshot, gc
from expstate.engine import memory
from expstate.errors import (
    ExpstateError,
    SnapshotExistsError,
    SnapshotNotFoundError,
    SnapshotReplacedError,
)
from expstate.storage.local import LocalStorage
from expstate.testing import FaultyStorage

from .crashes import EARLIER, PLACE, assert_clean, found_at, prepare, state, value_of
from .processes import Ended, end_of, in_child, start_child

RACERS = 5


def race(actions: list[Callable[[], Any]]) -> list[Ended]:
    """Run each in a process of its own, all at the same time."""
    children = [start_child(action, wait=True) for action in actions]
    for _, _, let_begin in children:
        os.close(let_begin)
    return [end_of(child, result) for child, result, _ in children]


def outcome(action: Callable[[], Any]) -> str:
    """``"won"``, or the name of the error of ours."""
    try:
        ended = action()
        if hasattr(ended, "wait"):
            ended.wait()
    except ExpstateError as error:
        return type(error).__name__
    return "won"


@pytest.mark.parametrize("take", [Snapshot.take, Snapshot.async_take])
@pytest.mark.parametrize("folder_is_there", [False, True])
def test_of_several_processes_that_take_to_one_path_one_wins(tmp_path: Path, take: Callable[..., Any], folder_is_there: bool) -> None:
    for number in range(6):
        place = tmp_path / str(number) / PLACE
        if folder_is_there:
            place.mkdir(parents=True)
        takes = [functools.partial(take, place, state(value)) for value in range(RACERS)]
        outcomes = [ended.result for ended in race([functools.partial(outcome, one) for one in takes])]

        assert ["SnapshotExistsError"] * (RACERS - 1) + ["won"] == sorted(outcomes)
        assert outcomes.index("won") == found_at(place)
        (place.parent / EARLIER).mkdir()
        assert_clean(place.parent)


def test_of_several_processes_that_overwrite_at_least_one_wins(tmp_path: Path) -> None:
    for number in range(6):
        root = tmp_path / str(number)
        prepare(root, "overwrite")
        takes = [functools.partial(Snapshot.take, root / PLACE, state(value), overwrite=True) for value in range(10, 10 + RACERS)]
        outcomes = [ended.result for ended in race([functools.partial(outcome, one) for one in takes])]

        assert {"won", "SnapshotExistsError"} >= set(outcomes)
        assert found_at(root / PLACE) in {10 + index for index, ended in enumerate(outcomes) if ended == "won"}
        assert_clean(root)


def test_of_several_processes_that_copy_to_one_path_one_wins(tmp_path: Path) -> None:
    """They would use the same names, since copies keep them."""
    for number in range(6):
        root = tmp_path / str(number)
        prepare(root, "copy")
        copies = [functools.partial(outcome, functools.partial(Snapshot(root / EARLIER).copy, root / PLACE)) for _ in range(RACERS)]
        outcomes = [ended.result for ended in race(copies)]

        assert ["SnapshotExistsError"] * (RACERS - 1) + ["won"] == sorted(outcomes)
        assert 1 == found_at(root / PLACE)
        assert_clean(root)


def test_of_several_processes_that_delete_one_does(tmp_path: Path) -> None:
    for number in range(6):
        root = tmp_path / str(number)
        prepare(root, "delete")
        outcomes = [ended.result for ended in race([functools.partial(outcome, Snapshot(root / PLACE).delete) for _ in range(RACERS)])]

        assert 1 == outcomes.count("won")
        assert {"won", "SnapshotExistsError", "SnapshotNotFoundError", "SnapshotReplacedError"} >= set(outcomes)
        assert not (root / PLACE).exists()


def test_what_replaces_a_snapshot_is_not_deleted_in_its_place(tmp_path: Path) -> None:
    """Whoever deletes means the snapshot that they saw."""
    prepare(tmp_path, "delete")
    storage = FaultyStorage(LocalStorage(str(tmp_path / PLACE)))
    storage.run("delete", 1, function=lambda: Snapshot.take(tmp_path / PLACE, state(3), overwrite=True), names="snapshot.json")
    with pytest.raises(SnapshotReplacedError):
        Snapshot(storage.url).delete()

    assert 3 == found_at(tmp_path / PLACE)
    assert_clean(tmp_path)


def test_a_snapshot_that_came_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    """Whoever overwrites means the snapshot that they saw; whoever does not, none."""
    for action in ("take", "overwrite"):
        root = tmp_path / action
        prepare(root, action)
        storage = FaultyStorage(LocalStorage(str(root / PLACE)))
        storage.run("stat", 1, function=functools.partial(Snapshot.take, root / PLACE, state(4), overwrite=action == "overwrite"))
        with pytest.raises(SnapshotExistsError, match="at the same time"):
            Snapshot.take(storage.url, state(3), overwrite=action == "overwrite")

        assert 4 == found_at(root / PLACE)
        assert_clean(root)


def test_a_folder_that_another_take_removes_is_made_again(tmp_path: Path) -> None:
    storage = FaultyStorage(LocalStorage(str(tmp_path / PLACE)))
    storage.run("create", 1, function=(tmp_path / PLACE).rmdir)
    Snapshot.take(storage.url, state(3))

    assert 3 == found_at(tmp_path / PLACE)


def _remove(folder: Path) -> None:
    """Remove a folder though files are being put there."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("operation", ["create_file", "flush", "stat"])
@pytest.mark.parametrize("action", ["take", "copy"])
def test_a_folder_that_someone_removes_is_an_error_of_ours(tmp_path: Path, operation: str, action: str) -> None:
    prepare(tmp_path, action)
    storage = FaultyStorage(LocalStorage(str(tmp_path / PLACE)))
    storage.run(operation, 1, function=functools.partial(_remove, tmp_path / PLACE))
    with pytest.raises(ExpstateError, match=r"gone|now has"):
        Snapshot.take(storage.url, state(3)) if action == "take" else Snapshot(tmp_path / EARLIER).copy(storage.url)

    assert found_at(tmp_path / PLACE) is None


def test_takes_clean_up_and_deletions_do_not_meet(tmp_path: Path) -> None:
    """Takes to places of their own, each looked at by gc all the time, each deleted when it is there."""
    is_over = threading.Event()
    reports = []

    def collect() -> None:
        while not is_over.is_set():
            reports.append(gc(tmp_path))

    def take(number: int) -> int | None:
        place = tmp_path / f"{number}"
        for _ in range(3):
            Snapshot.take(place, state(number))
            assert number == found_at(place)
            Snapshot(place).delete()
        return Snapshot.async_take(place, state(number)).wait() and found_at(place)

    collector = threading.Thread(target=collect)
    collector.start()
    with ThreadPoolExecutor(4) as pool:
        values = list(pool.map(take, range(4)))
    is_over.set()
    collector.join()

    assert [0, 1, 2, 3] == values
    assert reports
    assert {()} == {report.removed for report in reports}


def test_several_threads_take_to_one_path(tmp_path: Path) -> None:
    barrier = threading.Barrier(RACERS)

    def take(value: int) -> str:
        barrier.wait()
        return outcome(functools.partial(Snapshot.take, tmp_path / PLACE, state(value)))

    with ThreadPoolExecutor(RACERS) as pool:
        outcomes = list(pool.map(take, range(RACERS)))

    assert ["SnapshotExistsError"] * (RACERS - 1) + ["won"] == sorted(outcomes)
    assert outcomes.index("won") == found_at(tmp_path / PLACE)


def test_one_snapshot_is_read_by_several_threads(tmp_path: Path) -> None:
    snapshot = Snapshot.take(tmp_path / PLACE, state(5))

    def read(number: int) -> bool:
        if number % 3 == 0:
            return snapshot.verify().ok
        if number % 3 == 1:
            return torch.equal(state(5)["model"]["weight"], snapshot.read_object("model/weight"))
        return value_of(snapshot) == 5

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, range(60)))


# Readers and those who replace


def test_a_restore_that_has_begun_goes_on_when_the_snapshot_is_replaced(tmp_path: Path) -> None:
    prepare(tmp_path, "overwrite")
    storage = FaultyStorage(LocalStorage(str(tmp_path / PLACE)))
    storage.run("read_into", 1, function=functools.partial(Snapshot.take, tmp_path / PLACE, state(3), overwrite=True))

    assert 2 == value_of(Snapshot(storage.url))
    assert 3 == found_at(tmp_path / PLACE)


def test_a_snapshot_that_was_opened_and_then_replaced_says_so(tmp_path: Path) -> None:
    prepare(tmp_path, "overwrite")
    snapshot = Snapshot(tmp_path / PLACE)
    snapshot.keys()
    Snapshot.take(tmp_path / PLACE, state(3), overwrite=True)
    live = state(7)
    with pytest.raises(SnapshotReplacedError):
        snapshot.restore(live)
    with pytest.raises(SnapshotReplacedError):
        snapshot.read_object("model/weight")

    assert torch.equal(state(7)["model"]["weight"], live["model"]["weight"])


def test_a_snapshot_that_was_opened_and_then_deleted_says_so(tmp_path: Path) -> None:
    prepare(tmp_path, "delete")
    snapshot = Snapshot(tmp_path / PLACE)
    snapshot.keys()
    Snapshot(tmp_path / PLACE).delete()
    with pytest.raises(SnapshotReplacedError):
        snapshot.restore(state(7))
    with pytest.raises(SnapshotNotFoundError):
        snapshot.delete()


# Processes that split


def test_a_fork_with_warm_staging_memory_takes_and_restores(tmp_path: Path) -> None:
    """Parent and child have copies of idle buffers, and neither has a use for the other's."""
    Snapshot.take(tmp_path / EARLIER, state(1))
    assert memory._pool.idle_bytes > 0

    def take() -> int | None:
        Snapshot.take(tmp_path / "child", state(2))
        Snapshot.async_take(tmp_path / "child again", state(3)).wait()
        return found_at(tmp_path / "child")

    child, result, let_begin = start_child(take)
    Snapshot.take(tmp_path / "parent", state(4))
    os.close(let_begin)

    assert 2 == end_of(child, result).result
    assert [1, 2, 3, 4] == [found_at(tmp_path / name) for name in (EARLIER, "child", "child again", "parent")]


def test_a_fork_may_read_what_its_parent_has_open(tmp_path: Path) -> None:
    snapshot = Snapshot.take(tmp_path / PLACE, state(5))

    assert 5 == in_child(functools.partial(value_of, snapshot)).result
    assert 5 == value_of(snapshot)
