"""Versions of the tables: new catalogs are as migrations make them, older ones are migrated, newer ones refused."""

from __future__ import annotations

import functools
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from expstate import Catalog
from expstate.catalog import schema, versions
from expstate.errors import CatalogCorruptError, CatalogUnavailableError, CatalogVersionError
from tests.campaign import Campaign

from .data import make_catalog_0001
from .plain import all_of, count, data, put, urls

NEXT = '''
"""The version after this one."""
import sqlalchemy as sa
from alembic import op
from expstate.catalog import schema

revision = "{revision}"
down_revision = "{before}"


def upgrade():
    with op.batch_alter_table("records") as table:
        table.add_column(sa.Column("colour", sa.Text(), server_default="green", nullable=False))
    # Tables are made anew, and others point to their rows.
    recreate = "always" if op.get_bind().dialect.name == "sqlite" else "never"
    with op.batch_alter_table("names", recreate=recreate) as table:
        table.add_column(sa.Column("unit_{revision}", sa.Text()))
    op.execute("UPDATE records SET note = 'migrated'")
    {more}
'''


@pytest.fixture
def later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make this process one of a later version, with a migration more."""

    def install(more: str = "") -> None:
        folder = tmp_path / "migrations"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(versions.FOLDER, folder)
        source = NEXT.format(revision="later", before=schema.VERSION, more=more)
        (folder / "versions" / "later.py").write_text(source)
        monkeypatch.setattr(versions, "FOLDER", folder)
        monkeypatch.setattr(schema, "VERSION", "later")

    return install


def fetch(catalog: Catalog, statement: str) -> list[Any]:
    with catalog.database.reading() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(statement)]


def filled(catalog: Catalog) -> Catalog:
    """A catalog with records that have something in every table."""
    with_all = data(1).body.__class__(tags=("a", "b"), params={"lr": 0.1}, metrics={"loss": 0.5})
    put(catalog, data(1, body=with_all, packages={"torch": "2"}), data(2, body=with_all))
    return catalog


# What is made


def migrated(url: str) -> sa.Engine:
    """A database that only migrations have made."""
    from alembic import command

    engine = sa.create_engine(url, poolclass=sa.NullPool)
    config = versions.alembic_config()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    return engine


def test_migrations_lead_to_the_tables_of_the_schema(tmp_path: Path, empty_postgres: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    for url in (f"sqlite:///{tmp_path}/migrated.db", empty_postgres):
        with migrated(url).connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})

            assert [] == compare_metadata(context, schema.metadata), url


def test_the_statements_of_a_new_catalog_are_those_of_the_migrations(tmp_path: Path, catalog: Catalog) -> None:
    """Alembic does not compare everything: not options of tables, nor the order of columns."""
    statements = "SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%' ORDER BY name"
    made = fetch(catalog, statements)
    with migrated(f"sqlite:///{tmp_path}/migrated.db").connect() as connection:
        found = [tuple(row) for row in connection.exec_driver_sql(statements)]

    assert {plain(row[2]) for row in made} == {plain(row[2]) for row in found}


def plain(statement: str) -> str:
    return " ".join(statement.replace(",", " , ").split())


def test_the_schema_names_the_last_migration() -> None:
    from alembic.script import ScriptDirectory

    assert schema.VERSION == ScriptDirectory.from_config(versions.alembic_config()).get_current_head()


def test_alembic_is_not_imported_where_nothing_is_to_be_migrated(tmp_path: Path) -> None:
    script = f"import sys; from expstate import Catalog; len(Catalog({str(tmp_path / 'catalog.db')!r})); print('alembic' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)

    assert "False\n" == ended.stdout


# What is migrated


def test_an_older_catalog_is_migrated_when_it_is_opened(any_catalog: Catalog, later: Callable[..., None], fresh: Any) -> None:
    catalog = filled(fresh(any_catalog))
    before = all_of(catalog)
    later()

    assert [("later",)] == fetch(catalog, "SELECT version_num FROM alembic_version")
    assert [("green", "migrated")] * 2 == fetch(catalog, "SELECT colour, note FROM records")
    assert before == all_of(catalog)
    assert [2, 4, 2, 2, 1] == [
        count(catalog, table) for table in (schema.records, schema.tags, schema.metrics, schema.params, schema.environments)
    ]


@pytest.fixture
def fresh(empty_postgres: str) -> Callable[[Catalog], Catalog]:
    """The same kind of catalog in a database that no other test will use."""
    return lambda catalog: catalog if catalog.place.path is not None else Catalog(empty_postgres)


def test_a_migration_that_fails_changes_nothing(any_catalog: Catalog, later: Callable[..., None], fresh: Any) -> None:
    catalog = filled(fresh(any_catalog))
    before = urls(catalog)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "VERSION", schema.VERSION)
        patch.setattr(versions, "FOLDER", versions.FOLDER)
        later("op.execute('SELECT * FROM nowhere')")
        with pytest.raises(CatalogCorruptError, match="damaged"):
            all_of(catalog)

    with sa.create_engine(engine_url(catalog), poolclass=sa.NullPool).connect() as connection:
        assert [("0001",)] == [tuple(row) for row in connection.exec_driver_sql("SELECT version_num FROM alembic_version")]
        assert "colour" not in {column["name"] for column in sa.inspect(connection).get_columns("records")}
        assert len(before) == connection.exec_driver_sql("SELECT count(*) FROM records").scalar()


def engine_url(catalog: Catalog) -> str:
    return catalog.place.url


def test_several_that_open_an_older_catalog_migrate_it_once(any_catalog: Catalog, later: Callable[..., None], fresh: Any) -> None:
    first = filled(fresh(any_catalog))
    url = first.place.path or first.place.url
    later()
    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(lambda _: count(Catalog(url)), range(4)))

    assert [2] * 4 == counts
    assert [("later",)] == fetch(first, "SELECT version_num FROM alembic_version")


def test_one_that_was_open_already_migrates_it_too(catalog: Catalog, later: Callable[..., None]) -> None:
    """The version is looked at in each transaction: another process may have changed it."""
    put(catalog, data(1))
    later()
    put(catalog, data(2))

    assert [("later",)] == fetch(catalog, "SELECT version_num FROM alembic_version")
    assert 2 == count(catalog)


def test_without_alembic_an_older_catalog_is_left_alone(
    catalog: Catalog, later: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(catalog, data(1))
    later()
    monkeypatch.setitem(sys.modules, "alembic", None)
    with pytest.raises(CatalogUnavailableError, match="pip install alembic"):
        all_of(catalog)


# What is kept

KEPT = pytest.mark.campaign("Old snapshots are read", "catalogs of the first version that are kept, and of newer ones, which are refused")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Catalog]:
    """The committed catalog of the first version."""
    monkeypatch.setenv("EXPSTATE_PROJECT", "vision")
    connection = sqlite3.connect(tmp_path / "kept.db")
    connection.executescript(make_catalog_0001.FILE.read_text(encoding="utf-8"))
    connection.close()
    catalog = Catalog(tmp_path / "kept.db")
    yield catalog
    catalog.close()


@KEPT
def test_the_first_version_is_read(kept: Catalog, catalog: Catalog, campaign: Campaign) -> None:
    """All records, as a catalog of today has them, with all that was added to them."""
    make_catalog_0001.fill(catalog)
    other, first, second = all_of(kept)

    assert all_of(catalog) == [other, first, second]
    assert ["s3://bucket/1", "/runs/1"] == [location.url for location in first.locations]
    assert {"lr": 0.1, "layers": [4, (2, None)], "huge": 2**70, "optimizer": "adam", "amp": True, "nothing": None} == first.params
    assert (2**60 + 1, "c" * 40) == (first.metrics["steps"], first.provenance["git"]["commit"])
    assert (("kept",), ("best",), True, "changed since", 0.75) == (
        second.tags,
        second.aliases,
        second.pinned,
        second.note,
        second.metrics["acc"],
    )
    assert ("speech", 8) == (other.project, other.world_size)
    campaign.tried()


@KEPT
@pytest.mark.parametrize("newer", [False, True], ids=["as it is", "migrated"])
def test_the_first_version_is_searched_and_written_to(kept: Catalog, later: Callable[..., None], newer: bool, campaign: Campaign) -> None:
    """By this version, and by one after it, which changes its tables."""
    if newer:
        later()
    first, second = "1" * 32, "2" * 32

    assert second == kept["best"].id == kept["latest"].id == kept["2222"].id
    assert [first] == [record.id for record in kept.search("lr > 0.05 and optimizer = adam and tag = ablation and steps > 5")]
    assert [second, first] == [record.id for record in kept.search('name = resnet and tag = "für immer" or pinned')]
    assert {"torch": "2.13.0", "numpy": "2.4.6"} == kept.packages("best")
    put(kept, data(1, project="vision", parent=second))  # after its parent, whatever its time
    assert second == kept["latest"].parent
    assert 4 == count(kept)
    campaign.tried()


def test_a_catalog_of_today_has_the_rows_of_the_first_version(kept: Catalog, catalog: Catalog) -> None:
    """As long as the version is the same, the same records are written the same way."""
    make_catalog_0001.fill(catalog)

    assert schema.VERSION == "0001"
    for table in schema.metadata.tables:
        statement = f"SELECT * FROM {table}"  # noqa: S608 - a name of ours
        assert sorted(map(repr, fetch(kept, statement))) == sorted(map(repr, fetch(catalog, statement))), table


# What is refused


@KEPT
def test_a_newer_catalog_is_refused(any_catalog: Catalog, fresh: Any, campaign: Campaign) -> None:
    catalog = filled(fresh(any_catalog))
    with catalog.database.writing() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    for action in (all_of, functools.partial(put, catalog)):
        with pytest.raises(CatalogVersionError, match=r"version '9999'.*knows up to '0001'.*upgrade expstate"):
            action(*([catalog] if action is all_of else [data(3)]))

    with sa.create_engine(engine_url(catalog), poolclass=sa.NullPool).connect() as connection:
        assert 2 == connection.exec_driver_sql("SELECT count(*) FROM records").scalar()
    campaign.tried()


@pytest.mark.parametrize("change", ["DELETE FROM alembic_version", "INSERT INTO alembic_version VALUES ('0000')"])
def test_versions_that_nobody_wrote_are_refused(catalog: Catalog, change: str) -> None:
    put(catalog, data(1))
    assert catalog.place.path is not None
    with sqlite3.connect(catalog.place.path) as connection:
        connection.execute(change)
    connection.close()
    with pytest.raises(CatalogVersionError):
        all_of(catalog)


def test_migrations_are_part_of_the_package() -> None:
    import expstate

    folder = Path(expstate.__file__).parent / "catalog" / "migrations"

    assert folder == versions.FOLDER
    assert {"env.py", "script.py.mako", "versions"} <= {path.name for path in folder.iterdir()}
