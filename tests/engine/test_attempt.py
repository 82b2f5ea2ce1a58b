"""Attempts: a lease tells who is at work, a commit happens once and only if everything is there, and what failed leaves nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import pytest

from expstate.engine import attempt as attempts
from expstate.engine import lease as leases
from expstate.engine.attempt import read_committed
from expstate.engine.lease import LEASE_SECONDS, decode_lease, encode_lease
from expstate.errors import (
    SnapshotExistsError,
    SnapshotWriteError,
    StorageError,
)
from expstate.format import names
from expstate.storage.local import LocalStorage
from tests.engine.places import ID, OTHER, age, begun, committed, data_name, files, lease, manifest_of, put


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path / "snapshot"))


# Being alive


def test_a_lease_is_renewed_as_the_work_goes_on(storage: LocalStorage) -> None:
    """Not for every piece, but often enough; the heartbeat and the time of the file move on."""
    attempt = begun(storage)
    name = names.lease_name(attempt.token)
    before = storage.read(name)
    attempt.renew()
    assert before == storage.read(name)

    with patch.object(attempts, "RENEW_SECONDS", 0.0):
        attempt.renew()
    after = storage.read(name)
    assert before != after
    old, new = decode_lease(before), decode_lease(after)
    assert old is not None
    assert new is not None
    assert old.heartbeat < new.heartbeat


@pytest.mark.parametrize("taken_by", [None, "another"])
def test_an_attempt_whose_lease_is_gone_stops(storage: LocalStorage, taken_by: str | None) -> None:
    """Who finds its lease removed or replaced was declared dead, and writes nothing more."""
    attempt = begun(storage)
    name = names.lease_name(attempt.token)
    storage.delete(name)
    if taken_by:
        storage.create(name, encode_lease(ID, taken_by, ()), token=ID[:8])
    with patch.object(attempts, "RENEW_SECONDS", 0.0), pytest.raises(SnapshotWriteError, match="lease"):
        attempt.renew()


# Beginning


def test_a_free_place_is_held(storage: LocalStorage) -> None:
    """The folder is made and the lease is there before anything else."""
    attempt = begun(storage)

    assert [f".attempt-{attempt.token}.json"] == files(storage)


def test_a_place_with_a_snapshot_is_not_free(storage: LocalStorage) -> None:
    """It is refused, and nothing is left of the attempt."""
    committed(storage)
    before = files(storage)
    with pytest.raises(SnapshotExistsError, match="overwrite=True"):
        begun(storage, OTHER)

    assert before == files(storage)


def test_a_damaged_snapshot_is_not_written_over(storage: LocalStorage) -> None:
    """What it was can perhaps be saved."""
    data = committed(storage)
    path = Path(storage.path, names.MANIFEST)
    path.unlink()
    path.write_bytes(data.replace(b'"world_size":1', b'"world_size":2'))
    with pytest.raises(SnapshotExistsError):
        begun(storage, OTHER)


def test_a_torn_commit_is_written_over(storage: LocalStorage) -> None:
    """It is no snapshot; the new manifest takes its place."""
    attempt = begun(storage, OTHER)
    Path(storage.path, names.MANIFEST).write_bytes(manifest_of()[:100])
    attempt.abort([])
    storage.prepare()
    Path(storage.path, names.MANIFEST).write_bytes(manifest_of()[:100])
    data = committed(storage)

    assert data == read_committed(storage)


def test_a_folder_that_goes_away_is_made_again(storage: LocalStorage) -> None:
    """Another attempt may fail just then and remove the folder that it had made."""
    really_prepare = storage.prepare
    made = []

    def prepare() -> bool:
        result = really_prepare()
        made.append(result)
        if len(made) < 3:
            Path(storage.path).rmdir()
        return result

    with patch.object(storage, "prepare", prepare):
        attempt = begun(storage)

    assert 3 == len(made)
    assert [names.lease_name(attempt.token)] == files(storage)


def test_a_folder_that_never_stays_is_an_error(storage: LocalStorage) -> None:
    """The attempt does not go on for ever."""
    with patch.object(storage, "prepare", return_value=True), pytest.raises(StorageError, match="disappears"):
        begun(storage)


def test_the_lease_of_one_who_is_at_work_is_not_taken(storage: LocalStorage) -> None:
    """Two copies of one snapshot to one place have one id; the second sees that the first lives."""
    begun(storage, action="copy")
    with pytest.raises(SnapshotExistsError, match="another process"):
        begun(storage, action="copy")

    assert [f".attempt-{ID[:8]}.json"] == files(storage)


def test_the_lease_of_a_dead_copy_is_taken_over(storage: LocalStorage) -> None:
    """What it left, which has the same names, is removed first; files of others stay."""
    storage.prepare()
    dead = msgspec.json.encode(lease(action="copy", started=1) if leases.boot_id() else lease(action="copy"))
    storage.create(names.lease_name(ID[:8]), dead, token=ID[:8])
    age(storage, names.lease_name(ID[:8]), 2 * LEASE_SECONDS)
    for name in (data_name(), data_name(OTHER), "notes.txt"):
        put(storage, name)
    attempt = begun(storage, action="copy")

    assert sorted([names.lease_name(attempt.token), data_name(OTHER), "notes.txt"]) == files(storage)
    found = decode_lease(storage.read(names.lease_name(ID[:8])))
    assert found is not None
    assert lease().started == found.started


def test_a_lease_that_cannot_be_read_is_not_taken_over(storage: LocalStorage) -> None:
    """Nothing tells that its owner is dead."""
    storage.prepare()
    storage.create(names.lease_name(ID[:8]), b"{", token=ID[:8])
    with pytest.raises(SnapshotExistsError, match="another process"):
        begun(storage, action="copy")

    assert b"{" == storage.read(names.lease_name(ID[:8]))


# Committing


def test_a_commit_makes_the_snapshot(storage: LocalStorage) -> None:
    """Manifest and data files are there, and the lease is gone."""
    data = committed(storage)

    assert [data_name(), names.MANIFEST] == files(storage)
    assert data == read_committed(storage)


@pytest.mark.parametrize(("size", "found"), [(None, "0"), (0, "0"), (4095, "4,095"), (8192, "8,192")])
def test_a_file_that_is_not_as_it_was_written_stops_the_commit(storage: LocalStorage, size: int | None, found: str) -> None:
    """Missing or of another size: whatever the storage said, nothing becomes visible."""
    attempt = begun(storage)
    if size is not None:
        put(storage, data_name(), size)
    with pytest.raises(SnapshotWriteError, match=f"'{data_name()}'.* now has {found}"):
        attempt.commit(manifest_of(data_name()), {data_name(): 4096})

    assert not attempt.committed
    assert read_committed(storage) is None


def test_a_lease_that_is_gone_stops_the_commit(storage: LocalStorage) -> None:
    """Who cleaned up may have removed files that were looked at a moment ago."""
    attempt = begun(storage)
    put(storage, data_name())
    storage.delete(names.lease_name(attempt.token))
    with pytest.raises(SnapshotWriteError, match="someone cleaned up"):
        attempt.commit(manifest_of(data_name()), {data_name(): 4096})

    assert read_committed(storage) is None


def test_a_folder_that_is_gone_stops_the_commit(storage: LocalStorage) -> None:
    """The error says so, and does not talk of a missing file."""
    attempt = begun(storage)
    storage.delete(names.lease_name(attempt.token))
    Path(storage.path).rmdir()
    with pytest.raises(SnapshotWriteError, match="someone cleaned up"):
        attempt.commit(manifest_of(), {})


def test_of_two_attempts_the_first_to_commit_wins(storage: LocalStorage) -> None:
    """The other is told, and leaves nothing when it ends."""
    first, second = begun(storage), begun(storage, OTHER)
    for snapshot_id in (ID, OTHER):
        put(storage, data_name(snapshot_id))
    data = manifest_of(data_name())
    first.commit(data, {data_name(): 4096})
    with pytest.raises(SnapshotExistsError, match="at the same time"):
        second.commit(manifest_of(data_name(OTHER), snapshot_id=OTHER), {data_name(OTHER): 4096})
    second.abort([data_name(OTHER)])
    first.finish()

    assert [data_name(), names.MANIFEST] == files(storage)
    assert data == read_committed(storage)


# Replacing


def test_overwriting_replaces_and_removes_what_was_there(storage: LocalStorage) -> None:
    """The old snapshot is readable until the new one is, and then its files go; those of others stay."""
    before = committed(storage)
    put(storage, "notes.txt")
    attempt = begun(storage, OTHER, overwrite=True)
    put(storage, data_name(OTHER))
    assert before == read_committed(storage)
    after = manifest_of(data_name(OTHER), snapshot_id=OTHER)
    attempt.commit(after, {data_name(OTHER): 4096})
    assert {data_name(), data_name(OTHER)} <= set(files(storage))
    attempt.finish()

    assert after == read_committed(storage)
    assert sorted([data_name(OTHER), names.MANIFEST, "notes.txt"]) == files(storage)


def test_a_lease_names_the_files_that_will_be_replaced(storage: LocalStorage) -> None:
    """They carry another id, and a crash after the commit must not leave them for ever."""
    committed(storage)
    attempt = begun(storage, OTHER, overwrite=True)
    found = decode_lease(storage.read(names.lease_name(attempt.token)))

    assert found is not None
    assert (data_name(),) == found.files


def test_files_that_the_new_manifest_names_too_are_kept(storage: LocalStorage) -> None:
    """What old and new share is not the old one's alone."""
    committed(storage)
    attempt = begun(storage, OTHER, overwrite=True)
    attempt.commit(manifest_of(data_name(), snapshot_id=OTHER), {data_name(): 4096})
    attempt.finish()

    assert [data_name(), names.MANIFEST] == files(storage)


