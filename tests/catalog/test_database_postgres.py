"""A PostgreSQL server that is restarted, loses connections or stays away: no take fails, no record is lost, none is there twice."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from expstate import Catalog, Snapshot, settings
from expstate.catalog import postgres, recorder, rows, schema, spool
from expstate.catalog.database import Database
from expstate.errors import CatalogUnavailableError, CatalogWarning, RefNotFoundError, SnapshotPinnedError

from .plain import all_of, count, data, put, urls
from .servers import PostgresServer
from .workers import WORKERS, Workers

Take = Callable[..., Snapshot]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """No catalog is open, and none has failed; a take has time to wait for a server that comes back."""
    recorder.forget()
    with settings.override(catalog_timeout_seconds=60):
        yield
    recorder.forget()


@pytest.fixture
def server(postgres_server: PostgresServer) -> Iterator[PostgresServer]:
    """A server that may be stopped, and runs again for the next test."""
    yield postgres_server
    postgres_server.stop()
    postgres_server.start()


@pytest.fixture
def catalog(server: PostgresServer, empty_postgres: str) -> Catalog:
    """A catalog with one record that outlives a crash of its server, unlike those of other tests."""
    server.execute(f"ALTER DATABASE {empty_postgres.rpartition('/')[2]} SET synchronous_commit = on")
    catalog = Catalog(empty_postgres)
    put(catalog, data(0))
    return catalog


class Trouble:
    """Something that happens when a record has been entered and is not committed yet, so many times; and how often it was tried."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, strike: Callable[[sa.Connection], Any], times: int = 1) -> None:
        self.tried = 0
        really = rows.put

        def put_and_strike(connection: sa.Connection, record: Any, **options: Any) -> int:
            self.tried += 1
            seq = really(connection, record, **options)
            if self.tried <= times:
                strike(connection)
            return seq

        monkeypatch.setattr(rows, "put", put_and_strike)


def backend(connection: sa.Connection) -> int:
    """The process of the server that serves a connection."""
    return int(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())


def raise_state(connection: sa.Connection, state: str) -> None:
    """Have the server answer with an error."""
    connection.exec_driver_sql(f"DO $$ BEGIN RAISE EXCEPTION 'told to' USING ERRCODE = '{state}'; END $$")


def said(action: Callable[[], Any]) -> list[str]:
    """What is said of the catalog meanwhile."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CatalogWarning)
        action()
    return [str(one.message) for one in caught]


def lose_reply(catalog: Catalog, monkeypatch: pytest.MonkeyPatch, then: Callable[[], Any] = lambda: None) -> list[int]:
    """The server commits what the next take tells it, and the connection is lost before it can say so; the commits from then on."""
    database = recorder._desk(catalog.place).database()
    database.open()
    dialect = database._engine.dialect
    really = dialect.do_commit
    commits: list[int] = []

    def commit(connection: Any) -> None:
        really(connection)
        commits.append(1)
        if len(commits) == 1:
            connection.dbapi_connection.close()
            then()
            msg = "server closed the connection unexpectedly"
            raise psycopg.OperationalError(msg)

    monkeypatch.setattr(dialect, "do_commit", commit)
    return commits


# Restarts


def test_a_server_that_was_restarted_between_takes_is_not_noticed(catalog: Catalog, server: PostgresServer, take: Take) -> None:
    first = take(catalog, "a")
    server.restart()
    second = take(catalog, "b")

    assert ["/runs/0", first.path, second.path] == urls(catalog)
    assert not spool.is_waiting(catalog.place)


def test_a_server_that_is_restarted_in_the_midst_of_a_take_gets_the_record_once(
    catalog: Catalog, server: PostgresServer, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, restarted = threading.Event(), threading.Event()
    trouble = Trouble(monkeypatch, lambda _: (entered.set(), restarted.wait(60)))
    taking = threading.Thread(target=take, args=(catalog, "a"))
    taking.start()
    assert entered.wait(60)
    server.restart()
    restarted.set()
    taking.join()

    assert 2 == trouble.tried
    assert ["/runs/0", "a"] == [urls(catalog)[0], *(Path(url).name for url in urls(catalog)[1:])]
    assert not spool.is_waiting(catalog.place)


def test_a_server_that_stays_away_keeps_records_waiting(
    catalog: Catalog, server: PostgresServer, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Trouble(patch, lambda _: server.stop())
        taken: list[Snapshot] = []
        messages = said(lambda: taken.extend(take(catalog, name) for name in "abc"))

    assert 1 == len(messages)
    assert "does not answer" in messages[0]
    assert "the record waits" in messages[0]
    assert 3 == spool.pending(catalog.place)
    with pytest.raises(CatalogUnavailableError, match="does not answer"):
        all_of(catalog)
    server.start()
    catalog.close()

    assert ["/runs/0", *(snapshot.path for snapshot in taken)] == urls(catalog)
    assert not spool.is_waiting(catalog.place)


def test_the_next_take_enters_what_waits_when_the_server_is_back(
    catalog: Catalog, server: PostgresServer, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = threading.Event()
    really = Database.enter_spool
    monkeypatch.setattr(Database, "enter_spool", lambda self: (really(self), entered.set())[0])
    monkeypatch.setattr(recorder, "REST_SECONDS", 0.0)
    server.stop()
    messages = said(lambda: take(catalog, "a"))
    server.start()
    take(catalog, "b")

    assert 1 == len(messages)
    assert entered.wait(60)
    with sa.create_engine(catalog.place.url, poolclass=sa.NullPool).connect() as connection:
        assert 3 == connection.execute(sa.select(sa.func.count()).select_from(schema.records)).scalar()


def test_a_server_that_commits_and_goes_before_it_says_so_has_the_record_once(
    catalog: Catalog, server: PostgresServer, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is there and waits in the spool as well."""
    lose_reply(catalog, monkeypatch, server.stop)
    messages = said(lambda: take(catalog, "a", metrics={"loss": 0.5}, params={"lr": 0.1}))

    assert ["does not answer" in message for message in messages] == [True]
    assert 1 == spool.pending(catalog.place)
    server.start()

    assert 2 == count(catalog) == count(catalog, schema.locations)
    assert 1 == count(catalog, schema.metrics) == count(catalog, schema.params)
    assert not spool.is_waiting(catalog.place)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_what_people_do_meanwhile_fails_as_a_whole(catalog: Catalog, server: PostgresServer, how: signal.Signals) -> None:
    """Whoever asks is told at once, and may ask again."""

    def write() -> None:
        with catalog.database.writing() as connection:
            rows.put(connection, data(1))
            # SIGTERM waits until everybody has gone.
            stopping = threading.Thread(target=server.stop, args=[how])
            stopping.start()
            if how != signal.SIGTERM:
                stopping.join()
            rows.put(connection, data(2))
        stopping.join()

    if how == signal.SIGTERM:
        write()
    else:
        with pytest.raises(CatalogUnavailableError, match=r"does not answer|cannot be used"):
            write()
    server.start()

    assert ["/runs/0", "/runs/1", "/runs/2"][: 3 if how == signal.SIGTERM else 1] == urls(catalog)


