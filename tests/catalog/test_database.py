"""Opening a catalog, and transactions in it: on SQLite and on PostgreSQL."""

from __future__ import annotations

import os
import sqlite3
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from expstate import Catalog
from expstate.catalog import filesystems, rows, schema, sqlite
from expstate.errors import CatalogError, CatalogUnavailableError, CatalogWarning, InvalidArgumentError

from .plain import all_of, count, data, put, urls


def pragma(catalog: Catalog, name: str) -> object:
    with catalog.database.reading() as connection:
        return connection.exec_driver_sql(f"PRAGMA {name}").scalar()


def test_what_was_written_is_read(any_catalog: Catalog) -> None:
    put(any_catalog, data(1), data(2))

    assert ["/runs/1", "/runs/2"] == urls(any_catalog)


def test_a_block_that_fails_writes_nothing(any_catalog: Catalog) -> None:
    put(any_catalog, data(1))

    def fail() -> None:
        with any_catalog.database.writing() as connection:
            rows.put(connection, data(2))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    assert ["/runs/1"] == urls(any_catalog)


def test_who_reads_sees_one_state(any_catalog: Catalog) -> None:
    put(any_catalog, data(1))
    number = sa.select(sa.func.count()).select_from(schema.records)
    with any_catalog.database.reading() as connection:
        before = connection.execute(number).scalar()
        put(any_catalog, data(2))
        after = connection.execute(number).scalar()

    assert 1 == before == after
    assert 2 == count(any_catalog)


def test_who_reads_cannot_write_on_a_server(postgres_catalog: Catalog) -> None:
    with pytest.raises(CatalogUnavailableError, match="cannot be written"), postgres_catalog.database.reading() as connection:
        rows.put(connection, data(1))


def test_threads_share_a_catalog(any_catalog: Catalog) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: put(any_catalog, data(number)), range(40)))

    assert {f"/runs/{number}" for number in range(40)} == set(urls(any_catalog))


def test_one_that_writes_keeps_others_waiting_as_long_as_they_like(any_catalog: Catalog) -> None:
    other = Catalog(any_catalog.place.url if any_catalog.place.path is None else any_catalog.place.path)
    with any_catalog.database.writing() as connection:
        rows.put(connection, data(1))
        with pytest.raises(CatalogUnavailableError, match="locked by another process"), other.database.writing(0.05):
            pass

    assert ["/runs/1"] == urls(other)


def test_one_that_waits_gets_its_turn(any_catalog: Catalog) -> None:
    waits = threading.Event()

    def write() -> None:
        waits.set()
        put(any_catalog, data(2))

    with any_catalog.database.writing() as connection:
        other = threading.Thread(target=write)
        other.start()
        waits.wait()
        rows.put(connection, data(1))
    other.join()

    assert ["/runs/1", "/runs/2"] == urls(any_catalog)


def test_several_that_open_a_new_catalog_at_once_make_one(tmp_path: Path, empty_postgres: str) -> None:
    for url in (tmp_path / "catalog.db", empty_postgres):
        catalogs = [Catalog(url) for _ in range(6)]
        barrier = threading.Barrier(6)

        def open_and_put(number: int, catalogs: list[Catalog] = catalogs, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            put(catalogs[number], data(number))

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(open_and_put, range(6)))

        assert [6] * 6 == [count(catalog) for catalog in catalogs]
    assert "wal" == pragma(Catalog(tmp_path / "catalog.db"), "journal_mode")


def test_a_catalog_is_made_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "a" / "b" / "catalog.db")
    put(catalog, data(1))

    assert ["catalog.db"] == os.listdir(tmp_path / "a" / "b")


@pytest.mark.parametrize("name", ["with space.db", "a?b#c%41.db", "ünïcode.db", os.fsdecode(b"no-text-\xff.db")])
def test_a_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    put(Catalog(tmp_path / name), data(1))

    assert [name] == os.listdir(tmp_path)
    assert ["/runs/1"] == urls(Catalog(tmp_path / name))


