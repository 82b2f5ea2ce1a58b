"""Catalogs that are damaged, foreign, or set up by somebody else: refused with words that help, put aside, made anew."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from expstate import Catalog, Snapshot
from expstate.catalog import database
from expstate.errors import CatalogCorruptError, CatalogUnavailableError
from expstate.testing.cases import random_bytes

from .plain import all_of, count, data, put, urls


def path_of(catalog: Catalog) -> Path:
    assert catalog.place.path is not None
    return catalog.place.path


def garbage(path: Path) -> None:
    path.write_bytes(random_bytes(20_000))


def garbage_header(path: Path) -> None:
    path.write_bytes(random_bytes(100) + path.read_bytes()[100:])


def cut_in_the_header(path: Path) -> None:
    os.truncate(path, 50)


def cut_in_the_middle(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_after_a_page(path: Path) -> None:
    os.truncate(path, 4096)


def text(path: Path) -> None:
    path.write_text("this is my diary, and no catalog\n" * 200)


def of_another_program(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE records (seq INTEGER PRIMARY KEY)")
    connection.close()


def without_a_table(path: Path) -> None:
    change(path, "DROP TABLE bodies")


def without_versions(path: Path) -> None:
    change(path, "DROP TABLE alembic_version")


def with_zeros(path: Path) -> None:
    found = path.read_bytes()
    path.write_bytes(found[:4096] + bytes(len(found) - 4096))


def with_a_header_that_forbids_to_write(path: Path) -> None:
    found = path.read_bytes()
    path.write_bytes(found[:18] + b"\x03" + found[19:])


def change(path: Path, *statements: str) -> None:
    """What a stranger does to a catalog."""
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


DAMAGES = [
    garbage,
    garbage_header,
    cut_in_the_header,
    cut_in_the_middle,
    cut_after_a_page,
    text,
    of_another_program,
    without_a_table,
    without_versions,
    with_zeros,
]


@pytest.fixture(params=DAMAGES, ids=lambda damage: damage.__name__)
def damaged(request: pytest.FixtureRequest, catalog: Catalog) -> Catalog:
    """A catalog with something wrong with its file."""
    put(catalog, *map(data, range(50)))
    request.param(path_of(catalog))
    return catalog


def test_a_damaged_catalog_says_how_it_is_mended(damaged: Catalog) -> None:
    with pytest.raises(CatalogCorruptError, match=r"damaged.*`expstate scan` puts it aside and builds it anew"):
        all_of(damaged)


def test_damage_is_found_when_it_is_looked_for(damaged: Catalog) -> None:
    assert database.find_damage(damaged.place)


def test_a_damaged_catalog_is_put_aside_and_a_new_one_made(damaged: Catalog) -> None:
    before = path_of(damaged).read_bytes()
    aside = database.put_aside(damaged.place)
    put(damaged, data(7))

    assert aside is not None
    assert aside.name.startswith("catalog.db.damaged-")
    assert before == aside.read_bytes()
    assert ["/runs/7"] == urls(damaged)


@pytest.mark.parametrize("content", [b"", None])
def test_an_empty_file_is_a_new_catalog(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "catalog.db").write_bytes(content)
    catalog = Catalog(tmp_path / "catalog.db")

    assert database.find_damage(catalog.place) is None
    assert [] == urls(catalog)


def test_a_log_that_was_left_alone_does_not_meet_a_new_catalog(catalog: Catalog) -> None:
    """Someone has removed the file, and not its log."""
    put(catalog, data(1))
    path = path_of(catalog)
    with catalog.database.writing() as connection:
        connection.exec_driver_sql("PRAGMA user_version=5")
        log = path.with_name("catalog.db-wal").read_bytes()
    path.unlink()
    path.with_name("catalog.db-wal").write_bytes(log)
    put(catalog, data(2))

    assert ["/runs/2"] == urls(catalog)
    assert database.find_damage(catalog.place) is None


def test_the_log_is_put_aside_with_its_file(catalog: Catalog) -> None:
    put(catalog, data(1))
    path = path_of(catalog)
    for ending in ("-wal", "-shm"):
        path.with_name(path.name + ending).write_bytes(random_bytes(100))
    text(path)
    aside = database.put_aside(catalog.place)

    assert aside is not None
    assert {aside.name, f"{aside.name}-wal", f"{aside.name}-shm", "catalog.db.lock"} >= set(os.listdir(path.parent))
    assert aside.exists()


def test_a_sound_catalog_is_not_put_aside(any_catalog: Catalog) -> None:
    put(any_catalog, data(1))

    assert database.find_damage(any_catalog.place) is None
    assert database.put_aside(any_catalog.place) is None
    assert ["/runs/1"] == urls(any_catalog)


def test_several_that_put_it_aside_at_once_do_it_once(catalog: Catalog) -> None:
    put(catalog, data(1))
    text(path_of(catalog))
    barrier = threading.Barrier(4)
    found: list[Path | None] = []

    def mend() -> None:
        barrier.wait()
        found.append(database.put_aside(catalog.place))
        put(catalog, data(len(found)))

    threads = [threading.Thread(target=mend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert 1 == len([aside for aside in found if aside])
    assert 4 == count(catalog)


def test_a_record_with_a_flipped_byte_is_damage(catalog: Catalog) -> None:
    """SQLite sees nothing wrong with it."""
    put(catalog, data(1))
    change(path_of(catalog), "UPDATE bodies SET body = replace(body, '{', '!')")
    with pytest.raises(CatalogCorruptError, match=r"the record '[0-9a-f]{32}' is damaged.*`expstate scan` makes it anew"):
        all_of(catalog)


def test_a_text_that_is_none_is_damage(catalog: Catalog) -> None:
    put(catalog, data(1))
    change(path_of(catalog), "UPDATE records SET name = CAST(x'ff41' AS TEXT)")
    with pytest.raises(CatalogCorruptError, match="expstate scan"):
        all_of(catalog)


@pytest.mark.parametrize("value", ["9e300", "-9e18", "'noon'", "x'00'"])
def test_a_time_that_is_none_is_damage(catalog: Catalog, value: str) -> None:
    put(catalog, data(1))
    change(path_of(catalog), f"UPDATE records SET created_at = {value}")  # noqa: S608 - values of ours
    with pytest.raises(CatalogCorruptError, match="expstate scan"):
        all_of(catalog)


def test_a_header_that_forbids_to_write_is_damage(catalog: Catalog, take: Callable[..., Snapshot]) -> None:
    """SQLite says that such a file is read-only, which is no matter of permissions."""
    snapshot = take(catalog, "a")
    with_a_header_that_forbids_to_write(path_of(catalog))
    catalog = Catalog(path_of(catalog))
    with pytest.raises(CatalogCorruptError, match=r"its header says that it must not be written.*`expstate scan` puts it aside"):
        catalog.tag("latest", "paper")

    assert catalog.scan().put_aside is not None
    assert [snapshot.id] == [record.id for record in all_of(catalog)]


@pytest.mark.parametrize("statement", ["UPDATE aliases SET record = 77", "UPDATE locations SET url = replace(url, 'runs', 'rums')"])
def test_rows_that_tell_of_nothing_that_is_there_are_mended(catalog: Catalog, take: Callable[..., Snapshot], statement: str) -> None:
    """An alias of no record, and the place of a snapshot under another name: SQLite sees nothing wrong with either."""
    snapshot = take(catalog, "a")
    catalog.alias("latest", "best")
    change(path_of(catalog), statement)
    catalog = Catalog(path_of(catalog))

    assert not catalog.check(project="*").ok
    catalog.scan()
    assert (snapshot.id, snapshot.path) == (catalog["best"].id, catalog["best"].url)
    assert catalog.check(project="*").ok


# What somebody else has put there (H25)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER more AFTER INSERT ON records BEGIN DELETE FROM records; END",
        "CREATE VIEW strange AS SELECT * FROM records",
    ],
)
def test_triggers_and_views_are_refused(catalog: Catalog, statement: str) -> None:
    put(catalog, data(1))
    change(path_of(catalog), statement)
    for action in (all_of, lambda catalog: put(catalog, data(2))):
        for same_or_new in (catalog, Catalog(path_of(catalog))):
            with pytest.raises(CatalogCorruptError, match=r"somebody has added the (trigger 'more'|view 'strange')"):
                action(same_or_new)


def test_functions_in_the_schema_do_not_run(catalog: Catalog) -> None:
    """An index on an expression, or a default, could call what a program has registered."""
    put(catalog, data(1))
    change(path_of(catalog), "CREATE TABLE more (a TEXT DEFAULT (load_extension('evil')))", "CREATE INDEX evil ON records (abs(step))")

    assert ["/runs/1"] == urls(catalog)
    with pytest.raises(Exception, match=r"does not take|unsafe"), catalog.database.writing() as connection:
        connection.exec_driver_sql("INSERT INTO more DEFAULT VALUES")


def test_names_in_the_file_are_shown_without_control_characters(catalog: Catalog) -> None:
    put(catalog, data(1))
    change(path_of(catalog), 'CREATE VIEW "\x1b[31mred" AS SELECT 1')
    with pytest.raises(CatalogCorruptError) as raised:
        all_of(catalog)

    assert "'\\x1b[31mred'" in str(raised.value)


def test_tables_of_another_program_on_a_server_are_left_alone(empty_postgres: str, postgres_server: object) -> None:
    import psycopg

    with psycopg.connect(empty_postgres.replace("+psycopg", "")) as connection:
        connection.execute("CREATE TABLE records (a INTEGER)")
    with pytest.raises(CatalogCorruptError, match="not those of a catalog"):
        count(Catalog(empty_postgres))
    with psycopg.connect(empty_postgres.replace("+psycopg", "")) as connection:
        connection.execute("ALTER TABLE records RENAME TO stars")
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
        connection.execute("INSERT INTO alembic_version VALUES ('abc')")
    with pytest.raises(CatalogCorruptError, match="not those of a catalog"):
        count(Catalog(empty_postgres))


def test_a_file_that_cannot_be_renamed_is_an_error_of_ours(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    put(catalog, data(1))
    text(path_of(catalog))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CatalogUnavailableError, match=r"cannot be renamed \(Permission denied\)"):
        database.put_aside(catalog.place)