# Connections


def test_a_take_whose_connection_is_lost_is_recorded_once(
    catalog: Catalog, server: PostgresServer, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble = Trouble(monkeypatch, lambda connection: server.execute(f"SELECT pg_terminate_backend({backend(connection)}, 10000)"))
    taken = take(catalog, "a")

    assert 2 == trouble.tried
    assert ["/runs/0", taken.path] == urls(catalog)
    assert not spool.is_waiting(catalog.place)


def test_a_take_whose_connection_is_lost_before_its_first_word_is_recorded(
    catalog: Catalog, server: PostgresServer, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, struck = postgres.begin_writing, []

    def begin(connection: sa.Connection, timeout_seconds: float) -> None:
        if not struck:
            struck.append(server.execute(f"SELECT pg_terminate_backend({backend(connection)}, 10000)"))
        really(connection, timeout_seconds)

    monkeypatch.setattr(postgres, "begin_writing", begin)
    taken = take(catalog, "a")

    assert ["/runs/0", taken.path] == urls(catalog)


def test_a_take_that_never_hears_that_it_was_recorded_is_recorded_once(
    catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = lose_reply(catalog, monkeypatch)
    taken = take(catalog, "a", metrics={"loss": 0.5}, params={"lr": 0.1}, tags=["one"])

    assert 2 == len(commits)
    assert ["/runs/0", taken.path] == urls(catalog)
    assert 2 == count(catalog, schema.locations)
    assert [1] * 3 == [count(catalog, table) for table in (schema.metrics, schema.params, schema.tags)]


def test_an_edit_whose_connection_is_lost_is_made_once(
    catalog: Catalog, server: PostgresServer, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(catalog, "a")
    take(catalog, "b")
    catalog.alias("latest~1", "best")
    really, struck = rows.annotate, []

    def annotate(connection: sa.Connection, *arguments: Any) -> Any:
        found = really(connection, *arguments)
        if len(struck) < 2:
            struck.append(server.execute(f"SELECT pg_terminate_backend({backend(connection)}, 10000)") if not struck else None)
        return found

    monkeypatch.setattr(rows, "annotate", annotate)

    assert ("best",) == catalog.alias("latest", "best").aliases
    assert () == catalog["latest~1"].aliases
    assert ("one",) == catalog.tag("latest", "one").tags
    assert catalog.check().ok


# Errors that pass, and others


@pytest.mark.parametrize("state", ["40001", "40P01", "57P01", "08006"])
def test_a_transaction_that_another_got_in_the_way_of_is_done_again(
    catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    trouble = Trouble(monkeypatch, lambda connection: raise_state(connection, state))
    taken = take(catalog, "a")

    assert 2 == trouble.tried
    assert ["/runs/0", taken.path] == urls(catalog)


@pytest.mark.parametrize("state", ["22012", "23505", "42501", "53100", "P0001"])
def test_another_error_is_not_met_twice(catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    with monkeypatch.context() as patch:
        trouble = Trouble(patch, lambda connection: raise_state(connection, state), times=2)
        taken: list[Snapshot] = []
        messages = said(lambda: taken.append(take(catalog, "a")))

    assert 1 == trouble.tried
    assert ["told to" in message for message in messages] == [True]
    assert 1 == spool.pending(catalog.place)
    assert ["/runs/0", taken[0].path] == urls(catalog)


def test_an_error_that_does_not_pass_keeps_the_record_waiting(catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        trouble = Trouble(patch, lambda connection: raise_state(connection, "40001"), times=9)
        messages = said(lambda: take(catalog, "a"))

    assert 2 == trouble.tried
    assert ["told to" in message for message in messages] == [True]
    assert 1 == spool.pending(catalog.place)
    assert 2 == count(catalog)


def test_a_deadlock_with_another_program_ends_and_the_take_is_recorded(
    catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds a table, and wants what whoever writes holds."""
    url = catalog.place.url.replace("+psycopg", "")
    done = threading.Event()
    with psycopg.connect(url) as other:
        other.execute("SET deadlock_timeout = '1h'")  # it is not the one that gives in
        other.execute("LOCK TABLE records")

        def want() -> None:
            other.execute("SELECT pg_advisory_xact_lock(%s)", [postgres._LOCK])
            other.commit()
            done.set()

        really, threads = postgres.begin_writing, []

        def begin(connection: sa.Connection, timeout_seconds: float) -> None:
            really(connection, timeout_seconds)
            if not threads:
                threads.append(threading.Thread(target=want))
                threads[0].start()

        monkeypatch.setattr(postgres, "begin_writing", begin)
        trouble = Trouble(monkeypatch, lambda _: None)
        taken = take(catalog, "a")

        assert done.wait(60)
        threads[0].join()
    assert 2 == trouble.tried
    assert ["/runs/0", taken.path] == urls(catalog)
    assert not spool.is_waiting(catalog.place)


# Who waits for whom


def test_catalogs_of_one_server_do_not_wait_for_each_other(postgres_catalog: Catalog, empty_postgres: str) -> None:
    other = Catalog(empty_postgres)
    with postgres_catalog.database.writing() as connection:
        rows.put(connection, data(1))
        put(other, data(2))

    assert (["/runs/1"], ["/runs/2"]) == (urls(postgres_catalog), urls(other))


def test_whoever_reads_waits_for_nobody(postgres_catalog: Catalog) -> None:
    put(postgres_catalog, data(1))
    with postgres_catalog.database.writing() as connection:
        rows.put(connection, data(2))

        assert ["/runs/1"] == urls(Catalog(postgres_catalog.place.url))


def test_one_that_stalls_while_it_writes_does_not_keep_others_waiting_for_ever(
    postgres_catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(postgres_catalog, data(0))
    monkeypatch.setattr(postgres, "_STALLED_MILLISECONDS", 50)

    def stall() -> None:
        with postgres_catalog.database.writing() as connection:
            rows.put(connection, data(1))
            put(Catalog(postgres_catalog.place.url), data(2))
            rows.put(connection, data(3))

    with pytest.raises(CatalogUnavailableError, match="timeout"):
        stall()

    assert ["/runs/0", "/runs/2"] == urls(postgres_catalog)


def test_a_take_that_was_stopped_for_long_is_recorded_once(postgres_catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "_STALLED_MILLISECONDS", 50)
    trouble = Trouble(monkeypatch, lambda _: time.sleep(0.5))
    taken = take(postgres_catalog, "a")

    assert 2 == trouble.tried
    assert [taken.path] == urls(postgres_catalog)


def test_a_lock_goes_with_the_connection_of_its_holder(postgres_catalog: Catalog, postgres_server: PostgresServer) -> None:
    def die() -> None:
        with postgres_catalog.database.writing() as connection:
            rows.put(connection, data(1))
            postgres_server.execute(f"SELECT pg_terminate_backend({backend(connection)}, 10000)")
            put(Catalog(postgres_catalog.place.url), data(2))

    with pytest.raises(CatalogUnavailableError):
        die()

    assert ["/runs/2"] == urls(postgres_catalog)


def test_who_may_only_read_searches_and_their_takes_wait(catalog: Catalog, server: PostgresServer, take: Take) -> None:
    """Somebody of the team to whom only SELECT was granted."""
    database = catalog.place.url.rpartition("/")[2]
    server.execute("CREATE ROLE reader LOGIN PASSWORD 'CANARY'")
    server.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader", database)
    place = catalog.place.url.rpartition("@")[2]
    theirs = Catalog(f"postgresql+psycopg://reader:CANARY@{place}")
    try:
        with pytest.raises(CatalogUnavailableError, match=r"permission denied.*ask for the right"):
            put(theirs, data(1))
        messages = said(lambda: take(theirs, "a"))

        assert ["ask for the right" in message for message in messages] == [True]
        assert ["/runs/0"] == urls(theirs)
        assert 1 == spool.pending(theirs.place)
        assert 2 == count(catalog)  # whoever may write finds it beside theirs
    finally:
        server.execute("DROP OWNED BY reader", database)
        server.execute("DROP ROLE reader")


# Several processes


@pytest.mark.slow
def test_processes_that_are_killed_lose_no_record_on_a_server(postgres_catalog: Catalog, tmp_path: Path) -> None:
    workers = Workers(postgres_catalog, tmp_path, 25)
    workers.run(kills=25)
    acknowledged = workers.acknowledged()

    assert 10 < workers.killed
    assert WORKERS * 25 == len(acknowledged) == len(set(acknowledged))
    assert set(acknowledged) <= {record.id for record in all_of(postgres_catalog)} <= set(workers.committed())

    postgres_catalog.scan()

    assert workers.committed() == {record.id: record.url for record in all_of(postgres_catalog)}
    assert postgres_catalog.check(project="*").ok


def test_processes_that_take_at_once_are_put_in_one_order(postgres_catalog: Catalog, tmp_path: Path) -> None:
    workers = Workers(postgres_catalog, tmp_path, 3)
    workers.run()

    assert sorted(workers.acknowledged()) == sorted(record.id for record in all_of(postgres_catalog))
    steps: dict[str, list[int | None]] = {}
    for record in all_of(postgres_catalog):
        steps.setdefault(str(Path(record.url).parent), []).append(record.step)
    assert [[0, 1, 2]] * WORKERS == list(steps.values())
    assert not spool.is_waiting(postgres_catalog.place)


# All of it


def test_a_catalog_on_a_server_does_all_that_a_catalog_does(postgres_catalog: Catalog, take: Take, tmp_path: Path) -> None:
    taken = [take(postgres_catalog, str(step), step=step, metrics={"loss": 1 / step}, name=f"run {step}") for step in range(1, 7)]
    postgres_catalog.alias("run 1", "best")
    postgres_catalog.alias("run 6", "best")
    postgres_catalog.tag("run 2", "ablation")
    postgres_catalog.pin("run 3")
    postgres_catalog.log_metric("run 4", "acc", 0.5)
    postgres_catalog.note("run 4", "look at this")

    assert [6, 5, 4] == [record.step for record in postgres_catalog.search("loss < 0.3")]
    assert [2, 3] == [record.step for record in postgres_catalog.search("tag = ablation or pinned", sort="step")]
    assert [4] == [record.step for record in postgres_catalog.search('acc > 0.1 and note ~ "LOOK"')]
    assert [taken[5].id] * 3 == [postgres_catalog[ref].id for ref in ("best", "latest", taken[5].id[:8])]
    assert taken[3].id == Snapshot.find("run 4", catalog=postgres_catalog).id
    assert [0.5] == postgres_catalog.search("acc > 0").to_pandas()["metric.acc"].tolist()

    for ref in ("best", "run 3"):
        with pytest.raises(SnapshotPinnedError):
            postgres_catalog.delete(ref)
    postgres_catalog.delete("run 5")
    plan = postgres_catalog.prune(keep_best=("loss", "min", 2))

    assert [1] == [record.step for record in plan.delete]
    assert [taken[0].id] == [record.id for record in plan.apply().deleted]
    assert [2, 3, 4, 6] == [record.step for record in postgres_catalog.search(sort="step")]
    assert ["2", "3", "4", "6"] == sorted(path.name for path in (tmp_path / "runs").iterdir())
    with pytest.raises(RefNotFoundError):
        postgres_catalog["run 5"]

    with postgres_catalog.database.writing() as connection:
        connection.exec_driver_sql(f"TRUNCATE {', '.join(schema.metadata.tables)} RESTART IDENTITY")
    assert 4 == len(postgres_catalog.check().findings)
    assert 4 == len(postgres_catalog.scan().entered)
    assert ("best",) == postgres_catalog["run 6"].aliases
    assert [("ablation",), (), (), ()] == [record.tags for record in postgres_catalog.search(sort="step")]
    assert ["look at this"] == [record.note for record in postgres_catalog.search("acc = 0.5")]
    assert postgres_catalog["run 3"].pinned
    assert postgres_catalog.check(deep=True).ok
