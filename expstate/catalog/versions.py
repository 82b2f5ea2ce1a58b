"""Versions of the tables: a new catalog is made as it should be, an older one is migrated by Alembic, a newer one is refused.

Works inside a transaction that nobody else writes in. Alembic is imported only when there is something to migrate.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from expstate.catalog import failures, schema
from expstate.catalog.sqlite import APPLICATION_ID
from expstate.errors import CatalogUnavailableError, CatalogVersionError

if TYPE_CHECKING:
    from alembic.config import Config

    from expstate.catalog.place import CatalogPlace

FOLDER = Path(__file__).parent / "migrations"
"""Where Alembic finds the migrations."""

_VERSIONS = sa.Table(
    "alembic_version",
    sa.MetaData(),
    sa.Column("version_num", sa.String(32), nullable=False),
    sa.PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)
"""Alembic's own table, as it makes it."""


def is_current(connection: sa.Connection) -> bool:
    """Whether a catalog has the tables of this version.

    Raises
    ------
    sqlalchemy.exc.DBAPIError
        If it has no tables at all.
    """
    return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars().all() == [schema.VERSION]


def bring_up_to_date(connection: sa.Connection, place: CatalogPlace) -> None:
    """Make the tables, or migrate those that are there.

    Raises
    ------
    CatalogVersionError
        If they were made by a newer version.
    CatalogCorruptError
        If they are not ours.
    CatalogUnavailableError
        If Alembic is needed and not installed.
    """
    names = set(sa.inspect(connection).get_table_names())
    if "alembic_version" not in names:
        if names & set(schema.metadata.tables):
            raise failures.corrupt(place, "its tables are not those of a catalog")
        _make(connection)
        return
    found = connection.execute(sa.select(_VERSIONS.c.version_num)).scalars().all()
    if found == [schema.VERSION]:
        return
    if "records" not in names:
        raise failures.corrupt(place, "its tables are not those of a catalog")
    _migrate(connection, place, ", ".join(found))


def _make(connection: sa.Connection) -> None:
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
    schema.metadata.create_all(connection, checkfirst=False)
    _VERSIONS.create(connection)
    connection.execute(sa.insert(_VERSIONS).values(version_num=schema.VERSION))


def _migrate(connection: sa.Connection, place: CatalogPlace, found: str) -> None:
    try:
        from alembic import command  # noqa: PLC0415 - 0.1 s, and most catalogs need no migration
        from alembic.script import ScriptDirectory  # noqa: PLC0415
    except ImportError:
        msg = f"the catalog {place.shown!r} is of an older version, and to migrate it takes the package alembic: pip install alembic"
        raise CatalogUnavailableError(msg) from None
    config = alembic_config()
    if found not in {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}:
        msg = (
            f"the catalog {place.shown!r} has version {found[:80]!r}, and this version of expstate knows up to {schema.VERSION!r}; "
            "upgrade expstate, or name another catalog by EXPSTATE_CATALOG"
        )
        raise CatalogVersionError(msg)
    config.attributes["connection"] = connection
    command.upgrade(config, schema.VERSION)
    if connection.dialect.name == "sqlite" and connection.exec_driver_sql("PRAGMA foreign_key_check").first() is not None:
        raise failures.corrupt(place, "rows that belong together do not")


def alembic_config() -> Config:
    """What Alembic needs to know to find the migrations."""
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.set_main_option("file_template", "v%%(rev)s_%%(slug)s")
    return config
