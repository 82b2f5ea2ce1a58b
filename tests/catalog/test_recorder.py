"""What a take tells the catalog: never an error, never a long wait, nothing lost."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from expstate import Catalog, Snapshot, StateDict, settings
from expstate.catalog import recorder, roots, rows, spool
from expstate.catalog.database import Database
from expstate.errors import CatalogError, CatalogUnavailableError, CatalogWarning, InvalidArgumentError, InvalidSettingError

from .plain import all_of, count, data, put, urls

Take = Callable[..., Snapshot]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """No catalog is open, none has failed, and nobody was warned."""
    recorder.forget()
    yield
    recorder.forget()


@contextlib.contextmanager
def locked(catalog: Catalog) -> Iterator[None]:
    """Another process writes, and does not end."""
    put(catalog, data(0))
    with contextlib.closing(sqlite3.connect(str(catalog.place.path), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


class Failing:
    """A database that says no as long as it is told to."""

    def __init__(self) -> None:
        self.fails = True
        self.tried = 0

    def write(self, database: Database, *args: Any, **options: Any) -> Any:
        self.tried += 1
        if self.fails:
            msg = "the catalog is out to lunch"
            raise CatalogUnavailableError(msg)
        return _really_write(database, *args, **options)


_really_write = Database.write


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    """Catalogs fail, at once; so no test waits, nor depends on how long something takes."""
    failing = Failing()
    monkeypatch.setattr(Database, "write", lambda *args, **options: failing.write(*args, **options))  # noqa: PLW0108 - a method is bound
    return failing


def warned(action: Callable[[], Any]) -> list[str]:
    """What is said of the catalog meanwhile."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CatalogWarning)
        action()
    return [str(one.message) for one in caught if issubclass(one.category, CatalogWarning)]


# What is recorded


def test_a_take_is_recorded(any_catalog: Catalog, take: Take) -> None:
    snapshot = take(any_catalog, "one", step=3, name="first", metrics={"loss": 0.5})

    (record,) = all_of(any_catalog)
    assert (snapshot.id, snapshot.path, 3, "first", {"loss": 0.5}) == (record.id, record.url, record.step, record.name, record.metrics)
    assert snapshot.metadata.digest == record.digest
    assert (str(Path(snapshot.path).parent),) == roots.read(any_catalog.place)


def test_a_take_in_the_background_is_recorded_when_it_is_done(any_catalog: Catalog, tmp_path: Path) -> None:
    pending = Snapshot.async_take(tmp_path / "one", {"state": StateDict(a=1)}, catalog=any_catalog)
    snapshot = pending.wait()

    assert [snapshot.id] == [record.id for record in all_of(any_catalog)]


