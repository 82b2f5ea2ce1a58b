"""A take that the system lets down raises an error that says so, leaves nothing, and harms nothing that was there."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.errors import (
    AppStateError,
    InvalidMetadataError,
    NoSpaceError,
    RestoreInterruptedError,
    SnapshotWriteError,
    StorageError,
    StoragePermissionError,
)
from expstate.storage.local import LocalStorage
from expstate.testing import FaultyStorage
from tests.campaign import Campaign

from .crashes import (
    AFTER,
    BEFORE,
    EARLIER,
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
from .processes import Changes, changes_of, in_child, unmount, watched

ACTIONS = ["take", "async", "overwrite", "copy"]


# Errors of the system, one at each change that is made to the disk


def failing_at(number: int, code: int, root: Path, action: str) -> str | None:
    """The error raised by an action whose change of this number fails; the process lives on and looks at what remains."""

    def strike(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with watched(Changes(number, strike)) as changes:
        error = error_of(act, root, action)
    assert [] == threads_left()
    if error is None:
        return None
    assert isinstance(error, StorageError if code == errno.EIO else NoSpaceError)
    assert code == error.errno
    if changes.log[number - 1][0] not in {"unlink", "rmdir"} and found_at(root / PLACE) == BEFORE[action] and action != "delete":
        assert_failed_cleanly(root, action)
    return type(error).__name__


@pytest.mark.campaign("All or nothing", "an error at each change of the disk: EIO, ENOSPC, EDQUOT")
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("action", [*ACTIONS, "delete", "incremental", "incremental overwrite"])
def test_any_change_may_fail(tmp_path: Path, action: str, code: int, campaign: Campaign) -> None:
    prepare(tmp_path / "counted", action)
    count = len(changes_of(lambda: act(tmp_path / "counted", action)))
    outcomes = set()
    if code == errno.EDQUOT:
        campaign.note("quotas are played, not set")
    for number in campaign.some(range(1, count + 1), short={errno.EIO: 8, errno.ENOSPC: 4}.get(code, 2)):
        root = tmp_path / str(number)
        prepare(root, action)
        raised = in_child(lambda number=number, root=root: failing_at(number, code, root, action)).result
        with point(campaign):
            seen = check(root, action)
        outcomes.add((raised is not None, seen))

    # What fails after the commit is left to gc, and is no error, unless the commit may not be durable.
    assert (True, BEFORE[action]) in outcomes
    assert (False, BEFORE[action]) not in outcomes
    assert AFTER[action] in {seen for _, seen in outcomes}


# A disk that is full


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system in memory with these options, and gives its folder."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    mounts = 0

    def mount(options: str) -> Path:
        nonlocal mounts
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True, text=True, check=False)  # noqa: S607
        if done.returncode:
            pytest.skip(f"cannot mount here: {done.stderr.strip()}")
        mounts += 1
        return folder

    yield mount
    for _ in range(mounts):
        unmount(folder)


@pytest.mark.root
@pytest.mark.campaign("All or nothing", "a full disk: room for a page more, or a file more, each time")
@pytest.mark.parametrize("action", [*ACTIONS, "incremental"])
def test_no_room_for_the_bytes(mounted: Callable[[str], Path], action: str, campaign: Campaign) -> None:
    root = mounted("size=4m")
    prepare(root, action)
    filling = root / "filling"
    free = os.statvfs(root)
    filling.write_bytes(bytes(free.f_bavail * free.f_frsize))
    failed = 0
    for pages in range(0, 100, campaign.choose(3, 1)):
        os.truncate(filling, free.f_bavail * free.f_frsize - pages * 4096)
        error = error_of(act, root, action)
        if error is None:
            break
        assert isinstance(error, NoSpaceError)
        assert str(root) in str(error)
        with point(campaign):
            assert_failed_cleanly(root, action)
        failed += 1

    assert failed >= 3
    assert AFTER[action] == found_at(root / PLACE)


@pytest.mark.root
@pytest.mark.campaign("All or nothing", "a full disk: room for a page more, or a file more, each time")
@pytest.mark.parametrize("action", [*ACTIONS, "incremental"])
def test_no_room_for_another_file(mounted: Callable[[str], Path], action: str, campaign: Campaign) -> None:
    root = mounted("size=16m,nr_inodes=40")
    prepare(root, action)
    count = 0
    while os.statvfs(root).f_favail > 0:
        (root / f"filling-{count}").write_bytes(b"")
        count += 1
    failed = 0
    # With room for one file more each time, until there is enough.
    for number in range(count):
        try:
            act(root, action)
        except NoSpaceError:
            failed += 1
            with point(campaign):
                assert_failed_cleanly(root, action)
        else:
            break
        (root / f"filling-{number}").unlink()

    assert failed >= 3
    assert AFTER[action] == found_at(root / PLACE)


@pytest.mark.root
@pytest.mark.campaign("All or nothing", "a disk that is read-only, from the beginning or from some moment on")
@pytest.mark.parametrize("action", [*ACTIONS, "incremental"])
def test_a_disk_that_is_mounted_for_reading(mounted: Callable[[str], Path], action: str, campaign: Campaign) -> None:
    root = mounted("size=4m")
    prepare(root, action)
    subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)  # noqa: S607
    with pytest.raises(StoragePermissionError, match="Read-only"):
        act(root, action)
    with point(campaign):
        assert_failed_cleanly(root, action)


# Limits of the process


@pytest.mark.campaign("All or nothing", "limits of the process: sizes of files, open files, memory")
@pytest.mark.parametrize("action", [*ACTIONS, "incremental"])
def test_files_may_not_become_large(tmp_path: Path, action: str, campaign: Campaign) -> None:
    prepare(tmp_path, action)
    most = max(path.stat().st_size for path in (tmp_path / EARLIER).iterdir())

    def limited(nbytes: int) -> tuple[str, int | None]:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
        with pytest.raises(StorageError) as caught:
            act(tmp_path, action)
        assert_failed_cleanly(tmp_path, action)
        return type(caught.value).__name__, caught.value.errno

    for nbytes in campaign.some([4096 * pages for pages in range(2, most // 4096)] if action == "copy" else [0, 4096, 8192], short=1):
        with point(campaign):
            assert ("StorageError", errno.EFBIG) == in_child(lambda nbytes=nbytes: limited(nbytes)).result


@pytest.mark.campaign("All or nothing", "limits of the process: sizes of files, open files, memory")
@pytest.mark.parametrize("action", [*ACTIONS, "incremental", "restore"])
def test_no_more_files_may_be_open(tmp_path: Path, action: str, campaign: Campaign) -> None:
    prepare(tmp_path, action)

    def limited() -> int:
        """How often it failed, with one more file allowed each time."""
        filling = [os.open("/dev/null", os.O_RDONLY) for _ in range(64)]
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        soft = filling[-1] + 1
        for failed in range(len(filling)):
            live = state(7)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            error = error_of(Snapshot(tmp_path / EARLIER).restore, live) if action == "restore" else error_of(act, tmp_path, action)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            if error is None:
                return failed
            assert (StorageError, errno.EMFILE) == (type(error), error.errno)
            assert action == "restore" or not assert_failed_cleanly(tmp_path, action)
            assert torch.equal(live["model"]["weight"], state(7)["model"]["weight"])
            os.close(filling.pop())
        return -1

    with point(campaign):
        failed = in_child(limited).result
    campaign.tried(failed)
    assert failed >= 2
    assert (1 if action == "restore" else AFTER[action]) == found_at(tmp_path / (EARLIER if action == "restore" else PLACE))


# Permissions


class Watched(StateDict):
    """Tells whether anybody has looked at it."""

    asked = 0

    def state_dict(self) -> dict[str, Any]:
        self.asked += 1
        return super().state_dict()


@pytest.mark.root
@pytest.mark.parametrize("action", [*ACTIONS, "delete"])
def test_a_folder_of_someone_else(tmp_path: Path, action: str) -> None:
    """It is refused before the state is looked at."""
    prepare(tmp_path, action)
    (tmp_path / PLACE).mkdir(exist_ok=True)
    for folder in (tmp_path, *tmp_path.parents):
        folder.chmod(folder.stat().st_mode | 0o055)
    (tmp_path / PLACE).chmod(0o555)

    def as_nobody() -> int:
        os.setgid(65534)
        os.setuid(65534)
        with pytest.raises(StoragePermissionError):
            act(tmp_path, action)
        watched_state = Watched(weight=torch.ones(3))
        with pytest.raises(StoragePermissionError):
            Snapshot.take(tmp_path / PLACE, {"state": watched_state}, overwrite=True)
        return watched_state.asked

    assert 0 == in_child(as_nobody).result
    (tmp_path / PLACE).chmod(0o755)
    assert_failed_cleanly(tmp_path, action)


@pytest.mark.root
@pytest.mark.parametrize("action", [*ACTIONS, "delete"])
def test_a_folder_that_may_not_change(tmp_path: Path, action: str) -> None:
    if shutil.which("chattr") is None:
        pytest.skip("there is no chattr here")
    prepare(tmp_path, action)
    (tmp_path / PLACE).mkdir(exist_ok=True)
    done = subprocess.run(["chattr", "+i", str(tmp_path / PLACE)], capture_output=True, text=True, check=False)  # noqa: S607
    if done.returncode:
        pytest.skip(f"chattr does not work here: {done.stderr.strip()}")
    try:
        with pytest.raises(StoragePermissionError):
            act(tmp_path, action)
    finally:
        subprocess.run(["chattr", "-i", str(tmp_path / PLACE)], check=True)  # noqa: S607
    assert_failed_cleanly(tmp_path, action)


# Writes that did not happen, though the storage says so


def test_a_write_that_was_lost_is_noticed_before_the_commit(tmp_path: Path) -> None:
    for number in range(1, 5):
        storage = FaultyStorage(LocalStorage(str(tmp_path)))
        storage.lose("write", number)
        with pytest.raises(SnapshotWriteError, match="lost a write"):
            Snapshot.take(storage.url, state(1))
        assert [] == list(tmp_path.iterdir())


def test_without_looking_back_a_lost_write_goes_unnoticed(tmp_path: Path) -> None:
    storage = FaultyStorage(LocalStorage(str(tmp_path)))
    storage.lose("write", 2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("expstate.engine.write.FilesWriter._read_back", lambda *_: None)
        snapshot = Snapshot.take(storage.url, state(1))

    assert not snapshot.verify().ok


# Faults of what is taken


class Broken(StateDict):
    """Cannot say what its state is."""

    def state_dict(self) -> dict[str, Any]:
        msg = "no state today"
        raise LookupError(msg)


@pytest.mark.parametrize("take", [Snapshot.take, Snapshot.async_take])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exception_of_a_stateful_is_raised_as_it_is(tmp_path: Path, take: Callable[..., Any], overwrite: bool) -> None:
    action = "overwrite" if overwrite else "take"
    prepare(tmp_path, action)
    with pytest.raises(LookupError, match="no state today"):
        take(tmp_path / PLACE, {**state(3), "broken": Broken()}, overwrite=overwrite)

    assert_failed_cleanly(tmp_path, action)
    assert overwrite == (tmp_path / PLACE).exists()


@pytest.mark.parametrize("take", [Snapshot.take, Snapshot.async_take])
def test_an_exception_of_the_progress_function_ends_the_take(tmp_path: Path, take: Callable[..., Any]) -> None:
    def progress(_: object) -> None:
        msg = "stop it"
        raise LookupError(msg)

    prepare(tmp_path, "take")
    with pytest.raises(LookupError, match="stop it"):
        take(tmp_path / PLACE, state(3), progress=progress).wait()

    assert_failed_cleanly(tmp_path, "take")


# Faults of reading


def test_a_disk_that_fails_while_it_is_read(tmp_path: Path) -> None:
    prepare(tmp_path, "take")
    storage = FaultyStorage(LocalStorage(str(tmp_path / EARLIER)))
    storage.fail("read_into", 2, error=StorageError("the disk is broken", errno.EIO))
    live = state(7)
    with pytest.raises(RestoreInterruptedError, match="the disk is broken") as caught:
        Snapshot(storage.url).restore(live)

    everything = {"model/weight", "model/bias", "model/name", "other/table", "frozen/numbers"}
    assert everything == {*caught.value.applied, *caught.value.unapplied} - {"model", "other", "frozen"}
    assert caught.value.unapplied
    for path in caught.value.applied:
        key, _, name = path.partition("/")
        assert torch.equal(state(1)[key][name], live[key][name])
    Snapshot(storage.url).restore(live)
    assert torch.equal(state(1)["model"]["weight"], live["model"]["weight"])


def test_verify_names_what_a_broken_disk_does_not_give(tmp_path: Path) -> None:
    prepare(tmp_path, "take")
    storage = FaultyStorage(LocalStorage(str(tmp_path / EARLIER)))
    storage.fail("read_into", None, error=StorageError("the disk is broken", errno.EIO), names="other-*")
    report = Snapshot(storage.url).verify()

    assert not report.ok
    assert {"", "other/table"} == {damage.entry for damage in report.damages}
    assert all("the disk is broken" in damage.reason for damage in report.damages)


def test_what_went_wrong_once_on_the_way_is_read_again(tmp_path: Path) -> None:
    prepare(tmp_path, "take")
    storage = FaultyStorage(LocalStorage(str(tmp_path / EARLIER)))
    for names in ("model-*", "other-*"):
        storage.flip("read_into", 1, byte=100, names=names)
    live = state(7)
    Snapshot(storage.url).restore(live)

    assert torch.equal(state(1)["model"]["weight"], live["model"]["weight"])


@pytest.mark.parametrize("take", [Snapshot.take, Snapshot.async_take])
def test_text_that_cannot_be_written_is_refused(tmp_path: Path, take: Callable[..., Any]) -> None:
    prepare(tmp_path, "take")
    with pytest.raises(AppStateError, match="surrogates"):
        take(tmp_path / PLACE, {"model\ud800": StateDict(step=1)})
    with pytest.raises(InvalidMetadataError, match="surrogates"):
        take(tmp_path / PLACE, state(3), replicated=["model/\ud800"]).wait()

    assert_failed_cleanly(tmp_path, "take")
