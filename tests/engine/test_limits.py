"""Limits that are met by a take at work: a disk that becomes read-only, too little memory, a storage slower than the training."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.engine import memory
from expstate.errors import ExpstateError, StorageError
from expstate.settings import MIB
from expstate.storage.local import LocalStorage
from expstate.testing import FaultyStorage
from tests.campaign import Campaign

from .crashes import AFTER, BEFORE, EARLIER, PLACE, act, assert_failed_cleanly, check, error_of, found_at, point, prepare, state
from .processes import Changes, changes_of, in_child, unmount, watched

ACTIONS = ["take", "async", "overwrite", "copy", "delete", "incremental"]
CGROUPS = Path("/sys/fs/cgroup/memory")

# A disk that becomes read-only


class FailingDisk:
    """An ext4 file system in a file, which the system makes read-only as it does after an error."""

    def __init__(self, base: Path) -> None:
        self.folder = base / "mounted"
        self.folder.mkdir()
        self._image = base / "image"
        with self._image.open("wb") as file:
            file.truncate(64 * MIB)
        for command in (["mkfs.ext4", "-q", str(self._image)], self._mounting):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"{command[0]} does not work here: {done.stderr.strip()}")

    @property
    def _mounting(self) -> list[str]:
        return ["mount", "-o", "loop,errors=remount-ro", str(self._image), str(self.folder)]

    def fail(self) -> None:
        # Asked each time: a loop device that was let go of may be another test's by now.
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        device = next(Path(mount[0]).name for mount in mounts if mount[1] == str(self.folder))
        Path("/sys/fs/ext4", device, "trigger_fs_error").write_text("a test")

    def mend(self) -> None:
        unmount(self.folder)
        subprocess.run(["fsck.ext4", "-fy", str(self._image)], capture_output=True, check=False)  # noqa: S607
        subprocess.run(self._mounting, check=True)


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[FailingDisk]:
    disk = FailingDisk(tmp_path)
    yield disk
    unmount(disk.folder)


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.campaign("All or nothing", "a disk that is read-only, from the beginning or from some moment on")
@pytest.mark.parametrize("action", ACTIONS)
def test_a_disk_that_becomes_read_only(failing_disk: FailingDisk, action: str, campaign: Campaign) -> None:
    """Nobody can clean up until it is mended."""
    root = failing_disk.folder / "counted"
    prepare(root, action)
    count = len(changes_of(lambda: act(root, action)))
    for number in campaign.some(range(1, count + 1), short=3):
        root = failing_disk.folder / str(number)
        prepare(root, action)

        def failing(root: Path = root, number: int = number) -> bool:
            with watched(Changes(number, lambda *_: failing_disk.fail())):
                error = error_of(act, root, action)
            assert error is None or isinstance(error, StorageError)
            return error is not None

        raised = in_child(failing).result
        failing_disk.mend()
        seen = found_at(root / PLACE)
        assert raised or seen == AFTER[action]
        with point(campaign):
            assert check(root, action) in {BEFORE[action], AFTER[action]}


# Memory


@pytest.mark.campaign("All or nothing", "limits of the process: sizes of files, open files, memory")
@pytest.mark.parametrize("action", ["take", "async", "copy", "incremental", "restore"])
def test_no_address_space_is_left(tmp_path: Path, action: str, campaign: Campaign) -> None:
    """It ends as it should, or in an error, with nothing left; no thread waits for another for ever."""
    prepare(tmp_path, action)
    weight = StateDict(weight=torch.ones(4 * MIB))
    Snapshot.take(tmp_path / "large", {"model": weight})
    memory.free_idle()

    def limited(room: int) -> str | None:
        live = StateDict(weight=torch.zeros(4 * MIB))
        gc.collect()  # buffers of earlier takes would become room
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + room, hard))
        try:
            if action == "restore":
                Snapshot(tmp_path / "large").restore({"model": live})
            elif action == "copy":
                Snapshot(tmp_path / "large").copy(tmp_path / PLACE)
            elif action == "async":
                Snapshot.async_take(tmp_path / PLACE, {"model": weight}).wait()
            else:
                Snapshot.take(tmp_path / PLACE, {"model": weight}, base=tmp_path / EARLIER if action == "incremental" else None)
        except ExpstateError as error:
            found: str | None = f"{type(error).__name__}: {error}"
        else:
            found = None
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        if found is not None and action != "restore":
            assert_failed_cleanly(tmp_path, "take")
        return found

    found = set()
    # With less Python has no memory for its own threads, and waits for one that does not come.
    for room in campaign.some([MIB * number for number in (4, 6, 8, 10, 12, 14, 16, 18, 20, 24, 32, 48, 64, 96, 128)], short=2):
        with point(campaign):
            found.add(in_child(lambda room=room: limited(room)).result)
        if action != "restore" and (tmp_path / PLACE).exists():
            assert Snapshot(tmp_path / PLACE).verify().ok
            Snapshot(tmp_path / PLACE).delete()

    assert all(error is None or "the system gives no memory" in error for error in found), found
    assert None in found
    # How little is too little depends on what Python has in reserve.
    assert action in {"restore", "copy"} or len(found) == 2 or not campaign.is_long


CONFINED = """
import os, sys, torch
from expstate import Snapshot, StateDict

