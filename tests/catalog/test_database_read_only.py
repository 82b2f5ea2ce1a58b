"""Catalogs that this process may only read: searched as they are, with one notice; and nothing of them is changed."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Catalog, Snapshot, StateDict
from expstate.catalog import schema, spool
from expstate.errors import CatalogUnavailableError, CatalogWarning
from tests.engine.processes import in_child

from .plain import count, data, put, urls

NOBODY = 65534


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can look into; pytest's own they cannot."""
    folder = Path(tempfile.mkdtemp(prefix="expstate-read-only-"))
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture
def catalog(open_folder: Path) -> Catalog:
    """A catalog with a record."""
    catalog = Catalog(open_folder / "catalog.db")
    put(catalog, data(1))
    return catalog


def as_reader(folder: Path, function: Callable[[], Any]) -> Any:
    """What ``function`` gives in a process that may not write to the folder."""
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)

    def run() -> Any:
        if os.geteuid() == 0:  # whom permissions do not stop
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        return function()

    return in_child(run).result


def noticed(function: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What ``function`` gives, and the warnings it gives of the catalog."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CatalogWarning)
        found = function()
    return found, [str(one.message) for one in caught if issubclass(one.category, CatalogWarning)]


def refusal(function: Callable[[], Any]) -> str:
    try:
        function()
    except CatalogUnavailableError as error:
        return str(error)
    return ""


def test_it_is_read_with_one_notice(catalog: Catalog, open_folder: Path) -> None:
    found, notices = as_reader(open_folder, lambda: noticed(lambda: [urls(catalog), urls(Catalog(open_folder / "catalog.db"))]))

    assert [["/runs/1"]] * 2 == found
    assert [f"the catalog '{open_folder}/catalog.db' is read-only: it is searched as it is, and nothing new is entered"] == notices


def test_one_that_a_link_leads_to_is_read_too(catalog: Catalog, open_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The folder that counts is that of the file itself."""
    with tempfile.TemporaryDirectory(prefix="expstate-link-") as name:
        link = Path(name) / "catalog.db"
        link.symlink_to(open_folder / "catalog.db")
        Path(name).chmod(0o777)
        found, notices = as_reader(open_folder, lambda: noticed(lambda: count(Catalog(link))))

    assert 1 == found
    assert ["is read-only" in notice for notice in notices] == [True]


def test_it_is_not_written(catalog: Catalog, open_folder: Path) -> None:
    message, _ = as_reader(open_folder, lambda: noticed(lambda: refusal(lambda: put(catalog, data(2)))))

    assert f"the catalog '{open_folder}/catalog.db' is read-only" in message
    assert "EXPSTATE_CATALOG" in message
    assert ["/runs/1"] == urls(catalog)


def test_one_that_is_not_there_cannot_be_made(open_folder: Path) -> None:
    message = as_reader(open_folder, lambda: refusal(lambda: urls(Catalog(open_folder / "new.db"))))

    assert "does not exist, and its folder is read-only" in message


def test_what_others_write_meanwhile_is_seen(catalog: Catalog, open_folder: Path) -> None:
    """Their log is read, not only the file."""
    seen = open_folder / "seen"
    with catalog.database.reading() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
        put(catalog, data(2))  # which is in the log alone, as long as somebody reads
        shutil.copytree(open_folder, seen)
    found, _ = as_reader(seen, lambda: noticed(lambda: urls(Catalog(seen / "catalog.db"))))
    seen.chmod(0o755)

    assert {"catalog.db", "catalog.db-wal", "catalog.db-shm"} == {path.name for path in seen.iterdir()}
    assert ["/runs/1", "/runs/2"] == found


def test_one_that_becomes_read_only_is_looked_at_again(catalog: Catalog, open_folder: Path) -> None:
    messages, notices = as_reader(open_folder, lambda: noticed(lambda: [urls(catalog), refusal(lambda: put(catalog, data(2)))]))

    assert ["/runs/1"] == messages[0]
    assert "is read-only" in messages[1]
    assert 1 == len(notices)


def test_an_older_one_is_not_migrated(catalog: Catalog, open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "VERSION", "later")
    message, _ = as_reader(open_folder, lambda: noticed(lambda: refusal(lambda: urls(catalog))))

    assert "is of another version, and cannot be migrated" in message


def test_what_waits_beside_it_goes_on_waiting(catalog: Catalog, open_folder: Path) -> None:
    spool.append(catalog.place, data(2))
    found, _ = as_reader(open_folder, lambda: noticed(lambda: urls(catalog)))
    open_folder.chmod(0o755)

    assert ["/runs/1"] == found
    assert 1 == spool.pending(catalog.place)


def test_a_take_goes_on_without_it(catalog: Catalog, open_folder: Path) -> None:
    runs = open_folder / "runs"
    runs.mkdir()
    Snapshot.take(runs / "earlier", {"state": StateDict(a=1)}, catalog=False)  # imports what the other user may not read

    def take() -> str:
        torch.set_num_threads(1)
        return Snapshot.take(runs / "one", {"state": StateDict(a=1)}, catalog=catalog).read_object("state/a")

    (open_folder / "runs").chmod(0o777)
    open_folder.chmod(0o555)
    (open_folder / "catalog.db").chmod(0o444)

    def run() -> Any:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        return noticed(take)

    found, notices = in_child(run).result

    assert 1 == found
    assert 1 == len(notices)
    assert "is safe, but was not entered" in notices[0]
    assert f"expstate scan '{runs}'" in notices[0]
    assert 1 == count(catalog)
