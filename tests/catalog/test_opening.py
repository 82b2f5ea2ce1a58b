"""What is opened through the catalog is what was recorded, wherever it lies now; and no catalog chooses what a process talks to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from expstate import Catalog, Snapshot, settings
from expstate.catalog import opening, recorder, rows
from expstate.catalog.model import describe
from expstate.errors import (
    CatalogCorruptError,
    CatalogUnavailableError,
    CatalogWarning,
    InvalidArgumentError,
    RefNotFoundError,
    SnapshotChangedError,
    SnapshotCorruptError,
    SnapshotNotFoundError,
    UnsupportedSchemeError,
    UntrustedLocationError,
)
from expstate.format import manifest as manifests
from expstate.format import names
from expstate.storage import registry
from expstate.storage.local import LocalStorage

from .made import enter

Take = Callable[..., Snapshot]


def located(catalog: Catalog, snapshot: Snapshot, url: str, *, host: str | None = None) -> None:
    """Say that a snapshot lies at another place too."""
    data = describe(snapshot.manifest, snapshot.metadata.digest, url)
    fields = {"project": "tests"} | ({} if host is None else {"host": host})
    with catalog.database.writing() as connection:
        rows.put(connection, msgspec.structs.replace(data, **fields))


def statuses(catalog: Catalog, snapshot_id: str) -> dict[str, str]:
    return {location.url: location.status for location in catalog[snapshot_id].locations}


# Found


def test_a_snapshot_is_opened_by_any_ref(any_catalog: Catalog, take: Take) -> None:
    """Name, id, alias, latest and path; verified, with what is in it."""
    taken = take(any_catalog, "one", value=3, name="baseline")
    any_catalog.alias("latest", "best")
    for ref in ("baseline", taken.id, taken.id[:4], "best", "latest", taken.path, Path(taken.path)):
        found = Snapshot.find(ref, catalog=any_catalog)
        assert (taken.id, 3, True) == (found.id, found.read_object("model/value"), found.verify().ok)


def test_the_catalog_may_be_named_by_its_path(catalog: Catalog, take: Take) -> None:
    """Or by the setting."""
    taken = take(catalog, "one", name="baseline")
    with settings.override(catalog=catalog.url):
        assert taken.id == Snapshot.find("baseline").id

    assert taken.id == Snapshot.find("baseline", catalog=catalog.url).id
    for wrong in (True, 3):
        with pytest.raises(InvalidArgumentError, match="catalog must be"):
            Snapshot.find("baseline", catalog=wrong)  # type: ignore[arg-type]


def test_another_project_is_named(catalog: Catalog, take: Take) -> None:
    with settings.override(project="other"):
        taken = take(catalog, "one", name="baseline")
    with pytest.raises(RefNotFoundError, match="other"):
        Snapshot.find("baseline", catalog=catalog)

    assert taken.id == Snapshot.find("baseline", catalog=catalog, project="other").id
    assert taken.id == Snapshot.find("baseline", catalog=catalog, project="*").id


def test_a_path_is_opened_though_nobody_recorded_it(catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalog says how it is entered; opening needs none."""
    taken = take(None, "one", value=2)
    monkeypatch.chdir(Path(taken.path).parent)
    for ref in (taken.path, "one", f"file://{taken.path}"):
        assert taken.id == Snapshot.find(ref, catalog=catalog).id
    with pytest.raises(RefNotFoundError, match="expstate scan"):
        catalog[taken.path]


@pytest.mark.parametrize("option", [None, False])
def test_without_a_catalog_paths_are_opened(take: Take, option: Any) -> None:
    """Other refs cannot be, and the error says why."""
    taken = take(None, "one", name="baseline")

    assert taken.id == Snapshot.find(taken.path, catalog=option).id
    for ref in ("baseline", "latest", taken.id, "no/such/path"):
        with pytest.raises(CatalogUnavailableError, match=r"EXPSTATE_CATALOG is 'off'"):
            Snapshot.find(ref, catalog=option)


def test_a_damaged_catalog_does_not_stand_between_a_path_and_its_snapshot(take: Take, tmp_path: Path) -> None:
    """For other refs it is the catalog's own error."""
    taken = take(None, "one")
    (tmp_path / "damaged.db").write_bytes(b"no database" * 1000)

    assert taken.id == Snapshot.find(taken.path, catalog=tmp_path / "damaged.db").id
    with pytest.raises(CatalogCorruptError):
        Snapshot.find("baseline", catalog=tmp_path / "damaged.db")


def test_what_is_damaged_at_a_path_is_damage(catalog: Catalog, take: Take) -> None:
    """And not a ref that was not found."""
    taken = take(None, "one")
    damage(taken)
    with pytest.raises(SnapshotCorruptError):
        Snapshot.find(taken.path, catalog=catalog)


def damage(snapshot: Snapshot) -> None:
    path = Path(snapshot.path, names.MANIFEST)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data.replace(b'"world_size":1', b'"world_size":2'))


