"""Records that wait beside the catalog, and the list of folders that takes went to: no process that dies loses or doubles a line."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from expstate import Catalog
from expstate.catalog import locks, roots, rows, spool
from expstate.catalog.database import Database
from expstate.errors import CatalogCorruptError, CatalogError, CatalogUnavailableError, CatalogVersionError
from tests.engine.processes import end_of, in_child, start_child

from .plain import HOUR, all_of, count, data, put, urls


def files(catalog: Catalog) -> list[str]:
    """What lies beside the catalog."""
    return sorted(path.name for path in catalog.place.spool.parent.iterdir())


# Spool


def test_what_waits_is_entered_by_whoever_looks(any_catalog: Catalog) -> None:
    put(any_catalog, data(1))
    spool.append(any_catalog.place, data(2))
    spool.append(any_catalog.place, data(3))

    assert 2 == spool.pending(any_catalog.place)
    assert ["/runs/1", "/runs/2", "/runs/3"] == urls(any_catalog)
    assert 0 == spool.pending(any_catalog.place)
    assert not spool.is_waiting(any_catalog.place)


def test_what_waits_is_entered_when_a_new_catalog_is_made(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "new" / "catalog.db")
    spool.append(catalog.place, data(1))

    assert ["/runs/1"] == urls(catalog)


def test_what_waits_is_entered_before_what_is_written(any_catalog: Catalog) -> None:
    spool.append(any_catalog.place, data(2, created_at=7))
    put(any_catalog, data(1), live=True)

    assert ["/runs/2", "/runs/1"] == urls(any_catalog)


def test_paths_that_are_no_text_wait_too(catalog: Catalog) -> None:
    name = os.fsdecode(b"/runs/\xff\n")
    spool.append(catalog.place, data(1, url=name))

    assert [name] == urls(catalog)


def test_a_line_that_was_not_written_to_its_end_is_left_out(catalog: Catalog) -> None:
    spool.append(catalog.place, data(1))
    spool.append(catalog.place, data(2))
    whole = catalog.place.spool.read_bytes()
    catalog.place.spool.write_bytes(whole[:-20])
    spool.append(catalog.place, data(3))

    assert 2 == spool.pending(catalog.place)
    assert ["/runs/1", "/runs/3"] == urls(catalog)


@pytest.mark.parametrize("line", [b"", b"{}", b"null", b"\xff\xfe", b'{"at": 1, "record": {"id": 3}}', b"[" * 100_000, b"1" * 10_000])
def test_a_line_that_is_no_record_is_left_out(catalog: Catalog, line: bytes) -> None:
    spool.append(catalog.place, data(1))
    with catalog.place.spool.open("ab") as file:
        file.write(line + b"\n")
    spool.append(catalog.place, data(2))

    assert ["/runs/1", "/runs/2"] == urls(catalog)
    assert 0 == spool.pending(catalog.place)


def test_a_record_that_no_database_takes_does_not_keep_others_waiting(any_catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    really = rows.put

    def put_some(connection: Any, record: Any, **options: Any) -> int:
        if record.url == "/runs/2":
            msg = "nobody takes this"
            raise CatalogError(msg)
        return really(connection, record, **options)

    for number in (1, 2, 3):
        spool.append(any_catalog.place, data(number))
    monkeypatch.setattr(rows, "put", put_some)

    assert ["/runs/1", "/runs/3"] == urls(any_catalog)
    assert 0 == spool.pending(any_catalog.place)


@pytest.mark.parametrize("trouble", ["newer", "damaged"])
def test_what_waits_beside_a_catalog_that_nobody_can_read_goes_on_waiting(catalog: Catalog, trouble: str) -> None:
    put(catalog, data(1))
    spool.append(catalog.place, data(2))
    path = Path(str(catalog.place.path))
    sound = path.read_bytes()
    if trouble == "newer":
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("UPDATE alembic_version SET version_num = '9999'")
            other.commit()
    else:
        path.write_bytes(sound[:100] + b"garbage" * 1000)
    with pytest.raises((CatalogCorruptError, CatalogVersionError)):
        all_of(catalog)

    assert 1 == spool.pending(catalog.place)
    path.write_bytes(sound)
    assert ["/runs/1", "/runs/2"] == urls(Catalog(path))


def test_a_catalog_that_is_locked_is_read_all_the_same(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    put(catalog, data(1))
    spool.append(catalog.place, data(2))
    monkeypatch.setattr("expstate.catalog.database._SPOOL_SECONDS", 0.01)
    with contextlib.closing(sqlite3.connect(str(catalog.place.path), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")

        assert ["/runs/1"] == urls(catalog)
        assert 1 == spool.pending(catalog.place)

    assert ["/runs/1"] == urls(catalog)  # it is not tried again at once
    assert ["/runs/1", "/runs/2"] == urls(Catalog(catalog.place.path))


def test_several_processes_append_and_enter_at_once(catalog: Catalog) -> None:
    """Every line that was appended is entered, once."""

    def append(start: int) -> None:
        for number in range(start, start + 25):
            spool.append(catalog.place, data(number))

    def enter() -> int:
        database = Database(catalog.place)
        return sum(database.enter_spool() for _ in range(20))

    actions: list[Callable[[], Any]] = [functools.partial(append, start) for start in (0, 25, 50)] + [enter] * 3
    children = [start_child(action, wait=True) for action in actions]
    for _, _, let_begin in children:
        os.close(let_begin)
    entered = [end_of(child, result).result for child, result, _ in children]

    assert 75 == count(catalog)
    assert sum(entered[3:]) <= 75
    assert {f"/runs/{number}" for number in range(75)} == set(urls(catalog))
    assert {"catalog.db"} == set(files(catalog))


class Killed:
    """Kills the process at the n-th of these calls."""

    def __init__(self, at: int) -> None:
        self._left = at

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, really: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self()
            return really(*args, **options)

        return call


@pytest.mark.parametrize("at", range(1, 10))
def test_one_that_is_killed_while_entering_loses_and_doubles_nothing(catalog: Catalog, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    put(catalog, data(0))
    for number in (1, 2, 3):
        spool.append(catalog.place, data(number))

    def enter() -> None:
        killed = Killed(at)
        monkeypatch.setattr(Path, "rename", killed.before(Path.rename))
        monkeypatch.setattr(Path, "unlink", killed.before(Path.unlink))
        monkeypatch.setattr(locks, "_lock", killed.before(locks._lock))
        monkeypatch.setattr(rows, "put", killed.before(rows.put))
        Database(catalog.place).enter_spool()

    ended = in_child(enter)
    spool.append(catalog.place, data(4))

    assert ended.signal == signal.SIGKILL or at > 7
    assert [f"/runs/{number}" for number in range(5)] == urls(catalog)
    assert {"catalog.db"} == set(files(catalog))


def test_one_that_is_at_it_is_not_disturbed(catalog: Catalog) -> None:
    put(catalog, data(1))
    spool.append(catalog.place, data(2))
    (taken,) = spool._take_over(catalog.place)
    with locks.locked(taken, os.O_RDWR):
        assert 0 == catalog.database.enter_spool()
        spool.append(catalog.place, data(3))
        assert 2 == spool.pending(catalog.place)
        assert 1 == catalog.database.enter_spool()
    assert 1 == catalog.database.enter_spool()
    assert ["/runs/1", "/runs/2", "/runs/3"] == urls(catalog)


def test_catalogs_beside_each_other_have_spools_of_their_own(tmp_path: Path, empty_postgres: str) -> None:
    catalogs = [Catalog(tmp_path / "a.db"), Catalog(tmp_path / "b.db"), Catalog(empty_postgres)]
    for number, catalog in enumerate(catalogs):
        spool.append(catalog.place, data(number))

    assert [[f"/runs/{number}"] for number in range(3)] == [urls(catalog) for catalog in catalogs]


def test_what_came_to_its_place_since_stays(catalog: Catalog) -> None:
    spool.append(catalog.place, data(1, url="/runs/same"))
    line = json.loads(catalog.place.spool.read_text())
    spooled = catalog.place.spool.read_text()
    catalog.place.spool.unlink()
    put(catalog, data(2, url="/runs/same"), live=True)
    catalog.place.spool.write_text(spooled.replace(str(line["at"]), str(line["at"] - HOUR)))

    assert [("replaced", line["record"]["id"])] == [(record.status, record.id) for record in all_of(catalog)][:1]


def test_a_spool_that_someone_holds_is_an_error_after_a_while(catalog: Catalog) -> None:
    spool.append(catalog.place, data(1))
    with locks.locked(catalog.place.spool), pytest.raises(TimeoutError, match="does not let go"):
        spool.append(catalog.place, data(2), 0.01)

    assert ["/runs/1"] == urls(catalog)


def test_a_spool_is_entered_by_none_that_cannot_write(catalog: Catalog) -> None:
    put(catalog, data(1))
    spool.append(catalog.place, data(2))
    with contextlib.closing(sqlite3.connect(str(catalog.place.path), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(CatalogUnavailableError, match="locked"):
            spool.enter(catalog.place, functools.partial(catalog.database.write, timeout_seconds=0.01))

    assert 1 == spool.pending(catalog.place)


# Roots


def test_folders_are_remembered_once(catalog: Catalog) -> None:
    for url in (
        "/data/run-7/step-1",
        "/data/run-7/step-2",
        "/data/run-8/step-1",
        "s3://bucket/step-1",
        "s3://bucket/a/b",
        "/data/run-7/x/",
    ):
        roots.add(catalog.place, url)

    assert ("/data/run-7", "/data/run-8", "s3://bucket", "s3://bucket/a") == roots.read(catalog.place)
    assert 4 == len(catalog.place.roots.read_text().splitlines())


@pytest.mark.parametrize(
    "folder", ["/with space", "/line\nbreak", "/\x85\u2028", os.fsdecode(b"/\xff"), "/ünï", '"/quoted', "/", "//double"]
)
def test_folders_may_have_any_name(catalog: Catalog, folder: str) -> None:
    roots.add(catalog.place, f"{folder.rstrip('/')}/step-1")
    roots.add(catalog.place, "/other/step-1")

    assert (folder.rstrip("/") or "/", "/other") == roots.read(catalog.place)
    assert 2 == len(catalog.place.roots.read_text().split("\n")) - 1


def test_a_file_that_was_removed_is_made_anew(catalog: Catalog) -> None:
    roots.add(catalog.place, "/data/step-1")
    catalog.place.roots.unlink()
    roots.add(catalog.place, "/data/step-2")

    assert ("/data",) == roots.read(catalog.place)


def test_what_other_processes_have_added_is_known(catalog: Catalog) -> None:
    in_child(functools.partial(roots.add, catalog.place, "/data/step-1")).result  # noqa: B018 - asserts that it ended well
    roots.add(catalog.place, "/data/step-2")

    assert ["/data"] == catalog.place.roots.read_text().splitlines()


def test_a_line_that_was_torn_spoils_no_other(catalog: Catalog) -> None:
    roots.add(catalog.place, "/data/step-1")
    with catalog.place.roots.open("a") as file:
        file.write('"/torn')
    roots.add(catalog.place, "/more/step-1")

    assert ("/data", '"/torn', "/more") == roots.read(catalog.place)


def test_several_threads_and_processes_add_at_once(catalog: Catalog) -> None:
    def add(start: int) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda number: roots.add(catalog.place, f"/{number}/step"), range(start, start + 20)))

    children = [start_child(functools.partial(add, start), wait=True) for start in (0, 10, 20)]
    for _, _, let_begin in children:
        os.close(let_begin)
    for child, result, _ in children:
        assert end_of(child, result).error is None

    assert {f"/{number}" for number in range(40)} == set(roots.read(catalog.place))


def test_a_child_does_not_wait_for_a_lock_that_a_thread_of_its_parent_had(catalog: Catalog) -> None:
    with roots._lock:
        in_child(lambda: roots.add(catalog.place, "/runs/step-1"))

    assert ("/runs",) == roots.read(catalog.place)


def test_no_file_means_no_folders(catalog: Catalog) -> None:
    assert () == roots.read(catalog.place)
    catalog.place.roots.mkdir(parents=True)
    assert () == roots.read(catalog.place)


# Locks


def test_a_lock_is_given_up_when_its_holder_dies(tmp_path: Path) -> None:
    def die() -> None:
        with locks.locked(tmp_path / "lock"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert signal.SIGKILL == in_child(die).signal
    with locks.locked(tmp_path / "lock") as fd:
        assert fd is not None


def test_who_waits_for_a_lock_gets_the_file_that_is_there_then(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    waits = threading.Event()
    found: list[bool] = []

    def wait() -> None:
        waits.set()
        with locks.locked(path, timeout_seconds=10) as fd:
            assert fd is not None
            found.append(os.path.samestat(os.fstat(fd), path.stat()))

    with locks.locked(path):
        thread = threading.Thread(target=wait)
        thread.start()
        waits.wait()
        path.rename(tmp_path / "gone")
    thread.join()

    assert [True] == found


def test_where_a_file_system_has_no_locks_nothing_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with locks.locked(tmp_path / "lock") as one, locks.locked(tmp_path / "lock") as other:
        assert one is not None
        assert other is not None
