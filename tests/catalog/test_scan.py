"""A scan enters the snapshots that lie in folders: all of them, in the order of their takes, with what was added to them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expstate import Catalog, Snapshot, StateDict, settings
from expstate.catalog.model import Record
from expstate.errors import InvalidArgumentError, SnapshotNotFoundError
from expstate.format import annotations as added
from expstate.format import manifest as manifests
from expstate.format.annotations import Annotations, Mark
from tests.catalog.forging import forge, with_digest

Take = Callable[..., Snapshot]


def ids(catalog: Catalog, project: str | None = "*") -> list[str]:
    """Newest first."""
    return [record.id for record in catalog.search(project=project)]


def by_id(catalog: Catalog) -> dict[str, Record]:
    return {record.id: record for record in catalog.search(project="*")}


# What is entered


def test_snapshots_below_a_folder_are_entered(any_catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """However deep they lie; and once is enough."""
    taken = [take(None, "a", step=1), take(None, "b/c/d", step=2), take(None, "a/inner", step=3)]
    report = any_catalog.scan(tmp_path / "runs")

    assert sorted(snapshot.path for snapshot in taken) == sorted(report.entered)
    assert [snapshot.id for snapshot in reversed(taken)] == ids(any_catalog)
    again = any_catalog.scan(tmp_path / "runs")
    assert ((), 3, (), ()) == (again.entered, again.known, again.replaced, again.missing)
    assert any_catalog.check().ok


def test_a_record_made_by_a_scan_is_that_of_the_take(any_catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """All that was recorded is in the manifest."""
    take(any_catalog, "a", value=2, name="first", tags=["x"], params={"lr": 0.1}, metrics={"loss": float("nan")}, note="why", step=4)
    (before,) = any_catalog.search()
    any_catalog.delete("latest")
    take(None, "b")
    other = Catalog(tmp_path / "other.db")
    take(other, "c", value=2, name="first", tags=["x"], params={"lr": 0.1}, metrics={"loss": float("nan")}, note="why", step=4)
    (expected,) = other.search()
    other.close()
    any_catalog.scan(tmp_path / "runs" / "c")

    (found,) = any_catalog.search()
    assert repr(expected) == repr(found)
    assert expected.provenance == found.provenance
    assert before.params == found.params


def test_a_folder_with_a_snapshot_alone_can_be_scanned(catalog: Catalog, take: Take) -> None:
    """The folder itself is looked into."""
    taken = take(None, "a")

    assert (taken.path,) == catalog.scan(taken.path).entered


def test_what_was_added_to_a_snapshot_comes_with_it(any_catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Tags, aliases, pin, note and metrics are in its folder."""
    taken = take(any_catalog, "a", tags=["old"])
    any_catalog.tag(taken.id, "new")
    any_catalog.untag(taken.id, "old")
    any_catalog.alias(taken.id, "best")
    any_catalog.pin(taken.id)
    any_catalog.note(taken.id, "a note")
    any_catalog.log_metric(taken.id, "acc", 0.5)
    other = Catalog(tmp_path / "other.db")
    other.scan(tmp_path / "runs")
    (found,) = other.search()
    other.close()

    assert (("new",), ("best",), True, "a note", {"acc": 0.5}) == (found.tags, found.aliases, found.pinned, found.note, found.metrics)


def test_annotations_of_another_snapshot_are_left_out(catalog: Catalog, take: Take) -> None:
    """They were left behind by what lay there before."""
    taken = take(None, "a")
    left = Annotations(format=1, id="0" * 32, pin=Mark(1, present=True))
    Path(taken.path, "annotations.json").write_bytes(added.encode(left))
    report = catalog.scan(taken.path)

    assert () == report.damaged
    assert not catalog[taken.id].pinned


def test_of_two_claims_of_an_alias_the_newest_wins(any_catalog: Catalog, take: Take) -> None:
    """Whichever is found first."""
    taken = [take(None, folder, step=step) for step, folder in enumerate("abc")]
    for snapshot, at in zip(taken, (1, 3, 2), strict=True):
        claim = Annotations(format=1, id=snapshot.id, aliases={"best": Mark(at, present=True)})
        Path(snapshot.path, "annotations.json").write_bytes(added.encode(claim))
    any_catalog.scan(Path(taken[0].path).parent)

    assert taken[1].id == any_catalog["best"].id
    assert [("best",)] == [record.aliases for record in any_catalog.search() if record.aliases]


