"""What the tests of crashes share: actions that can be interrupted, and all that must hold wherever they were."""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from expstate import Snapshot, StateDict, gc, settings
from expstate.engine.lease import decode_lease
from expstate.errors import ExpstateError, SnapshotNotFoundError
from tests.campaign import Campaign

EARLIER, PLACE = "earlier", "place"


def state(value: int) -> dict[str, StateDict]:
    """Three data files; one has two windows' worth of tensors and is no multiple of a page, and one is the same whatever the value."""
    return {
        "model": StateDict(weight=torch.full((3000,), float(value)), bias=torch.full((7,), value), name=f"value {value}"),
        "other": StateDict(table=torch.full((100, 3), value, dtype=torch.int16)),
        "frozen": StateDict(numbers=torch.arange(5000)),
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
    if action in {"overwrite", "delete", "incremental overwrite"}:
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
        elif action == "incremental":
            Snapshot.take(root / PLACE, state(3), base=root / EARLIER)
        elif action == "incremental async":
            Snapshot.async_take(root / PLACE, state(3), base=root / EARLIER).wait()
        elif action == "incremental overwrite":
            Snapshot.take(root / PLACE, state(3), overwrite=True, base=root / PLACE)
        else:
            Snapshot.take(root / PLACE, state(3), overwrite=action == "overwrite")


INCREMENTAL = ("incremental", "incremental async", "incremental overwrite")
BEFORE = {"take": None, "async": None, "copy": None, "overwrite": 2, "delete": 2} | dict(zip(INCREMENTAL, (None, None, 2), strict=True))
AFTER = {"take": 3, "async": 3, "copy": 1, "overwrite": 3, "delete": None} | dict.fromkeys(INCREMENTAL, 3)


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
        found = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file() or not any(path.iterdir())}
        try:
            expected = {record.name for record in Snapshot(place).manifest.files} | {"snapshot.json"}
        except SnapshotNotFoundError:
            # A manifest that was not written to its end is nothing; the next take puts its own there.
            expected = found & {"snapshot.json"}
        assert expected == found


def let_a_day_pass(folder: Path) -> None:
    """What was not written to its end, a lease or an edit of annotations, does not say whose it is: age alone tells that it is dead."""
    for path in folder.glob(".*attempt-*") if folder.exists() else ():
        if decode_lease(path.read_bytes()) is None:
            assert gc(folder).alive
            os.utime(path, (time.time() - 2 * 86400,) * 2)
    for path in folder.glob(".annotations.json.*"):
        os.utime(path, (time.time() - 2 * 86400,) * 2)


HALVES, LOST, LEFTOVERS = "visible halves", "snapshots lost", "leftovers after gc"


class SeenError(AssertionError):
    """Something that may never be seen, of the kind that ``what`` says."""

    def __init__(self, what: str, error: BaseException) -> None:
        super().__init__(f"{what}: {error}")
        self.what = what


@contextmanager
def seeing(what: str) -> Iterator[None]:
    """If what is asserted in here, or done, does not succeed, then this was seen."""
    try:
        yield
    except (AssertionError, ExpstateError) as error:
        raise SeenError(what, error) from error


@contextmanager
def point(campaign: Campaign) -> Iterator[None]:
    """One point of a campaign of crashes: what is seen at it is counted."""
    for what in (HALVES, LOST, LEFTOVERS):
        campaign.count(what, 0)
    try:
        yield
    except SeenError as seen:
        campaign.count(seen.what)
        raise
    campaign.tried()


def check(root: Path, action: str) -> int | None:
    """All that must hold after a crash; the value that is visible at the place."""
    with seeing(LOST):
        assert 1 == found_at(root / EARLIER)
    with seeing(HALVES):
        value = found_at(root / PLACE)
        assert value in {BEFORE[action], AFTER[action]}
    # Twice from here on: whoever comes next cleans up first or takes first.
    let_a_day_pass(root / PLACE)
    copied = root.with_name(f"{root.name}-2")
    shutil.copytree(root, copied)

    report = gc(root)
    with seeing(LOST):
        assert 1 == found_at(root / EARLIER)
        assert value == found_at(root / PLACE)
    with seeing(LEFTOVERS):
        assert ((), ()) == (report.alive, report.damaged)
        assert_clean(root)
    Snapshot.take(root / PLACE, state(4), overwrite=True)
    assert 4 == found_at(root / PLACE)

    Snapshot.take(copied / PLACE, state(5), overwrite=value is not None)
    assert 5 == found_at(copied / PLACE)
    gc(copied)
    with seeing(LOST):
        assert 5 == found_at(copied / PLACE)
        assert 1 == found_at(copied / EARLIER)
    with seeing(LEFTOVERS):
        assert_clean(copied)
    return value


def crew_threads() -> list[str]:
    """The threads of ours that move bytes, and not those that keep idle memory or a connection, or look around for a record.

    One whose start was interrupted is listed for ever, but does not live.
    """
    names = [thread.name for thread in threading.enumerate() if thread.is_alive()]
    return [name for name in names if re.match(r"expstate-(\d|take)", name)]


def threads_left() -> list[str]:
    """Those that do not end by themselves: a take wakes who waits for it a moment before its own thread ends."""
    until = time.monotonic() + 10
    while any(name.startswith("expstate-take") for name in crew_threads()) and time.monotonic() < until:
        time.sleep(0.005)
    return crew_threads()


def error_of(function: Callable[..., object], *args: object) -> Any:
    """The error of ours that a function raises, or None."""
    try:
        function(*args)
    except ExpstateError as error:
        return error
    return None


def assert_failed_cleanly(root: Path, action: str) -> None:
    """Nothing of the failed action is there, in the process that lives on."""
    assert [] == threads_left()
    with seeing(LEFTOVERS):
        assert_clean(root)
    with seeing(LOST):
        assert 1 == found_at(root / EARLIER)
    with seeing(HALVES):
        assert BEFORE[action] == found_at(root / PLACE)
