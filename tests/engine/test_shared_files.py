"""A snapshot that shares files with others stands alone: whatever becomes of one, the others are as they were."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expstate import Snapshot, gc
from expstate.errors import SnapshotCorruptError
from expstate.format import names
from tests.engine.leftovers import DEAD, LIVING, data_name, lease
from tests.engine.shared import listing, room, state, take_shared

RUNS = "runs"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / RUNS
    folder.mkdir()
    return folder


def shared_file(snapshot: Snapshot) -> Path:
    (name,) = [record.name for record in snapshot.manifest.files if "frozen" in record.name]
    return Path(snapshot.path) / name


def is_whole(snapshot: Snapshot, step: int) -> bool:
    """Whether every byte is there and right."""
    live, expected = state(-1), state(step)
    live["frozen"]["w"].zero_()
    opened = Snapshot(snapshot.path)
    opened.restore(live)
    return opened.verify().ok and all(torch.equal(expected[key]["w"], live[key]["w"]) for key in expected)


def test_they_do_share_a_file(runs: Path) -> None:
    """Else nothing here would be shown."""
    taken = take_shared(runs, 3)

    assert 1 == len({shared_file(snapshot).stat().st_ino for snapshot in taken})
    assert 3 == shared_file(taken[0]).stat().st_nlink
    assert all(is_whole(snapshot, step) for step, snapshot in enumerate(taken))


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_deleting_one_leaves_the_others_whole(runs: Path, gone: int) -> None:
    """All of it goes, the empty folder of shared files too, and nothing else."""
    taken = take_shared(runs, 3)
    before = {step: listing(runs / str(step)) for step in range(3)}
    taken[gone].delete()

    assert sorted({"0", "1", "2"} - {str(gone)}) == sorted(path.name for path in runs.iterdir())
    for step in {0, 1, 2} - {gone}:
        assert before[step] == listing(runs / str(step))
        assert is_whole(taken[step], step)


def test_what_others_keep_in_the_folder_of_shared_files_stays(runs: Path) -> None:
    """A deletion names each file that it removes."""
    _, later = take_shared(runs, 2)
    theirs = ["base/notes.txt", f"base/{data_name(LIVING)}"]
    for name in theirs:
        (runs / "1" / name).write_text("theirs")
    later.delete()

    assert ["base", *sorted(theirs)] == listing(runs / "1")


def test_the_folder_of_shared_files_is_not_followed_out_of_the_snapshot(runs: Path, tmp_path: Path) -> None:
    """Put there instead of the real one, a link saves what it leads to."""
    _, later = take_shared(runs, 2)
    elsewhere = tmp_path / "elsewhere"
    (runs / "1" / "base").rename(elsewhere)
    (runs / "1" / "base").symlink_to(elsewhere)
    with pytest.raises(Exception, match="link"):
        later.delete()

    assert 1 == len(listing(elsewhere))


@pytest.mark.parametrize("by", ["full", "shared"])
def test_overwriting_removes_the_shared_files_of_what_was_there(runs: Path, by: str) -> None:
    """Here, and not where they came from."""
    first, second = take_shared(runs, 2)
    third = Snapshot.take(second.path, state(7), overwrite=True, base=first if by == "shared" else None)

    assert is_whole(first, 0)
    assert is_whole(third, 7)
    expected = {*(record.name for record in third.manifest.files), names.MANIFEST, *(["base"] if by == "shared" else [])}
    assert sorted(expected) == listing(runs / "1")
    assert (2 if by == "shared" else 1) == shared_file(first).stat().st_nlink


def test_a_copy_has_the_files_to_itself(runs: Path, tmp_path: Path) -> None:
    """Under the names that they had, and it outlives all others."""
    taken = take_shared(runs, 2)
    copied = taken[1].copy(tmp_path / "copy")
    assert taken[1].manifest.files == copied.manifest.files
    for snapshot in taken:
        snapshot.delete()

    assert is_whole(copied, 1)
    assert 1 == shared_file(copied).stat().st_nlink
    assert room(tmp_path) == copied.nbytes_unique
    copied.delete()
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    "copy",
    [shutil.copytree, lambda old, new: shutil.copytree(old, new, copy_function=os.link)],
    ids=["cp -r", "cp -rl"],
)
def test_a_copied_folder_is_a_snapshot(runs: Path, copy: Callable[[Path, Path], object]) -> None:
    _, later = take_shared(runs, 2)
    copy(runs / "1", runs / "copy")
    later.delete()
    (runs / "0").rename(runs / "moved")

    assert is_whole(Snapshot(runs / "copy"), 1)


def test_damage_of_a_shared_file_is_named_in_each(runs: Path) -> None:
    """By the name that it has there."""
    taken = take_shared(runs, 3)
    path = shared_file(taken[0])
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff" * 8)

    for snapshot in taken:
        report = Snapshot(snapshot.path).verify()
        assert not report.ok
        assert [("frozen/w", str(shared_file(snapshot).relative_to(snapshot.path)))] == [
            (damage.entry, damage.file) for damage in report.damages
        ]
        with pytest.raises(SnapshotCorruptError, match="frozen/w"):
            snapshot.read_object("frozen/w")


def test_a_shared_file_that_was_removed_by_hand_is_missed_there_alone(runs: Path) -> None:
    first, second = take_shared(runs, 2)
    shared_file(second).unlink()

    assert is_whole(first, 0)
    assert not Snapshot(second.path).verify().ok


def test_what_is_not_of_the_snapshot_is_told_apart(runs: Path) -> None:
    """Its shared files are its own."""
    _, later = take_shared(runs, 2)
    assert () == Snapshot(later.path).verify().unknown_files
    (runs / "1" / "base" / data_name(LIVING)).write_bytes(b"another's")

    assert (f"base/{data_name(LIVING)}",) == Snapshot(later.path).verify().unknown_files


def test_gc_removes_the_shared_files_of_a_dead_attempt(runs: Path) -> None:
    """Where they came from they stay, and their bytes do not count as freed."""
    (first,) = take_shared(runs, 1)
    folder = runs / "dead"
    its = lease(folder)
    (folder / "base").mkdir()
    os.link(shared_file(first), folder / "base" / data_name())
    (folder / data_name()).write_bytes(b"x" * 10)
    before = room(runs)
    planned = gc(runs, dry_run=True).nbytes
    report = gc(runs)

    assert not folder.exists()
    assert (f"base/{data_name()}", data_name(), its.name) == report.removed[0].files[-3:]
    assert before - room(runs) == report.nbytes == planned
    assert is_whole(first, 0)


def test_gc_leaves_the_shared_files_of_a_snapshot(runs: Path) -> None:
    """Beside what a dead attempt has left there."""
    taken = take_shared(runs, 2)
    lease(runs / "1")
    (runs / "1" / "base" / data_name(DEAD)).write_bytes(b"x" * 10)
    before = {step: listing(runs / str(step)) for step in range(2)}
    (leftover,) = gc(runs).removed

    assert (f"base/{data_name(DEAD)}", names.lease_name(DEAD[:8])) == leftover.files
    assert [name for name in before[1] if name not in leftover.files] == listing(runs / "1")
    assert all(is_whole(snapshot, step) for step, snapshot in enumerate(taken))


def test_a_deletion_that_was_interrupted_is_finished(runs: Path) -> None:
    """The lease leads to the shared files, which have lost their manifest."""
    first, second = take_shared(runs, 2)
    files = tuple(record.name for record in second.manifest.files)
    (runs / "1" / names.MANIFEST).unlink()
    lease(runs / "1", second.id, "delete", files)
    gc(runs)

    assert not (runs / "1").exists()
    assert is_whole(first, 0)
