"""A process that is killed while it changes a catalog, or snapshots that it names, loses none and leaves what the next one finishes."""

from __future__ import annotations

import functools
import shutil
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

from expstate import Catalog, Snapshot, StateDict, gc
from expstate.catalog import schema, versions
from expstate.engine import annotate
from expstate.errors import SnapshotNotFoundError
from expstate.storage.local import LocalStorage
from tests.campaign import Campaign
from tests.engine.crashes import HALVES, LEFTOVERS, LOST, let_a_day_pass, point, seeing
from tests.engine.processes import NEEDS_STRACE, changes_of, changing_calls, killed_at, killed_on

MIGRATION = '''
"""One that makes tables anew, to which others point."""
import sqlalchemy as sa
from alembic import op

revision = "later"
down_revision = "{before}"


def upgrade():
    with op.batch_alter_table("records") as table:
        table.add_column(sa.Column("colour", sa.Text(), server_default="green", nullable=False))
    with op.batch_alter_table("names", recreate="always") as table:
        table.add_column(sa.Column("unit", sa.Text()))
'''
STEPS, PRUNED = range(6), (0, 1, 2)
ACTIONS = ("take", "edit", "delete", "prune", "gc", "scan", "migrate")


def take(root: Path, step: int) -> Snapshot:
    state = {"model": StateDict(weight=torch.full((3000,), float(step))), "step": StateDict(step=step)}
    return Snapshot.take(root / "runs" / str(step), state, step=step, catalog=root / "catalog.db")


def prepare(root: Path, action: str) -> None:
    """Snapshots in a catalog: one with an alias that is to move, one that is pinned; for some actions something is left undone."""
    for step in STEPS:
        take(root, step)
    catalog = Catalog(root / "catalog.db")
    catalog.alias(catalog.search("step = 4")[0].id, "best")
    catalog.pin(catalog.search("step = 5")[0].id)
    catalog.close()
    if action == "gc":
        number = len(changes_of(lambda: take(root, 7))) - 8
        shutil.rmtree(root / "runs" / "7", ignore_errors=True)
        assert signal.SIGKILL == killed_at(number, lambda: take(root, 7)).signal
    if action == "scan":
        (root / "catalog.db").unlink()
        for path in root.glob("catalog.db-*"):
            path.unlink()


def act(root: Path, action: str) -> None:
    """What is interrupted; it may be done again."""
    catalog = Catalog(root / "catalog.db")
    if action == "take":
        take(root, 6)
    elif action == "edit":
        ref = catalog.search("step = 3")[0].id
        catalog.tag(ref, "good", "kept")
        catalog.alias(ref, "best")
        catalog.pin(ref)
        catalog.note(ref, "seen")
        catalog.log_metric(ref, "loss", 0.5)
    elif action == "delete":
        for record in catalog.search("step = 0"):
            catalog.delete(record.id)
    elif action == "prune":
        catalog.prune(keep_last=3).apply()
    elif action == "gc":
        gc(root)
    elif action == "scan":
        catalog.scan(root)
    else:
        len(catalog)  # the first that looks migrates
    catalog.close()


def value_at(folder: Path) -> int | None:
    """The step that a snapshot was taken at, all of it verified; None if nothing is visible there."""
    try:
        assert Snapshot(folder).verify().ok
    except SnapshotNotFoundError:
        return None
    live = {"model": StateDict(weight=torch.zeros(3000)), "step": StateDict(step=-1)}
    Snapshot(folder).restore(live)
    step = int(live["step"]["step"])
    assert torch.equal(torch.full((3000,), float(step)), live["model"]["weight"])
    return step


