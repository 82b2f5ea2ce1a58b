"""When one rank fails, all raise, naming it and what has happened to it; nothing is committed, and nothing of the take stays."""

from __future__ import annotations

import _thread
import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from expstate import Snapshot, StateDict
from expstate.engine import attempt as attempts
from expstate.engine import ranks as engine_ranks
from expstate.errors import (
    InvalidArgumentError,
    RankFailedError,
    RankTimeoutError,
    SnapshotExistsError,
    StorageError,
    TakeCancelledError,
    UnsupportedValueError,
)
from expstate.storage.local import LocalStorage
from expstate.testing.faulty import FaultyStorage
from tests.ranks import worlds

LARGE = 400_000  # elements: more than a block


def _state(rank: int) -> dict[str, Any]:
    return {"s": StateDict(shared=torch.arange(LARGE), own=torch.full((LARGE,), rank), value=rank)}


def _take(folder: Path, rank: int, **options: Any) -> Any:
    return Snapshot.take(folder, _state(rank), replicated=["s/shared"], **options)


def _async_take(folder: Path, rank: int, **options: Any) -> Any:
    return Snapshot.async_take(folder, _state(rank), replicated=["s/shared"], **options).wait()


TAKES: dict[str, Callable[..., Any]] = {"take": _take, "async": _async_take}
takes = pytest.mark.parametrize("take", TAKES.values(), ids=TAKES)


def _check(folder: Path, found: list[BaseException], failed: int, kind: type[BaseException], match: str | None = None) -> None:
    """The rank that has failed raises its own error, every other one that it has."""
    for rank, error in enumerate(found):
        if rank == failed:
            with pytest.raises(kind, match=match):
                raise error
        else:
            with pytest.raises(RankFailedError, match=rf"^rank {failed} failed: {kind.__name__}{'$' if match is None else ': .*' + match}"):
                raise error
            assert isinstance(error, RankFailedError)
            assert failed == error.rank
    assert not folder.exists(), os.listdir(folder)


def _goes_on(folder: Path, work: Callable[[int], Any], size: int = 3) -> list[BaseException]:
    """The errors of each rank; after them the same ranks take again, and that succeeds."""

    def both(rank: int) -> Any:
        try:
            work(rank)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - told
            dist.barrier()
            Snapshot.take(folder.parent / "again", {"s": StateDict(x=rank)})
            assert Snapshot(folder.parent / "again").read_object("s/x") == rank
            return error
        return None

    found: list[BaseException] = worlds.results(size, both)
    return found


# What is given differs


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            lambda rank: {"path": f"other-{rank // 2}"},
            r"all ranks must take the same: path is .*other-0' on rank 0, and .*other-1' on rank 2",
        ),
        (lambda rank: {"keys": ["a", "b"] if rank else ["a"]}, r"keys of the app state is \['a'\] on rank 0, and \['a', 'b'\] on rank 1"),
        (
            lambda rank: {"keys": ["a", "b"] if rank != 2 else ["b", "a"]},
            r"keys of the app state is \['a', 'b'\] .* \['b', 'a'\] on rank 2",
        ),
        (lambda rank: {"replicated": ["a/**"] if rank == 1 else []}, r"replicated globs is \[\] on rank 0, and \['a/\*\*'\] on rank 1"),
        (lambda rank: {"overwrite": rank == 2}, r"overwrite is False on rank 0, and True on rank 2"),
        (lambda rank: {"check_replicated": rank != 1}, r"check_replicated is True on rank 0, and False on rank 1"),
    ],
    ids=["path", "keys", "order-of-keys", "globs", "overwrite", "check"],
)
def test_what_is_given_must_be_the_same(tmp_path, options, match):
    def work(rank):
        given = options(rank)
        path = tmp_path / given.pop("path", "a")
        Snapshot.take(path, {key: StateDict(x=1) for key in given.pop("keys", ["a"])}, **given)

    found = _goes_on(tmp_path / "a", work)
    _check(tmp_path / "a", found, 0, InvalidArgumentError, match)
    assert ["again"] == os.listdir(tmp_path)


@takes
def test_an_argument_that_is_wrong_on_one_rank(tmp_path, take):
    found = _goes_on(tmp_path / "a", lambda rank: take(tmp_path / "a", rank, tags=["a b\n"] if rank == 1 else ()))
    assert isinstance(found[1], ValueError)
    assert all("rank 1 failed: Invalid" in str(error) for error in (found[0], found[2]))
    assert not (tmp_path / "a").exists()


# A stateful


class _Broken:
    def __init__(self, error: BaseException) -> None:
        self._error = error

    def state_dict(self) -> dict[str, Any]:
        raise self._error

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise AssertionError


