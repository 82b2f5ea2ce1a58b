"""Garbage collection removes what the dead left, all of it, and can be interrupted anywhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from expstate import gc
from expstate.engine.attempt import Attempt
from expstate.errors import StorageError
from expstate.format import names
from expstate.storage.local import LocalStorage
from tests.engine.leftovers import DEAD, LIVING, age, data_name, lease, listing, put, take

# What is removed


def test_what_a_dead_attempt_left_is_removed(tmp_path: Path) -> None:
    """Its data files, its temporary files, its lease and the folder if that is empty then."""
    folder = tmp_path / "run"
    put(
        folder,
        data_name(),
        data_name(number=2),
        "base/" + data_name(),
        f".snapshot.json.{DEAD[:8]}",
        f"..attempt-{DEAD[:8]}.json.{DEAD[:8]}",
    )
    its = lease(folder)
    size = its.stat().st_size
    report = gc(tmp_path)

    assert not folder.exists()
    (leftover,) = report.removed
    assert (str(folder), DEAD[:8], "take") == (leftover.url, leftover.attempt, leftover.action)
    assert 5 * 10 + size == leftover.nbytes == report.nbytes
    assert ((), ()) == (report.alive, report.damaged)


def test_the_lease_goes_last(tmp_path: Path) -> None:
    """As long as anything is left it can be found by its lease, so a collection may be interrupted anywhere."""
    put(tmp_path, data_name(), data_name(number=2), data_name(number=3))
    its = lease(tmp_path)
    really_delete = LocalStorage.delete
    deleted: list[str] = []

    def delete(storage: LocalStorage, name: str, **named: Any) -> None:
        if len(deleted) == 2:
            raise KeyboardInterrupt
        deleted.append(name)
        really_delete(storage, name, **named)

    with patch.object(LocalStorage, "delete", delete), pytest.raises(KeyboardInterrupt):
        gc(tmp_path)

    assert 2 == len(listing(tmp_path))
    assert its.exists()
    (leftover,) = gc(tmp_path).removed
    assert its.name == leftover.files[-1]
    assert ["(gone)"] == listing(tmp_path)


def test_a_dry_run_removes_nothing(tmp_path: Path) -> None:
    """It reports what would go, and the same goes then."""
    put(tmp_path, data_name(), "notes.txt")
    lease(tmp_path)
    before = listing(tmp_path)
    planned = gc(tmp_path, dry_run=True)

    assert before == listing(tmp_path)
    assert planned == gc(tmp_path)
    assert ["notes.txt"] == listing(tmp_path)


def test_leftovers_of_several_attempts_in_several_folders(tmp_path: Path) -> None:
    """Each is reported by itself, wherever it is below the folder."""
    other = "abad1dea" * 4
    for folder in (tmp_path / "a", tmp_path / "b" / "c"):
        put(folder, data_name(), data_name(other))
        lease(folder)
        lease(folder, other)
    report = gc(tmp_path)

    assert sorted(
        [(str(tmp_path / "a"), n[:8]) for n in (DEAD, other)] + [(str(tmp_path / "b/c"), n[:8]) for n in (DEAD, other)]
    ) == sorted((leftover.url, leftover.attempt) for leftover in report.removed)
    assert ["b"] == listing(tmp_path)


def test_a_torn_commit_is_removed_with_its_attempt(tmp_path: Path) -> None:
    """A manifest that was never finished protects nothing; its data files go."""
    folder = tmp_path / "run"
    put(folder, data_name())
    (folder / names.MANIFEST).write_bytes(b'{"format":1,"id":"' + DEAD.encode())
    lease(folder)
    gc(tmp_path)

    assert [names.MANIFEST] == listing(folder)


def test_a_lease_that_was_never_finished_is_removed_when_it_is_old(tmp_path: Path) -> None:
    """A temporary file that was to be a lease, or a lease without content, tells its age and no more."""
    for folder, name in ((tmp_path / "a", names.lease_name(DEAD[:8])), (tmp_path / "b", f"..attempt-{DEAD[:8]}.json.{DEAD[:8]}")):
        put(folder, name, data_name())
        (folder / name).write_bytes(b"")
        assert (folder.as_posix() + "/" + name,) == gc(folder).alive
        age(folder / name)
        gc(folder)
        assert not folder.exists()


# Overwritten, copied, deleted


def test_an_overwrite_that_died_after_its_commit_is_finished(tmp_path: Path) -> None:
    """The replaced snapshot's files carry another id; the lease names them."""
    snapshot = take(tmp_path / "run")
    put(tmp_path / "run", data_name(LIVING))
    lease(tmp_path / "run", snapshot.id, named=(data_name(LIVING),))
    (leftover,) = gc(tmp_path).removed

    assert (data_name(LIVING), names.lease_name(snapshot.id[:8])) == leftover.files
    assert snapshot.verify().ok
    assert 2 == len(listing(tmp_path / "run"))


def test_an_overwrite_that_died_before_its_commit_leaves_the_old_snapshot(tmp_path: Path) -> None:
    """What the lease names is needed as long as the manifest names it too."""
    snapshot = take(tmp_path / "run")
    (record,) = snapshot.manifest.files
    put(tmp_path / "run", data_name())
    lease(tmp_path / "run", named=(record.name,))
    gc(tmp_path)

    assert sorted([record.name, names.MANIFEST]) == listing(tmp_path / "run")
    assert snapshot.verify().ok


