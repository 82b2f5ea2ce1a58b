"""A process that is killed at any change of the disk leaves what was there before, or what it was making, and nothing in between."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from expstate import Snapshot, StateDict, gc, settings
from expstate.engine import attempt
from expstate.errors import SnapshotNotFoundError
from expstate.storage import local
from expstate.storage.base import FileWriter
from expstate.storage.local import LocalStorage

from .processes import NEEDS_STRACE, calls_in, changes_of, killed_at, under_strace

EARLIER, PLACE = "earlier", "place"


def state(value: int) -> dict[str, StateDict]:
    """Two data files; one has two windows' worth of tensors and is no multiple of a page."""
    return {
        "model": StateDict(weight=torch.full((3000,), float(value)), bias=torch.full((7,), value), name=f"value {value}"),
        "other": StateDict(table=torch.full((100, 3), value, dtype=torch.int16)),
    }


def value_of(snapshot: Snapshot) -> int:
    """The value that a snapshot was taken with; all of it must be of that one."""
    live = state(-1)
    snapshot.restore(live)
    value = int(live["model"]["bias"][0])
    expected = state(value)
    for key in live:
        for name, wanted in expected[key].items():
            found = live[key][name]
            assert torch.equal(wanted, found) if isinstance(wanted, torch.Tensor) else wanted == found
    return value


def prepare(root: Path, action: str) -> None:
    """What is there before."""
    Snapshot.take(root / EARLIER, state(1))
    if action in {"overwrite", "delete"}:
        Snapshot.take(root / PLACE, state(2))


def act(root: Path, action: str) -> None:
    """What is interrupted; one thread, so that the changes come in one order."""
    with settings.override(io_threads=1):
        if action == "delete":
            Snapshot(root / PLACE).delete()
        elif action == "copy":
            Snapshot(root / EARLIER).copy(root / PLACE)
        elif action == "async":
            Snapshot.async_take(root / PLACE, state(3)).wait()
        else:
            Snapshot.take(root / PLACE, state(3), overwrite=action == "overwrite")


BEFORE = {"take": None, "async": None, "copy": None, "overwrite": 2, "delete": 2}
AFTER = {"take": 3, "async": 3, "copy": 1, "overwrite": 3, "delete": None}


def found_at(place: Path) -> int | None:
    """The value at a place, all of its bytes verified; None if nothing is visible there."""
    try:
        report = Snapshot(place).verify()
    except SnapshotNotFoundError:
        return None
    assert report.ok, str(report)
    return value_of(Snapshot(place))


def assert_clean(root: Path) -> None:
    """Nothing is in the folders but what the manifests name."""
    for place in (root / EARLIER, root / PLACE):
        found = {path.name for path in place.iterdir()} if place.exists() else set()
        try:
            expected = {record.name for record in Snapshot(place).manifest.files} | {"snapshot.json"}
        except SnapshotNotFoundError:
            expected = set()
        assert expected == found


def check(root: Path, action: str) -> int | None:
    """All that must hold after a crash; the value that is visible at the place."""
    assert 1 == found_at(root / EARLIER)
    value = found_at(root / PLACE)
    assert value in {BEFORE[action], AFTER[action]}
    # Twice from here on: whoever comes next cleans up first or takes first.
    copied = root.with_name(f"{root.name}-2")
    shutil.copytree(root, copied)

    report = gc(root)
    assert ((), ()) == (report.alive, report.damaged)
    assert value == found_at(root / PLACE)
    assert_clean(root)
    Snapshot.take(root / PLACE, state(4), overwrite=True)
    assert 4 == found_at(root / PLACE)

    Snapshot.take(copied / PLACE, state(5), overwrite=value is not None)
    assert 5 == found_at(copied / PLACE)
    gc(copied)
    assert 5 == found_at(copied / PLACE)
    assert 1 == found_at(copied / EARLIER)
    assert_clean(copied)
    return value


def sweep(tmp_path: Path, action: str, *, torn: bool = False, within: Callable[[], AbstractContextManager[Any]] = nullcontext) -> list[int | None]:
    """Kill the action before each of its changes; what was visible after each."""
    root = tmp_path / "counted"
    prepare(root, action)

    def run() -> None:
        with within():
            act(root, action)

    changes = changes_of(run)
    seen = []
    for number in range(1, len(changes) + 1):
        if torn and changes[number - 1][0] != "pwrite":
            continue
        root = tmp_path / f"{number}"
        prepare(root, action)
        assert signal.SIGKILL == killed_at(number, run, torn=torn).signal
        seen.append(check(root, action))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("action", ["take", "async", "overwrite", "copy", "delete"])
def test_killed_before_any_change(tmp_path: Path, action: str) -> None:
    seen = sweep(tmp_path, action)

    assert len(seen) >= (6 if action == "delete" else 20)
    assert {BEFORE[action], AFTER[action]} == set(seen)
    # Once it is visible, or gone, it stays so.
    first = seen.index(AFTER[action])
    assert [BEFORE[action]] * first + [AFTER[action]] * (len(seen) - first) == seen


@pytest.mark.slow
@pytest.mark.parametrize("action", ["take", "overwrite"])
def test_killed_in_the_middle_of_any_write(tmp_path: Path, action: str) -> None:
    seen = sweep(tmp_path, action, torn=True)

    assert len(seen) >= 6
    assert {BEFORE[action]} == set(seen)


class _WithoutExclusiveRename:
    pass


def without_unnamed_files() -> AbstractContextManager[Any]:
    return patch.object(local, "_O_TMPFILE", 0)


def without_links() -> AbstractContextManager[Any]:
    return patch.multiple(local, _O_TMPFILE=0, _NO_LINKS=local._NO_LINKS)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["take", "overwrite"])
@pytest.mark.parametrize("torn", [False, True])
def test_killed_where_files_need_names(tmp_path: Path, action: str, torn: bool) -> None:
    seen = sweep(tmp_path, action, torn=torn, within=without_unnamed_files)

    assert {BEFORE[action]} | (set() if torn else {AFTER[action]}) == set(seen)
