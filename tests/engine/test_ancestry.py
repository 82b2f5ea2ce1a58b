"""Which snapshot a state came from is known in every process, and asked for without waiting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from expstate import Snapshot, StateDict
from expstate.engine import ancestry

from .processes import in_child

MODEL, OPTIMIZER = {"model": StateDict(x=1)}, {"optimizer": StateDict(x=1)}


@pytest.fixture(autouse=True)
def _new_process() -> Iterator[None]:
    ancestry.forget()
    yield
    ancestry.forget()


def test_the_parent_is_the_last_that_was_taken_with_one_of_the_keys(tmp_path: Path) -> None:
    first = Snapshot.take(tmp_path / "1", MODEL)
    second = Snapshot.take(tmp_path / "2", OPTIMIZER)
    third = Snapshot.take(tmp_path / "3", MODEL)
    fourth = Snapshot.take(tmp_path / "4", MODEL | OPTIMIZER)

    assert [None, None, first.id, third.id] == [one.manifest.parent for one in (first, second, third, fourth)]


def test_what_is_restored_is_the_parent_of_what_is_taken_next(tmp_path: Path) -> None:
    first = Snapshot.take(tmp_path / "1", MODEL | OPTIMIZER)
    second = Snapshot.take(tmp_path / "2", MODEL | OPTIMIZER)
    first.restore(MODEL, dry_run=True)
    before = ancestry.parent_of(MODEL)
    first.restore(MODEL)

    assert second.id == before
    assert first.id == Snapshot.take(tmp_path / "3", MODEL).manifest.parent
    assert second.id == Snapshot.take(tmp_path / "4", OPTIMIZER).manifest.parent


def test_a_take_that_failed_is_nobodys_parent(tmp_path: Path) -> None:
    first = Snapshot.take(tmp_path / "1", MODEL)
    Snapshot.take(tmp_path / "2", OPTIMIZER)
    with pytest.raises(FileExistsError):
        Snapshot.take(tmp_path / "2", MODEL)

    assert first.id == ancestry.parent_of(MODEL)


def test_a_child_knows_what_its_parent_did_and_does_not_wait_for_its_threads(tmp_path: Path) -> None:
    first = Snapshot.take(tmp_path / "1", MODEL)
    with ancestry._lock:  # as a thread of the parent may have it
        ended = in_child(lambda: ancestry.parent_of(MODEL))

    assert first.id == ended.result
