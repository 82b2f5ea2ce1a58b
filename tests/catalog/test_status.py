"""The status tells what the catalog holds, what waits to be entered, and what has not come to its end."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from expstate import Catalog, Snapshot, settings
from expstate.catalog import database, model, spool
from expstate.catalog.status import status
from expstate.engine import collect
from expstate.format import manifest as manifests
from expstate.format import names
from tests.engine import leftovers

Take = Callable[..., Snapshot]


def test_records_are_counted_by_project(any_catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all projects, with those whose snapshot is not where it was."""
    take(any_catalog, "a")
    take(any_catalog, "a", overwrite=True)
    monkeypatch.setenv("EXPSTATE_PROJECT", "another")
    gone = take(any_catalog, "b")
    gone.delete()
    any_catalog.scan()
    found = status(any_catalog)

    assert {"another": 1, "tests": 2} == found.records
    assert (1, 1, 1, 0, None) == (found.missing, found.replaced, found.roots, found.spooled, found.problem)
    assert (found.nbytes or 0) > 4096
    assert found.version
    assert "3 records in 2 projects" in str(found)
    assert any_catalog.url == found.to_dict()["url"]


def test_an_unfinished_take_of_a_dead_process_is_told(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Of this machine, killed in the midst of it: by the process that it was."""
    take(catalog, "a")
    script = """
import os, signal, sys, torch
from expstate import Snapshot, StateDict
from expstate.engine.take import Take

Take.commit = lambda take: os.kill(os.getpid(), signal.SIGKILL)
Snapshot.take(sys.argv[1], {"a": StateDict(x=torch.ones(3))})
"""
    done = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "runs" / "b")], env={**os.environ, "EXPSTATE_CATALOG": "off"})
    assert -signal.SIGKILL == done.wait()
    found = status(catalog)

    (unfinished,) = found.unfinished
    assert (str(tmp_path / "runs" / "b"), "take", done.pid, model.this_host(), False) == (
        unfinished.path,
        unfinished.action,
        unfinished.pid,
        unfinished.host,
        unfinished.alive,
    )
    assert f"1 unfinished take by pid {done.pid} (dead)" in str(found)
    assert "expstate gc" in str(found)
    catalog.gc()
    assert () == status(catalog).unfinished


def test_what_is_at_work_is_told(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """It is alive, and there is nothing to clean up."""
    take(catalog, "a")
    folder = tmp_path / "runs" / "b"
    folder.mkdir()
    leftovers.own_lease(folder)
    found = status(catalog)

    assert [(os.getpid(), True)] == [(unfinished.pid, unfinished.alive) for unfinished in found.unfinished]
    assert f"by pid {os.getpid()} (alive)" in str(found)
    assert "expstate gc" not in str(found)


def test_leases_of_other_machines_name_them(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Dead when they are old; one that was not written to its end belongs to nobody."""
    take(catalog, "a")
    leftovers.lease(tmp_path / "runs" / "b", host="gpu-7")
    unwritten = tmp_path / "runs" / "c" / names.lease_name("0" * 8)
    unwritten.parent.mkdir()
    unwritten.touch()
    found = status(catalog)

    assert "on gpu-7 (dead), 2 d old" in str(found)
    assert "by an unknown process (alive)" in str(found)


def test_a_lease_without_content_is_dead_when_gc_says_so(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Its age tells."""
    take(catalog, "a")
    unwritten = tmp_path / "runs" / "c" / names.lease_name("0" * 8)
    unwritten.parent.mkdir()
    unwritten.touch()
    leftovers.age(unwritten)

    assert [False] == [unfinished.alive for unfinished in status(catalog).unfinished]
    assert 1 == len(collect.gc(tmp_path / "runs").removed)


def test_records_that_wait_are_told(catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the catalog is locked they wait."""
    monkeypatch.setattr(database, "_SPOOL_SECONDS", 0.05)
    taken = take(catalog, "a")
    assert 1 == len(catalog)
    assert catalog.place.path is not None
    other = take(None, "b")
    spool.append(catalog.place, model.describe(other.manifest, other.metadata.digest, other.path))
    locked = sqlite3.connect(catalog.place.path)
    locked.execute("BEGIN IMMEDIATE")
    try:
        found = status(catalog)
        assert 1 == found.spooled
        assert "waiting to be entered: 1 record\n" in f"{found}\n"
    finally:
        locked.rollback()
        locked.close()
    catalog.close()
    found = status(Catalog(catalog.place.path))

    assert (0, {"tests": 2}) == (found.spooled, found.records)
    assert taken.id != other.id


def test_a_catalog_that_cannot_be_opened_is_part_of_the_status(catalog: Catalog, take: Take) -> None:
    """What waits and what is unfinished is told all the same."""
    taken = take(catalog, "a")
    leftovers.lease(Path(taken.path))
    catalog.close()
    assert catalog.place.path is not None
    catalog.place.path.write_bytes(b"no database")
    with settings.override(catalog_timeout_seconds=1):
        found = status(catalog)

    assert "expstate scan" in (found.problem or "")
    assert (None, {}, 1) == (found.nbytes, found.records, len(found.unfinished))
    assert b"no database" == catalog.place.path.read_bytes()


def test_hostile_leases_are_inert(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Host and action come from a file."""
    take(catalog, "a")
    leftovers.lease(tmp_path / "runs" / "\x1b[1m<b>", host="\x1b[31m<script>", action="<img src=x>\n")
    found = status(catalog)

    assert "\x1b" not in str(found)
    assert 2 == len(str(found).splitlines()) - 1
    assert "<img" not in found._repr_html_()
    assert "&lt;script&gt;" in found._repr_html_()


def test_manifests_are_not_read_for_it(catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at the folders is enough."""
    take(catalog, "a")

    def refuse(*given: object) -> None:
        raise AssertionError

    monkeypatch.setattr(manifests, "decode", refuse)
    assert {"tests": 1} == status(catalog).records
