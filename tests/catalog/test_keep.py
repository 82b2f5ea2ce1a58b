"""A deletion takes the recorded snapshot and nothing else, wherever it lies; clean-up takes what the dead left."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expstate import Catalog, Snapshot, StateDict
from expstate.catalog import database, filesystems, model, removal
from expstate.engine import attempt
from expstate.errors import (
    CatalogUnavailableError,
    CatalogWarning,
    InvalidArgumentError,
    RefNotFoundError,
    SnapshotChangedError,
    SnapshotCorruptError,
    SnapshotNotFoundError,
    SnapshotPinnedError,
    SnapshotReplacedError,
)
from expstate.format import annotations as added
from expstate.format import names
from expstate.format.annotations import Annotations, Mark
from expstate.storage.local import LocalStorage
from expstate.testing import FaultyStorage
from tests.catalog.forging import forge
from tests.engine import leftovers

Take = Callable[..., Snapshot]


@pytest.fixture
def another_host(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called on, this is another machine."""

    def move() -> None:
        monkeypatch.setattr(model.socket, "gethostname", lambda: "another")

    return move


def ids(catalog: Catalog) -> list[str]:
    return [record.id for record in catalog.search(project="*")]


# Deletion


def test_a_deleted_snapshot_and_its_record_are_gone(any_catalog: Catalog, take: Take) -> None:
    """Others stay; what is given back is the record as it was."""
    first, second = take(any_catalog, "a", step=1), take(any_catalog, "b", step=2)
    record = any_catalog.delete(first.id)

    assert (first.id, 1) == (record.id, record.step)
    assert not Path(first.path).exists()
    assert [second.id] == ids(any_catalog)
    assert second.verify().ok
    assert any_catalog.check().ok
    with pytest.raises(RefNotFoundError):
        any_catalog.delete(first.id)