def test_a_file_is_opened_with_care(catalog: Catalog) -> None:
    put(catalog, data(1))

    assert "wal" == pragma(catalog, "journal_mode")
    assert 1 == pragma(catalog, "synchronous")
    assert 1 == pragma(catalog, "foreign_keys")
    assert 0 == pragma(catalog, "trusted_schema")
    assert 1 == pragma(catalog, "cell_size_check")
    assert sqlite.APPLICATION_ID == pragma(catalog, "application_id")


def test_values_that_only_a_stranger_writes_are_not_read(catalog: Catalog) -> None:
    """A value of a gigabyte is not brought into memory."""
    if not hasattr(sqlite3.Connection, "getlimit"):
        pytest.skip("Python 3.10 has no way to set limits")
    with catalog.database.reading() as connection:
        raw = connection.connection.dbapi_connection
        assert raw is not None

        assert 256 * 1024**2 == raw.getlimit(sqlite3.SQLITE_LIMIT_LENGTH)


def test_a_catalog_at_rest_is_a_single_file(catalog: Catalog) -> None:
    """So that it can be copied, and read where nothing can be written."""
    put(catalog, data(1))
    assert len(all_of(catalog)) == 1
    assert catalog.place.path is not None

    assert ["catalog.db"] == os.listdir(catalog.place.path.parent)


def test_a_catalog_that_was_removed_is_made_anew(catalog: Catalog) -> None:
    put(catalog, data(1))
    assert catalog.place.path is not None
    catalog.place.path.unlink()
    put(catalog, data(2))

    assert ["/runs/2"] == urls(catalog)


def test_a_catalog_that_was_replaced_is_read_as_it_is(catalog: Catalog, tmp_path: Path) -> None:
    put(catalog, data(1))
    other = Catalog(tmp_path / "other.db")
    put(other, data(2))
    assert catalog.place.path is not None
    (tmp_path / "other.db").rename(catalog.place.path)

    assert ["/runs/2"] == urls(catalog)


def test_the_tables_of_a_server_may_go_away_too(empty_postgres: str) -> None:
    catalog = Catalog(empty_postgres)
    put(catalog, data(1))
    with catalog.database.writing() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
    put(catalog, data(2))

    assert ["/runs/2"] == urls(catalog)


# Places that do not suit it


MOUNTS = b"""\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
23 22 0:50 / /net rw - nfs4 server:/export rw
24 23 0:51 / /net/own\\040disk rw shared:5 - xfs /dev/sdb rw
25 22 0:52 / /fused rw - fuse.sshfs me@there: rw
26 22 0:53 / /container rw - fuse.fuse-overlayfs overlay rw
27 22 0:54 / /twice rw - ext4 /dev/sdc rw
28 22 0:55 / /twice rw - cifs //server/share rw
torn
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/home/me/catalog.db", ("ext4", False)),
        ("/net/home/catalog.db", ("nfs4", True)),
        ("/network/catalog.db", ("ext4", False)),
        ("/net/own disk/catalog.db", ("xfs", False)),
        ("/fused/catalog.db", ("fuse.sshfs", True)),
        ("/container/catalog.db", ("fuse.fuse-overlayfs", False)),
        ("/twice/catalog.db", ("cifs", True)),
    ],
)
def test_network_file_systems_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, expected: tuple[str, bool]) -> None:
    (tmp_path / "mountinfo").write_bytes(MOUNTS)
    monkeypatch.setattr(filesystems, "_MOUNTS", tmp_path / "mountinfo")

    assert expected == (filesystems.kind_of(Path(path)), filesystems.is_network(Path(path)))


def test_a_link_to_a_network_file_system_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite keeps its log beside the file itself."""
    (tmp_path / "far").mkdir()
    link = tmp_path / "catalog.db"
    link.symlink_to(tmp_path / "far" / "catalog.db")
    (tmp_path / "mountinfo").write_text(f"1 0 0:1 / / rw - ext4 /dev/sda rw\n2 1 0:2 / {tmp_path}/far rw - nfs4 server:/ rw\n")
    monkeypatch.setattr(filesystems, "_MOUNTS", tmp_path / "mountinfo")
    catalog = Catalog(link)
    with pytest.warns(CatalogWarning, match="network file system"):
        put(catalog, data(1))

    assert "truncate" == pragma(catalog, "journal_mode")


