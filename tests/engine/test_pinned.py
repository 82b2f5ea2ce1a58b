"""A snapshot that is pinned or has an alias is not removed: its folder says so itself, and where that cannot be read it stays too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import pytest

from expstate import Snapshot, StateDict
from expstate.engine import annotate
from expstate.engine.attempt import read_committed
from expstate.errors import SnapshotPinnedError
from expstate.format import annotations as added
from expstate.format import names
from expstate.format.annotations import Annotations, Mark
from expstate.storage.local import LocalStorage
from tests.engine.leftovers import lease, listing, take

THERE, GONE = Mark(1, present=True), Mark(2, present=False)
PINNED: dict[str, Any] = {"pin": THERE}
ALIASED: dict[str, Any] = {"aliases": {"best": THERE, "old": GONE}}


@pytest.fixture
def taken(tmp_path: Path) -> Snapshot:
    return take(tmp_path / "run")


def storage_of(snapshot: Snapshot) -> LocalStorage:
    return LocalStorage(snapshot.path)


def annotated(snapshot: Snapshot, **items: Any) -> Annotations:
    return annotate.update(storage_of(snapshot), msgspec.structs.replace(added.empty(snapshot.id), **items))


def overwrite(snapshot: Snapshot, **options: Any) -> Snapshot:
    return take(Path(snapshot.path), overwrite=True, **options)


def remove(snapshot: Snapshot, **options: Any) -> None:
    snapshot.delete(**options)


REMOVALS = pytest.mark.parametrize("removal", [remove, overwrite])
Removal = Callable[..., object]


@REMOVALS
@pytest.mark.parametrize(
    ("items", "said"),
    [
        (PINNED, "is pinned; unpin it, or pass force=True"),
        (ALIASED, "has the alias 'best'; unalias it, or pass force=True"),
        (PINNED | {"aliases": {"a": THERE, "b": THERE}}, "is pinned and has the aliases 'a', 'b'; unpin and unalias it, or"),
    ],
)
def test_what_is_protected_is_not_removed(taken: Snapshot, removal: Removal, items: dict[str, Any], said: str) -> None:
    """The error says by what, and what to do; nothing is left of the attempt."""
    annotated(taken, **items)
    before = listing(Path(taken.path))
    with pytest.raises(SnapshotPinnedError, match=said):
        removal(taken)

    assert before == listing(Path(taken.path))
    assert taken.verify().ok


@REMOVALS
def test_force_removes_what_is_protected(taken: Snapshot, removal: Removal) -> None:
    """What was added to it goes too: it is not the next snapshot's."""
    annotated(taken, **PINNED, **ALIASED)
    removal(taken, force=True)

    assert not Path(taken.path, names.ANNOTATIONS).exists()


@REMOVALS
def test_what_is_no_longer_protected_is_removed(taken: Snapshot, removal: Removal) -> None:
    """Tags and notes protect nothing either."""
    annotated(taken, pin=GONE, aliases={"best": GONE}, tags={"keep": THERE}, note=added.Text(1, "pinned"))
    removal(taken)

    assert not Path(taken.path, names.ANNOTATIONS).exists()


@REMOVALS
@pytest.mark.parametrize("data", [b"", b"{", b'{"format":2,"id":"","pin":[1,true]}', b'{"format":1,"id":"x"}'])
def test_where_it_cannot_be_told_nothing_is_removed(taken: Snapshot, removal: Removal, data: bytes) -> None:
    """Damage must not undo a pin; force does."""
    Path(taken.path, names.ANNOTATIONS).write_bytes(data)
    before = listing(Path(taken.path))
    with pytest.raises(SnapshotPinnedError, match=r"cannot be told.*force=True"):
        removal(taken)

    assert before == listing(Path(taken.path))
    removal(taken, force=True)
    assert not Path(taken.path, names.ANNOTATIONS).exists()


@REMOVALS
def test_a_link_in_the_place_of_annotations_protects(taken: Snapshot, removal: Removal, tmp_path: Path) -> None:
    """It may have been put there to hide a pin; with force it goes, and what it points to stays."""
    target = tmp_path / "target"
    target.touch()
    Path(taken.path, names.ANNOTATIONS).symlink_to(target)
    with pytest.raises(SnapshotPinnedError):
        removal(taken)
    removal(taken, force=True)

    assert not Path(taken.path, names.ANNOTATIONS).is_symlink()
    assert target.exists()


@REMOVALS
def test_annotations_of_a_snapshot_that_is_gone_protect_nothing(taken: Snapshot, removal: Removal) -> None:
    """A crash may have left them; they go with the snapshot."""
    stale = msgspec.structs.replace(added.empty("f" * 32), **PINNED)
    Path(taken.path, names.ANNOTATIONS).write_bytes(added.encode(stale))
    removal(taken)

    assert not Path(taken.path, names.ANNOTATIONS).exists()


