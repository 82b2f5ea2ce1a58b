"""Processes do everything that a catalog is for, and are killed at any moment: no snapshot is lost, and a scan makes the catalog right."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Catalog, Snapshot, StateDict, gc
from expstate.catalog import recorder
from expstate.errors import CatalogWarning, ExpstateError, SnapshotNotFoundError
from tests.campaign import Campaign
from tests.engine.processes import end_of, start_child

from .plain import all_of
from .servers import PostgresServer

pytestmark = pytest.mark.slow

VERBS = {"take": 8, "async": 2, "tag": 3, "alias": 2, "pin": 1, "note": 2, "metric": 3, "search": 4, "delete": 2, "prune": 1, "scan": 1}
"""What a process does, and how often."""


class Worker:
    """What one process does until its time is over.

    It says what it has taken after the take, and what it is going to delete before the deletion: so whatever is missing in the end without
    anybody having wanted that is known. And what it has done, so that the operations of those that are killed count too.
    """

    def __init__(self, place: Any, runs: Path, seed: int, until: float) -> None:
        self.catalog = Catalog(place)
        self.runs = runs
        self.seed = seed
        self.dice = random.Random(seed)
        self.until = until
        self.count = 0

    def work(self) -> None:
        recorder.forget()
        self._log = os.open(self.runs.parent / "said", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        warnings.simplefilter("ignore", CatalogWarning)
        while time.monotonic() < self.until:
            verb = self.dice.choices(list(VERBS), list(VERBS.values()))[0]
            with contextlib.suppress(ExpstateError):  # someone else was faster, or has pinned it, or the server is away
                getattr(self, f"_{verb}")()
                self._say("did", verb)

    def _say(self, what: str, of: str) -> None:
        os.write(self._log, f"{what} {of}\n".encode())

    def _any(self) -> str:
        return self.dice.choice(["latest", "latest~1", "latest~3", "best", "final", *self._ids()])

    def _ids(self) -> list[str]:
        return [record.id for record in self.catalog.search(limit=20)]

    def _take(self, method: Callable[..., Any] = Snapshot.take) -> None:
        self.count += 1
        state = {"model": StateDict(weight=torch.full((500,), float(self.count)))}
        place = self.runs / f"{self.seed}" / f"{self.count}"
        taken = method(place, state, step=self.count, metrics={"loss": self.dice.random()}, catalog=self.catalog)
        self._say("took", (taken if isinstance(taken, Snapshot) else taken.wait()).id)

    def _async(self) -> None:
        self._take(Snapshot.async_take)

    def _tag(self) -> None:
        self.dice.choice([self.catalog.tag, self.catalog.untag])(self._any(), self.dice.choice(["paper", "draft"]))

    def _alias(self) -> None:
        self.catalog.alias(self._any(), self.dice.choice(["best", "final"]))

    def _pin(self) -> None:
        self.dice.choice([self.catalog.pin, self.catalog.unpin, self.catalog.unpin])(self._any())

    def _note(self) -> None:
        self.catalog.note(self._any(), self.dice.choice(["good", "bad", None]))

    def _metric(self) -> None:
        self.catalog.log_metric(self._any(), "accuracy", self.dice.random())

    def _search(self) -> None:
        for record in self.catalog.search("metric.loss < 0.5 and not tag = draft", sort="-step", limit=10):
            assert record.metrics["loss"] < 0.5

    def _delete(self) -> None:
        record = self.catalog[self._any()]
        self._say("deletes", record.id)
        self.catalog.delete(record.id)

    def _prune(self) -> None:
        plan = self.catalog.prune(keep_last=30)
        for record in plan.delete:
            self._say("deletes", record.id)
        plan.apply()

    def _scan(self) -> None:
        self.catalog.scan(self.runs / f"{self.dice.randrange(self.seed + 1)}")


def storm(place: Any, runs: Path, workers: int, seconds: float, disturb: Callable[[], object]) -> int:
    """Let so many processes work for some seconds, and kill one of them again and again; how often."""
    runs.mkdir()
    dice = random.Random(0)
    until = time.monotonic() + seconds
    running: dict[int, int] = {}
    started = killed = 0

    def start() -> None:
        nonlocal started
        child, result, let_begin = start_child(Worker(place, runs, started, until).work)
        started += 1
        os.close(let_begin)
        running[result] = child

    for _ in range(workers):
        start()
    while running:
        ended, _, _ = select.select(list(running), [], [], dice.uniform(0, 0.4))
        for result in ended:
            end = end_of(running.pop(result), result)
            if end.signal == signal.SIGKILL:
                killed += 1
                if time.monotonic() < until - 1:
                    start()
            else:
                assert end.result is None
        if running and time.monotonic() < until:
            disturb()
            os.kill(dice.choice(list(running.values())), signal.SIGKILL)
    return killed


def said(runs: Path) -> tuple[set[str], set[str], list[str]]:
    """The ids of what was taken, and of what somebody wanted to delete, and the verb of each operation."""
    lines = [line.split() for line in (runs.parent / "said").read_text().splitlines()]
    took, deletes, did = ([words[1] for words in lines if words[0] == what] for what in ("took", "deletes", "did"))
    return set(took), set(deletes), did


def found_in(runs: Path) -> dict[str, str]:
    """The snapshots that are there: where, by id."""
    found = {}
    for path in runs.glob("*/*"):
        with contextlib.suppress(SnapshotNotFoundError):
            found[Snapshot(path).id] = str(path)
    return found


def check_after(catalog: Catalog, runs: Path, campaign: Campaign) -> None:
    """Nothing is lost, and the catalog is right, or is after a scan."""
    taken, deleted, done = said(runs)
    campaign.count("operations", len(done))
    assert not campaign.is_long or set(done) == set(VERBS)
    gc(runs)
    there = found_in(runs)
    lost = taken - deleted - set(there)
    campaign.count("snapshots lost", len(lost))
    assert set() == lost
    catalog.scan(runs)
    report = catalog.check(deep=True, project="*")
    if not report.ok:  # what is removed for good is not there to be found
        catalog.scan()
        for record in all_of(catalog):
            if record.status == "missing":
                catalog.delete(record.id, force=True)
        report = catalog.check(deep=True, project="*")
    assert report.ok, str(report)
    assert there == {record.id: record.url for record in all_of(catalog)}


@pytest.fixture(autouse=True)
def _plain_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPSTATE_PROVENANCE", "off")


STORM = pytest.mark.campaign("The catalog is an index", "processes that are killed while they do everything at once")


@STORM
def test_processes_that_do_everything_and_are_killed_lose_nothing(catalog: Catalog, tmp_path: Path, campaign: Campaign) -> None:
    runs = tmp_path / "runs"
    assert 0 == len(catalog)
    killed = storm(catalog.place.path, runs, campaign.choose(4, 16), campaign.choose(3, 300), lambda: None)

    assert killed
    campaign.tried(killed)
    check_after(catalog, runs, campaign)
    with catalog.database.reading() as connection:
        assert "ok" == connection.exec_driver_sql("PRAGMA integrity_check").scalar()


@STORM
def test_a_server_that_is_restarted_meanwhile_loses_nothing(
    postgres_server: PostgresServer, empty_postgres: str, tmp_path: Path, campaign: Campaign
) -> None:
    catalog = Catalog(empty_postgres)
    assert 0 == len(catalog)
    catalog.close()
    last = time.monotonic()

    def restart() -> None:
        nonlocal last
        if time.monotonic() - last > campaign.choose(1, 10):
            postgres_server.restart()
            campaign.count("restarts of the server")
            last = time.monotonic()

    runs = tmp_path / "runs"
    killed = storm(empty_postgres, runs, campaign.choose(4, 16), campaign.choose(3, 300), restart)

    assert killed
    campaign.tried(killed)
    check_after(catalog, runs, campaign)
    catalog.close()
