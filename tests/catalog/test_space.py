"""What is said to get free is what gets free, of one snapshot and of many, wherever it is shown."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expstate import Catalog, Record, Snapshot, StateDict
from expstate.catalog import folders, space
from expstate.cli import main
from expstate.engine.report import bytes_text
from expstate.errors import StorageError
from expstate.notebook.browser import edits, overview
from expstate.notebook.browser.data import Table
from expstate.storage.local import LocalStorage
from tests.catalog.made import enter
from tests.engine.shared import SIZE, room, take_shared

SHARED = 4 * SIZE
"""Bytes of the tensor that all have."""


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


@pytest.fixture
def taken(catalog: Catalog, runs: Path) -> list[Snapshot]:
    """Four snapshots of one project that share a file."""
    return take_shared(runs, 4, catalog=catalog)


def record(catalog: Catalog, step: int) -> Record:
    return catalog[f"step-{step}"]


# Records


def test_a_record_tells_what_the_take_wrote(catalog: Catalog, taken: list[Snapshot]) -> None:
    """As the snapshot does, in tables and in queries too."""
    written = [snapshot.nbytes_written for snapshot in taken]
    found = catalog.search(sort="step")

    assert written == [one.nbytes_written for one in found]
    assert written == found.to_pandas()["nbytes_written"].tolist()
    assert written[0] > taken[0].nbytes > SHARED > written[1] == written[2] == written[3]
    for name in ("written", "nbytes_written"):
        assert [0] == [one.step for one in catalog.search(f"{name} > {SHARED}")]
    assert [1, 2, 3] == sorted(one.step or 0 for one in catalog.search("written < 100 KiB"))
    assert catalog.check().ok


def test_a_record_tells_what_its_deletion_frees(catalog: Catalog, taken: list[Snapshot], runs: Path) -> None:
    """Now: it looks each time."""
    for step in (1, 0, 3, 2):
        before, unique = room(runs), record(catalog, step).nbytes_unique
        assert unique == taken[step].nbytes_unique
        catalog.delete(f"step-{step}")
        assert before - room(runs) == unique


def test_a_copy_counts_at_each_of_its_places(catalog: Catalog, taken: list[Snapshot], tmp_path: Path) -> None:
    """Since all of them go; what can be known of none of them is None."""
    alone = record(catalog, 1).nbytes_unique
    assert alone is not None
    copied = taken[1].copy(tmp_path / "copy", catalog=catalog)

    assert alone + (copied.nbytes_unique or 0) == record(catalog, 1).nbytes_unique
    shutil.rmtree(tmp_path / "copy")
    assert alone == record(catalog, 1).nbytes_unique
    shutil.rmtree(taken[1].path)
    assert record(catalog, 1).nbytes_unique is None


def test_of_what_lies_on_another_host_nothing_is_known(catalog: Catalog, taken: list[Snapshot], monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing there is read."""
    monkeypatch.setattr(folders, "is_reachable", lambda *_: False)
    monkeypatch.setattr(LocalStorage, "list", lambda *_: pytest.fail("it was looked at"))

    assert record(catalog, 1).nbytes_unique is None
    assert space.nbytes_unique(catalog.search()) is None


def test_a_folder_that_cannot_be_listed_is_left_out(catalog: Catalog, taken: list[Snapshot], monkeypatch: pytest.MonkeyPatch) -> None:
    really = LocalStorage.list

    def listed(storage: LocalStorage) -> Any:
        if storage.path == taken[1].path:
            msg = "broken"
            raise StorageError(msg)
        return really(storage)

    monkeypatch.setattr(LocalStorage, "list", listed)
    both = [record(catalog, 1), record(catalog, 2)]

    assert both[0].nbytes_unique is None
    assert both[1].nbytes_unique == space.nbytes_unique(both)