def test_a_damaged_manifest_does_not_undo_a_pin(taken: Snapshot) -> None:
    """Its id cannot be believed, so any pin counts."""
    annotated(taken, **PINNED)
    path = Path(taken.path, names.MANIFEST)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data.replace(taken.id.encode(), b"0" * 31 + b"x", 1))
    with pytest.raises(SnapshotPinnedError):
        overwrite(taken)


def test_a_torn_commit_is_no_snapshot_to_protect(taken: Snapshot) -> None:
    """Whatever annotations lie beside it."""
    annotated(taken, **PINNED)
    path = Path(taken.path, names.MANIFEST)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-50])

    assert overwrite(taken).verify().ok


def test_a_pin_that_comes_during_an_overwrite_counts(taken: Snapshot) -> None:
    """It is looked at again right before the manifest is replaced; nothing of the new take remains."""
    really_flush = LocalStorage.flush
    before = sorted([names.ANNOTATIONS, *listing(Path(taken.path))])

    def flush(storage: LocalStorage) -> None:
        annotated(taken, **PINNED)
        really_flush(storage)

    with patch.object(LocalStorage, "flush", flush), pytest.raises(SnapshotPinnedError):
        overwrite(taken)

    assert before == listing(Path(taken.path))
    assert taken.verify().ok


def test_a_pin_that_comes_during_a_deletion_counts(taken: Snapshot) -> None:
    """It is looked at again right before the manifest goes, and no lease of the deletion stays."""
    really_create = LocalStorage.create
    before = sorted([names.ANNOTATIONS, *listing(Path(taken.path))])

    def create(storage: LocalStorage, name: str, data: bytes, *, token: str) -> None:
        really_create(storage, name, data, token=token)
        if name != names.ANNOTATIONS:
            annotated(taken, **PINNED)

    with patch.object(LocalStorage, "create", create), pytest.raises(SnapshotPinnedError):
        taken.delete()

    assert before == listing(Path(taken.path))
    assert taken.verify().ok


def test_an_overwrite_in_the_background_is_refused_at_once(taken: Snapshot) -> None:
    """Before any state is staged."""
    annotated(taken, **PINNED)
    with pytest.raises(SnapshotPinnedError):
        Snapshot.async_take(taken.path, {"a": StateDict(x=1)}, overwrite=True)

    assert taken.verify().ok


def test_what_is_added_to_the_new_snapshot_right_after_the_commit_stays(taken: Snapshot) -> None:
    """The clean-up after an overwrite removes only what is of the old one."""
    annotated(taken, tags={"old": THERE})
    really_remove = annotate.remove_others

    def remove_others(storage: LocalStorage, snapshot_id: str) -> None:
        annotated(Snapshot(taken.path), tags={"new": THERE})
        really_remove(storage, snapshot_id)

    with patch.object(annotate, "remove_others", remove_others):
        new = overwrite(taken)
    found = annotate.read(storage_of(new), new.id)

    assert found is not None
    assert {"new": THERE} == found.tags


def test_an_overwrite_that_died_after_its_commit_leaves_annotations_that_say_nothing(taken: Snapshot) -> None:
    """Until the next edit takes their place."""
    annotated(taken, **PINNED)
    stale = Path(taken.path, names.ANNOTATIONS).read_bytes()
    new = overwrite(taken, force=True)
    Path(new.path, names.ANNOTATIONS).write_bytes(stale)
    lease(Path(new.path), new.id)

    assert annotate.read(storage_of(new), new.id) is None
    assert read_committed(storage_of(overwrite(new))) is not None


# Copies


def test_what_was_added_goes_along_with_a_copy(taken: Snapshot, tmp_path: Path) -> None:
    """It is the same snapshot, so its pin and aliases are too."""
    annotations = annotated(taken, **PINNED, **ALIASED, tags={"a": THERE}, note=added.Text(1, "n"), metrics={"m": added.Value(1, 0.5)})
    copied = taken.copy(tmp_path / "copy")

    assert annotations == annotate.read(storage_of(copied), taken.id)
    with pytest.raises(SnapshotPinnedError):
        copied.delete()


def test_annotations_that_are_damaged_are_copied_as_they_are(taken: Snapshot, tmp_path: Path) -> None:
    """They may be mended there as well as here, and protect the copy till then."""
    Path(taken.path, names.ANNOTATIONS).write_bytes(b"{")
    copied = taken.copy(tmp_path / "copy")

    assert b"{" == Path(copied.path, names.ANNOTATIONS).read_bytes()


def test_a_copy_takes_no_annotations_of_others(taken: Snapshot, tmp_path: Path) -> None:
    """Neither those that lie in the source's folder nor those that lay in the copy's."""
    stale = added.encode(msgspec.structs.replace(added.empty("f" * 32), **PINNED))
    Path(taken.path, names.ANNOTATIONS).write_bytes(stale)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / names.ANNOTATIONS).write_bytes(b"damaged")
    copied = taken.copy(tmp_path / "copy")

    assert not Path(copied.path, names.ANNOTATIONS).exists()


def test_verify_knows_annotations(taken: Snapshot) -> None:
    """They are part of a snapshot's folder."""
    annotated(taken, **PINNED)

    assert () == taken.verify().unknown_files
