"""What a power cut leaves: on a disk that forgets, from one moment on, everything that was not flushed."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from expstate import Snapshot, settings

from .crashes import AFTER, BEFORE, EARLIER, PLACE, act, check, found_at, prepare
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
        self._run("mount", "-o", "loop", str(self.image), str(self.folder))


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    base = tmp_path_factory.mktemp("disk")
    (base / "mounted").mkdir()
    disk = Disk(base / "image", base / "mounted")
    yield disk
    disk.unmount()


def cut_at(disk: Disk, number: int, function: Callable[[], Any]) -> None:
    """Run ``function`` in a child, and cut the power before its change of this number."""

    def strike(*_: object) -> None:
        disk.cut()
        os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        with watched(Changes(number, strike)):
            function()

    assert signal.SIGKILL == in_child(run).signal
    disk.restart()


@pytest.mark.parametrize("action", ["take", "overwrite", "async", "copy", "delete"])
def test_cut_before_a_change(disk: Disk, action: str) -> None:
    root = disk.folder / f"{action}-counted"
    prepare(root, action)
    count = len(changes_of(lambda: act(root, action)))
    seen = []
    # The last ones are those around the commit.
    for number in [*range(2, count - 8, 5), *range(max(2, count - 8), count + 1)]:
        root = disk.folder / f"{action}-{number}"
        prepare(root, action)
        cut_at(disk, number, lambda root=root: act(root, action))
        seen.append(check(root, action))

    assert {BEFORE[action], AFTER[action]} == set(seen)


def act_and_cut(disk: Disk, root: Path, action: str) -> None:
    def run() -> None:
        act(root, action)
        disk.cut()
        os.kill(os.getpid(), signal.SIGKILL)

    assert signal.SIGKILL == in_child(run).signal
    disk.restart()


@pytest.mark.parametrize("action", ["take", "overwrite", "async", "copy", "delete"])
def test_cut_right_after_the_return(disk: Disk, action: str) -> None:
    root = disk.folder / f"{action}-returned"
    prepare(root, action)
    act_and_cut(disk, root, action)

    assert AFTER[action] == check(root, action)


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
