"""Whatever is done to snapshots, folders and the catalog in whatever order, the catalog says what plain Python says."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

import expstate
from expstate import Catalog, Snapshot, StateDict
from expstate.catalog import recorder
from expstate.engine import ancestry
from expstate.errors import CatalogWarning, ExpstateError, RefNotFoundError, SnapshotExistsError, SnapshotPinnedError
from tests.campaign import Campaign

from .plain_catalog import PlainCatalog, Row, Taken

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - thousands of flushes take long on a disk
slots = st.sampled_from(["1", "2", "3", "4"])
projects = st.sampled_from(["tests", "tests", "others"])
names = st.sampled_from([None, "first", "second"])
labels = st.sampled_from(["ablation", "baseline"])
aliases = st.sampled_from(["best", "final"])
losses = st.sampled_from([0.1, 0.5, 0.9, math.nan])
places = st.integers(0, 5)
"""Which of the records: the newest, the next, and so on."""


class Machine(RuleBasedStateMachine):
    """A catalog, its folders, and what plain Python knows of both."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="expstate-machine-", dir=MEMORY))
        self.catalog = Catalog(self.root / "catalog" / "catalog.db")
        self.plain = PlainCatalog()
        self.count = 0
        recorder.forget()
        ancestry.forget()

    def teardown(self) -> None:
        self.catalog.close()
        shutil.rmtree(self.root)

    def path(self, slot: str) -> Path:
        return self.root / "runs" / slot

    def row(self, place: int) -> Row:
        rows = self.plain.newest_first()
        return rows[place % len(rows)]

    @contextlib.contextmanager
    def of_project(self, project: str) -> Iterator[None]:
        """As somebody who works on a project, and knows that some things stay in the catalog alone."""
        with expstate.settings.override(project=project), warnings.catch_warnings():
            warnings.simplefilter("ignore", CatalogWarning)
            yield

    # Takes

    def take(self, slot: str, project: str, name: str | None, tags: set[str], loss: float | None, **options: Any) -> None:
        is_async, is_recorded = options.pop("is_async", False), options.pop("is_recorded", True)
        self.count += 1
        metrics = {} if loss is None else {"loss": loss}
        state = {"model": StateDict(number=self.count)}
        catalog = self.catalog if is_recorded else False
        with self.of_project(project):
            function: Any = Snapshot.async_take if is_async else Snapshot.take
            taken = function(self.path(slot), state, name=name, tags=tags, metrics=metrics, catalog=catalog, **options)
            if is_async:
                assert taken.id == self.catalog[taken.id].id
                taken = taken.wait()
        self.plain.take(slot, Taken(taken.id, self.count, project, name, tuple(tags), metrics), is_recorded=is_recorded)

    @initialize(name=names, tags=st.sets(labels), loss=losses)
    def take_first(self, **given: Any) -> None:
        """So that the catalog knows the folder."""
        self.take("1", "tests", **given)

    @rule(slot=slots, project=projects, name=names, tags=st.sets(labels), loss=st.none() | losses, is_async=st.booleans())
    def take_one(self, slot: str, **given: Any) -> None:
        if slot not in self.plain.folders:
            self.take(slot, **given)
        else:
            with pytest.raises(SnapshotExistsError):
                self.take(slot, **given)

    @rule(slot=slots, project=projects, name=names, tags=st.sets(labels), loss=losses, force=st.booleans())
    def overwrite(self, slot: str, **given: Any) -> None:
        found = self.plain.folders.get(slot)
        if found is None or not found.is_protected or given["force"]:
            self.take(slot, **given, overwrite=True)
        else:
            with pytest.raises(SnapshotPinnedError):
                self.take(slot, **given, overwrite=True)

    @rule(slot=slots, name=names)
    def take_without_the_catalog(self, slot: str, name: str | None) -> None:
        if slot not in self.plain.folders:
            self.take(slot, "tests", name, set(), None, is_recorded=False)

    # Folders

    @rule(source=slots, slot=slots)
    def copy_a_folder(self, source: str, slot: str) -> None:
        if source in self.plain.folders and slot not in self.plain.folders:
            shutil.copytree(self.path(source), self.path(slot))
            self.plain.copy(source, slot)

    @rule(slot=slots)
    def remove_a_folder(self, slot: str) -> None:
        if slot in self.plain.folders:
            shutil.rmtree(self.path(slot))
            del self.plain.folders[slot]

    @precondition(lambda self: len(self.plain.rows) > 1)
    @rule()
    def lose_the_catalog(self) -> None:
        (self.root / "catalog" / "catalog.db").unlink()
        self.plain.lose()

    @rule()
    def scan(self) -> None:
        entered, missing, mended = self.plain.scan()
        report = self.catalog.scan()

        assert len(entered) == len(report.entered)
        assert missing == {Path(url).name for url in report.missing}
        assert mended == bool(report.mended)
        assert () == report.damaged
        assert all(row.status != "missing" for row in self.plain.rows.values()) == self.catalog.check(project="*").ok

    # What people add

    def edit(self, place: int, work: Callable[[str], Any], **changes: Any) -> None:
        row = self.row(place)
        with self.of_project(row.taken.project):
            work(row.taken.id)
        self.plain.edit(row.taken.id, {(kind, name): value for kind, (name, value) in changes.items()})

    @precondition(lambda self: self.plain.rows)
    @rule(place=places, label=labels, present=st.booleans())
    def tag(self, place: int, label: str, present: bool) -> None:
        self.edit(place, lambda ref: (self.catalog.tag if present else self.catalog.untag)(ref, label), tag=(label, present))

    @precondition(lambda self: self.plain.rows)
    @rule(place=places, present=st.booleans())
    def pin(self, place: int, present: bool) -> None:
        self.edit(place, self.catalog.pin if present else self.catalog.unpin, pin=("", present))

    @precondition(lambda self: self.plain.rows)
    @rule(place=places, text=st.sampled_from(["good", "bad", None]))
    def note(self, place: int, text: str | None) -> None:
        self.edit(place, lambda ref: self.catalog.note(ref, text), note=("", text))

    @precondition(lambda self: self.plain.rows)
    @rule(place=places, name=st.sampled_from(["loss", "acc"]), value=losses)
    def log_metric(self, place: int, name: str, value: float) -> None:
        self.edit(place, lambda ref: self.catalog.log_metric(ref, name, value), metric=(name, value))

    @precondition(lambda self: self.plain.rows)
    @rule(place=places, alias=aliases)
    def alias(self, place: int, alias: str) -> None:
        row = self.row(place)
        with self.of_project(row.taken.project):
            assert alias in self.catalog.alias(row.taken.id, alias).aliases
        self.plain.alias(row.taken.id, alias)

    @rule(project=projects, alias=aliases)
    def unalias(self, project: str, alias: str) -> None:
        holder = self.plain.holders.get((project, alias))
        with self.of_project(project):
            if holder is None:
                with pytest.raises(RefNotFoundError):
                    self.catalog.unalias(alias)
            else:
                self.catalog.unalias(alias)
                self.plain.edit(holder[1], {("alias", alias): False})

    # What goes

    @precondition(lambda self: self.plain.rows)
    @rule(place=places, force=st.sampled_from([False, False, True]))
    def delete(self, place: int, force: bool) -> None:
        row = self.row(place)
        with self.of_project(row.taken.project):
            if self.plain.is_protected(row) and not force:
                with pytest.raises(SnapshotPinnedError):
                    self.catalog.delete(row.taken.id)
            else:
                self.catalog.delete(row.taken.id, force=force)
                self.plain.remove(row)

    @rule(project=projects, last=st.integers(1, 2), best=st.none() | st.integers(1, 2), keep_tagged=st.booleans())
    def prune(self, project: str, last: int, best: int | None, keep_tagged: bool) -> None:
        planned = self.plain.to_prune(project, last, best, keep_tagged=keep_tagged)
        keep_best = None if best is None else ("loss", "min", best)
        with self.of_project(project):
            try:
                plan = self.catalog.prune(keep_last=last, keep_best=keep_best, keep_tagged=keep_tagged)
            except ExpstateError as error:
                assert best is not None
                assert "no snapshot of the project has the metric 'loss'" in str(error)
                return
            assert [row.taken.id for row in planned] == [record.id for record in plan.delete]
            report = plan.apply()
        deleted, skipped = self.plain.prune(planned, keep_tagged=keep_tagged)
        assert [row.taken.id for row in deleted] == [record.id for record in report.deleted]
        assert [row.taken.id for row in skipped] == [left.record.id for left in report.skipped]

    # What must hold

    @invariant()
    def every_record_says_what_plain_python_says(self) -> None:
        plain = self.plain
        expected = [
            (row.taken.id, row.taken.project, row.taken.name, row.tags, plain.aliases(row), row.pinned, row.note, row.status)
            for row in plain.newest_first()
        ]
        records = self.catalog.search(project="*")
        found = [
            (record.id, record.project, record.name, record.tags, record.aliases, record.pinned, record.note, record.status)
            for record in records
        ]
        slots_of = [{Path(place.url).name: place.status for place in record.locations} for record in records]
        assert expected == found
        assert [row.places for row in plain.newest_first()] == slots_of
        assert [repr(sorted(row.metrics.items())) for row in plain.newest_first()] == [
            repr(sorted(record.metrics.items())) for record in records
        ]

    @rule(project=projects)
    def search(self, project: str) -> None:
        for query, only in QUERIES.items():
            expected = [row.taken.id for row in self.plain.newest_first(project, lambda row, only=only: only(self.plain, row))]
            found = [record.id for record in self.catalog.search(query, project=project)]
            assert expected == found, query

    @invariant()
    def folders_are_those_that_nobody_removed(self) -> None:
        """So nothing that is pinned was removed, and nothing that was to go is left."""
        folder = self.root / "runs"
        assert set(self.plain.folders) == {path.name for path in folder.iterdir()} if folder.exists() else not self.plain.folders
        for slot, found in self.plain.folders.items():
            assert found.taken.number == Snapshot(self.path(slot)).read_object("model/number")

    @rule()
    def check(self) -> None:
        report = self.catalog.check(project="*")
        assert self.plain.is_true == report.ok, str(report)

    @rule(project=projects)
    def look_up(self, project: str) -> None:
        rows = self.plain.newest_first(project)
        present = [row for row in rows if row.status == "present"]
        expected: dict[str, Row | None] = {row.taken.id[:8]: row for row in rows}
        expected |= dict.fromkeys(("latest", "latest~1", "best", "final"))
        expected |= dict(zip(("latest", "latest~1"), present, strict=False))
        for name in ("first", "second"):
            expected[name] = next((row for row in present + rows if row.taken.name == name), None)
        for (project_of_alias, alias), (_, holder) in self.plain.holders.items():
            if project_of_alias == project:
                expected[alias] = self.plain.rows[holder]
        for row in self.plain.rows.values():
            expected |= {str(self.path(slot)): row for slot, status in row.places.items() if status == "present"}
        with self.of_project(project):
            for ref, row in expected.items():
                assert (None if row is None else row.taken.id) == self.found(ref), ref

    def found(self, ref: str) -> str | None:
        try:
            return self.catalog[ref].id
        except RefNotFoundError:
            return None


