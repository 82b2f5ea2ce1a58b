"""What a power cut leaves: on a disk that forgets, from one moment on, everything that was not flushed."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from expstate import Catalog, Snapshot, gc, settings
from tests.campaign import Campaign

from .crashes import (
    AFTER,
    BEFORE,
    EARLIER,
    HALVES,
    INCREMENTAL,
    LEFTOVERS,
    LOST,
    PLACE,
    act,
    check,
    found_at,
    let_a_day_pass,
    point,
    prepare,
    seeing,
    state,
    value_of,
)
from .processes import Changes, changes_of, in_child, unmount, watched
from .test_crash import without_fsync

pytestmark = [pytest.mark.root, pytest.mark.slow]

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
_WITHOUT_LOG = 2


class Disk:
    """An ext4 file system in a file."""

    def __init__(self, image: Path, folder: Path) -> None:
        self.image, self.folder = image, folder
        with image.open("wb") as file:
            file.truncate(64 * 1024 * 1024)
        self._run("mkfs.ext4", "-q", str(image))
        self._run("mount", "-o", "loop", str(image), str(folder))

    @staticmethod
    def _run(*command: str) -> None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip(f"there is no {command[0]} here")
        if done.returncode:
            pytest.skip(f"{command[0]} does not work here: {done.stderr.strip()}")

    def cut(self) -> None:
        """From here on nothing reaches the disk, and what was not flushed is lost."""
        fd = os.open(self.folder, os.O_RDONLY)
        fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _WITHOUT_LOG))
        os.close(fd)

    def unmount(self) -> None:
        unmount(self.folder)

    def restart(self) -> None:
        """Switch it on again."""
        self.unmount()
        subprocess.run(["mount", "-o", "loop", str(self.image), str(self.folder)], check=True)  # noqa: S607


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    base = tmp_path_factory.mktemp("disk")
    (base / "mounted").mkdir()
    disk = Disk(base / "image", base / "mounted")
    yield disk
    disk.unmount()


def cut_at(disk: Disk, number: int, function: Callable[[], Any]) -> None:
    """Run ``function`` in a child, and cut the power before its change of this number."""

    struck = threading.Event()

    def strike(*_: object) -> None:
        struck.set()
        disk.cut()
        os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        try:
            with watched(Changes(number, strike)):
                function()
        finally:
            if struck.is_set():  # by another thread, which is about to kill it
                signal.pause()

    assert signal.SIGKILL == in_child(run).signal
    disk.restart()


ACTIONS = ["take", "overwrite", "async", "copy", "delete", *INCREMENTAL]


@pytest.mark.campaign("All or nothing", "the power cut before each change of the disk, on ext4 that loses what was not flushed")
@pytest.mark.parametrize("action", ACTIONS)
def test_cut_before_a_change(disk: Disk, action: str, campaign: Campaign) -> None:
    root = disk.folder / f"{action}-counted"
    prepare(root, action)
    count = len(changes_of(lambda: act(root, action)))
    seen = []
    # The last ones are those around the commit.
    for number in [*campaign.some(range(2, max(2, count - 4)), short=3), *range(max(2, count - 4), count + 1)]:
        root = disk.folder / f"{action}-{number}"
        prepare(root, action)
        cut_at(disk, number, lambda root=root: act(root, action))
        with point(campaign):
            seen.append(check(root, action))
        forget(root)

    assert {BEFORE[action], AFTER[action]} == set(seen)


def forget(root: Path) -> None:
    for folder in (root, root.with_name(f"{root.name}-2")):
        shutil.rmtree(folder)


def act_and_cut(disk: Disk, function: Callable[[], Any]) -> None:
    def run() -> None:
        function()
        disk.cut()
        os.kill(os.getpid(), signal.SIGKILL)

    assert signal.SIGKILL == in_child(run).signal
    disk.restart()


@pytest.mark.campaign("Durable on return", "the power cut right after the return")
@pytest.mark.parametrize("action", ACTIONS)
def test_cut_right_after_the_return(disk: Disk, action: str, campaign: Campaign) -> None:
    for number in range(campaign.choose(1, 15)):
        root = disk.folder / f"{action}-returned-{number}"
        prepare(root, action)
        act_and_cut(disk, lambda root=root: act(root, action))
        with point(campaign):
            assert AFTER[action] == check(root, action)
        forget(root)


# What people add, and the catalog


def edit(root: Path) -> None:
    """Two edits: the first makes the file, the second replaces it."""
    with closing(Catalog(root / "catalog.db")) as catalog:
        catalog.tag("latest", "good")
        catalog.note("latest", "seen")


def take_recorded(root: Path) -> None:
    """The earlier one is in the catalog."""
    Snapshot.take(root / PLACE, state(3), catalog=root / "catalog.db")


def prepare_recorded(root: Path) -> None:
    Snapshot.take(root / EARLIER, state(1), catalog=root / "catalog.db")


def check_recorded(root: Path) -> tuple[int | None, tuple[str, ...], str | None]:
    """No snapshot is lost, and what the catalog has lost a scan finds; what is visible, and what has been added to the last snapshot."""
    with seeing(LOST):
        assert 1 == found_at(root / EARLIER)
    with seeing(HALVES):
        value = found_at(root / PLACE)
    with closing(Catalog(root / "catalog.db")) as catalog:
        catalog.scan(root)
        let_a_day_pass(root / EARLIER)
        gc(root)
        found = list(catalog.search())
        with seeing(LEFTOVERS):
            assert catalog.check().ok, str(catalog.check())
            assert [] == [path for path in root.rglob(".a*") if path.is_file()]
        assert [1] + [3] * (value is not None) == [value_of(Snapshot(record.url)) for record in reversed(found)]
        return value, found[0].tags, found[0].note


@pytest.mark.campaign("The catalog is an index", "the power cut before each change that a recorded take or an edit makes to files")
@pytest.mark.parametrize("action", [take_recorded, edit])
def test_cut_while_it_is_recorded(disk: Disk, action: Callable[[Path], None], campaign: Campaign) -> None:
    root = disk.folder / f"{action.__name__}-counted"
    prepare_recorded(root)
    count = len(changes_of(lambda: action(root)))
    for number in campaign.some(range(1, count + 1), short=4):
        root = disk.folder / f"{action.__name__}-{number}"
        prepare_recorded(root)
        cut_at(disk, number, lambda root=root: action(root))
        with point(campaign):
            value, tags, note = check_recorded(root)
        assert value in {None, 3}
        assert (tags, note) in {((), None), (("good",), None), (("good",), "seen")}
        shutil.rmtree(root)


@pytest.mark.campaign("Durable on return", "the power cut right after the return")
@pytest.mark.parametrize("action", [take_recorded, edit])
def test_cut_right_after_it_was_recorded(disk: Disk, action: Callable[[Path], None], campaign: Campaign) -> None:
    for number in range(campaign.choose(2, 15)):
        root = disk.folder / f"{action.__name__}-returned-{number}"
        prepare_recorded(root)
        act_and_cut(disk, lambda root=root: action(root))
        with point(campaign):
            found = check_recorded(root)
        assert found == ((3, (), None) if action is take_recorded else (None, ("good",), "seen"))
        shutil.rmtree(root)


# Would these checks notice?


def test_without_flushing_what_was_taken_is_lost(disk: Disk) -> None:
    """So the tests above do see what was flushed."""
    root = disk.folder / "unflushed"
    prepare(root, "overwrite")

    def run() -> None:
        with without_fsync(lambda path: True):
            act(root, "overwrite")
        disk.cut()
        os.kill(os.getpid(), signal.SIGKILL)

    assert signal.SIGKILL == in_child(run).signal
    disk.restart()

    assert BEFORE["overwrite"] == found_at(root / PLACE)


def test_data_that_is_not_flushed_before_the_commit_is_damage(disk: Disk) -> None:
    """So the order matters, and the checks see it."""
    root = disk.folder / "disordered"
    prepare(root, "take")

    def run() -> None:
        # Direct writes are on the disk without being flushed; through the page cache they are not.
        with settings.override(direct_io=False), without_fsync(lambda path: path.endswith(".safetensors")):
            act(root, "take")
        disk.cut()
        os.kill(os.getpid(), signal.SIGKILL)

    assert signal.SIGKILL == in_child(run).signal
    disk.restart()

    assert Snapshot(root / EARLIER).verify().ok
    assert not Snapshot(root / PLACE).verify().ok