def test_of_two_that_overwrite_the_second_is_told(storage: LocalStorage) -> None:
    """It would have replaced something else than it saw; the first stays."""
    committed(storage)
    first, second = begun(storage, OTHER, overwrite=True), begun(storage, "00" * 16, overwrite=True)
    after = manifest_of(snapshot_id=OTHER)
    first.commit(after, {})
    with pytest.raises(SnapshotExistsError):
        second.commit(manifest_of(snapshot_id="00" * 16), {})
    second.abort([])
    first.finish()

    assert after == read_committed(storage)
    assert [names.MANIFEST] == files(storage)


def test_what_is_overwritten_cannot_name_files_of_others(storage: LocalStorage) -> None:
    """A forged manifest does not make its replacement remove what people keep."""
    outside = Path(storage.path).parent / "outside-00001-01234567.safetensors"
    storage.prepare()
    outside.write_bytes(b"x")
    put(storage, "notes.txt")
    for name in ("../" + outside.name, "notes.txt", names.ANNOTATIONS):
        Path(storage.path, names.MANIFEST).unlink(missing_ok=True)
        Path(storage.path, names.MANIFEST).write_bytes(manifest_of(name))
        committed(storage, OTHER, overwrite=True)

    assert outside.exists()
    assert "notes.txt" in files(storage)


