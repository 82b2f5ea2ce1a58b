"""Many processes take into one catalog and are killed at any moment: what was acknowledged is recorded, what was committed is found."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from expstate import Catalog
from expstate.catalog import recorder

from .plain import all_of
from .workers import WORKERS, Workers

TAKES, KILLS = 200, 80


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No catalog is open, and takes gather nothing: it is their records that are tested."""
    monkeypatch.setenv("EXPSTATE_PROVENANCE", "off")
    recorder.forget()
    yield
    recorder.forget()


def ids(catalog: Catalog) -> set[str]:
    return {record.id for record in all_of(catalog)}


@pytest.mark.slow
def test_processes_that_are_killed_lose_no_record_and_harm_no_catalog(catalog: Catalog, tmp_path: Path) -> None:
    workers = Workers(catalog, tmp_path, TAKES)
    workers.run(KILLS)
    acknowledged, committed = workers.acknowledged(), workers.committed()

    assert KILLS // 2 < workers.killed
    assert WORKERS * TAKES == len(acknowledged) == len(set(acknowledged))
    assert set() == set(acknowledged) - ids(catalog)
    assert set() == ids(catalog) - set(committed)

    report = catalog.scan()

    assert () == report.damaged
    assert committed == {record.id: record.url for record in all_of(catalog)}
    assert {"present"} == {record.status for record in all_of(catalog)}
    assert catalog.check(project="*").ok
    with catalog.database.reading() as connection:
        assert "ok" == connection.exec_driver_sql("PRAGMA integrity_check").scalar()


@pytest.mark.slow
def test_takes_that_did_not_wait_for_their_records_would_lose_them(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with a recorder that answers at once and has not begun when its process ends; a scan finds the snapshots."""
    assert 0 == len(catalog)

    def hurry() -> None:
        monkeypatch.setattr(recorder._Job, "start", lambda self: threading.Thread(target=threading.Event().wait, daemon=True).start())
        monkeypatch.setattr(recorder._Job, "wait", lambda self, seconds: None)

    workers = Workers(catalog, tmp_path, 3, prepare=hurry)
    workers.run()

    assert set(workers.acknowledged()) == set(workers.committed()) == set(workers.acknowledged()) - ids(catalog)

    catalog.scan(tmp_path / "runs")

    assert set(workers.acknowledged()) == ids(catalog)
