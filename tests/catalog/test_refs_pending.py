"""A take that goes on in the background is found by refs of its process, before everything else, until it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Catalog, PendingSnapshot, Snapshot, StateDict
from expstate.catalog import refs
from expstate.errors import AmbiguousRefError, RefNotFoundError, StorageError, TakeCancelledError, TakePendingError
from expstate.storage import registry
from expstate.testing import FaultyStorage
from tests.engine.processes import in_child

from .made import enter

Start = Callable[..., PendingSnapshot]


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Takes in the background go on when it is set."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def start(gate: threading.Event, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Begin a take whose writes wait for the gate, or fail."""
    begun: list[PendingSnapshot] = []
    fails = threading.Event()

    def wait() -> None:
        assert gate.wait(60)
        if fails.is_set():
            msg = "no disk any more"
            raise StorageError(msg)

    def opened(path: str, _: Any) -> FaultyStorage:
        storage = FaultyStorage(really(path))
        storage.run("write", None, function=wait)
        return storage

    really = registry.open_storage
    monkeypatch.setitem(registry._factories, "gated", opened)

    def start(folder: str, *, fail: bool = False, **options: Any) -> PendingSnapshot:
        if fail:
            fails.set()
        options.setdefault("catalog", catalog)
        state = {folder: StateDict(weight=torch.ones(3))}  # keys of its own, so that none waits for another
        begun.append(Snapshot.async_take(f"gated://{tmp_path}/{folder}", state, **options))
        return begun[-1]

    yield start
    gate.set()
    for pending in begun:
        pending.exception()


def test_a_take_that_goes_on_is_found(start: Start, gate: threading.Event, catalog: Catalog) -> None:
    """By name, id, place and as the latest; then it is a record like others."""
    pending = start("one", name="baseline", step=3, tags=["a"], params={"lr": 0.1}, metrics={"loss": 2}, note="n")
    for ref in ("baseline", pending.id, pending.id[:6], pending.path, "latest"):
        record = catalog[ref]
        assert ("pending", pending.id, pending.path) == (record.status, record.id, record.url)
    assert ("baseline", 3, ("a",), {"lr": 0.1}, {"loss": 2}, "n") == (
        record.name,
        record.step,
        record.tags,
        record.params,
        record.metrics,
        record.note,
    )
    assert ("tests", 12) == (record.project, record.nbytes)
    gate.set()
    pending.wait()

    assert "present" == catalog["baseline"].status


def test_opening_waits_for_it(start: Start, gate: threading.Event, catalog: Catalog) -> None:
    """And gives the committed snapshot."""
    pending = start("one", name="baseline")
    timer = threading.Timer(0.05, gate.set)
    timer.start()

    assert pending.id == Snapshot.find("baseline", catalog=catalog).id
    assert pending.done()
    timer.join()


def test_it_comes_before_what_is_recorded(start: Start, catalog: Catalog) -> None:
    """Before an alias and a name, and at its path; those before it follow it."""
    enter(catalog, id="a" * 32, name="baseline")
    pending = start("one", name="baseline")
    start("two")

    assert pending.id == catalog["baseline"].id == catalog["latest~1"].id
    assert "a" * 32 == catalog["latest~2"].id
    with pytest.raises(RefNotFoundError):
        catalog["latest~3"]


def test_the_last_begun_is_the_latest(start: Start, catalog: Catalog) -> None:
    """Of two with one name too."""
    first, second = start("one", name="same"), start("two", name="same")

    assert [second.id, first.id] == [catalog["latest"].id, catalog["latest~1"].id]
    assert second.id == catalog["same"].id


def test_the_beginning_of_its_id_may_fit_another(start: Start, catalog: Catalog) -> None:
    """Then nobody is guessed at."""
    pending = start("one")
    other = pending.id[:4] + ("0" if pending.id[4] != "0" else "1") * 28
    enter(catalog, id=other)
    with pytest.raises(AmbiguousRefError, match="2 ids") as error:
        catalog[pending.id[:4]]

    assert pending.id in str(error.value)
    assert other in str(error.value)
    assert pending.id == catalog[pending.id].id


def test_a_take_that_fails_is_found_no_more(start: Start, gate: threading.Event, catalog: Catalog) -> None:
    """It never was a snapshot."""
    pending = start("one", fail=True, name="baseline")
    gate.set()

    assert isinstance(pending.exception(), StorageError)
    with pytest.raises(RefNotFoundError):
        catalog["baseline"]


def test_a_take_that_is_cancelled_is_found_no_more(start: Start, gate: threading.Event, catalog: Catalog) -> None:
    """Who waits for it by its name is told."""
    pending = start("one", name="baseline")
    threading.Timer(0.05, gate.set).start()
    errors: list[BaseException] = []

    def find() -> None:
        try:
            Snapshot.find("baseline", catalog=catalog)
        except BaseException as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    finder = threading.Thread(target=find)
    assert "pending" == catalog["baseline"].status
    finder.start()
    pending.cancel()
    finder.join()

    assert isinstance(errors[0], (TakeCancelledError, RefNotFoundError))
    with pytest.raises(RefNotFoundError):
        catalog["baseline"]


def test_it_is_found_only_where_it_will_be_recorded(start: Start, tmp_path: Path, catalog: Catalog) -> None:
    """Not in another catalog, nor if it is not recorded, nor in another project."""
    start("one", name="baseline")
    start("two", name="unrecorded", catalog=False)
    other = Catalog(tmp_path / "other.db")

    for asked, ref, project in ((other, "baseline", None), (catalog, "unrecorded", None), (catalog, "baseline", "another")):
        with pytest.raises(RefNotFoundError):
            refs.resolve(asked, ref, project)
    assert "pending" == refs.resolve(catalog, "baseline", "*").status
    other.close()


def test_nothing_is_added_before_it_is_committed(start: Start, catalog: Catalog) -> None:
    """There is no folder yet to write to; the error says to wait."""
    start("one", name="baseline")
    for edit in (lambda: catalog.tag("baseline", "a"), lambda: catalog.alias("latest", "best")):
        with pytest.raises(TakePendingError, match=r"wait\(\)"):
            edit()


def test_its_lineage_is_itself(start: Start, catalog: Catalog) -> None:
    """What it came from is known when it is recorded."""
    pending = start("one", name="baseline")

    assert [pending.id] == [relative.id for relative in catalog.lineage("baseline")]
    assert "(pending)" in str(catalog.lineage("baseline"))


def test_a_forked_child_has_none(start: Start, catalog: Catalog) -> None:
    """The threads that write them are the parent's, so waiting would never end."""
    start("one", name="baseline")

    def look() -> str:
        try:
            return catalog["baseline"].status
        except RefNotFoundError:
            return "not found"

    assert "not found" == in_child(look).result
    assert "pending" == catalog["baseline"].status