QUERIES: dict[str, Callable[[PlainCatalog, Row], bool]] = {
    "tag = ablation and not pinned": lambda _, row: "ablation" in row.tags and not row.pinned,
    "metric.loss < 0.6": lambda _, row: row.metrics.get("loss", math.nan) < 0.6,
    "not metric.loss < 0.6 or note = good": lambda _, row: not row.metrics.get("loss", math.nan) < 0.6 or row.note == "good",
    "alias = best or status = missing": lambda plain, row: "best" in plain.aliases(row) or row.status == "missing",
    "name = first": lambda _, row: row.taken.name == "first",
}


@pytest.mark.campaign("The catalog is an index", "whatever is done in whatever order, against what plain Python knows")
def test_a_catalog_says_what_plain_python_says(campaign: Campaign) -> None:
    class Counted(Machine):
        def teardown(self) -> None:
            super().teardown()
            campaign.tried()

    examples, steps = campaign.choose(15, 150), campaign.choose(15, 30)
    run_state_machine_as_test(
        Counted, settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck))
    )


def pin_and_delete(machine: Machine) -> None:
    machine.pin(place=0, present=True)
    machine.delete(place=0, force=False)


def move_an_alias(machine: Machine) -> None:
    machine.take_one(slot="2", project="tests", name="second", tags=set(), loss=0.5, is_async=False)
    machine.alias(place=1, alias="best")
    machine.alias(place=0, alias="best")


def remove_a_folder_and_scan(machine: Machine) -> None:
    machine.remove_a_folder(slot="1")
    machine.scan()


@pytest.mark.parametrize("is_broken", [False, True])
@pytest.mark.parametrize(
    ("function", "steps"),
    [
        ("expstate.engine.annotate.check_unprotected", pin_and_delete),
        ("expstate.catalog.rows._claim_aliases", move_an_alias),
        ("expstate.catalog.rows.set_location_status", remove_a_folder_and_scan),
    ],
)
def test_what_a_catalog_forgets_to_do_is_noticed(
    function: str, steps: Callable[[Machine], None], is_broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_broken:
        monkeypatch.setattr(function, lambda *_, **__: None)
    machine = Machine()
    with contextlib.ExitStack() as stack:
        stack.callback(machine.teardown)
        machine.take_first(name="first", tags=set(), loss=0.1)
        if is_broken:
            stack.enter_context(pytest.raises((AssertionError, pytest.fail.Exception)))
        steps(machine)
        machine.every_record_says_what_plain_python_says()
        machine.folders_are_those_that_nobody_removed()