MIB = 2**20
group, limit, place = sys.argv[1], int(sys.argv[2]), sys.argv[3]
live = StateDict({f"t{number}": torch.full((4 * MIB,), float(number)) for number in range(16)})
Snapshot.take(place + "/warm", {"state": StateDict(x=torch.ones(3))})
with open(group + "/memory.limit_in_bytes", "w") as file:
    file.write(str(limit))
with open(group + "/tasks", "w") as file:  # what was allocated before is not counted
    file.write(str(os.getpid()))
snapshot = getattr(Snapshot, sys.argv[4])(place + "/s", {"state": live}, memory_budget_bytes=16 * MIB)
snapshot = snapshot.wait() if hasattr(snapshot, "wait") else snapshot
snapshot.restore({"state": live}, memory_budget_bytes=16 * MIB)
assert snapshot.verify(memory_budget_bytes=16 * MIB).ok
print("kept")
"""


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.campaign("Within the budget", "a memory cgroup that holds the budget and little more: the system kills what takes more")
@pytest.mark.parametrize("verb", ["take", "async_take"])
def test_a_take_lives_in_a_memory_cgroup(tmp_path: Path, verb: str, campaign: Campaign) -> None:
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(tmp_path)], capture_output=True, text=True, check=True).stdout  # noqa: S607
    if kind.strip() in {"tmpfs", "ramfs"}:
        campaign.note("files in memory count as memory")
        pytest.skip("files of this folder lie in memory, which would count")
    if not (CGROUPS / "memory.limit_in_bytes").exists():
        campaign.note("no memory cgroup (version 1) could be made")
        pytest.skip("there is no memory controller of cgroup version 1 here")
    for limit_mib in campaign.some([48, 40, 32], short=1)[::-1]:
        group = CGROUPS / f"expstate-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError as error:
            campaign.note("no memory cgroup could be made")
            pytest.skip(f"no memory cgroup can be made here: {error}")
        try:
            given = [str(group), str(limit_mib * MIB), str(tmp_path / str(limit_mib)), verb]
            command = [sys.executable, "-c", CONFINED, *given]
            ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
        finally:
            remove_group(group)
        assert (0, "kept\n") == (ended.returncode, ended.stdout), ended.stderr
        campaign.tried()


def remove_group(group: Path) -> None:
    """The system forgets the processes of a group a moment after they end."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.05)
        else:
            return


# A storage that is slower than the training


@pytest.mark.campaign("Within the budget", "a training that takes faster than the storage writes")
@pytest.mark.parametrize("on_busy", ["wait", "skip", "replace"])
def test_takes_that_come_faster_than_the_storage_do_not_pile_up(tmp_path: Path, on_busy: str, campaign: Campaign) -> None:
    """There is one at a time, with the memory of one."""
    running, most = set(), 0
    lock = threading.Lock()
    live = state(0)
    storages, pending = [], []
    for number in range(campaign.choose(6, 100)):
        storage = FaultyStorage(LocalStorage(str(tmp_path / str(number))))

        def slow(number: int = number) -> None:
            nonlocal most
            with lock:
                running.add(number)
                most = max(most, len(running))
            time.sleep(0.05)
            with lock:
                running.discard(number)

        storage.run("write", None, function=slow, names="model-*")
        storages.append(storage)
        live["model"]["bias"].fill_(number)
        live["model"]["weight"].fill_(float(number))
        pending.append(Snapshot.async_take(storage.url, live, on_busy=on_busy))
        campaign.tried()
    for number, taken in enumerate(pending):
        error = taken.exception()
        if error is None:
            back = state(-1)
            Snapshot(tmp_path / str(number)).restore(back)
            assert torch.equal(torch.full((3000,), float(number)), back["model"]["weight"])
        else:
            assert on_busy != "wait", error
            assert not (tmp_path / str(number)).exists()

    assert 1 == most
    committed = sum(taken.exception() is None for taken in pending)
    assert {"wait": committed == len(pending), "skip": 1 <= committed < len(pending), "replace": 1 <= committed}[on_busy]
