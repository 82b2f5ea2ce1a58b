"""A check finds every difference between records, snapshots and database, changes nothing, and says what mends it."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expstate import Catalog, Snapshot, StateDict
from expstate.catalog import model, rows
from expstate.catalog.check import CheckReport
from expstate.format import annotations as added
from expstate.format import names
from expstate.format.annotations import Annotations, Mark
from tests.catalog.forging import forge
from tests.engine import leftovers
from tests.engine.leftovers import listing

Take = Callable[..., Snapshot]


def told(report: CheckReport) -> list[tuple[str, str]]:
    """What each finding is about, and what mends it."""
    return [(finding.what, finding.mend) for finding in report.findings]


def data_file(snapshot: Snapshot) -> Path:
    """One that can be changed."""
    path = Path(snapshot.path, snapshot.manifest.files[0].name)
    path.chmod(0o644)
    return path


def test_a_catalog_that_agrees_with_its_snapshots_is_well(any_catalog: Catalog, take: Take) -> None:
    """What was looked at is counted; nothing is read that need not be."""
    for folder in ("a", "b"):
        take(any_catalog, folder, tags=["x"], params={"lr": 0.1, "big": 2**70, "none": None}, metrics={"nan": float("nan")})
    any_catalog.tag("latest", "y")
    any_catalog.alias("latest", "best")
    any_catalog.alias("latest~1", "best")
    report = any_catalog.check()

    assert report.ok
    assert (2, 2, 0, 0, 0) == (report.records, report.snapshots, report.replaced, report.elsewhere, report.nbytes)
    assert "all is well: 2 records, 2 snapshots" == str(report)


def test_a_deep_check_reads_every_byte(any_catalog: Catalog, take: Take) -> None:
    """And says how many these were."""
    take(any_catalog, "a")
    report = any_catalog.check(deep=True)

    assert (True, 16) == (report.ok, report.nbytes)
    assert "16 B read and verified" in str(report)


def test_a_snapshot_that_is_gone_is_found(any_catalog: Catalog, take: Take) -> None:
    """A scan takes note; after that it can be sought or its record deleted."""
    taken = take(any_catalog, "a")
    shutil.rmtree(taken.path)
    report = any_catalog.check()

    assert not report.ok
    assert [("record", "expstate scan")] == told(report)
    any_catalog.scan()
    (finding,) = any_catalog.check().findings
    assert f"expstate delete {taken.id}" in finding.mend
    any_catalog.delete(taken.id)
    assert any_catalog.check().ok


def test_a_snapshot_that_was_replaced_is_found(catalog: Catalog, take: Take) -> None:
    """Until the catalog knows; then it is nothing that could be mended."""
    take(catalog, "a")
    take(None, "a", overwrite=True)
    assert [("record", "expstate scan")] == told(catalog.check())[:1]
    catalog.scan()
    report = catalog.check()

    assert (True, 1, 1) == (report.ok, report.snapshots, report.replaced)


def test_a_snapshot_without_a_record_is_found(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Beside others that were recorded; its own scan enters it."""
    take(catalog, "a")
    other = take(None, "b c")
    report = catalog.check()

    assert [("snapshot", f"expstate scan '{other.path}'")] == told(report)
    catalog.scan(other.path)
    assert catalog.check().ok


def test_a_changed_manifest_is_found(catalog: Catalog, take: Take) -> None:
    """It has the id and is another."""
    taken = take(catalog, "a")
    forge(taken, metadata={"note": "changed by hand"})
    (finding,) = catalog.check().findings

    assert ("record", f"expstate scan {taken.path}") == (finding.what, finding.mend)
    assert "its manifest was changed" in finding.problem
    catalog.scan(taken.path)
    assert catalog.check().ok


def test_a_damaged_manifest_is_found(catalog: Catalog, take: Take) -> None:
    """Once, though both its record and its folder lead there."""
    taken = take(catalog, "a")
    path = Path(taken.path, names.MANIFEST)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data.replace(b'"world_size":1', b'"world_size":2'))
    (finding,) = catalog.check().findings

    assert ("snapshot", taken.path) == (finding.what, finding.name)
    assert "digest" in finding.problem
    assert "from a copy" in finding.mend


def test_files_that_are_missing_or_of_another_size_are_found(catalog: Catalog, take: Take) -> None:
    """By their sizes alone."""
    first, second = take(catalog, "a"), take(catalog, "b")
    data_file(first).unlink()
    with data_file(second).open("ab") as file:
        file.write(b"x")
    report = catalog.check()

    assert {"file"} == {finding.what for finding in report.findings}
    problems = {finding.name: finding.problem for finding in report.findings}
    assert "it is missing" == problems[f"{first.path}/{first.manifest.files[0].name}"]
    assert "should have" in problems[f"{second.path}/{second.manifest.files[0].name}"]


def test_a_flipped_bit_is_found_by_a_deep_check(catalog: Catalog, take: Take) -> None:
    """Its entry is named."""
    taken = take(catalog, "a")
    path = data_file(taken)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    assert catalog.check().ok
    (finding,) = catalog.check(deep=True).findings
    assert ("file", str(path)) == (finding.what, finding.name)
    assert "model/weight" in finding.problem


def test_annotations_that_the_catalog_does_not_know_are_found(catalog: Catalog, take: Take) -> None:
    """Somebody with another catalog has added them."""
    taken = take(catalog, "a")
    theirs = Annotations(format=1, id=taken.id, pin=Mark(1, present=True))
    Path(taken.path, names.ANNOTATIONS).write_bytes(added.encode(theirs))

    assert [("annotations", f"expstate scan {taken.path}")] == told(catalog.check())
    catalog.scan(taken.path)
    assert catalog.check().ok
    assert catalog["latest"].pinned