def test_a_snapshot_without_a_project_gets_the_current_one(
    catalog: Catalog, take: Take, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who took it stays unknown."""
    taken = take(None, "a")
    forge(taken, provenance={})
    monkeypatch.setenv("EXPSTATE_PROJECT", "another")
    catalog.scan(tmp_path / "runs")

    (found,) = catalog.search()
    assert ("another", None) == (found.project, found.user)


# Order


def test_old_snapshots_are_entered_at_their_time(any_catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """What was taken before is not on top because it is entered later."""
    old = take(None, "old")
    new = take(any_catalog, "new")
    any_catalog.scan(tmp_path / "runs")

    assert [new.id, old.id] == ids(any_catalog)
    assert new.id == any_catalog["latest"].id


def test_a_parent_comes_before_its_child_whatever_the_clocks_said(any_catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Here each was taken a day before its parent."""
    taken = [take(None, f"{number}") for number in range(4)]
    for number, snapshot in enumerate(taken):
        forge(snapshot, created_at=f"2026-01-{10 - number:02d}T00:00:00+00:00")
    any_catalog.scan(tmp_path / "runs")

    assert [taken[number].id for number in (3, 2, 1, 0)] == ids(any_catalog)


def test_snapshots_that_are_each_others_parents_are_entered(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """No take makes such, so nobody minds the order."""
    taken = [take(None, f"{number}") for number in range(3)]
    for number, snapshot in enumerate(taken):
        forge(snapshot, parent=taken[(number + 1) % 3].id)
    catalog.scan(tmp_path / "runs")

    assert sorted(snapshot.id for snapshot in taken) == sorted(ids(catalog))


# What has changed


def test_a_moved_snapshot_is_found_at_its_new_place(any_catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Its old place is missing; the record stays one."""
    taken = take(any_catalog, "a")
    shutil.move(taken.path, tmp_path / "runs" / "b")
    report = any_catalog.scan()

    assert (taken.path,) == report.missing
    (found,) = any_catalog.search()
    assert [(str(tmp_path / "runs" / "b"), "present"), (taken.path, "missing")] == [(p.url, p.status) for p in found.locations]
    assert "present" == found.status


def test_a_copy_is_another_place_of_the_same_record(any_catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Copies keep the id."""
    taken = take(any_catalog, "a")
    shutil.copytree(taken.path, tmp_path / "elsewhere" / "copy")
    report = any_catalog.scan(tmp_path / "elsewhere")

    assert ((), 1) == (report.entered, report.known)
    (found,) = any_catalog.search()
    assert {taken.path, str(tmp_path / "elsewhere" / "copy")} == {place.url for place in found.locations}


def test_a_removed_snapshot_is_missing(any_catalog: Catalog, take: Take) -> None:
    """The record stays, and says so; when the folder comes back it is present again."""
    taken = take(any_catalog, "a")
    put_away = Path(taken.path).rename(Path(taken.path).parents[1] / "away")
    report = any_catalog.scan()

    assert (taken.path,) == report.missing
    assert "missing" == any_catalog[taken.id].status
    put_away.rename(taken.path)
    assert ((), ()) == (any_catalog.scan().missing, any_catalog.scan().damaged)
    assert "present" == any_catalog[taken.id].status


def test_an_overwritten_snapshot_is_replaced(any_catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Also if the take that did it is recorded nowhere."""
    first = take(any_catalog, "a")
    second = take(None, "a", overwrite=True)
    report = any_catalog.scan()

    assert ((second.path,), (second.path,)) == (report.entered, report.replaced)
    assert ["present", "replaced"] == [any_catalog[snapshot.id].status for snapshot in (second, first)]


def test_what_is_overwritten_while_a_scan_reads_is_not_entered(
    catalog: Catalog, take: Take, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one is recorded by its take, and stays what is there."""
    take(None, "a")
    new: list[Snapshot] = []
    really_write = type(catalog.database).writing

    def overwrite_first(database: object, *given: object) -> object:
        if not new:
            new.append(take(None, "a", overwrite=True))
        return really_write(database, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(type(catalog.database), "writing", overwrite_first)
    report = catalog.scan(tmp_path / "runs")

    assert ((), 0) == (report.entered, report.known)
    assert [] == ids(catalog)


# All that is known


def test_without_a_folder_all_places_are_looked_at(any_catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Folders that takes went to, where more may lie by now, and places that are known otherwise."""
    take(any_catalog, "a")
    beside = take(None, "b")
    away = take(None, "deep/down/c")
    any_catalog.scan(away.path)
    assert {away.id, any_catalog["latest"].id} <= set(ids(any_catalog))
    shutil.rmtree(away.path)
    report = any_catalog.scan()

    assert (beside.path,) == report.entered
    assert (away.path,) == report.missing


def test_what_a_scan_entered_is_found_again_when_the_catalog_is_lost(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Its folder is remembered like one that a take went to."""
    taken = take(None, "deep/down/c")
    catalog.scan(tmp_path / "runs")
    catalog.close()
    assert catalog.place.path is not None
    catalog.place.path.unlink()
    catalog.scan()

    assert [taken.id] == ids(catalog)


@pytest.mark.parametrize("level", ["minimal", "off"])
def test_a_scan_keeps_what_the_manifest_does_not_tell(any_catalog: Catalog, take: Take, level: str) -> None:
    """Whose a snapshot is and to which project it belongs is known to the take, though its provenance is not recorded."""
    with settings.override(provenance=level):
        taken = take(any_catalog, "a")
    before = any_catalog[taken.id]
    report = any_catalog.scan()

    assert before.user
    assert 0 == report.mended
    assert before == any_catalog[taken.id]


def test_places_on_other_machines_are_left_alone(catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies at the same path here is something else."""
    from expstate.catalog import model

    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(model.socket, "gethostname", lambda: "another")
        taken = take(catalog, "a")
    shutil.rmtree(taken.path)
    report = catalog.scan()

    assert () == report.missing
    assert "present" == catalog[taken.id].status


# What there is no snapshot in


def test_a_folder_that_is_not_there_is_an_error(catalog: Catalog, tmp_path: Path) -> None:
    """A slip of the pen is not an empty folder."""
    with pytest.raises(SnapshotNotFoundError, match="no folder"):
        catalog.scan(tmp_path / "nowhere")


def test_storage_options_without_a_folder_are_an_error(catalog: Catalog) -> None:
    """They would be ignored."""
    with pytest.raises(InvalidArgumentError, match="URL"):
        catalog.scan(storage_options={"key": "x"})


def test_links_are_not_followed(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Neither to folders elsewhere nor round in circles; and a manifest that is a link is no snapshot's."""
    outside = take(None, "../outside")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(outside.path)
    (tmp_path / "runs" / "circle").symlink_to(tmp_path / "runs")
    (tmp_path / "runs" / "made").mkdir()
    (tmp_path / "runs" / "made" / "snapshot.json").symlink_to(Path(outside.path, "snapshot.json"))
    report = catalog.scan(tmp_path / "runs")

    assert () == report.entered
    assert [str(tmp_path / "runs" / "made")] == [problem.path for problem in report.damaged]


def test_takes_that_were_interrupted_are_no_snapshots(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Files without a manifest, or with the beginning of one."""
    taken = take(None, "a")
    path = Path(taken.path, "snapshot.json")
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) // 2])
    (tmp_path / "runs" / "b").mkdir()
    report = catalog.scan(tmp_path / "runs")

    assert ((), ()) == (report.entered, report.damaged)


def test_a_storage_that_cannot_list_folders_is_looked_into_itself(catalog: Catalog) -> None:
    """Of what lies below it nothing is known."""
    import expstate.testing

    assert expstate.testing is not None
    taken = Snapshot.take("null://scanned", {"model": StateDict(weight=torch.ones(3))})
    report = catalog.scan("null://scanned")

    assert (taken.path,) == report.entered
    assert "" == catalog[taken.id].locations[0].host
    taken.delete()


def test_folders_that_cannot_be_read_are_reported(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """The others are entered all the same. Here the paths get longer than the system takes."""
    taken = take(None, "a")
    folder = os.open(tmp_path / "runs", os.O_RDONLY)
    for _ in range(18):
        os.mkdir("d" * 250, dir_fd=folder)
        inner = os.open("d" * 250, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
    report = catalog.scan(tmp_path / "runs")

    assert (taken.path,) == report.entered
    (problem,) = report.damaged
    assert "too long" in problem.reason


def test_the_report_counts_and_escapes(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Names of folders are anybody's."""
    take(None, "a")
    bad = take(None, "\x1b[31m<script>")
    path = Path(bad.path, "snapshot.json")
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data.replace(b'"world_size":1', b'"world_size":2'))
    report = catalog.scan(tmp_path / "runs")

    assert "3 folders" in str(report)
    assert "1 entered, 0 known" in str(report)
    assert "\x1b" not in str(report) + report._repr_html_()
    assert "<script>" in str(report)
    assert "<script>" not in report._repr_html_()
    assert [bad.path] == [problem["path"] for problem in report.to_dict()["damaged"]]


def test_a_manifest_too_strange_for_the_database_does_not_keep_others_out(any_catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Each of these has a right digest and passes for a manifest otherwise."""
    good = take(None, "good")
    forge(take(None, "step"), metadata={"step": 2**70})
    forge(take(None, "ranks"), world_size=2**40)
    forge(take(None, "param"), metadata={"params": {"x": {"type": "nothing known", "value": 1}}})
    forge(take(None, "packages"), provenance={"packages": [1, 2], "project": ["x"], "user": 7, "git": "y", "host": None})
    forge(take(None, "user"), provenance={"project": "a\0b", "user": "c\0d", "host": "e\0f"})
    forge(take(None, "name"), metadata={"name": "n\0m", "tags": ["t\0u"], "note": "n\0o"})
    forge(take(None, "time"), created_at="0001-01-01T00:00:00+00:00")
    report = any_catalog.scan(tmp_path / "runs")

    assert good.path in report.entered
    assert {str(tmp_path / "runs" / name) for name in ("step", "ranks")} <= {problem.path for problem in report.damaged}
    assert 8 == len(report.entered) + len(report.damaged)
    assert len(report.entered) == len(list(any_catalog.search(project="*")))


def test_a_manifest_with_two_ids_is_damaged(catalog: Catalog, take: Take) -> None:
    """Of keys that are there twice JSON takes the last, and the file's name for it would be the first."""
    taken = take(None, "a")
    path = Path(taken.path, "snapshot.json")
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(with_digest(data[: data.rindex(b',"blake3"')] + b',"id":"' + b"0" * 32 + b'"'))
    report = catalog.scan(taken.path)

    assert () == report.entered
    assert "two ids" in report.damaged[0].reason
    assert manifests.identify(path.read_bytes())[0] == taken.id
