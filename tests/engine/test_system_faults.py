"""Errors and lies of the system, told by the system: calls that strace makes fail, or makes say that they did what they did not."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from expstate import Snapshot
from expstate.errors import RestoreInterruptedError

from .crashes import AFTER, BEFORE, EARLIER, PLACE, act, assert_failed_cleanly, check, error_of, found_at, prepare, state
from .processes import NEEDS_STRACE, under_strace

pytestmark = [NEEDS_STRACE, pytest.mark.slow]


def attempted(root: Path, action: str) -> str | None:
    """The error of an action, in the process that lives on."""
    error = error_of(act, root, action)
    if error is None:
        return None
    assert_failed_cleanly(root, action)
    return f"{type(error).__name__} {error.errno}"


@pytest.mark.parametrize("action", ["take", "copy"])
@pytest.mark.parametrize("call", ["pwrite64", "fallocate", "ftruncate", "fsync"])
def test_the_system_says_that_the_disk_is_broken(tmp_path: Path, action: str, call: str) -> None:
    errors = set()
    for number in (1, 2, 3):
        root = tmp_path / str(number)
        prepare(root, action)
        inject = ["-e", f"trace={call}", "-e", f"inject={call}:error=EIO:when={number}"]
        ended = under_strace(inject, lambda root=root: attempted(root, action), tmp_path / "log")
        errors.add(ended.result)
        check(root, action)

    assert f"StorageError {errno.EIO}" in errors
    assert {f"StorageError {errno.EIO}", None} >= errors


@pytest.mark.parametrize("action", ["take", "async", "overwrite"])
def test_the_system_says_that_it_wrote_and_did_not(tmp_path: Path, action: str) -> None:
    """Each write in turn: of the lease, of headers, of tensors, of the manifest."""
    errors = []
    for number in range(1, 20):
        root = tmp_path / str(number)
        prepare(root, action)
        inject = ["-e", "trace=pwrite64", "-e", f"inject=pwrite64:retval=4096:when={number}"]
        errors.append(under_strace(inject, lambda root=root: attempted(root, action), tmp_path / "log").result)
        if errors[-1] is None:
            break
        assert BEFORE[action] == check(root, action)

    assert len(errors) >= 4
    assert {"SnapshotWriteError None"} == set(errors[:-1])
    assert AFTER[action] == found_at(root / PLACE)


def test_the_system_says_that_it_wrote_a_copy_and_did_not(tmp_path: Path) -> None:
    prepare(tmp_path, "copy")
    files = [record.name for record in Snapshot(tmp_path / EARLIER).manifest.files]
    for name in files:
        for number in (1, 2):
            inject = ["-e", "trace=pwrite64", "-P", str(tmp_path / PLACE / name), "-e", f"inject=pwrite64:retval=4096:when={number}"]
            ended = under_strace(inject, lambda: attempted(tmp_path, "copy"), tmp_path / "log")
            assert "SnapshotWriteError None" == ended.result

    act(tmp_path, "copy")
    assert 2 == len(files)
    assert 1 == check(tmp_path, "copy")


def test_the_system_says_that_the_disk_cannot_be_read(tmp_path: Path) -> None:
    prepare(tmp_path, "take")

    def read() -> tuple[str, bool, bool]:
        live = state(7)
        with pytest.raises(RestoreInterruptedError) as caught:
            Snapshot(tmp_path / EARLIER).restore({"other": live["other"]})
        report = Snapshot(tmp_path / EARLIER).verify()
        return str(caught.value.__cause__), report.ok, all("Input/output error" in damage.reason for damage in report.damages)

    file = tmp_path / EARLIER / Snapshot(tmp_path / EARLIER).manifest.files[1].name
    inject = ["-e", "trace=preadv,preadv2,pread64,read", "-P", str(file), "-e", "inject=preadv,preadv2,pread64,read:error=EIO"]
    cause, ok, named = under_strace(inject, read, tmp_path / "log").result

    assert "Input/output error" in cause
    assert str(file) in cause
    assert not ok
    assert named
    assert Snapshot(tmp_path / EARLIER).verify().ok