def test_damaged_annotations_are_found(catalog: Catalog, take: Take) -> None:
    """The snapshot itself is whole."""
    taken = take(catalog, "a")
    Path(taken.path, names.ANNOTATIONS).write_bytes(b"{")
    (finding,) = catalog.check().findings

    assert f"{taken.path}/{names.ANNOTATIONS}" == finding.name


def test_a_copy_that_the_catalog_does_not_know_is_found(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """The record would be opened without it all the same, but should tell of all places."""
    taken = take(catalog, "a")
    shutil.copytree(taken.path, tmp_path / "runs" / "b")

    assert [("snapshot", f"expstate scan {tmp_path}/runs/b")] == told(catalog.check())


@pytest.mark.parametrize(
    "harm",
    [
        "DELETE FROM tags",
        "UPDATE tags SET tag = 'other'",
        "DELETE FROM metrics",
        "UPDATE metrics SET number = number + 1",
        "UPDATE params SET number = NULL",
        "UPDATE names SET name = 'x' || name",
        "UPDATE records SET pinned = 1",
        "UPDATE records SET note = 'other'",
        "DELETE FROM aliases",
        "UPDATE aliases SET alias = 'worst'",
        "UPDATE aliases SET claimed_at = claimed_at - 1",
        "UPDATE bodies SET body = '[]'",
        "UPDATE bodies SET annotations = '[]'",
        "DELETE FROM bodies",
    ],
)
def test_a_table_that_disagrees_is_found_and_mended(catalog: Catalog, take: Take, harm: str) -> None:
    """What is searched is what was recorded; a scan makes it so."""
    take(catalog, "a", tags=["x"], params={"lr": 0.5}, metrics={"loss": 0.5}, note="why")
    catalog.alias("latest", "best")
    before = repr(catalog["latest"])
    assert catalog.place.path is not None
    with sqlite3.connect(catalog.place.path) as connection:
        connection.execute(harm)
    connection.close()
    rows._decoded.cache_clear()

    assert [("record", "expstate scan")] == told(catalog.check())[:1]
    catalog.scan()
    assert catalog.check().ok
    assert before == repr(catalog["latest"])


@pytest.mark.parametrize("damage", [b"no database", b"SQLite format 3\0" + bytes(5000)])
def test_a_damaged_catalog_is_found(catalog: Catalog, take: Take, damage: bytes) -> None:
    """It is reported like everything else, and stays as it is."""
    take(catalog, "a")
    catalog.close()
    assert catalog.place.path is not None
    catalog.place.path.write_bytes(damage)
    report = catalog.check()

    assert [("catalog", "expstate scan")] == told(report)
    assert damage == catalog.place.path.read_bytes()


def test_snapshots_on_other_machines_are_counted(catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be said of them from here."""
    taken = take(catalog, "a")
    shutil.rmtree(taken.path)
    monkeypatch.setattr(model.socket, "gethostname", lambda: "another")
    report = catalog.check()

    assert (True, 1, 0, 1) == (report.ok, report.records, report.snapshots, report.elsewhere)


def test_a_check_is_of_one_project(catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless all are meant."""
    taken = take(catalog, "a")
    take(None, "b")
    shutil.rmtree(taken.path)
    monkeypatch.setenv("EXPSTATE_PROJECT", "another")

    assert catalog.check().ok
    for project in ("tests", "*"):
        assert ["record", "snapshot"] == [finding.what for finding in catalog.check(project=project).findings]


def test_a_check_changes_nothing(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Neither in the folders nor in the catalog."""
    first = take(catalog, "a")
    take(catalog, "b")
    shutil.rmtree(first.path)
    take(None, "c")
    before = listing(tmp_path / "runs"), [repr(record) for record in catalog.search()]
    catalog.check(deep=True)

    assert before == (listing(tmp_path / "runs"), [repr(record) for record in catalog.search()])


def test_an_interrupted_deletion_is_told_as_such(catalog: Catalog, take: Take) -> None:
    """What mends it is gc, which also removes the record; not a scan, which would call it missing."""
    taken = take(catalog, "a")
    Path(taken.path, names.MANIFEST).unlink()
    leftovers.lease(Path(taken.path), taken.id, "delete", tuple(file.name for file in taken.manifest.files))
    report = catalog.check()

    assert [("record", "expstate gc --yes")] == told(report)
    assert "its deletion at" in str(report)
    catalog.gc()
    assert not Path(taken.path).exists()
    assert "all is well: 0 records, 0 snapshots" == str(catalog.check())


def test_a_report_is_for_people_and_for_programs(catalog: Catalog, take: Take) -> None:
    """Names of folders are anybody's, so they are escaped."""
    taken = take(None, "\x1b[31m<script>alert(1)<")
    Snapshot.take(Path(taken.path).parent / "b", {"model": StateDict(weight=torch.ones(4))}, catalog=catalog)
    report = catalog.check()

    assert "1 problem: 1 record, 2 snapshots" in str(report)
    assert "\x1b" not in str(report) + report._repr_html_()
    assert "<script>" not in report._repr_html_()
    assert "not recorded" in str(report)
    assert "expstate scan" in str(report)
    found = report.to_dict()
    assert (False, taken.path) == (found["ok"], found["findings"][0]["name"])
