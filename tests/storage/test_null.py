"""``null://`` takes a take, keeps what is small and forgets the rest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import expstate.testing
from expstate import Snapshot, StateDict
from expstate.errors import ExpstateError, InvalidArgumentError, ManifestTooLargeError, SnapshotExistsError, StorageError
from expstate.storage.registry import open_storage
from expstate.testing.cases import DATA, SMALL, TOKEN, aligned

URL = "null://test/step-1"


@pytest.fixture(autouse=True)
def _emptied() -> Iterator[None]:
    yield
    storage = open_storage(URL)
    storage.prepare()
    for info in list(storage.list()):
        storage.delete(info.name)
    storage.remove_folder()


def app_state() -> dict[str, StateDict]:
    return {"state": StateDict(weight=torch.arange(1000.0), step=3)}


def test_a_take_commits_and_its_manifest_can_be_read() -> None:
    Snapshot.take(URL, app_state(), step=3)
    snapshot = Snapshot(URL)

    assert 3 == snapshot.metadata.step
    assert 4000 == snapshot.nbytes
    assert 3 == snapshot.read_object("state/step")


def test_an_async_take_commits() -> None:
    assert 4000 == Snapshot.async_take(URL, app_state()).wait().nbytes


def test_tensors_cannot_be_read_back() -> None:
    snapshot = Snapshot.take(URL, app_state())
    live = app_state()

    with pytest.raises(StorageError, match="keeps no data files"):
        snapshot.read_object("state/weight")
    with pytest.raises(ExpstateError, match="keeps no data files"):
        snapshot.restore(live)


def test_a_second_take_is_refused_and_overwriting_is_not() -> None:
    first = Snapshot.take(URL, app_state())
    with pytest.raises(SnapshotExistsError):
        Snapshot.take(URL, app_state())
    second = Snapshot.take(URL, app_state(), overwrite=True)

    assert first.id != second.id
    assert sorted([SMALL, second.manifest.files[0].name]) == sorted(info.name for info in open_storage(URL).list())


def test_a_deleted_snapshot_leaves_nothing() -> None:
    Snapshot.take(URL, app_state()).delete()

    assert open_storage(URL).prepare()


def test_small_files_are_kept_as_a_storage_must() -> None:
    storage = open_storage(URL)
    with pytest.raises(FileNotFoundError):
        storage.create(SMALL, b"x", token=TOKEN)
    assert storage.prepare()
    storage.create(SMALL, b"first", token=TOKEN)
    with pytest.raises(FileExistsError):
        storage.create(SMALL, b"second", token=TOKEN)
    with pytest.raises(FileExistsError):
        storage.replace(SMALL, b"second", token=TOKEN, expected=b"other")
    with pytest.raises(FileExistsError):
        storage.delete(SMALL, expected=b"other")
    storage.replace(SMALL, b"second", token=TOKEN, expected=b"first")

    assert b"second" == storage.read(SMALL)
    assert 6 == storage.stat(SMALL).size
    with pytest.raises(ManifestTooLargeError):
        storage.read(SMALL, limit=5)
    with pytest.raises(FileNotFoundError):
        storage.stat(DATA)
    storage.remove_folder()
    assert not storage.prepare()


def test_data_files_are_created_once_and_have_a_size() -> None:
    storage = open_storage(URL)
    storage.prepare()
    writer = storage.create_file(DATA, 5000)
    writer.write(0, aligned(bytes(5000)))
    assert [] == list(writer.finish())
    writer.abort()

    assert 5000 == storage.stat(DATA).size
    with pytest.raises(FileExistsError):
        storage.create_file(DATA, 1)
    with pytest.raises(StorageError, match="keeps no data files"):
        storage.open_file(DATA)


def test_names_that_lead_elsewhere_and_options_are_refused() -> None:
    storage = open_storage(URL)
    storage.prepare()
    with pytest.raises(ExpstateError):
        storage.create_file("../x", 1)
    with pytest.raises(ExpstateError):
        storage.delete("a//b")
    with pytest.raises(InvalidArgumentError, match="endpoint"):
        open_storage(URL, {"endpoint": "x"})


def test_it_is_one_of_the_names_of_the_package() -> None:
    assert isinstance(open_storage(URL), expstate.testing.NullStorage)