def check(root: Path, action: str) -> None:
    """All that must hold after a crash, and after what was interrupted is done again."""
    may_be_gone = {"prune": set(PRUNED), "delete": {0}}.get(action, set())
    stay = {step for step in STEPS if step not in may_be_gone}
    with seeing(LOST):
        assert stay == {step for step in stay if seen(root, step)}
    with seeing(HALVES):
        for step in (*may_be_gone, 6):
            seen(root, step)
    catalog = Catalog(root / "catalog.db")
    with seeing(LOST):
        assert action == "scan" or stay <= {record.step for record in catalog.search()}
        with closing(sqlite3.connect(root / "catalog.db")) as connection:
            assert [("ok",)] == connection.execute("PRAGMA integrity_check").fetchall()
    catalog.close()

    if action != "take" or not seen(root, 6):
        act(root, action)
    for folder in (root / "runs").iterdir():
        let_a_day_pass(folder)
    gc(root)
    there = [step for step in (*STEPS, 6) if seen(root, step)]
    with seeing(LOST):
        assert sorted(stay | ({6} if action == "take" else set())) == there
    with seeing(LEFTOVERS):
        assert_clean(root, there)
    catalog = Catalog(root / "catalog.db")
    catalog.scan(root)
    catalog.scan()
    for record in catalog.search('status = "missing"'):  # as `expstate check` says; deleted, but its record was not any more
        assert not seen(root, record.step or 0)
        catalog.delete(record.id)
    with seeing(LEFTOVERS):
        assert catalog.check().ok, str(catalog.check())
        assert there == sorted(record.step for record in catalog.search())
    assert [3 if action == "edit" else 4] == [record.step for record in catalog.search() if "best" in record.aliases]
    if action == "edit":
        record = catalog.search("step = 3")[0]
        assert (("good", "kept"), True, "seen", 0.5) == (tuple(sorted(record.tags)), record.pinned, record.note, record.metrics["loss"])
    catalog.close()


def seen(root: Path, step: int) -> bool:
    """Whether a snapshot is visible where it was taken, with its own value; also what was added to it can be read."""
    folder = root / "runs" / str(step)
    found = value_at(folder)
    assert found in {step, None}
    if found is not None:
        annotate.read(LocalStorage(str(folder)), Snapshot(folder).id)
    return found is not None


def assert_clean(root: Path, there: list[int]) -> None:
    """No file is in the folders but what the manifests name, and what people added; an empty folder is nobody's."""
    runs = root / "runs"
    expected = {f"{step}/{record.name}" for step in there for record in Snapshot(runs / str(step)).manifest.files}
    found = {str(path.relative_to(runs)) for path in runs.rglob("*") if path.is_file()}
    assert expected | {f"{step}/snapshot.json" for step in there} == {name for name in found if not name.endswith("/annotations.json")}
    assert {str(step) for step in there} >= {name.partition("/")[0] for name in found}


class Scene:
    """The same folder, again and again as it was before."""

    def __init__(self, tmp_path: Path, action: str) -> None:
        self.root, self._kept = tmp_path / "scene", tmp_path / "kept"
        prepare(self.root, action)
        shutil.copytree(self.root, self._kept)
        self.act = functools.partial(act, self.root, action)

    def again(self) -> Path:
        shutil.rmtree(self.root)
        shutil.copytree(self._kept, self.root)
        return self.root


@pytest.fixture
def later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes this process one of a later version if that is what the action is about."""

    def install(action: str) -> None:
        if action == "migrate":
            folder = tmp_path / "migrations"
            shutil.copytree(versions.FOLDER, folder)
            (folder / "versions" / "later.py").write_text(MIGRATION.format(before=schema.VERSION))
            monkeypatch.setattr(versions, "FOLDER", folder)
            monkeypatch.setattr(schema, "VERSION", "later")

    return install


@pytest.mark.campaign("All or nothing", "a process killed before each change of the disk while it edits, deletes, prunes or cleans up")
@pytest.mark.parametrize("action", ["edit", "delete", "prune", "gc"])
def test_killed_before_any_change(tmp_path: Path, action: str, campaign: Campaign) -> None:
    scene = Scene(tmp_path, action)
    count = len(changes_of(scene.act))
    for number in campaign.some(range(1, count + 1), short=4):
        root = scene.again()
        assert signal.SIGKILL == killed_at(number, scene.act).signal
        with point(campaign):
            check(root, action)


@NEEDS_STRACE
@pytest.mark.slow
@pytest.mark.campaign("The catalog is an index", "a process killed by strace on entering each changing system call, SQLite's too")
@pytest.mark.parametrize("action", ACTIONS)
def test_killed_on_entering_a_system_call(tmp_path: Path, action: str, campaign: Campaign, later: Callable[[str], None]) -> None:
    scene = Scene(tmp_path, action)
    later(action)
    calls = changing_calls(scene.act, tmp_path / "log")
    for call, number in campaign.some(calls, short=3):
        root = scene.again()
        killed_on(call, number, scene.act, tmp_path / "log")
        with point(campaign):
            check(root, action)
