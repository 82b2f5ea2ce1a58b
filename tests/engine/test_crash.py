"""A process that is killed at any change of the disk leaves what was there before, or what it was making, and nothing in between."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from expstate.format import names
from expstate.storage import local
from expstate.storage.base import FileWriter
from expstate.storage.local import LocalStorage
from expstate.testing.cases import aligned
from tests.campaign import Campaign

from .crashes import AFTER, BEFORE, HALVES, INCREMENTAL, LEFTOVERS, LOST, PLACE, act, check, point, prepare
from .processes import NEEDS_STRACE, calls_in, changes_of, changing_calls, killed_at, killed_on, under_strace

Within = Callable[[], AbstractContextManager[Any]]


def sweep(
    tmp_path: Path, action: str, campaign: Campaign, *, torn: bool = False, within: Within = nullcontext, short: int = 1000
) -> list[int | None]:
    """Kill the action before each of its changes, or so many of them in the short form; what was visible after each."""
    root = tmp_path / "counted"
    prepare(root, action)

    def run() -> None:
        with within():
            act(root, action)

    changes = changes_of(run)
    seen = []
    numbers = [number for number, (name, *_) in enumerate(changes, 1) if not torn or name == "pwrite"]
    for number in campaign.some(numbers, short):
        root = tmp_path / f"{number}"
        prepare(root, action)
        assert signal.SIGKILL == killed_at(number, run, torn=torn).signal
        with point(campaign):
            seen.append(check(root, action))
        shutil.rmtree(root)
        shutil.rmtree(root.with_name(f"{root.name}-2"))
    return seen


@pytest.mark.campaign("All or nothing", "a process killed before each change of the disk")
@pytest.mark.parametrize("action", ["take", "async", "overwrite", "copy", "delete", *INCREMENTAL])
def test_killed_before_any_change(tmp_path: Path, action: str, campaign: Campaign) -> None:
    seen = sweep(tmp_path, action, campaign, short=8)

    assert len(seen) >= (6 if action == "delete" else campaign.choose(8, 20))
    assert {BEFORE[action], AFTER[action]} == set(seen)
    # Once it is visible, or gone, it stays so.
    first = seen.index(AFTER[action])
    assert [BEFORE[action]] * first + [AFTER[action]] * (len(seen) - first) == seen


@pytest.mark.campaign("All or nothing", "a process killed in the middle of each write")
@pytest.mark.parametrize("action", ["take", "overwrite", "incremental", "copy"])
def test_killed_in_the_middle_of_any_write(tmp_path: Path, action: str, campaign: Campaign) -> None:
    seen = sweep(tmp_path, action, campaign, torn=True, short=4)

    assert len(seen) >= campaign.choose(4, 6)
    assert {BEFORE[action]} == set(seen)


# Where the file system lacks what the usual way needs


def without_unnamed_files() -> AbstractContextManager[Any]:
    return patch.object(local, "_O_TMPFILE", 0)


@contextmanager
def without_links() -> Iterator[None]:
    def link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    with patch.object(os, "link", link):
        yield


@contextmanager
def without_exclusive_renames() -> Iterator[None]:
    with without_links(), patch.object(local, "_libc", object()):
        yield


@pytest.mark.campaign("All or nothing", "a process killed on file systems without unnamed files, links or exclusive renames")
@pytest.mark.parametrize("within", [without_unnamed_files, without_links, without_exclusive_renames])
@pytest.mark.parametrize("action", ["take", "overwrite"])
@pytest.mark.parametrize("torn", [False, True])
def test_killed_where_files_need_names(tmp_path: Path, within: Within, action: str, torn: bool, campaign: Campaign) -> None:
    seen = sweep(tmp_path, action, campaign, torn=torn, within=within, short=3 if torn else 5)

    assert {BEFORE[action]} | (set() if torn else {AFTER[action]}) == set(seen)


# Would these checks notice?


@contextmanager
def manifest_first() -> Iterator[None]:
    """Data files get their bytes when the manifest is there."""
    late: list[_Late] = []
    create_file, create = LocalStorage.create_file, LocalStorage.create

    class _Late(FileWriter):
        def __init__(self, writer: FileWriter, size: int) -> None:
            self.writer, self.size = writer, size
            self.parts: list[tuple[int, memoryview]] = []

        def write(self, offset: int, data: memoryview) -> None:
            self.parts.append((offset, aligned(bytes(data))))

        def finish(self) -> tuple[()]:
            os.ftruncate(self.writer._fd, self.size)  # type: ignore[attr-defined]
            late.append(self)
            return ()

        def abort(self) -> None:
            pass

    def create_manifest_first(storage: LocalStorage, name: str, data: bytes, *, token: str) -> None:
        create(storage, name, data, token=token)
        for file in late if name == "snapshot.json" else ():
            for offset, part in file.parts:
                file.writer.write(offset, part)
            file.writer.finish()

    with (
        patch.object(LocalStorage, "create_file", lambda storage, name, size: _Late(create_file(storage, name, size), size)),
        patch.object(LocalStorage, "create", create_manifest_first),
    ):
        yield


def test_the_sweep_notices_a_manifest_that_comes_first(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="is damaged"):
        sweep(tmp_path, "take", counting := Campaign(), within=manifest_first)

    assert {HALVES: 1, LOST: 0, LEFTOVERS: 0} == counting.counts


def test_the_sweep_notices_leftovers(tmp_path: Path) -> None:
    with patch.object(names, "is_of_attempt", lambda *_: False), pytest.raises(AssertionError, match=r"safetensors"):
        sweep(tmp_path, "take", counting := Campaign())

    assert {HALVES: 0, LOST: 0, LEFTOVERS: 1} == counting.counts


# What is durable when


def durability_problems(changes: list[tuple[str, str]], place: Path) -> list[str]:
    """What is not on the disk, in the order in which it must be, according to the changes that were made."""
    commit = max(index for index, (name, path) in enumerate(changes) if name in {"link", "rename"} and path == f"{place}/snapshot.json")
    problems = []

    def need_sync(path: str, after: int, before: int, what: str) -> None:
        if not any(change == ("fsync", path) for change in changes[after + 1 : before]):
            problems.append(what)

    touched = {path for name, path in changes[:commit] if name in {"open", "pwrite", "posix_fallocate", "ftruncate"}}
    removed = {path for name, path in changes[:commit] if name == "unlink"}  # such as what was to share blocks and could not
    data_files = sorted(path for path in touched - removed if path.endswith(".safetensors"))
    for path in data_files:
        last = max(index for index, change in enumerate(changes) if change[1] == path and change[0] != "fsync")
        need_sync(path, last, commit, f"{path} is not flushed before the commit")
        need_sync(str(place), last, commit, f"the name of {path} is not flushed before the commit")
    for index, (name, path) in enumerate(changes[:commit]):
        if name == "mkdir":
            need_sync(str(Path(path).parent), index, commit, f"the folder {path} is not flushed before the commit")
        if name == "link" and path.endswith(".safetensors"):
            need_sync(str(Path(path).parent), index, commit, f"the name of {path} is not flushed before the commit")
    manifest = max(index for index, (name, path) in enumerate(changes[:commit]) if name == "pwrite" and path not in data_files)
    need_sync(changes[manifest][1], manifest, commit, "the manifest is not flushed before the commit")
    need_sync(str(place), commit, len(changes), "the commit is not flushed")
    assert data_files
    return problems


@contextmanager
def without_fsync(of: Callable[[str], bool]) -> Iterator[None]:
    """As on a system that does not flush what ``of`` says."""
    really = os.fsync

    def fsync(fd: int) -> None:
        if not of(str(Path(f"/proc/self/fd/{fd}").readlink())):
            really(fd)

    with patch.object(os, "fsync", fsync):
        yield


@pytest.mark.parametrize("action", ["take", "async", "overwrite", "copy", *INCREMENTAL])
@pytest.mark.parametrize("within", [nullcontext, without_unnamed_files, without_links])
def test_everything_is_flushed_before_the_commit_and_the_commit_after(tmp_path: Path, action: str, within: Within) -> None:
    prepare(tmp_path, action)

    def run() -> None:
        with within():
            act(tmp_path, action)

    assert [] == durability_problems(changes_of(run), tmp_path / PLACE)


UNFLUSHED: dict[str, Callable[[str], bool]] = {
    "model-00001": lambda path: "model-00001" in path,
    "the name of": lambda path: path.endswith(PLACE),
    "the folder": lambda path: not path.endswith(PLACE) and Path(path).is_dir(),
    "the manifest": lambda path: "#" in path,
}


@pytest.mark.parametrize("expected", UNFLUSHED)
def test_what_is_not_flushed_is_noticed(tmp_path: Path, expected: str) -> None:
    prepare(tmp_path, "take")

    def run() -> None:
        with without_fsync(UNFLUSHED[expected]):
            act(tmp_path, "take")

    problems = durability_problems(changes_of(run), tmp_path / PLACE)
    assert problems
    assert any(expected in problem for problem in problems)


# The same, by what the system sees

SYSTEM_CALLS = {
    "mkdir": "mkdir",
    "openat": "open",
    "pwrite64": "pwrite",
    "fallocate": "posix_fallocate",
    "ftruncate": "ftruncate",
    "fsync": "fsync",
    "linkat": "link",
    "unlinkat": "unlink",
    "renameat": "rename",
    "rmdir": "rmdir",
}


@NEEDS_STRACE
@pytest.mark.slow
@pytest.mark.parametrize("action", ["take", "async", "overwrite", "copy", "incremental"])
def test_the_system_sees_the_same_order(tmp_path: Path, action: str) -> None:
    prepare(tmp_path, action)
    log = tmp_path / "strace"
    trace = f"trace={','.join(SYSTEM_CALLS)}"
    assert under_strace(["-e", trace], lambda: act(tmp_path, action), log).result is None
    changes = [
        (SYSTEM_CALLS[name], "/".join(paths[-2:]) if name in {"linkat", "renameat", "unlinkat"} else paths[0])
        for _, name, paths in calls_in(log)
        if name != "openat"
    ]

    assert [] == durability_problems(changes, tmp_path / PLACE)


@NEEDS_STRACE
@pytest.mark.slow
@pytest.mark.campaign("All or nothing", "a process killed by strace on entering each system call that changes the disk")
@pytest.mark.parametrize("action", ["take", "async", "overwrite", "copy", "delete", *INCREMENTAL])
def test_killed_on_entering_a_system_call(tmp_path: Path, action: str, campaign: Campaign) -> None:
    prepare(tmp_path / "counted", action)
    log = tmp_path / "log"
    calls = changing_calls(lambda: act(tmp_path / "counted", action), log)
    seen = set()
    for call, number in campaign.some(calls, {"take": 14, "incremental": 6}.get(action, 4)):
        root = tmp_path / f"{call}-{number}"
        prepare(root, action)
        killed_on(call, number, functools.partial(act, root, action), log)
        with point(campaign):
            seen.add(check(root, action))
        shutil.rmtree(root)
        shutil.rmtree(root.with_name(f"{root.name}-2"))

    assert {BEFORE[action], AFTER[action]} >= seen
    assert {BEFORE[action], AFTER[action]} == seen or not campaign.is_long
