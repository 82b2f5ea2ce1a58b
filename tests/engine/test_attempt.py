"""Attempts: a commit is made of everything or not at all, and clean-up takes only what is its own."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.engine import lease as leases
from expstate.engine.attempt import Attempt
from expstate.engine.lease import Lease
from expstate.errors import SnapshotExistsError, SnapshotNotFoundError, SnapshotReplacedError, SnapshotWriteError
from expstate.format import names
from expstate.storage.local import LocalStorage


def state(value: float = 1.0) -> dict[str, StateDict]:
    return {"model": StateDict(w=torch.full((4,), value))}


def begun(folder: Path, *, overwrite: bool = False) -> Attempt:
    attempt = Attempt(LocalStorage(str(folder)), names.new_id(), "take")
    attempt.begin(overwrite=overwrite)
    return attempt


def test_a_file_that_shrank_or_vanished_stops_the_commit(tmp_path: Path) -> None:
    """Sizes are looked at again when everything is written."""
    attempt = begun(tmp_path)
    (tmp_path / "a").write_bytes(b"12")
    with pytest.raises(SnapshotWriteError, match=r"'a'.*3 bytes.*2"):
        attempt.commit(b"{}", {"a": 3})
    with pytest.raises(SnapshotWriteError, match="'b'"):
        attempt.commit(b"{}", {"b": 1})
    assert not (tmp_path / "snapshot.json").exists()


def test_a_lease_that_is_gone_stops_the_commit(tmp_path: Path) -> None:
    """Someone has cleaned up after what looked dead."""
    attempt = begun(tmp_path)
    (tmp_path / names.lease_name(attempt.token)).unlink()
    with pytest.raises(SnapshotWriteError, match="lease"):
        attempt.commit(b"{}", {})
    assert not (tmp_path / "snapshot.json").exists()


def test_of_two_attempts_the_first_to_commit_wins(tmp_path: Path) -> None:
    """The other is told, and takes away only its own files."""
    first, second = begun(tmp_path), begun(tmp_path)
    data = Snapshot.take(tmp_path / "other", state())._load()[1]
    first.commit(data, {})
    with pytest.raises(SnapshotExistsError):
        second.commit(data, {})
    second.abort([])
    first.finish()
    assert {"snapshot.json", "other"} == {path.name for path in tmp_path.iterdir()}


def test_an_overwrite_fails_if_the_snapshot_changed_meanwhile(tmp_path: Path) -> None:
    """It replaces what it saw, and not what someone else has put there since."""
    Snapshot.take(tmp_path, state(1.0))
    attempt = begun(tmp_path, overwrite=True)
    newer = Snapshot.take(tmp_path, state(2.0), overwrite=True)
    with pytest.raises(SnapshotExistsError):
        attempt.commit(b"{}", {})
    attempt.abort([])
    assert newer.id == Snapshot(tmp_path).id
    assert Snapshot(tmp_path).verify().ok


def test_an_overwrite_takes_the_old_files_away_when_it_is_committed(tmp_path: Path) -> None:
    """Until then the old snapshot is whole; afterwards only the new one's files are there."""
    old = Snapshot.take(tmp_path, state(1.0))
    new = Snapshot.take(tmp_path, state(2.0), overwrite=True)
    assert old.id != new.id
    assert {"snapshot.json", *(record.name for record in new.manifest.files)} == {path.name for path in tmp_path.iterdir()}
    with pytest.raises(SnapshotReplacedError):
        old.read_object("model/w")


def test_an_abort_after_the_commit_keeps_the_snapshot(tmp_path: Path) -> None:
    """An interrupt can come when everything is done but the saying so."""
    source = Snapshot.take(tmp_path / "other", state())
    attempt = Attempt(LocalStorage(str(tmp_path / "s")), source.id, "copy")
    attempt.begin(overwrite=False)
    attempt.commit(source._load()[1], {})
    attempt.committed = False
    attempt.abort(["snapshot.json"])
    assert attempt.committed
    assert {"snapshot.json"} == {path.name for path in (tmp_path / "s").iterdir()}


def test_a_failed_attempt_takes_away_the_folder_that_it_made(tmp_path: Path) -> None:
    """A folder that was there before stays."""
    begun(tmp_path / "new").abort([])
    (tmp_path / "old").mkdir()
    begun(tmp_path / "old").abort([])
    assert {"old"} == {path.name for path in tmp_path.iterdir()}


def test_the_lease_of_a_dead_deletion_is_taken_over(tmp_path: Path) -> None:
    """What a crash left half done can be done again, without gc in between."""
    snapshot = Snapshot.take(tmp_path, state())
    lease = Lease(snapshot.id, "delete", "host", leases.boot_id(), leases.process_namespace(), 2**22 + 1, 1, 0.0)
    (tmp_path / names.lease_name(snapshot.id[:8])).write_bytes(msgspec.json.encode(lease))
    snapshot.delete()
    assert not tmp_path.exists()


def test_a_living_lease_of_the_same_snapshot_is_respected(tmp_path: Path) -> None:
    """Two processes do not delete, or copy, one snapshot at the same time."""
    snapshot = Snapshot.take(tmp_path, state())
    data = leases.encode_lease(snapshot.id, "delete", ())
    (tmp_path / names.lease_name(snapshot.id[:8])).write_bytes(data)
    with pytest.raises(SnapshotExistsError, match="at work"):
        snapshot.delete()
    assert Snapshot(tmp_path).verify().ok


def test_a_deletion_keeps_other_files(tmp_path: Path) -> None:
    """Only files that the snapshot names go, never a folder with something in it."""
    snapshot = Snapshot.take(tmp_path, state())
    (tmp_path / "notes.txt").write_text("mine")
    inner = Snapshot.take(tmp_path / "inner", state())
    snapshot.delete()
    assert {"notes.txt", "inner"} == {path.name for path in tmp_path.iterdir()}
    assert inner.verify().ok
    with pytest.raises(SnapshotNotFoundError):
        Snapshot(tmp_path).delete()


def test_a_lease_is_renewed_as_bytes_go_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A take that lasts longer than a lease keeps it; one whose lease was taken away stops."""
    attempt = begun(tmp_path)
    path = tmp_path / names.lease_name(attempt.token)
    before = path.read_bytes()
    attempt.renew()
    assert before == path.read_bytes()
    monkeypatch.setattr("expstate.engine.attempt.RENEW_SECONDS", 0.0)
    attempt.renew()
    assert before != path.read_bytes()
    path.unlink()
    with pytest.raises(SnapshotWriteError, match="lease"):
        attempt.renew()
