"""Async takes of several ranks that come before an earlier one has ended: the first rank decides, and all do the same."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.errors import InvalidArgumentError, RankFailedError, TakeCancelledError
from expstate.storage.registry import open_storage
from expstate.testing import FaultyStorage

from . import worlds


def state(rank: int) -> dict[str, Any]:
    return {"model": StateDict(weight=torch.full((3,), float(rank)))}


class Slow:
    """A take of all ranks whose writes wait on one of them until it is opened."""

    def __init__(self, path: Path, rank: int, slow_rank: int) -> None:
        self._open = threading.Event()
        # What the storage's URL is on one rank it must be on all: each has a storage of its own behind the same number.
        storage = FaultyStorage(open_storage(path))
        if rank == slow_rank:
            storage.run("write", None, function=lambda: self._open.wait(60))
        self._storage = storage
        self.pending = Snapshot.async_take(storage.url, state(rank))

    def open_after(self, seconds: float) -> None:
        threading.Timer(seconds, self._open.set).start()


@pytest.mark.parametrize("slow_rank", [0, 1])
def test_all_wait(tmp_path: Path, slow_rank: int) -> None:
    """Whichever rank the earlier take waits for."""

    def work(rank: int) -> Any:
        slow = Slow(tmp_path / "slow", rank, slow_rank)
        slow.open_after(0.3)
        pending = Snapshot.async_take(tmp_path / "next", state(rank))
        return slow.pending.done(), pending.wait().metadata.provenance.get("busy", {}).get("policy")

    assert [(True, "wait")] * 2 == worlds.results(2, work)


def test_all_skip(tmp_path: Path) -> None:
    """Those too on which the earlier take could have ended; and the next one is taken by all, and counts."""

    def work(rank: int) -> Any:
        slow = Slow(tmp_path / "slow", rank, 0)
        skipped = [Snapshot.async_take(tmp_path / "next", state(rank), on_busy="skip").skipped for _ in range(3)]
        slow.open_after(0)
        slow.pending.wait()
        torch.distributed.barrier()
        taken = Snapshot.async_take(tmp_path / "next", state(rank), on_busy="skip")
        return skipped, taken.wait().metadata.provenance["busy"]

    assert [([True] * 3, {"policy": "skip", "skipped": 3})] * 2 == worlds.results(2, work)


def test_a_rank_that_lags_behind_does_not_skip_alone(tmp_path: Path) -> None:
    """The first rank has ended the earlier take, another not yet: it waits for its own and takes with the others."""

    def work(rank: int) -> Any:
        first = Snapshot.async_take(tmp_path / "first", state(rank))
        if rank == 1:
            ended, end = threading.Event(), first._turn.end

            def end_later(error: BaseException | None = None) -> None:
                ended.wait(60)
                end(error)

            first._turn.end = end_later  # type: ignore[method-assign]
            threading.Timer(0.5, ended.set).start()
        else:
            first.wait()
        second = Snapshot.async_take(tmp_path / "second", state(rank), on_busy="skip")
        return second.skipped, second.exception()

    assert [(False, None)] * 2 == worlds.results(2, work)


@pytest.mark.parametrize("slow_rank", [0, 1])
def test_all_replace(tmp_path: Path, slow_rank: int) -> None:
    """The first rank cancels the earlier take, and that ends it on all."""

    def work(rank: int) -> Any:
        slow = Slow(tmp_path / "slow", rank, slow_rank)
        slow.open_after(0.3)
        snapshot = Snapshot.async_take(tmp_path / "next", state(rank), on_busy="replace").wait()
        error = slow.pending.exception()
        return isinstance(error, (TakeCancelledError, RankFailedError)), snapshot.metadata.provenance["busy"] == {
            "policy": "replace",
            "replaced": [slow.pending.id],
        }

    assert [(True, True)] * 2 == worlds.results(2, work)
    assert not (tmp_path / "slow" / "snapshot.json").exists()


def test_ranks_that_differ_are_refused(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        return Snapshot.async_take(tmp_path / "one", state(rank), on_busy="wait" if rank else "replace")

    first, second = worlds.errors(2, work)

    assert isinstance(first, RankFailedError)
    assert isinstance(second, InvalidArgumentError)
    assert "on_busy is 'replace' on rank 0, and 'wait' on rank 1" in str(second)
    assert not (tmp_path / "one" / "snapshot.json").exists()