# Pruning


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_a_plan_says_what_gets_free(catalog: Catalog, taken: list[Snapshot], runs: Path, keep: int) -> None:
    """Of all that go together; and so does the report, of what went."""
    before = room(runs)
    plan = catalog.prune(keep_last=keep)
    report = plan.apply()

    assert (4 - keep) * taken[0].nbytes == plan.nbytes == report.nbytes
    assert before - room(runs) == plan.nbytes_freed == report.nbytes_freed
    assert plan.nbytes_freed == plan.to_dict()["nbytes_freed"] == report.to_dict()["nbytes_freed"]


def test_a_plan_in_which_all_go_frees_all(catalog: Catalog, taken: list[Snapshot], runs: Path) -> None:
    """The shared file too, once."""
    everything = room(runs)
    plan = catalog.prune(older_than="0s")
    report = plan.apply()

    assert 4 == len(report.deleted)
    assert everything == plan.nbytes_freed == report.nbytes_freed
    assert 0 == room(runs)


def test_a_report_counts_what_went_alone(catalog: Catalog, taken: list[Snapshot], runs: Path) -> None:
    """And not what was planned."""
    plan = catalog.prune(older_than="0s")
    catalog.pin("step-2")
    before = room(runs)
    report = plan.apply()

    assert ["step-2"] == [skipped.record.name for skipped in report.skipped]
    assert before - room(runs) == report.nbytes_freed < plan.nbytes_freed


def test_what_gets_free_is_said_where_it_is_less(catalog: Catalog, taken: list[Snapshot], tmp_path: Path) -> None:
    """Of a plan and of a report, as text and as a page."""
    plan = catalog.prune(keep_last=1)
    assert f"({bytes_text(plan.nbytes)}, of which {bytes_text(plan.nbytes_freed)} get free)" in str(plan)
    assert "get free" in plan._repr_html_()
    assert f"({bytes_text(plan.nbytes)}, of which {bytes_text(plan.nbytes_freed)} get free)" in str(plan.apply())

    for step in (4, 5):
        Snapshot.take(tmp_path / "others" / str(step), {"a": StateDict(b=step)}, step=step, catalog=catalog)
    catalog.delete("step-3")
    plan = catalog.prune(keep_last=1)
    assert "get free" not in str(plan) + str(plan.apply())


# The command line


