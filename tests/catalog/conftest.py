"""Catalogs to test with: on SQLite and on a PostgreSQL server that is started when the first test asks for it; and small takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Catalog, Snapshot, StateDict
from expstate.engine import ancestry

from .servers import PostgresServer, programs


@pytest.fixture(autouse=True)
def _nobodys_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """All takes are of one project, none has a parent from another test, and the folder of the user's own files is the test's."""
    monkeypatch.setenv("EXPSTATE_PROJECT", "tests")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "user"))
    ancestry.forget()
    yield
    ancestry.forget()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL server of this process's own."""
    bin_folder = programs()
    if bin_folder is None:
        reason = "PostgreSQL is not installed: run .ci/install-postgres"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    server = PostgresServer(bin_folder)
    yield server
    server.close()


@pytest.fixture(scope="session")
def _postgres_url(postgres_server: PostgresServer) -> str:
    """The URL of the database that tests use one after the other: emptying one is quicker than making one."""
    return postgres_server.new_database()


@pytest.fixture
def empty_postgres(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a PostgreSQL database with nothing in it."""
    url = postgres_server.new_database()
    yield url
    postgres_server.drop_database(url)


@pytest.fixture
def postgres_catalog(_postgres_url: str) -> Iterator[Catalog]:
    """An empty catalog on PostgreSQL."""
    from expstate.catalog import schema

    catalog = Catalog(_postgres_url)
    with catalog.database.writing() as connection:
        connection.exec_driver_sql(f"TRUNCATE {', '.join(schema.metadata.tables)} RESTART IDENTITY")
    yield catalog
    catalog.close()


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    """An empty catalog on SQLite."""
    catalog = Catalog(tmp_path / "catalog" / "catalog.db")
    yield catalog
    catalog.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def any_catalog(request: pytest.FixtureRequest) -> Catalog:
    """An empty catalog, on SQLite and on PostgreSQL."""
    found: Catalog = request.getfixturevalue("catalog" if request.param == "sqlite" else "postgres_catalog")
    return found


@pytest.fixture
def take(tmp_path: Path) -> Callable[..., Snapshot]:
    """Take a small snapshot into a catalog: ``take(catalog, "folder", value=1, step=1, metrics={"loss": 0.5})``."""

    def take(catalog: Catalog | None, folder: str, *, value: float = 0.0, key: str = "model", **options: Any) -> Snapshot:
        state = {key: StateDict(weight=torch.full((4,), float(value)), value=value)}
        return Snapshot.take(tmp_path / "runs" / folder, state, catalog=False if catalog is None else catalog, **options)

    return take
