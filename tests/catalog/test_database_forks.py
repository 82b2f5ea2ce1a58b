"""Processes that split: each has a catalog of its own to talk to, and no transaction is cut in two."""

from __future__ import annotations

import functools
import itertools
import os
import signal
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Catalog, Snapshot, StateDict
from expstate.catalog import database, forks, recorder, rows, spool
from expstate.errors import CatalogUnavailableError, CatalogWarning
from tests.engine.processes import end_of, in_child, start_child

from .plain import count, data, put, urls


@pytest.fixture(autouse=True)
def _fresh_recorders() -> Any:
    recorder.forget()
    yield
    recorder.forget()


def test_a_child_reads_and_writes_what_its_parent_has_open(any_catalog: Catalog) -> None:
    put(any_catalog, data(1))
    ended = in_child(functools.partial(put, any_catalog, data(2)))
    put(any_catalog, data(3))

    assert ended.error is None
    assert ["/runs/1", "/runs/2", "/runs/3"] == urls(any_catalog) == in_child(functools.partial(urls, any_catalog)).result


def test_a_fork_waits_for_the_transactions_of_other_threads(any_catalog: Catalog) -> None:
    put(any_catalog, data(1))
    has_begun, may_end = threading.Event(), threading.Event()

    def write() -> None:
        with any_catalog.database.writing() as connection:
            has_begun.set()
            may_end.wait(10)
            rows.put(connection, data(2))

    writer = threading.Thread(target=write)
    writer.start()
    has_begun.wait()
    threading.Timer(0.2, may_end.set).start()
    found = in_child(functools.partial(urls, any_catalog)).result
    writer.join()

    assert ["/runs/1", "/runs/2"] == found


def test_threads_begin_no_transaction_while_a_process_is_forked(catalog: Catalog) -> None:
    """Eight children are forked while four threads write; each writes too."""
    is_over = threading.Event()
    numbers = itertools.count(100)

    def write() -> None:
        while not is_over.is_set():
            put(catalog, data(next(numbers)))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for number in range(8):
            in_child(functools.partial(put, catalog, data(number))).result  # noqa: B018 - asserts that it ended well
    finally:
        is_over.set()
        for thread in threads:
            thread.join()

    assert {f"/runs/{number}" for number in range(8)} <= set(urls(catalog))
    assert database.find_damage(catalog.place) is None


def test_a_child_need_not_wait_for_a_thread_that_was_opening_the_catalog(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    put(catalog, data(1))
    opened = Catalog(catalog.place.path)
    has_begun, may_end = threading.Event(), threading.Event()
    really = database.Database.__init__

    def slowly(self: database.Database, *arguments: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            has_begun.set()
            may_end.wait(10)
        really(self, *arguments)

    def found() -> list[str]:
        signal.alarm(20)  # ends it
        return urls(opened)

    monkeypatch.setattr(database.Database, "__init__", slowly)
    opener = threading.Thread(target=lambda: opened.database)
    opener.start()
    has_begun.wait()
    ended = in_child(found)
    may_end.set()
    opener.join()

    assert ["/runs/1"] == ended.result


def test_a_child_that_inherits_a_transaction_is_refused(catalog: Catalog) -> None:
    """SQLite would take the locks of the parent for its own."""
    put(catalog, data(1))

    def write() -> str:
        try:
            put(Catalog(catalog.place.path), data(3))
        except CatalogUnavailableError as error:
            return str(error)
        return ""

    with catalog.database.writing() as connection:
        rows.put(connection, data(2))
        message = in_child(write).result

    assert "was in use when this process was forked" in message
    assert ["/runs/1", "/runs/2"] == urls(catalog)


def test_a_take_of_such_a_child_waits_in_the_spool(catalog: Catalog, tmp_path: Path) -> None:
    put(catalog, data(1))

    def take() -> None:
        torch.set_num_threads(1)
        with pytest.warns(CatalogWarning, match="was in use when this process was forked"):
            Snapshot.take(tmp_path / "one", {"state": StateDict(a=1)}, catalog=catalog)

    with catalog.database.writing():
        in_child(take).result  # noqa: B018 - asserts that it ended well

    assert 1 == spool.pending(catalog.place)
    assert 2 == count(catalog)
    assert 0 == spool.pending(catalog.place)


def test_a_transaction_that_hangs_holds_up_one_fork_alone(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "_WAIT_SECONDS", 0.05)
    put(catalog, data(1))
    has_begun, may_end = threading.Event(), threading.Event()

    def hang() -> None:
        with catalog.database.reading():
            has_begun.set()
            may_end.wait(10)

    thread = threading.Thread(target=hang)
    thread.start()
    has_begun.wait()
    in_child(os.getpid).result  # noqa: B018
    monkeypatch.setattr(forks, "_WAIT_SECONDS", 1e6)
    in_child(os.getpid).result  # noqa: B018
    may_end.set()
    thread.join()

    assert not forks._open
    assert not forks._hanging


def test_takes_go_on_in_parent_and_child(catalog: Catalog, tmp_path: Path) -> None:
    def take(name: str) -> None:
        torch.set_num_threads(1)
        Snapshot.take(tmp_path / name, {"state": StateDict(a=1)}, catalog=catalog)

    take("before")
    child, result, let_begin = start_child(functools.partial(take, "child"))
    take("parent")
    os.close(let_begin)

    assert end_of(child, result).error is None
    assert {str(tmp_path / name) for name in ("before", "child", "parent")} == set(urls(catalog))
    assert 0 == spool.pending(catalog.place)


class Numbers(torch.utils.data.Dataset[int]):
    """A data set whose workers look into the catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> int:
        if number >= len(self):
            raise IndexError
        return count(self._catalog)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_workers_of_a_data_loader_may_look_into_it(catalog: Catalog) -> None:
    put(catalog, data(1), data(2))
    found = [int(number) for number in torch.utils.data.DataLoader(Numbers(catalog), num_workers=2, multiprocessing_context="fork")]

    assert [2] * 4 == found
    with sqlite3.connect(str(catalog.place.path)) as connection:
        assert ("ok",) == connection.execute("PRAGMA integrity_check").fetchone()
    connection.close()