def test_takes_of_several_threads_are_recorded(any_catalog: Catalog, take: Take) -> None:
    threads = [threading.Thread(target=take, args=(any_catalog, str(number))) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert 6 == count(any_catalog)
    assert 0 == spool.pending(any_catalog.place)


@pytest.mark.parametrize("given", ["a catalog", "a path", "a text", "a URL", "a URL with its driver"])
def test_a_catalog_is_named_in_several_ways(tmp_path: Path, given: str) -> None:
    path = tmp_path / "catalog.db"
    ways = {"a catalog": Catalog(path), "a path": path, "a text": str(path), "a URL": f"sqlite:///{path}"}
    option: Any = (ways | {"a URL with its driver": f"sqlite+pysqlite:///{path}"})[given]
    Snapshot.take(tmp_path / "one", {"state": StateDict(a=1)}, catalog=option)

    assert 1 == count(Catalog(path))


def test_a_setting_names_it_too(tmp_path: Path) -> None:
    with settings.override(catalog=str(tmp_path / "catalog.db")):
        Snapshot.take(tmp_path / "one", {"state": StateDict(a=1)})
        Snapshot.take(tmp_path / "two", {"state": StateDict(a=1)}, catalog=False)

    assert [str(tmp_path / "one")] == urls(Catalog(tmp_path / "catalog.db"))


def test_without_a_setting_it_is_the_users_own(tmp_path: Path) -> None:
    with settings.override(catalog=""):
        Snapshot.take(tmp_path / "one", {"state": StateDict(a=1)})

    assert 1 == count(Catalog(tmp_path / "user" / "expstate" / "catalog.db"))


@pytest.mark.parametrize("option", [True, 7, object(), b"catalog.db", "mysql://host/catalog"])
def test_what_names_no_catalog_is_refused_before_anything_is_written(tmp_path: Path, option: Any) -> None:
    with pytest.raises(InvalidArgumentError):
        Snapshot.take(tmp_path / "one", {"state": StateDict(a=1)}, catalog=option)

    assert not (tmp_path / "one").exists()


def test_two_catalogs_are_told_apart(tmp_path: Path, take: Take) -> None:
    one, other = Catalog(tmp_path / "one.db"), Catalog(tmp_path / "other.db")
    take(one, "a")
    take(other, "b")

    assert [1, 1] == [count(one), count(other)]


# What fails


def test_a_catalog_that_is_locked_delays_a_take_and_no_more(catalog: Catalog, take: Take) -> None:
    """F24."""
    with settings.override(catalog_timeout_seconds=2), locked(catalog):
        messages = warned(lambda: take(catalog, "one"))

    assert 1 == len(messages)
    assert "the snapshot at" in messages[0]
    assert "is safe, but was not entered into the catalog" in messages[0]
    assert "is locked by another process" in messages[0]
    assert "`expstate status`" in messages[0]
    assert "database is locked" not in messages[0]
    assert 1 == spool.pending(catalog.place)
    assert 2 == count(catalog)


def test_it_is_said_once_per_process(catalog: Catalog, take: Take, failing: Failing, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "expstate")
    messages = [warned(lambda name=name: take(catalog, name)) for name in "abc"]

    assert [1, 0, 0] == [len(found) for found in messages]
    assert 2 == sum("was not entered" in record.message for record in caplog.records)
    assert 3 == spool.pending(catalog.place)


def test_a_catalog_that_has_failed_is_left_alone_for_a_minute(
    catalog: Catalog, take: Take, failing: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned(lambda: take(catalog, "a"))
    failing.fails = False
    take(catalog, "b")
    take(catalog, "c")

    assert 1 == failing.tried
    assert 3 == spool.pending(catalog.place)

    later = time.monotonic() + recorder.REST_SECONDS
    with monkeypatch.context() as patch:
        patch.setattr(recorder.time, "monotonic", lambda: later)
        take(catalog, "d")
    until = time.monotonic() + 60
    while count(catalog) < 4 and time.monotonic() < until:
        time.sleep(0.01)

    assert 4 == count(catalog)
    assert 3 == failing.tried  # the record, and what waited


def test_when_it_works_again_what_waited_is_entered(
    catalog: Catalog, take: Take, failing: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "REST_SECONDS", 0.0)
    entered = threading.Event()
    really = Database.enter_spool
    monkeypatch.setattr(Database, "enter_spool", lambda self: (really(self), entered.set())[0])
    warned(lambda: take(catalog, "a"))
    failing.fails = False
    take(catalog, "b")

    assert entered.wait(60)
    with contextlib.closing(sqlite3.connect(str(catalog.place.path))) as connection:
        assert (2,) == connection.execute("SELECT count(*) FROM records").fetchone()


def test_a_damaged_catalog_says_what_mends_it(catalog: Catalog, take: Take) -> None:
    """F25."""
    put(catalog, data(1))
    Path(str(catalog.place.path)).write_bytes(b"garbage" * 1000)
    messages = warned(lambda: take(catalog, "a"))

    assert ["run `expstate scan`: it builds the catalog anew, and enters the record" in message for message in messages] == [True]
    assert 1 == spool.pending(catalog.place)


def test_a_newer_catalog_keeps_the_record_waiting(catalog: Catalog, take: Take) -> None:
    put(catalog, data(1))
    with contextlib.closing(sqlite3.connect(str(catalog.place.path))) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    messages = warned(lambda: take(catalog, "a"))

    assert "upgrade expstate" in messages[0]
    assert 1 == spool.pending(catalog.place)


def test_a_catalog_in_a_place_that_cannot_be_is_left_to_a_scan(tmp_path: Path, take: Take) -> None:
    (tmp_path / "file").write_text("")
    messages = warned(lambda: take(Catalog(tmp_path / "file" / "catalog.db"), "a"))

    assert f"`expstate scan '{tmp_path}/runs'`" in messages[0]


def test_a_record_that_the_catalog_does_not_take_fails_no_take(catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise RecursionError

    monkeypatch.setattr(rows, "put", refuse)

    assert ["RecursionError" in message for message in warned(lambda: take(catalog, "a"))] == [True]


def test_where_warnings_are_errors_a_take_goes_on(catalog: Catalog, take: Take, caplog: pytest.LogCaptureFixture) -> None:
    """The snapshot was committed; in the background the error would be taken for that of the take."""
    put(catalog, data(1))
    Path(str(catalog.place.path)).write_bytes(b"garbage" * 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(catalog, "a")

    assert ["was not entered" in record.message for record in caplog.records] == [True]


def test_a_server_that_is_not_there_delays_a_take_and_no_more(tmp_path: Path, take: Take) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"postgresql://me:CANARY@127.0.0.1:{nobody.getsockname()[1]}/team"
        messages = warned(lambda: take(Catalog(url), "a"))

    assert "does not answer" in messages[0]
    assert "CANARY" not in messages[0]
    assert 1 == spool.pending(Catalog(url).place)


def test_a_server_that_hangs_delays_a_take_and_no_more(take: Take) -> None:
    with socket.socket() as mute, settings.override(catalog_timeout_seconds=0.3):
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        catalog = Catalog(f"postgresql://me:CANARY@127.0.0.1:{mute.getsockname()[1]}/team")
        first = warned(lambda: take(catalog, "a"))
        began = time.monotonic()
        take(catalog, "b")

        assert time.monotonic() - began < 30
    assert "does not answer within 0.24 s" in first[0]
    assert 2 == spool.pending(catalog.place)


@pytest.mark.parametrize("seconds", [float("inf"), 1e300])
def test_all_the_time_in_the_world_is_no_trouble(catalog: Catalog, take: Take, seconds: float) -> None:
    with settings.override(catalog_timeout_seconds=seconds):
        messages = warned(lambda: take(catalog, "a"))

    assert [] == messages
    assert 1 == count(catalog)


def test_a_time_that_is_no_number_is_refused_before_anything_is_written(
    catalog: Catalog, take: Take, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPSTATE_CATALOG_TIMEOUT_SECONDS", "nan")
    with pytest.raises(InvalidSettingError, match="catalog_timeout_seconds must be a number that is not negative, got nan"):
        take(catalog, "a")

    assert not (tmp_path / "runs").exists()


def test_no_time_at_all_means_that_nobody_waits(catalog: Catalog, take: Take) -> None:
    with settings.override(catalog_timeout_seconds=0), locked(catalog):
        messages = warned(lambda: take(catalog, "a"))

    assert 1 == len(messages)
    assert 2 == count(catalog)


# Interrupts


def test_an_interrupt_does_not_lose_the_record(catalog: Catalog, take: Take) -> None:
    with locked(catalog):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with settings.override(catalog_timeout_seconds=20), pytest.raises(KeyboardInterrupt):
            take(catalog, "a")

        assert 1 == spool.pending(catalog.place)
    deadline = time.monotonic() + 20
    while count(catalog) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)

    assert 2 == count(catalog)
    recorder.forget()


# Machines that only take and restore


SCRIPT = """
import sys, warnings
sys.modules.update(dict.fromkeys({absent!r}))
warnings.simplefilter("always")
from expstate import Snapshot, StateDict
for name in ("one", "two"):
    snapshot = Snapshot.take({runs!r} + "/" + name, {{"state": StateDict(a=1)}})
state = StateDict(a=2)
snapshot.restore({{"state": state}})
print(state["a"])
{more}
"""


def run(tmp_path: Path, *, absent: list[str], more: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Take two snapshots in a new process."""
    script = SCRIPT.format(absent=absent, runs=str(tmp_path / "runs"), more=more)
    given = os.environ | {"XDG_DATA_HOME": str(tmp_path / "home"), "EXPSTATE_CATALOG": "", "EXPSTATE_PROJECT": "tests"} | environment
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120, env=given)


def test_without_sqlalchemy_takes_wait_for_a_machine_that_has_it(tmp_path: Path) -> None:
    absent = ["sqlalchemy", "alembic", "platformdirs", "pandas", "lark", "rich", "tqdm"]
    ended = run(tmp_path, absent=absent)
    place = Catalog(tmp_path / "home" / "expstate" / "catalog.db").place

    assert (0, "1\n") == (ended.returncode, ended.stdout), ended.stderr
    assert 1 == ended.stderr.count("CatalogWarning")
    assert "pip install sqlalchemy" in ended.stderr
    assert 2 == spool.pending(place)
    assert [str(tmp_path / "runs" / name) for name in ("one", "two")] == urls(Catalog(place.path))


def _homeless(how: str) -> str:
    """What platformdirs says of a user whom the system does not know: older versions, and newer ones."""
    if how == "raises":
        msg = "could not determine the home directory"
        raise RuntimeError(msg)
    return "~/.local/share/expstate"


@pytest.mark.parametrize("how", ["says", "raises"])
def test_without_a_home_takes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr("platformdirs.user_data_dir", lambda *_, **__: _homeless(how))
    monkeypatch.chdir(tmp_path)
    with settings.override(catalog=""):
        messages = warned(lambda: [Snapshot.take(name, {"state": StateDict(a=1)}) for name in ("one", "two")])

    assert ["name one by EXPSTATE_CATALOG" in message for message in messages] == [True]
    assert ["one", "two"] == sorted(os.listdir(tmp_path))


def test_without_a_working_folder_a_take_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    messages = warned(lambda: Snapshot.take(tmp_path / "one", {"state": StateDict(a=1)}, catalog="catalog.db"))

    assert ["the working folder was removed" in message for message in messages] == [True]
    assert (tmp_path / "one" / "snapshot.json").exists()


def test_a_server_is_of_use_without_a_home(empty_postgres: str, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_data_dir", lambda *_, **__: _homeless("raises"))
    catalog = Catalog(empty_postgres)
    messages = warned(lambda: take(catalog, "a"))

    assert [] == messages
    assert 1 == count(catalog)
    catalog.close()


def test_takes_that_end_with_the_interpreter_are_recorded(tmp_path: Path) -> None:
    more = f"Snapshot.async_take({str(tmp_path / 'runs' / 'three')!r}, {{'state': StateDict(a=1)}})"
    ended = run(tmp_path, absent=[], more=more)

    assert (0, "1\n", "") == (ended.returncode, ended.stdout, ended.stderr)
    assert 3 == count(Catalog(tmp_path / "home" / "expstate" / "catalog.db"))


def test_importing_the_package_imports_no_database() -> None:
    heavy = ["sqlalchemy", "alembic", "pandas", "lark", "rich", "platformdirs", "psycopg"]
    script = f"import sys, expstate; print([name for name in {heavy!r} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)

    assert "[]\n" == ended.stdout


def test_a_thread_that_cannot_be_started_any_more_is_not_needed(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of Python 3.12, an interpreter that ends starts none."""

    class NoThread(threading.Thread):
        def start(self) -> None:
            msg = "can't create new thread at interpreter shutdown"
            raise RuntimeError(msg)

    monkeypatch.setattr(recorder.threading, "Thread", NoThread)
    found = recorder.recorder(catalog)
    assert found is not None
    found.prepare()
    found.record(data(1))

    assert ["/runs/1"] == urls(catalog)


def test_preparing_never_raises(tmp_path: Path) -> None:
    (tmp_path / "catalog.db").write_bytes(b"garbage" * 1000)
    found = recorder.recorder(tmp_path / "catalog.db")
    assert found is not None
    found.prepare()
    with pytest.raises(CatalogError):
        count(Catalog(tmp_path / "catalog.db"))
