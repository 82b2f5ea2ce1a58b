"""``annotations.json`` is changed by compare-and-swap: nothing that anyone adds is lost, whoever else is at work, whoever dies."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import msgspec
import pytest

from expstate import gc
from expstate.engine import annotate
from expstate.engine.attempt import delete
from expstate.errors import (
    SnapshotCorruptError,
    SnapshotNotFoundError,
    SnapshotReplacedError,
    StorageError,
    StoragePermissionError,
    UnsafeFileError,
    UnsupportedFormatError,
)
from expstate.format import annotations as added
from expstate.format import names
from expstate.format.annotations import Annotations, Mark
from expstate.storage.local import LocalStorage
from tests.engine.leftovers import age, lease
from tests.engine.places import ID, OTHER, committed, data_name, files
from tests.engine.processes import end_of, in_child, killed_at, start_child


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    """A folder with a snapshot in it."""
    storage = LocalStorage(str(tmp_path / "snapshot"))
    committed(storage)
    return storage


def tagged(*tags: str, at: int = 1, snapshot_id: str = ID) -> Annotations:
    return msgspec.structs.replace(added.empty(snapshot_id), tags={tag: Mark(at, present=True) for tag in tags})


def tags_of(storage: LocalStorage) -> list[str]:
    found = annotate.read(storage, ID)
    return [] if found is None else sorted(found.tags)


# One at a time


def test_what_is_added_is_read_back(storage: LocalStorage) -> None:
    """The first makes the file, the next is merged with it."""
    assert annotate.read(storage, ID) is None
    assert tagged("a") == annotate.update(storage, tagged("a"))
    assert tagged("a", "b") == annotate.update(storage, tagged("b")) == annotate.read(storage, ID)
    assert [names.ANNOTATIONS, data_name(), names.MANIFEST] == files(storage)


def test_what_is_there_already_is_not_written_again(storage: LocalStorage) -> None:
    """The file stays the same."""
    annotate.update(storage, tagged("a", "b"))
    with patch.object(LocalStorage, "replace", side_effect=AssertionError):
        assert tagged("a", "b") == annotate.update(storage, tagged("b"))


def test_annotations_of_a_snapshot_that_is_gone_say_nothing(storage: LocalStorage) -> None:
    """They are not read, and the first edit takes their place."""
    Path(storage.path, names.ANNOTATIONS).write_bytes(added.encode(tagged("old", at=99, snapshot_id=OTHER)))

    assert annotate.read(storage, ID) is None
    assert tagged("new") == annotate.update(storage, tagged("new")) == annotate.read(storage, ID)


def test_nothing_is_added_where_no_snapshot_is(tmp_path: Path) -> None:
    """No folder is made, and none that is empty gets a file."""
    storage = LocalStorage(str(tmp_path / "nothing"))
    for _ in range(2):
        with pytest.raises(SnapshotNotFoundError):
            annotate.update(storage, tagged("a"))
        assert [] == files(storage)
        storage.prepare()


def test_nothing_is_added_to_another_snapshot(storage: LocalStorage) -> None:
    """The place may have been overwritten since it was looked at."""
    with pytest.raises(SnapshotReplacedError, match=ID[:8]):
        annotate.update(storage, tagged("a", snapshot_id=OTHER))

    assert [data_name(), names.MANIFEST] == files(storage)


@pytest.mark.parametrize(
    ("data", "error"), [(b'{"format":1', SnapshotCorruptError), (b'{"format":9,"id":"x","new":1}', UnsupportedFormatError)]
)
def test_what_cannot_be_understood_is_left_alone(storage: LocalStorage, data: bytes, error: type[Exception]) -> None:
    """An edit says so, with the place and what to do; what is there may be mended by hand, or by a newer version."""
    Path(storage.path, names.ANNOTATIONS).write_bytes(data)
    for call in (lambda: annotate.read(storage, ID), lambda: annotate.update(storage, tagged("a"))):
        with pytest.raises(error, match=f"{storage.path}.*(remove it|upgrade)"):
            call()

    assert data == storage.read(names.ANNOTATIONS)


def test_a_link_is_not_followed(storage: LocalStorage, tmp_path: Path) -> None:
    """A snapshot of a stranger must not make us read or change what it points to."""
    target = tmp_path / "target"
    target.write_bytes(added.encode(tagged("a")))
    Path(storage.path, names.ANNOTATIONS).symlink_to(target)
    for call in (lambda: annotate.read(storage, ID), lambda: annotate.update(storage, tagged("b"))):
        with pytest.raises(UnsafeFileError):
            call()

    assert added.encode(tagged("a")) == target.read_bytes()


@pytest.mark.parametrize("data", [b"", b"{", b'{"format":1,"id":"' + ID.encode() + b'"', b"x" * 10_000])
def test_a_torn_manifest_is_no_snapshot(tmp_path: Path, data: bytes) -> None:
    """Nor is a file that was never one."""
    Path(tmp_path, names.MANIFEST).write_bytes(data)

    assert annotate.committed_id(LocalStorage(str(tmp_path))) is None


# Several at once


def test_processes_that_edit_at_the_same_time_lose_nothing(storage: LocalStorage) -> None:
    """Every tag of every one of them is there at the end, and nothing else."""
    each = 12

    def edit(number: int) -> Callable[[], None]:
        def work() -> None:
            for index in range(each):
                annotate.update(LocalStorage(storage.path), tagged(f"{number}.{index}"))

        return work

    children = [start_child(edit(number)) for number in range(4)]
    for child, result, let_begin in children:
        os.close(let_begin)
        end_of(child, result).result  # noqa: B018 - raises if it failed

    assert sorted(f"{number}.{index}" for number in range(4) for index in range(each)) == tags_of(storage)
    assert [names.ANNOTATIONS, data_name(), names.MANIFEST] == files(storage)


def test_threads_that_edit_at_the_same_time_lose_nothing(storage: LocalStorage) -> None:
    """A writer's temporary file is its own."""
    threads = [threading.Thread(target=annotate.update, args=(storage, tagged(f"t{number}"))) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(f"t{number}" for number in range(16)) == tags_of(storage)


def test_a_writer_that_always_loses_gives_up(storage: LocalStorage) -> None:
    """With an error, and not never."""
    with patch.object(LocalStorage, "create", side_effect=FileExistsError), pytest.raises(StorageError, match="as often"):
        annotate.update(storage, tagged("a"))


@pytest.mark.parametrize("at_end", [False, True])
def test_an_edit_of_a_snapshot_that_is_deleted_meanwhile_leaves_nothing(storage: LocalStorage, at_end: bool) -> None:
    """Whether the deletion comes just before or just after the file is written."""
    really_create = LocalStorage.create

    def create(self: LocalStorage, name: str, data: bytes, *, token: str) -> None:
        if name != names.ANNOTATIONS:
            really_create(self, name, data, token=token)
            return
        if at_end:
            really_create(self, name, data, token=token)
            with patch.object(LocalStorage, "create", really_create):
                os.link(f"{self.path}/{names.ANNOTATIONS}", f"{self.path}/kept")
                delete(storage)
                Path(self.path, "kept").rename(f"{self.path}/{names.ANNOTATIONS}")  # as if the deletion had not seen it
        else:
            with patch.object(LocalStorage, "create", really_create):
                delete(storage)
            really_create(self, name, data, token=token)

    with patch.object(LocalStorage, "create", create), pytest.raises(SnapshotNotFoundError):
        annotate.update(storage, tagged("a"))

    assert not Path(storage.path).exists()


# Crashes


def test_an_edit_that_is_killed_leaves_the_old_or_the_new(storage: LocalStorage) -> None:
    """At any of its changes of the disk; and the deletion of the snapshot takes what it left."""
    annotate.update(storage, tagged("a"))
    seen = set()
    for number in range(1, 50):
        ended = killed_at(number, lambda: annotate.update(storage, tagged("b")))
        seen.add(tuple(tags_of(storage)))
        if ended.signal is None:
            break
        if tags_of(storage) == ["a", "b"]:
            Path(storage.path, names.ANNOTATIONS).unlink()
            annotate.update(storage, tagged("a"))
    delete(storage)

    assert {("a",), ("a", "b")} == seen
    assert not Path(storage.path).exists()


def test_gc_that_finishes_a_deletion_removes_annotations(storage: LocalStorage) -> None:
    """And what an edit that was killed left of its own."""
    annotate.update(storage, tagged("a"))
    killed_at(3, lambda: annotate.update(storage, tagged("b")))
    Path(storage.path, names.MANIFEST).unlink()
    lease(Path(storage.path), ID, "delete", (data_name(),))
    assert annotate.temporary_files(storage, ID)
    gc(storage.path)

    assert not Path(storage.path).exists()


def test_gc_removes_what_an_edit_that_was_killed_left_a_day_ago(storage: LocalStorage) -> None:
    """Not before: it may be an edit that goes on. What was added stays."""
    annotate.update(storage, tagged("a"))
    killed_at(3, lambda: annotate.update(storage, tagged("b")))
    (left,) = annotate.temporary_files(storage, ID)

    assert () == gc(storage.path).removed
    age(Path(storage.path, left))
    assert (("edit", (left,)),) == tuple((found.action, found.files) for found in gc(storage.path, dry_run=True).removed)
    assert [left] == annotate.temporary_files(storage, ID)
    gc(storage.path)
    assert [] == annotate.temporary_files(storage, ID)
    assert ["a"] == tags_of(storage)


@pytest.mark.parametrize(
    "name", [".annotations.json", ".annotations.json.12345678", "annotations.json.12345678.12345678", ".annotations.json.me"]
)
def test_gc_leaves_other_files_of_like_names(storage: LocalStorage, name: str) -> None:
    """However old they are."""
    path = Path(storage.path, name)
    path.touch()
    age(path)
    gc(storage.path)

    assert path.exists()


# What cannot be written


@pytest.mark.root
def test_a_folder_that_cannot_be_written_is_an_error(storage: LocalStorage) -> None:
    """And what was there is still there."""
    annotate.update(storage, tagged("a"))

    for folder in Path(storage.path, "x").parents:
        folder.chmod(folder.stat().st_mode | 0o055)

    def as_nobody() -> None:
        os.setgid(65534)
        os.setuid(65534)
        with pytest.raises(StoragePermissionError):
            annotate.update(storage, tagged("b"))

    assert in_child(as_nobody).result is None
    assert ["a"] == tags_of(storage)