@pytest.mark.parametrize("ref", ["x" * 300, "/" + "y/" * 4000, "a\0b", "\ud800/x", "/dev/null/x", "/dev/null"])
def test_a_hostile_ref_opens_nothing(catalog: Catalog, ref: str) -> None:
    """It is not found."""
    with pytest.raises(RefNotFoundError):
        Snapshot.find(ref, catalog=catalog)


def test_a_url_that_no_storage_is_known_for_says_so(catalog: Catalog) -> None:
    with pytest.raises(UnsupportedSchemeError, match="nosuch://"):
        Snapshot.find("nosuch://bucket/run", catalog=catalog)


# Places


def test_a_snapshot_that_was_moved_is_found_at_its_copy(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """A copy keeps the id; the place where it is no more is marked."""
    taken = take(catalog, "one", name="baseline")
    copied = taken.copy(tmp_path / "copy")
    located(catalog, taken, copied.path)
    shutil.rmtree(taken.path)
    found = Snapshot.find("baseline", catalog=catalog)

    assert copied.path == found.path
    assert {copied.path: "present", taken.path: "missing"} == statuses(catalog, taken.id)
    assert ("present", copied.path) == (catalog["baseline"].status, catalog["baseline"].url)


def test_a_copy_is_recorded_as_another_place(any_catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """With or without its provenance, and found there when the first place is gone."""
    taken = take(any_catalog, "one", name="baseline")
    take(any_catalog, "two")
    places = [taken.copy(tmp_path / "copy", catalog=any_catalog).path]
    places += [taken.copy(tmp_path / "bare", provenance=False, catalog=any_catalog).path]
    taken.copy(tmp_path / "elsewhere" / "unknown", catalog=False)

    assert dict.fromkeys([taken.path, *places], "present") == statuses(any_catalog, taken.id)
    assert any_catalog["latest"].id != taken.id
    assert "tests" == any_catalog["baseline"].project
    assert any_catalog.check().ok
    shutil.rmtree(taken.path)
    assert places[0] == Snapshot.find("baseline", catalog=any_catalog).path


def test_a_copy_of_a_snapshot_that_nobody_recorded_is_recorded_where_its_time_puts_it(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    old = take(None, "old", name="baseline")
    new = take(catalog, "new")
    old.copy(tmp_path / "copy", catalog=catalog)

    assert [old.id, new.id] == [catalog["baseline"].id, catalog["latest"].id]


def test_a_catalog_that_fails_does_not_fail_a_copy(take: Take, tmp_path: Path) -> None:
    recorder.forget()  # it is said once per process
    (tmp_path / "file").touch()
    with pytest.warns(CatalogWarning, match="was not entered"):
        copied = take(None, "one").copy(tmp_path / "copy", catalog=tmp_path / "file" / "catalog.db")

    assert copied.verify().ok
    recorder.forget()


def test_a_path_is_opened_where_it_was_said(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Though the snapshot lies elsewhere too."""
    taken = take(catalog, "one")
    copied = taken.copy(tmp_path / "copy")
    located(catalog, taken, copied.path)
    for snapshot in (taken, copied):
        assert snapshot.path == Snapshot.find(snapshot.path, catalog=catalog).path


def test_a_snapshot_that_is_gone_names_the_places(catalog: Catalog, take: Take) -> None:
    """It is marked missing, and found again when it is back."""
    taken = take(catalog, "one", name="baseline")
    moved = Path(taken.path).rename(f"{taken.path}-moved")
    with pytest.raises(SnapshotNotFoundError, match=f"nothing is at '{taken.path}'.*scan"):
        Snapshot.find("baseline", catalog=catalog)
    assert "missing" == catalog["baseline"].status
    moved.rename(taken.path)

    assert taken.id == Snapshot.find("baseline", catalog=catalog).id
    assert "present" == catalog["baseline"].status


def test_a_path_that_was_overwritten_is_another_snapshot(catalog: Catalog, take: Take) -> None:
    """By a take that the catalog was not told of: the record is marked replaced, and never stands for what is there now."""
    taken = take(catalog, "one", name="baseline")
    other = take(None, "one", overwrite=True)
    for ref in ("baseline", taken.path, taken.id):
        with pytest.raises(SnapshotChangedError, match=f"{other.id[:8]}.*scan"):
            Snapshot.find(ref, catalog=catalog)

    assert "replaced" == catalog[taken.id].status


def test_a_manifest_that_was_changed_is_not_the_one_recorded(catalog: Catalog, take: Take) -> None:
    """Though it has the id, and a digest of its own that fits."""
    taken = take(catalog, "one", name="baseline")
    path = Path(taken.path, names.MANIFEST)
    manifest = manifests.decode(path.read_bytes())
    path.unlink()
    path.write_bytes(manifests.encode(msgspec.structs.replace(manifest, writer="someone else")))
    assert taken.id == Snapshot(taken.path).id
    with pytest.raises(SnapshotChangedError, match="digest"):
        Snapshot.find("baseline", catalog=catalog)

    assert "present" == catalog["baseline"].status


def test_a_damaged_snapshot_is_damage(catalog: Catalog, take: Take) -> None:
    """It is there, so it is neither missing nor replaced."""
    taken = take(catalog, "one", name="baseline")
    damage(taken)
    with pytest.raises(SnapshotCorruptError):
        Snapshot.find("baseline", catalog=catalog)

    assert "present" == catalog["baseline"].status


def test_a_snapshot_on_the_disk_of_another_host_names_the_host(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """What this host has at the same path says nothing about it."""
    elsewhere = take(None, "elsewhere")
    located(catalog, elsewhere, f"{tmp_path}/theirs", host="gpu-7")
    other = take(None, "other")
    located(catalog, elsewhere, other.path, host="gpu-8")
    with pytest.raises(SnapshotNotFoundError, match=r"disk of host 'gpu-[78]'.*disk of host 'gpu-[78]'"):
        Snapshot.find(elsewhere.id, catalog=catalog)

    assert {"present"} == set(statuses(catalog, elsewhere.id).values())


def test_a_disk_that_hosts_share_is_opened(catalog: Catalog, take: Take) -> None:
    """The same snapshot at the same path is the one that was recorded, whoever recorded it."""
    taken = take(None, "one")
    located(catalog, taken, taken.path, host="gpu-7")

    assert taken.id == Snapshot.find(taken.id, catalog=catalog).id


def test_a_catalog_that_cannot_be_written_is_no_hindrance(catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the mark is missing then."""
    taken = take(catalog, "one", name="baseline")
    shutil.rmtree(taken.path)

    def refuse(*_: Any, **__: Any) -> Any:
        msg = "read-only"
        raise CatalogUnavailableError(msg)

    monkeypatch.setattr(catalog.database, "writing", refuse)
    with pytest.raises(SnapshotNotFoundError):
        Snapshot.find("baseline", catalog=catalog)

    assert "present" == catalog["baseline"].status


# Trust


@pytest.mark.parametrize("url", ["/data/run", "/odd::name", "fs:///data/run", "file:///data/run", "s3://bucket/run", "GS://bucket/run"])
def test_what_a_record_may_open(url: str) -> None:
    """Disks, S3 and GCS."""
    opening.check_trusted(url)


HOSTILE_URLS = [
    "http://169.254.169.254/latest/meta-data",
    "ftp://host/x",
    "memory://x",
    "simplecache::file:///etc",
    "simplecache::s3://bucket/x",
    "s3://bucket::http://evil/x",
    "/data/x::http://evil",
    "file:///x::memory://y",
    "reference://::x",
    "relative/path",
    "",
    "file://",
    "\0",
    "javascript:alert(1)",
]


@pytest.mark.parametrize("url", HOSTILE_URLS)
def test_what_a_record_may_not_open(catalog: Catalog, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is opened for it, and the error can be shown."""
    opened: list[str] = []
    for scheme in ("http", "ftp", "memory", "reference", "s3"):
        monkeypatch.setitem(registry._factories, scheme, lambda path, _: opened.append(path))
    monkeypatch.setattr(LocalStorage, "read", lambda self, name, limit=None: opened.append(self.url))
    enter(catalog, id="a" * 32, url=url, host="")
    with pytest.raises(UntrustedLocationError) as error:
        Snapshot.find("aaaa", catalog=catalog)

    assert [] == opened
    assert str(error.value).isprintable()


def test_a_scheme_may_be_trusted_by_a_setting(monkeypatch: pytest.MonkeyPatch, catalog: Catalog, take: Take) -> None:
    """With or without its slashes; chains stay closed."""
    taken = take(None, "one")
    monkeypatch.setitem(registry._factories, "lab", lambda path, _: LocalStorage(path))
    located(catalog, taken, f"lab://{taken.path}", host="")
    with pytest.raises(UntrustedLocationError, match="EXPSTATE_SCHEMES"):
        Snapshot.find(taken.id, catalog=catalog)
    monkeypatch.setenv("EXPSTATE_SCHEMES", "other, lab://")

    assert taken.id == Snapshot.find(taken.id, catalog=catalog).id
    with pytest.raises(UntrustedLocationError):
        opening.check_trusted("lab://x::lab://y")


def test_what_a_person_types_is_theirs(monkeypatch: pytest.MonkeyPatch, catalog: Catalog, take: Take) -> None:
    """Any scheme that there is a storage for, with the options for it."""
    taken = take(None, "one")
    given: list[Any] = []

    def factory(path: str, options: Any) -> LocalStorage:
        given.append(options)
        return LocalStorage(path)

    monkeypatch.setitem(registry._factories, "lab", factory)

    assert taken.id == Snapshot.find(f"lab://{taken.path}", catalog=catalog, storage_options={"key": "k"}).id
    assert {"key": "k"} == given[-1]
    assert taken.id == Snapshot.find(taken.path, catalog=catalog, storage_options={"key": "k"}).id


def test_an_untrusted_place_does_not_hide_a_trusted_one(catalog: Catalog, take: Take) -> None:
    """The others are tried."""
    taken = take(catalog, "one")
    located(catalog, taken, "http://evil/x", host="")

    assert taken.path == Snapshot.find(taken.id, catalog=catalog).path
