"""A deletion makes a snapshot invisible at once, takes its own files and no others, and is carried on once it has begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.engine.attempt import delete, read_committed
from expstate.errors import (
    SnapshotCorruptError,
    SnapshotNotFoundError,
    SnapshotReplacedError,
    StorageError,
    UnsafePathError,
)
from expstate.format import names
from expstate.storage.local import LocalStorage
from tests.engine.places import OTHER, committed, data_name, files, manifest_of


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path / "snapshot"))


@pytest.fixture
def taken(tmp_path: Path) -> Snapshot:
    return Snapshot.take(tmp_path / "taken", {"a": StateDict(x=torch.ones(3))})


def test_deleting_removes_the_snapshot_and_its_folder(taken: Snapshot) -> None:
    """Nothing is left of it."""
    taken.delete()

    assert not Path(taken.path).exists()


def test_deleting_leaves_what_is_not_the_snapshots(taken: Snapshot) -> None:
    """Files of others, and snapshots in folders below."""
    inner = Snapshot.take(f"{taken.path}/inner", {"a": StateDict(x=1)})
    Path(taken.path, "notes.txt").touch()
    taken.delete()

    assert ["inner", "notes.txt"] == sorted(path.name for path in Path(taken.path).iterdir())
    assert inner.verify().ok


def test_deleting_what_is_not_there_is_an_error(storage: LocalStorage) -> None:
    """Twice is once too often, and nothing is made."""
    with pytest.raises(SnapshotNotFoundError):
        delete(storage)

    assert not Path(storage.path).exists()


def test_deleting_a_damaged_snapshot_removes_nothing(storage: LocalStorage) -> None:
    """Which files are its own cannot be told."""
    data = committed(storage)
    path = Path(storage.path, names.MANIFEST)
    path.unlink()
    path.write_bytes(data.replace(b'"world_size":1', b'"world_size":2'))
    with pytest.raises(SnapshotCorruptError):
        delete(storage)

    assert [data_name(), names.MANIFEST] == files(storage)


def test_deleting_a_forged_snapshot_removes_nothing(storage: LocalStorage) -> None:
    """A name that leads outside stops it before the manifest is gone."""
    storage.prepare()
    Path(storage.path, names.MANIFEST).write_bytes(manifest_of("../x-00001-01234567.safetensors"))
    with pytest.raises(UnsafePathError):
        delete(storage)

    assert [names.MANIFEST] == files(storage)


def test_deleting_what_is_replaced_meanwhile_is_an_error(storage: LocalStorage) -> None:
    """The new snapshot is not harmed, and no lease of the deletion stays."""
    committed(storage)
    after = manifest_of(snapshot_id=OTHER)
    really_create = storage.create

    def replace_first(name: str, data: bytes, *, token: str) -> None:
        really_create(name, data, token=token)
        storage.replace(names.MANIFEST, after, token=token)

    with patch.object(storage, "create", replace_first), pytest.raises(SnapshotReplacedError):
        delete(storage)

    assert after == read_committed(storage)
    assert [data_name(), names.MANIFEST] == files(storage)


def test_a_deletion_that_fails_early_leaves_the_snapshot(storage: LocalStorage) -> None:
    """As long as the manifest is there it is whole, and there is no lease."""
    data = committed(storage)
    really_delete = storage.delete

    def refuse(name: str, **named: Any) -> None:
        if name == names.MANIFEST:
            raise StorageError(name)
        really_delete(name, **named)

    with patch.object(storage, "delete", refuse), pytest.raises(StorageError):
        delete(storage)

    assert data == read_committed(storage)
    assert [data_name(), names.MANIFEST] == files(storage)


def test_a_deletion_that_is_interrupted_is_carried_on(storage: LocalStorage) -> None:
    """Once the manifest is gone there is no way back, so an interrupt does not leave the files."""
    committed(storage)
    flush = storage.flush
    with patch.object(storage, "flush", side_effect=[KeyboardInterrupt, None]), pytest.raises(KeyboardInterrupt):
        delete(storage)

    assert flush is not None
    assert not Path(storage.path).exists()