def test_a_deletion_that_died_is_finished(tmp_path: Path) -> None:
    """Its lease names the files of the snapshot; annotations go with them, notes do not."""
    folder = tmp_path / "run"
    put(folder, data_name(LIVING), names.ANNOTATIONS, "notes.txt")
    lease(folder, LIVING, "delete", (data_name(LIVING),))
    gc(tmp_path)

    assert ["notes.txt"] == listing(folder)


def test_a_deletion_that_failed_in_the_middle_is_finished(tmp_path: Path) -> None:
    """From the library's own deletion, stopped right after the manifest was gone. Its process still lives, and has given it up."""
    snapshot = take(tmp_path / "run")
    with patch.object(LocalStorage, "flush", side_effect=OSError), patch.object(LocalStorage, "remove_folder", side_effect=OSError):
        really_delete = LocalStorage.delete

        def only_manifest(storage: LocalStorage, name: str, **named: Any) -> None:
            if name != names.MANIFEST:
                raise OSError
            really_delete(storage, name, **named)

        with patch.object(LocalStorage, "delete", only_manifest), pytest.raises(OSError):  # noqa: PT011
            snapshot.delete()
    its = tmp_path / "run" / names.lease_name(snapshot.id[:8])
    assert its.exists()
    (leftover,) = gc(tmp_path).removed

    assert "delete" == leftover.action
    assert not (tmp_path / "run").exists()


REFUSED = "the storage does not want to"


def refused(*_: object, **__: object) -> None:
    raise OSError(REFUSED)


def test_what_a_failed_take_could_not_remove_is_collected_while_its_process_lives(tmp_path: Path) -> None:
    """A notebook may live for days. What another of its takes is writing is left alone."""
    other = LocalStorage(str(tmp_path / "other"))
    running = Attempt(other, 32 * "f", "take")
    running.begin(overwrite=False)
    with patch.object(Attempt, "commit", refused), patch.object(LocalStorage, "delete", refused), pytest.raises(OSError, match=REFUSED):
        take(tmp_path / "run")
    assert any(path.suffix == ".safetensors" for path in (tmp_path / "run").iterdir())
    report = gc(tmp_path)

    assert not (tmp_path / "run").exists()
    assert [f"{other.url}/{names.lease_name('ffffffff')}"] == list(report.alive)
    running.abort([])


def test_a_copy_that_could_not_clean_up_is_done_again(tmp_path: Path) -> None:
    """It is the same snapshot, whose lease has the same name."""
    snapshot = take(tmp_path / "run")
    with (
        patch.object(LocalStorage, "delete", refused),
        patch.object(Attempt, "commit", refused),
        pytest.raises(OSError, match=REFUSED),
    ):
        snapshot.copy(tmp_path / "copy")
    assert (tmp_path / "copy" / names.lease_name(snapshot.id[:8])).exists()

    assert snapshot.copy(tmp_path / "copy").verify().ok
    assert {"snapshot.json", *(record.name for record in snapshot.manifest.files)} == {path.name for path in (tmp_path / "copy").iterdir()}


def test_a_deletion_that_died_before_it_began_leaves_the_snapshot(tmp_path: Path) -> None:
    """As long as the manifest is there, its files and annotations are needed."""
    snapshot = take(tmp_path / "run")
    (tmp_path / "run" / names.ANNOTATIONS).touch()
    lease(tmp_path / "run", snapshot.id, "delete", tuple(record.name for record in snapshot.manifest.files))
    (leftover,) = gc(tmp_path).removed

    assert (names.lease_name(snapshot.id[:8]),) == leftover.files
    assert snapshot.verify().ok
    assert (tmp_path / "run" / names.ANNOTATIONS).exists()


def test_annotations_go_with_deletions_alone(tmp_path: Path) -> None:
    """A take that died had none."""
    put(tmp_path, names.ANNOTATIONS, data_name())
    lease(tmp_path)
    gc(tmp_path)

    assert [names.ANNOTATIONS] == listing(tmp_path)


# Where


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    """There is nothing to collect, and nothing is made."""
    report = gc(tmp_path / "nothing")

    assert ((), 0) == (report.removed, report.nbytes)
    assert not (tmp_path / "nothing").exists()


def test_whole_snapshots_are_left_as_they_are(tmp_path: Path) -> None:
    """What has no leases costs nothing and loses nothing."""
    snapshots = [take(tmp_path / str(number)) for number in range(3)]
    before = listing(tmp_path)
    report = gc(tmp_path)

    assert ((), (), ()) == (report.removed, report.alive, report.damaged)
    assert before == listing(tmp_path)
    assert all(snapshot.verify().ok for snapshot in snapshots)


def test_a_file_that_cannot_be_removed_keeps_its_lease(tmp_path: Path) -> None:
    """The error comes out, and the next collection goes on from there."""
    put(tmp_path, data_name(), data_name(number=2))
    its = lease(tmp_path)
    really_delete = LocalStorage.delete

    def refuse(storage: LocalStorage, name: str, **named: Any) -> None:
        if name == data_name():
            msg = "refused"
            raise StorageError(msg)
        really_delete(storage, name, **named)

    with patch.object(LocalStorage, "delete", refuse), pytest.raises(StorageError, match="refused"):
        gc(tmp_path)
    assert its.exists()
    gc(tmp_path)

    assert ["(gone)"] == listing(tmp_path)


def test_a_huge_lease_is_not_read(tmp_path: Path) -> None:
    """A file of a lease's name and of any size costs nothing, and nobody dies of it."""
    put(tmp_path, data_name())
    path = tmp_path / names.lease_name(DEAD[:8])
    path.touch()
    os.truncate(path, 2**40)
    age(path)

    assert (str(path),) == gc(tmp_path).alive
    assert [path.name, data_name()] == listing(tmp_path)