@pytest.mark.parametrize("failed", [0, 1])
@pytest.mark.parametrize("error", [ZeroDivisionError("divided"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("verb", ["take", "async_take"])
def test_a_stateful_that_raises(tmp_path, verb, failed, error):
    def work(rank):
        taken = getattr(Snapshot, verb)(tmp_path / "a", {"s": _Broken(error) if rank == failed else StateDict(x=rank)})
        taken.wait()

    found = _goes_on(tmp_path / "a", work)
    _check(tmp_path / "a", found, failed, type(error), str(error) or None)


def test_a_value_that_cannot_be_stored(tmp_path):
    def work(rank):
        Snapshot.take(tmp_path / "a", {"s": StateDict(x=torch.empty(2, device="meta") if rank == 2 else torch.empty(2))})

    _check(tmp_path / "a", _goes_on(tmp_path / "a", work), 2, UnsupportedValueError, "entry 's/x' is on the meta device")


# The storage


@pytest.mark.parametrize("failed", [0, 1, 2])
@pytest.mark.parametrize("operation", ["create_file", "write", "finish"])
@takes
def test_a_storage_that_fails_on_one_rank(tmp_path, monkeypatch, take, failed, operation):
    monkeypatch.setattr("expstate.storage.registry.open_storage", _faulty(failed, operation))
    found = _goes_on(tmp_path / "a", lambda rank: take(tmp_path / "a", rank))
    _check(tmp_path / "a", found, failed, StorageError, f"broken at {operation}")


def _faulty(failed: int, operation: str, **more: Any) -> Callable[..., Any]:
    """Opens folders whose storage fails on one rank, but for the second take."""
    held: list[FaultyStorage] = []

    def opened(path: Any, options: Any = None) -> Any:
        storage = LocalStorage(os.fspath(path))
        if not (dist.is_initialized() and dist.get_rank() == failed) or Path(path).name == "again":
            return storage
        faulty = FaultyStorage(storage)
        faulty.url = storage.url
        faulty.fail(operation, error=StorageError(f"broken at {operation}"), **more)
        held.append(faulty)
        return faulty

    return opened


@pytest.mark.parametrize("done", [False, True], ids=["not-done", "reply-lost"])
@takes
def test_a_commit_that_fails(tmp_path, monkeypatch, take, done):
    """Where only the reply was lost, the snapshot is there, with the files of all ranks."""
    monkeypatch.setattr("expstate.storage.registry.open_storage", _faulty(0, "create", names="snapshot.json", done=done))
    ended = worlds.run(3, lambda rank: bool(take(tmp_path / "a", rank)))
    assert isinstance(ended[0].error, StorageError)
    assert all("rank 0 failed: StorageError: broken at create" in str(one.error) for one in ended[1:])
    if done:
        assert Snapshot(tmp_path / "a").verify().ok
        assert 2 == Snapshot(tmp_path / "a").read_object("s/own", rank=2)[0]
    else:
        assert not (tmp_path / "a").exists()


def test_a_snapshot_that_is_there_already(tmp_path):
    Snapshot.take(tmp_path / "a", {"s": StateDict(x=1)})
    found = worlds.errors(2, lambda rank: _take(tmp_path / "a", rank))
    assert isinstance(found[0], SnapshotExistsError)
    assert "rank 0 failed: SnapshotExistsError: a snapshot is already at" in str(found[1])
    assert 1 == Snapshot(tmp_path / "a").read_object("s/x")


# Interrupts and cancelling


def _at_window(rank: int, failed: int, function: Callable[[], object]) -> contextlib.AbstractContextManager[Any]:
    """Call a function on one rank when it begins to write."""
    really = LocalStorage.create_file

    def create_file(self: LocalStorage, name: str, size: int) -> Any:
        if rank == failed:
            function()
        return really(self, name, size)

    patch = pytest.MonkeyPatch()
    patch.setattr(LocalStorage, "create_file", create_file)

    @contextlib.contextmanager
    def patched() -> Any:
        try:
            yield
        finally:
            patch.undo()

    return patched()


@pytest.mark.parametrize("failed", [0, 1])
def test_ctrl_c_while_it_writes(tmp_path, failed):
    def interrupt() -> None:
        _thread.interrupt_main()
        time.sleep(0.2)

    def work(rank):
        with _at_window(rank, failed, interrupt):
            _take(tmp_path / "a", rank)

    _check(tmp_path / "a", _goes_on(tmp_path / "a", work), failed, KeyboardInterrupt)


@pytest.mark.parametrize("failed", [0, 1])
def test_ctrl_c_while_it_waits_for_others(tmp_path, failed):
    def interrupt_soon() -> None:
        threading.Timer(0.3, _thread.interrupt_main).start()

    def work(rank):
        if rank == failed:
            interrupt_soon()
        with _at_window(rank, 2, lambda: time.sleep(1)):
            _take(tmp_path / "a", rank)

    _check(tmp_path / "a", _goes_on(tmp_path / "a", work), failed, KeyboardInterrupt)


@pytest.mark.parametrize("failed", [0, 1])
@pytest.mark.parametrize("slow", [0, 1, 2])
def test_cancel_on_one_rank_ends_it_on_all(tmp_path, failed, slow):
    """Whether that rank still writes, or waits for others."""

    def work(rank):
        with _at_window(rank, slow, lambda: time.sleep(1.5)):
            pending = Snapshot.async_take(tmp_path / "a", _state(rank), replicated=["s/shared"])
            time.sleep(0.2)
            if rank == failed:
                assert pending.cancel()
            pending.wait()

    _check(tmp_path / "a", _goes_on(tmp_path / "a", work), failed, TakeCancelledError, "cancelled")


def test_cancel_after_the_commit_changes_nothing(tmp_path):
    def work(rank):
        pending = Snapshot.async_take(tmp_path / "a", _state(rank), replicated=["s/shared"])
        pending.wait()
        return pending.cancel()

    assert [False, False] == worlds.results(2, work)
    assert Snapshot(tmp_path / "a").verify().ok


@pytest.mark.parametrize("failed", [1, 2])
def test_a_failure_after_the_first_rank_has_decided_changes_nothing(tmp_path, failed):
    """A rank that is interrupted while the first one commits raises, the others get the snapshot."""

    def work(rank):
        really = attempts.Attempt.commit

        def commit(self: Any, data: bytes, sizes: dict[str, int]) -> None:
            time.sleep(1)
            really(self, data, sizes)

        attempts.Attempt.commit = commit
        if rank == failed:
            with _interrupted_at_the_decision(), pytest.raises(KeyboardInterrupt):
                _take(tmp_path / "a", rank)
            return None
        return Snapshot(_take(tmp_path / "a", rank).path).read_object("s/own")[0].item()

    expected = [0, 1, 2]
    expected[failed] = None
    assert expected == worlds.results(3, work)
    assert Snapshot(tmp_path / "a").verify().ok


@contextlib.contextmanager
def _interrupted_at_the_decision() -> Any:
    """Raise KeyboardInterrupt in a rank that waits, once the first rank has decided to commit."""
    really = engine_ranks._Group._look_for_failure

    def look(self: Any) -> None:
        if threading.current_thread() is threading.main_thread() and self._store.check([f"{self._prefix}decision"]):
            raise KeyboardInterrupt
        really(self)

    patch = pytest.MonkeyPatch()
    patch.setattr(engine_ranks._Group, "_look_for_failure", look)
    try:
        yield
    finally:
        patch.undo()


# Time


@pytest.mark.parametrize("missing", [0, 1])
def test_a_take_that_a_rank_does_not_come_to(tmp_path, missing):
    def work(rank):
        if rank == missing:
            time.sleep(6)
            return
        _take(tmp_path / "a", rank, timeout=1)

    ended = worlds.run(3, work)
    for rank, one in enumerate(ended):
        if rank != missing:
            with pytest.raises(RankTimeoutError, match=f"rank {missing} does not go on: for 1 s it has not come to this operation"):
                raise one.error
            assert missing == one.error.rank
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("hung", [0, 1])
@takes
def test_a_rank_that_stands_still(tmp_path, take, hung):
    def work(rank):
        with _at_window(rank, hung, lambda: time.sleep(6)):
            take(tmp_path / "a", rank, timeout=1)

    found = worlds.errors(3, work)
    for error in found:
        with pytest.raises(RankTimeoutError, match=f"rank {hung} does not go on: for 1 s it has done nothing"):
            raise error
    assert not (tmp_path / "a").exists()


def test_a_rank_that_is_slow_and_goes_on_is_waited_for(tmp_path):
    """Longer than the timeout, which counts from the last sign of progress."""

    def work(rank):
        class Slow:
            def state_dict(self) -> dict[str, Any]:
                time.sleep(1.7 if rank == 1 else 0)
                return {"x": torch.full((10,), rank)}

            def load_state_dict(self, state_dict: dict[str, Any]) -> None:
                raise AssertionError

        with _at_window(rank, 1, lambda: time.sleep(1.7)):
            return Snapshot.take(tmp_path / "a", {"s": Slow()}, timeout=1).read_object("s/x", rank=1)[0].item()

    assert [1, 1] == worlds.results(2, work)


@pytest.mark.parametrize("timeout", [0, -1, "10"])
def test_a_timeout_that_cannot_be(tmp_path, timeout):
    for error in worlds.errors(2, lambda rank: _take(tmp_path / "a", rank, timeout=timeout)):
        with pytest.raises(InvalidArgumentError, match="timeout must be a positive number of seconds"):
            raise error