@pytest.fixture
def run(catalog: Catalog, taken: list[Snapshot], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setenv("EXPSTATE_CATALOG", catalog.url)

    def run(*line: str) -> str:
        assert 0 == main(line)
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("line", [("delete", "step-1", "step-2"), ("prune", "--keep-last", "2"), ("delete", "step-0", "step-1", "step-2")])
def test_commands_say_what_gets_free(run: Callable[..., str], runs: Path, line: tuple[str, ...]) -> None:
    """Before and after, for eyes and for programs."""
    before = room(runs)
    shown, planned = run(*line), json.loads(run(*line, "--json"))
    done = json.loads(run(*line, "--yes", "--json"))
    planned, done = planned.get("plan", planned), done.get("report", done.get("plan", done))

    assert before - room(runs) == planned["nbytes_freed"] == done["nbytes_freed"]
    assert f"({bytes_text(planned['nbytes'])}, of which {bytes_text(planned['nbytes_freed'])} get free)" in shown
    assert planned["nbytes"] == done["nbytes"] > planned["nbytes_freed"]


def test_lists_show_what_was_written_where_some_share(run: Callable[..., str], catalog: Catalog, taken: list[Snapshot]) -> None:
    """And what is unique if that is asked for."""
    written, unique = (bytes_text(nbytes or 0) for nbytes in (taken[3].nbytes_written, taken[3].nbytes_unique))
    head, line, *_ = run("list").splitlines()
    assert head.index("written") + len("written") == line.index(written) + len(written)
    head, line, *_ = run("list", "--columns", "name,unique,nbytes_unique").splitlines()
    assert ["name", "unique", "unique"] == head.split()
    assert f"step-3{unique}{unique}".replace(" ", "") == line.replace(" ", "")
    assert "written" not in run("list", "written > 150KiB").splitlines()[0]


def test_show_tells_written_and_unique(run: Callable[..., str], taken: list[Snapshot]) -> None:
    """Of the one that others have gone on from, what is unique alone."""
    size, written, unique = (bytes_text(nbytes or 0) for nbytes in (taken[3].nbytes, taken[3].nbytes_written, taken[3].nbytes_unique))
    assert f"{size}, {written} of it written, {unique} in no other snapshot" in run("show", "step-3")
    first = run("show", "step-0")
    assert f"{bytes_text(taken[0].nbytes_unique or 0)} in no other snapshot" in first
    assert "of it written" not in first
    found = json.loads(run("show", "step-3", "--json"))
    assert [taken[3].nbytes, taken[3].nbytes_written, taken[3].nbytes_unique] == [
        found[name] for name in ("nbytes", "nbytes_written", "nbytes_unique")
    ]


def test_show_waits_for_no_network(run: Callable[..., str], catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what lies in an object store all is unique, and nobody has to ask for that."""
    monkeypatch.setattr(folders, "open_location", lambda url: pytest.fail(f"{url} was opened"))
    enter(catalog, name="far", url="s3://bucket/far", host="")

    assert "no other" not in run("show", "far")
    assert json.loads(run("show", "far", "--json"))["nbytes_unique"] is None
    assert "size" in dict(overview.overview(catalog, catalog["far"].id)["facts"])


def test_a_snapshot_shows_what_its_take_wrote(taken: list[Snapshot]) -> None:
    """If that is not all of it."""
    first, second = (Snapshot(snapshot.path) for snapshot in taken[:2])
    expected = f"{bytes_text(second.nbytes)}, {bytes_text(second.nbytes_written)} of it written"

    assert expected in second._repr_html_()
    assert repr(second).endswith(f"{expected})")
    assert "of it written" not in first._repr_html_() + repr(first)


# The browser


def test_the_browser_tells_written_and_unique(catalog: Catalog, taken: list[Snapshot]) -> None:
    """In its table, on the card and before it deletes."""
    found = Table(catalog, record(catalog, 3).project).search(columns=["written", "size"])
    assert bytes_text(taken[3].nbytes_written) == found["rows"][0]["cells"][0]
    assert f"{bytes_text(sum(snapshot.nbytes_written for snapshot in taken))}, " in found["bytes"]
    facts = dict(overview.overview(catalog, taken[3].id)["facts"])
    assert facts["size"].endswith(f", {bytes_text(taken[3].nbytes_unique or 0)} in no other snapshot")
    asked = edits.ask_delete(catalog, [taken[1].id, taken[2].id])["what"]
    freed = space.nbytes_unique([record(catalog, 1), record(catalog, 2)])
    assert f"2 snapshots, {bytes_text(2 * taken[1].nbytes)}, of which {bytes_text(freed or 0)} get free" == asked


# What shares files is a snapshot like others


def test_scans_and_checks_know_shared_files(catalog: Catalog, taken: list[Snapshot], runs: Path) -> None:
    """As files of each snapshot that has them."""
    assert catalog.check(deep=True).ok
    (shared,) = (runs / "2" / "base").iterdir()
    shared.chmod(0o644)
    os.truncate(shared, 5000)
    findings = catalog.check().findings
    assert {f"{snapshot.path}/{one.name}" for snapshot in taken for one in snapshot.manifest.files if "frozen" in one.name} == {
        finding.name for finding in findings
    }
    shared.unlink()
    assert 1 == sum("missing" in finding.problem for finding in catalog.check().findings)


def test_a_deleted_base_leaves_no_trace(catalog: Catalog, taken: list[Snapshot], runs: Path) -> None:
    """The others are scanned anew and whole."""
    catalog.delete("step-0")
    catalog.scan(runs)

    assert [1, 2, 3] == [one.step for one in catalog.search(sort="step")]
    assert catalog.check(deep=True).ok