def test_this_disk_is_no_network(tmp_path: Path) -> None:
    assert not filesystems.is_network(tmp_path)


def test_a_system_that_tells_nothing_has_no_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "_MOUNTS", tmp_path / "not there")

    assert ("", False) == (filesystems.kind_of(tmp_path), filesystems.is_network(tmp_path))


def test_on_a_network_there_is_no_write_ahead_log(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "is_network", lambda _: True)
    with pytest.warns(CatalogWarning, match="network file system") as warned:
        put(catalog, data(1), data(2))
    put(catalog, data(3))

    assert 1 == len(warned)
    assert ("truncate", 2) == (pragma(catalog, "journal_mode"), pragma(catalog, "synchronous"))
    assert 3 == count(catalog)


def test_a_catalog_that_moves_to_a_network_and_back_changes_its_log(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    put(catalog, data(1))
    modes = [pragma(catalog, "journal_mode")]
    for is_network in (True, False):
        monkeypatch.setattr(filesystems, "is_network", lambda _, found=is_network: found)
        moved = Catalog(catalog.place.path)
        if is_network:
            with pytest.warns(CatalogWarning, match="network"):
                put(moved, data(2))
        else:
            put(moved, data(3))
        modes.append(pragma(moved, "journal_mode"))

    assert ["wal", "truncate", "wal"] == modes
    assert 3 == count(catalog)


def test_a_folder_in_its_place_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(CatalogUnavailableError, match=r"cannot be opened.*EXPSTATE_CATALOG"):
        count(Catalog(tmp_path))


def test_a_path_through_a_file_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CatalogUnavailableError, match=r"cannot be opened|read-only"):
        count(Catalog(tmp_path / "file" / "catalog.db"))


def test_values_in_statements_are_not_shown(any_catalog: Catalog) -> None:
    secret = data().id
    rows_to_enter = [{"digest": secret, "packages": secret}] * 2
    with pytest.raises(CatalogError, match="does not take") as raised, any_catalog.database.writing() as connection:
        connection.execute(sa.insert(schema.environments), rows_to_enter)

    assert secret not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:?cache=shared",
        "sqlite://user:CANARY@host/catalog.db",
        "mysql://user:CANARY@host/catalog",
        "postgresql://user:CANARY@host:CANARY/catalog",
        "postgresql://user:12@CANARY#/catalog",
        "postgresql://[CANARY/catalog",
        "postgresql://user:CANARY@ho st/catalog",
    ],
)
def test_a_url_that_is_none_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        Catalog(url)

    assert "CANARY" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:CANARY@db.example.org:5433/team?sslpassword=CANARY", "postgresql+psycopg://db.example.org:5433/team"),
        ("postgresql+psycopg://me:CAN#A/R?Y@db/team", "postgresql+psycopg://db/team"),
        ("postgresql+psycopg://me:12#CANARY@db/team", "postgresql+psycopg://db/team"),
        ("postgresql://[::1]:5432/team", "postgresql+psycopg://[::1]:5432/team"),
        ("POSTGRESQL:///team", "postgresql+psycopg:///team"),
    ],
)
def test_a_url_is_shown_without_what_is_secret(url: str, shown: str) -> None:
    catalog = Catalog(url)

    assert shown == catalog.url
    assert repr(catalog) == f"Catalog({shown!r})"
    assert "CANARY" not in repr(catalog.place)