# Ending


def test_an_attempt_that_fails_leaves_nothing(storage: LocalStorage) -> None:
    """Its files, its lease and the folder that it made go."""
    attempt = begun(storage)
    put(storage, data_name())
    attempt.abort([data_name()])

    assert not Path(storage.path).exists()
    assert not attempt.committed


def test_an_attempt_that_fails_leaves_a_folder_that_was_there(storage: LocalStorage) -> None:
    """What is not its own stays, the folder among it."""
    storage.prepare()
    attempt = begun(storage)
    attempt.abort([])

    assert Path(storage.path).is_dir()


def test_an_attempt_that_fails_keeps_a_folder_that_others_use(storage: LocalStorage) -> None:
    """A second attempt may have begun in the folder that the first had made."""
    first, second = begun(storage), begun(storage, OTHER)
    first.abort([])

    assert [names.lease_name(second.token)] == files(storage)


def test_an_attempt_that_lost_its_lease_removes_nothing(storage: LocalStorage) -> None:
    """Names of copies are not unique: what is there may be another's by now."""
    attempt = begun(storage, action="copy")
    name = names.lease_name(attempt.token)
    storage.delete(name)
    storage.create(name, encode_lease(ID, "copy", ["another"]), token=ID[:8])
    put(storage, data_name())
    attempt.abort([data_name()])

    assert [name, data_name()] == files(storage)


def test_a_commit_that_was_interrupted_counts(storage: LocalStorage) -> None:
    """The manifest is there, so the snapshot is, whatever came right after."""
    attempt = begun(storage)
    put(storage, data_name())
    with patch.object(storage, "create", side_effect=_then(storage.create, KeyboardInterrupt)), pytest.raises(KeyboardInterrupt):
        attempt.commit(manifest_of(data_name()), {data_name(): 4096})
    attempt.abort([data_name()])

    assert attempt.committed
    assert [data_name(), names.MANIFEST] == files(storage)


def _then(action: Any, error: type[BaseException]) -> Any:
    def interrupted(*arguments: Any, **named: Any) -> None:
        action(*arguments, **named)
        raise error

    return interrupted


def test_a_file_that_cannot_be_removed_keeps_the_lease(storage: LocalStorage) -> None:
    """As long as something is left there is a lease to find it by."""
    attempt = begun(storage)
    put(storage, data_name())
    really_delete = storage.delete

    def refuse(name: str, **named: Any) -> None:
        if name == data_name():
            raise StorageError(name)
        really_delete(name, **named)

    with patch.object(storage, "delete", refuse):
        attempt.abort([data_name()])

    assert [names.lease_name(attempt.token), data_name()] == files(storage)


def test_a_storage_that_fails_does_not_make_the_end_fail(storage: LocalStorage) -> None:
    """The error that is told is the one that ended the attempt, not one of the cleaning up."""
    attempt = begun(storage)
    with patch.object(storage, "read", side_effect=StorageError("gone")):
        attempt.abort([data_name()])

    assert [names.lease_name(attempt.token)] == files(storage)
