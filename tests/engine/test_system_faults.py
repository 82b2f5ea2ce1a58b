"""Errors and lies of the system, told by the system: calls that strace makes fail, or makes say that they did what they did not."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from expstate import Snapshot
from expstate.errors import RestoreInterruptedError
from tests.campaign import Campaign

from .crashes import (
    AFTER,
    BEFORE,
    EARLIER,
    INCREMENTAL,
    PLACE,
    act,
    assert_failed_cleanly,
    check,
    error_of,
    found_at,
    point,
    prepare,
    state,
    threads_left,
)
from .processes import NEEDS_STRACE, changing_calls, under_strace

pytestmark = [NEEDS_STRACE, pytest.mark.slow]


def attempted(root: Path, action: str) -> str | None:
    """The error of an action, in the process that lives on."""
    error = error_of(act, root, action)
    if error is None:
        return None
    assert_failed_cleanly(root, action)
    return f"{type(error).__name__} {error.errno}"


@pytest.mark.campaign("All or nothing", "EIO from each system call that changes the disk, by strace")
@pytest.mark.parametrize("action", ["take", "async", "overwrite", "copy", "delete", *INCREMENTAL])
def test_the_system_says_that_the_disk_is_broken(tmp_path: Path, action: str, campaign: Campaign) -> None:
    """What is only clean-up may fail without an error: ``gc`` does it."""
    prepare(tmp_path / "counted", action)
    log = tmp_path / "log"
    calls = changing_calls(lambda: act(tmp_path / "counted", action), log)
    errors = set()
    for call, number in campaign.some(calls, short=10 if action in {"take", "incremental"} else 3):
        root = tmp_path / f"{call}-{number}"
        prepare(root, action)
        inject = ["-e", f"trace={call}", "-e", f"inject={call}:error=EIO:when={number}"]
        errors.add(under_strace(inject, lambda root=root: error_and_aftermath(root, action), log).result)
        with point(campaign):
            check(root, action)

    assert {f"StorageError {errno.EIO}", None} >= errors
    assert f"StorageError {errno.EIO}" in errors or not campaign.is_long


def error_and_aftermath(root: Path, action: str) -> str | None:
    """The error of an action; whatever it is, what is there is the old or the new, and no thread goes on."""
    error = error_of(act, root, action)
    assert [] == threads_left()
    seen = found_at(root / PLACE)
    assert seen in {BEFORE[action], AFTER[action]}
    assert error is not None or seen == AFTER[action]
    return None if error is None else f"{type(error).__name__} {error.errno}"


@pytest.mark.campaign("All or nothing", "writes of which the system says that they were done and were not, by strace")
@pytest.mark.parametrize("action", ["take", "async", "overwrite", "incremental"])
def test_the_system_says_that_it_wrote_and_did_not(tmp_path: Path, action: str, campaign: Campaign) -> None:
    """Each write in turn: of the lease, of headers, of tensors, of the manifest."""
    errors = []
    for number in range(1, 20):
        root = tmp_path / str(number)
        prepare(root, action)
        inject = ["-e", "trace=pwrite64", "-e", f"inject=pwrite64:retval=4096:when={number}"]
        errors.append(under_strace(inject, lambda root=root: attempted(root, action), tmp_path / "log").result)
        if errors[-1] is None:
            break
        with point(campaign):
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
    assert 3 == len(files)
    assert 1 == check(tmp_path, "copy")


@pytest.mark.campaign("Verified", "EIO from each read of a restore, by strace")
@pytest.mark.parametrize("call", ["preadv,preadv2,pread64,read", "openat"])
def test_a_disk_that_breaks_while_it_is_read(tmp_path: Path, call: str, campaign: Campaign) -> None:
    """The error names what failed; what was not read yet is as it was."""
    prepare(tmp_path, "take")
    files = [tmp_path / EARLIER / record.name for record in Snapshot(tmp_path / EARLIER).manifest.files]

    def restore() -> tuple[str | None, bool]:
        live = state(7)
        error = error_of(Snapshot(tmp_path / EARLIER).restore, live)
        values = {
            float(tensor.reshape(-1)[-1])
            for tensor in (live["model"]["weight"], live["other"]["table"])
            if torch.isfinite(tensor.float()).all()
        }
        assert {1.0, 7.0} >= values
        return (None if error is None else f"{error} {error.__cause__}"), {1.0} == values

    for file in [*files, tmp_path / EARLIER / "snapshot.json"]:
        for number in campaign.some(range(1, 8), short=2):
            inject = ["-e", f"trace={call}", "-P", str(file), "-e", f"inject={call}:error=EIO:when={number}"]
            error, restored = under_strace(inject, restore, tmp_path / "log").result
            assert restored or error is not None
            assert error is None or ("Input/output error" in error and str(file.parent) in error)
            campaign.tried()
    assert Snapshot(tmp_path / EARLIER).verify().ok


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