def test_all_its_places_are_cleared(any_catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Copies are the same snapshot."""
    taken = take(any_catalog, "a")
    shutil.copytree(taken.path, tmp_path / "copies" / "b")
    any_catalog.scan(tmp_path / "copies")
    any_catalog.delete("latest")

    assert not Path(taken.path).exists()
    assert not (tmp_path / "copies" / "b").exists()
    assert [] == ids(any_catalog)


def test_the_record_of_a_snapshot_that_is_gone_already_is_removed(any_catalog: Catalog, take: Take) -> None:
    """Whether the catalog knew or not."""
    taken = take(any_catalog, "a")
    shutil.rmtree(taken.path)
    any_catalog.delete(taken.id)

    assert [] == ids(any_catalog)


def test_what_replaced_it_is_not_harmed(any_catalog: Catalog, take: Take) -> None:
    """The record goes; the snapshot at its path is another."""
    first = take(any_catalog, "a")
    second = take(any_catalog, "a", overwrite=True)
    any_catalog.delete(first.id)

    assert [second.id] == ids(any_catalog)
    assert second.verify().ok


def test_what_replaces_it_at_that_moment_is_not_harmed(catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the comparison and the deletion."""
    first = take(catalog, "a")
    really_delete = attempt.delete
    after: list[Snapshot] = []

    def replace_first(*given: object, **named: object) -> None:
        after.append(take(None, "a", overwrite=True))
        really_delete(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(attempt, "delete", replace_first)
    catalog.delete(first.id)

    assert after[0].verify().ok
    assert [] == ids(catalog)


def test_the_engine_deletes_only_the_expected_snapshot(take: Take) -> None:
    """By id and manifest digest."""
    taken = take(None, "a")
    storage = LocalStorage(taken.path)
    for expected in ((taken.id, "0" * 64), ("0" * 32, taken.metadata.digest)):
        with pytest.raises(SnapshotReplacedError):
            attempt.delete(storage, expected=expected)
    assert taken.verify().ok
    attempt.delete(storage, expected=(taken.id, taken.metadata.digest))

    assert not Path(taken.path).exists()


def test_what_has_its_id_and_another_digest_is_not_deleted(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Nor is any copy then: somebody has to look first."""
    taken = take(catalog, "a")
    shutil.copytree(taken.path, tmp_path / "copies" / "b")
    catalog.scan(tmp_path / "copies")
    forge(taken, metadata={"note": "changed by hand"})
    with pytest.raises(SnapshotChangedError, match="expstate scan"):
        catalog.delete("latest")

    assert Path(taken.path, "snapshot.json").exists()
    assert (tmp_path / "copies" / "b" / "snapshot.json").exists()
    catalog.scan(taken.path)
    catalog.delete("latest")
    assert [] == ids(catalog)


@pytest.mark.parametrize("protection", ["pin", "alias"])
def test_a_protected_snapshot_is_not_deleted(any_catalog: Catalog, take: Take, protection: str) -> None:
    """Unless by force."""
    taken = take(any_catalog, "a")
    any_catalog.pin("latest") if protection == "pin" else any_catalog.alias("latest", "best")
    with pytest.raises(SnapshotPinnedError, match="force"):
        any_catalog.delete("latest")

    assert taken.verify().ok
    any_catalog.delete("latest", force=True)
    assert [] == ids(any_catalog)
    assert not Path(taken.path).exists()


def test_a_snapshot_that_is_pinned_in_its_folder_alone_is_not_deleted(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """By somebody with another catalog, at one of its places; then it stays at all of them."""
    taken = take(catalog, "a")
    copied = tmp_path / "copies" / "b"
    shutil.copytree(taken.path, copied)
    catalog.scan(copied)
    (copied / names.ANNOTATIONS).write_bytes(added.encode(Annotations(format=1, id=taken.id, pin=Mark(1, present=True))))
    for dry_run in (True, False):
        with pytest.raises(SnapshotPinnedError):
            catalog.delete("latest", dry_run=dry_run)

    assert taken.verify().ok
    assert [taken.id] == ids(catalog)


def test_nothing_is_deleted_while_the_catalog_cannot_be_written(catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the error would tell of a failure, and the snapshot be gone all the same."""
    monkeypatch.setattr(database, "WAIT_SECONDS", 0.05)
    taken, other = take(catalog, "a"), take(catalog, "b")
    plan = catalog.prune(keep_last=1)
    assert catalog.place.path is not None
    locked = sqlite3.connect(catalog.place.path)
    locked.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(CatalogUnavailableError, match="locked"):
            catalog.delete("latest")
        with pytest.raises(CatalogUnavailableError, match="locked"):
            plan.apply()
    finally:
        locked.close()

    assert taken.verify().ok
    assert other.verify().ok
    assert 1 == len(plan.apply().deleted)
    catalog.delete("latest")
    assert [] == ids(catalog)


def test_a_deletion_that_could_not_be_recorded_says_that_it_was_done(catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalog was lost in the middle of it; the same again removes the record."""
    taken = take(catalog, "a")

    def fail(*given: object) -> None:
        msg = "the catalog is locked"
        raise CatalogUnavailableError(msg)

    with monkeypatch.context() as failing:
        failing.setattr(removal, "forget", fail)
        with pytest.raises(CatalogUnavailableError, match=f"{taken.id[:8]} was deleted, but its record was not.*the catalog is locked"):
            catalog.delete("latest")

    assert not Path(taken.path).exists()
    assert [taken.id] == ids(catalog)
    catalog.delete(taken.id)
    assert [] == ids(catalog)


def test_snapshots_of_other_users_are_not_deleted(catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless that is said; nor are those of which nobody knows whose they are."""
    taken = take(catalog, "a")
    unknown = take(None, "b")
    forge(unknown, provenance={"project": "tests"})
    catalog.scan(unknown.path)
    with pytest.raises(InvalidArgumentError, match="nobody knows"):
        catalog.delete(unknown.id)
    monkeypatch.setattr(removal, "current_user", lambda: "somebody else")
    with pytest.raises(InvalidArgumentError, match="any_user=True"):
        catalog.delete(taken.id)

    assert 2 == len(ids(catalog))
    catalog.delete(taken.id, any_user=True)
    catalog.delete(unknown.id, any_user=True)
    assert [] == ids(catalog)


def test_snapshots_of_other_projects_are_deleted_if_the_project_is_named(
    catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An id finds them, but that is not enough."""
    taken = take(catalog, "a", name="mine")
    monkeypatch.setenv("EXPSTATE_PROJECT", "another")
    with pytest.raises(InvalidArgumentError, match="project='tests'"):
        catalog.delete(taken.id)
    with pytest.raises(InvalidArgumentError, match="one project at a time"):
        catalog.delete(taken.id, project="*")

    assert taken.verify().ok
    assert taken.id == catalog.delete("mine", project="tests").id


def test_what_lies_on_another_machine_stays_recorded(
    catalog: Catalog, take: Take, another_host: Callable[[], None], tmp_path: Path
) -> None:
    """The copy here goes, and it is said what remains."""
    taken = take(catalog, "a")
    another_host()
    shutil.copytree(taken.path, tmp_path / "copies" / "b")
    catalog.scan(tmp_path / "copies")
    with pytest.warns(CatalogWarning, match="delete it there"):
        catalog.delete(taken.id)

    assert taken.verify().ok
    assert not (tmp_path / "copies" / "b").exists()
    assert [taken.path] == [place.url for place in catalog[taken.id].locations]
    assert "present" == catalog[taken.id].status


def test_what_lies_on_another_machine_alone_is_not_deleted(catalog: Catalog, take: Take, another_host: Callable[[], None]) -> None:
    """The message names the machine."""
    taken = take(catalog, "a")
    host = catalog["latest"].locations[0].host
    another_host()
    with pytest.raises(SnapshotNotFoundError, match=host):
        catalog.delete(taken.id)

    assert taken.verify().ok
    assert [taken.id] == ids(catalog)


def test_what_another_machine_has_put_on_a_shared_disk_is_deleted(
    catalog: Catalog, take: Take, another_host: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is found on a network file system it is the same one, and no place of it stays recorded."""
    taken = take(catalog, "a")
    another_host()
    catalog.scan(taken.path)
    assert 2 == len(catalog["latest"].locations)
    monkeypatch.setattr(filesystems, "kind_of", lambda path: "nfs4")
    catalog.delete("latest")

    assert not Path(taken.path).exists()
    assert [] == ids(catalog)


def test_a_snapshot_with_a_damaged_manifest_is_not_deleted(catalog: Catalog, take: Take) -> None:
    """Which files are its own cannot be told, and the record stays."""
    taken = take(catalog, "a")
    path = Path(taken.path, names.MANIFEST)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data.replace(b'"world_size":1', b'"world_size":2'))
    before = leftovers.listing(Path(taken.path))
    for dry_run in (True, False):
        with pytest.raises(SnapshotCorruptError, match=f"{taken.path}.*damaged.*put it back from a copy"):
            catalog.delete("latest", dry_run=dry_run)

    assert before == leftovers.listing(Path(taken.path))
    assert [taken.id] == ids(catalog)


def test_other_files_in_the_folder_stay(catalog: Catalog, take: Take) -> None:
    """And snapshots in it."""
    taken = take(catalog, "a")
    inner = take(catalog, "a/inner")
    Path(taken.path, "notes.txt").touch()
    catalog.delete(taken.id)

    assert ["inner", "notes.txt"] == sorted(path.name for path in Path(taken.path).iterdir())
    assert inner.verify().ok


def test_children_outlive_their_parents(catalog: Catalog, take: Take) -> None:
    """Snapshots stand alone."""
    parent, child = take(catalog, "a"), take(catalog, "b")
    catalog.delete(parent.id)

    assert child.verify().ok
    assert parent.id == catalog["latest"].parent


# Deletions that are interrupted, and other leftovers


def interrupt(monkeypatch: pytest.MonkeyPatch, catalog: Catalog, ref: str) -> None:
    """Delete, and die when the manifest is gone."""
    with monkeypatch.context() as dying:

        def die(*given: object) -> None:
            raise KeyboardInterrupt

        dying.setattr(attempt, "_delete_all", die)
        with pytest.raises(KeyboardInterrupt):
            catalog.delete(ref)


def kill_leases(folder: Path) -> None:
    """Make what this process has left look like a dead one's."""
    for path in folder.glob(".attempt-*.json"):
        lease = attempt.decode_lease(path.read_bytes())
        assert lease is not None
        path.unlink()
        leftovers.lease(folder, lease.id, lease.action, lease.files)


def test_an_interrupted_deletion_is_finished_by_gc(any_catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files go, and the record."""
    taken = take(any_catalog, "a", value=1)
    interrupt(monkeypatch, any_catalog, taken.id)
    assert Path(taken.path).exists()
    kill_leases(Path(taken.path))
    planned = any_catalog.gc(dry_run=True)
    assert Path(taken.path).exists()
    assert [taken.id] == ids(any_catalog)
    report = any_catalog.gc()

    assert planned == report
    assert ["delete"] == [leftover.action for leftover in report.removed]
    assert not Path(taken.path).exists()
    assert [] == ids(any_catalog)


def test_an_interrupted_deletion_is_finished_by_another(catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same snapshot."""
    taken = take(catalog, "a")
    interrupt(monkeypatch, catalog, taken.id)
    kill_leases(Path(taken.path))
    catalog.delete(taken.id)

    assert not Path(taken.path).exists()
    assert [] == ids(catalog)


def test_a_snapshot_that_was_taken_again_keeps_its_record(catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an interrupted deletion its path may be used again, before anybody cleans up."""
    taken = take(catalog, "a")
    interrupt(monkeypatch, catalog, taken.id)
    kill_leases(Path(taken.path))
    after = take(catalog, "a")
    catalog.gc()

    assert after.verify().ok
    assert [after.id] == ids(catalog)


def test_gc_looks_into_the_folders_of_takes_and_of_records(any_catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Beside snapshots, where other takes died, and in places that are known from a scan; the reports are one."""
    take(any_catalog, "a")
    away = take(None, "deep/down/b")
    any_catalog.scan(away.path)
    dead = [tmp_path / "runs" / "dead", Path(away.path)]
    for folder in dead:
        leftovers.put(folder, leftovers.data_name())
        leftovers.lease(folder)
    living = tmp_path / "runs" / "living"
    leftovers.put(living, leftovers.data_name(leftovers.LIVING))
    lease = leftovers.own_lease(living)
    report = any_catalog.gc()

    assert sorted(map(str, dead)) == sorted(leftover.url for leftover in report.removed)
    assert (str(lease),) == report.alive
    assert away.verify().ok
    assert not dead[0].exists()
    assert (living / leftovers.data_name(leftovers.LIVING)).exists()


def test_a_folder_that_gc_cannot_read_does_not_stop_it(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """It is reported, and the others are cleaned up."""
    taken = take(catalog, "a")
    Path(taken.path, names.MANIFEST).rename(Path(taken.path, "manifest"))
    Path(taken.path, names.MANIFEST).symlink_to("manifest")
    leftovers.lease(Path(taken.path))
    leftovers.lease(tmp_path / "runs" / "z")
    report = catalog.gc()

    assert (taken.path,) == report.damaged
    assert [str(tmp_path / "runs" / "z")] == [leftover.url for leftover in report.removed]


def test_gc_keeps_to_its_project(catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """Places that are known from records of others are theirs, unless all are meant."""
    away = take(None, "deep/down/b")
    catalog.scan(away.path)
    catalog.place.roots.unlink()
    leftovers.lease(Path(away.path))
    monkeypatch.setenv("EXPSTATE_PROJECT", "another")

    assert () == catalog.gc().removed
    assert 1 == len(catalog.gc(project="*").removed)


def test_gc_leaves_what_lies_beside_snapshots_of_other_projects_alone(
    catalog: Catalog, take: Take, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead take is of the project of the snapshots beside it; beside those of two it is of both."""
    take(catalog, "a")
    dead = tmp_path / "runs" / "dead"
    leftovers.lease(dead)
    assert 1 == len(catalog.gc(dry_run=True).removed)
    monkeypatch.setenv("EXPSTATE_PROJECT", "another")
    Snapshot.take(tmp_path / "other" / "b", {"model": StateDict(x=1)}, catalog=catalog)

    assert () == catalog.gc().removed
    assert dead.exists()
    take(catalog, "c")
    assert 1 == len(catalog.gc().removed)


def test_a_take_that_goes_on_is_not_deleted(catalog: Catalog, tmp_path: Path) -> None:
    """It has to be cancelled, or waited for."""
    gate = threading.Event()
    storage = FaultyStorage(LocalStorage(str(tmp_path / "runs" / "a")))
    storage.run("write", None, function=lambda: gate.wait(60))
    pending = Snapshot.async_take(storage.url, {"model": StateDict(weight=torch.ones(3))}, name="going", catalog=catalog)
    try:
        with pytest.raises(InvalidArgumentError, match="still being taken"):
            catalog.delete("going")
    finally:
        gate.set()

    assert pending.wait().verify().ok
