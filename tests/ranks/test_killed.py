"""Ranks that are killed or stopped in the middle of a take: the others soon notice and name them, and no half snapshot appears."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Snapshot, StateDict, gc
from expstate.engine import attempt as attempts
from expstate.engine import ranks as engine_ranks
from expstate.errors import RankFailedError, RankTimeoutError, SnapshotNotFoundError
from expstate.storage.local import LocalStorage
from tests.campaign import Campaign
from tests.engine.processes import Changes, watched
from tests.ranks import worlds

pytestmark = pytest.mark.slow

NOTICED_SECONDS = 10.0
"""In this time after the kill every rank that is left has raised."""


def _state(rank: int) -> dict[str, Any]:
    return {"s": StateDict(shared=torch.arange(400_000), own=torch.full((400_000,), rank))}


def _take(folder: Path, rank: int, **options: Any) -> Any:
    return Snapshot.take(folder, _state(rank), replicated=["s/shared"], **options)


def _async_take(folder: Path, rank: int, **options: Any) -> Any:
    return Snapshot.async_take(folder, _state(rank), replicated=["s/shared"], **options).wait()


@contextlib.contextmanager
def _struck(rank: int, victim: int, owner: type, name: str, strike: Callable[[], object], *, after: bool = False) -> Iterator[None]:
    """Do something to one rank when it calls a method, before or after that does its work."""
    really = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if rank == victim and not after:
            strike()
        found = really(*args, **kwargs)
        if rank == victim and after:
            strike()
        return found

    patch = pytest.MonkeyPatch()
    patch.setattr(owner, name, call)
    try:
        yield
    finally:
        patch.undo()


def _noting(place: Path, number: int) -> Callable[[], None]:
    """Note the time, then send a signal to this process."""

    def strike() -> None:
        place.write_text(repr(time.monotonic()))
        os.kill(os.getpid(), number)
        time.sleep(60)

    return strike


def _check_noticed(ended: list[Any], victim: int, noted: Path, match: str) -> None:
    struck_at = float(noted.read_text())
    assert signal.SIGKILL == ended[victim].signal
    for rank, one in enumerate(ended):
        if rank != victim:
            error, at = one.result
            assert isinstance(error, RankFailedError)
            with pytest.raises(RankFailedError, match=match):
                raise error
            assert victim == error.rank
            assert at - struck_at <= NOTICED_SECONDS


def _raised(work: Callable[[], Any]) -> tuple[BaseException, float]:
    with pytest.raises(RankFailedError) as caught:
        work()
    return caught.value, time.monotonic()


@pytest.mark.parametrize("take", [_take, _async_take], ids=["take", "async"])
@pytest.mark.parametrize("owner_and_name", [(LocalStorage, "create_file"), (engine_ranks._Group, "gather")], ids=["writing", "agreeing"])
def test_a_rank_that_is_killed(tmp_path, take, owner_and_name):
    def work(rank):
        with _struck(rank, 2, *owner_and_name, _noting(tmp_path / "noted", signal.SIGKILL)):
            return _raised(lambda: take(tmp_path / "a", rank))

    ended = worlds.run(3, work)
    _check_noticed(ended, 2, tmp_path / "noted", r"rank 2 is gone: its process \d+ on .* has ended")
    assert not (tmp_path / "a").exists(), "what it had written is found by its name"


@pytest.mark.parametrize("take", [_take, _async_take], ids=["take", "async"])
def test_the_first_rank_is_killed_and_the_store_with_it(tmp_path, take):
    def work(rank):
        with _struck(rank, 0, LocalStorage, "create_file", _noting(tmp_path / "noted", signal.SIGKILL)):
            return _raised(lambda: take(tmp_path / "a", rank))

    ended = worlds.run(3, work)
    _check_noticed(ended, 0, tmp_path / "noted", r"rank 0 is gone: its process \d+ on .* has ended")
    with pytest.raises(SnapshotNotFoundError):
        Snapshot(tmp_path / "a").read_object("s/own")
    # Nobody who is left knows what the first rank has done, so the files stay until gc finds its lease.
    report = gc(tmp_path / "a")
    assert report.removed
    assert not (tmp_path / "a").exists()


def test_the_first_rank_is_killed_and_the_store_stays(tmp_path):
    """Then the others know that it has not committed, and remove what they have written."""

    def work(rank):
        with _struck(rank, 0, LocalStorage, "create_file", _noting(tmp_path / "noted", signal.SIGKILL)):
            return _raised(lambda: _take(tmp_path / "a", rank))

    ended = worlds.run(3, work, keep_store=True)
    _check_noticed(ended, 0, tmp_path / "noted", r"rank 0 is gone: its process \d+ on .* has ended")
    assert not list((tmp_path / "a").glob("*-r0000[12]-*"))
    gc(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("keep_store", [False, True], ids=["store-gone", "store-stays"])
@pytest.mark.parametrize("after", [False, True], ids=["before-the-commit", "after-the-commit"])
def test_the_first_rank_is_killed_around_its_commit(tmp_path, after, keep_store):
    """The others leave their files alone: the snapshot may be there."""

    def work(rank):
        with _struck(rank, 0, attempts.Attempt, "commit", _noting(tmp_path / "noted", signal.SIGKILL), after=after):
            return _raised(lambda: _take(tmp_path / "a", rank))

    ended = worlds.run(3, work, keep_store=keep_store)
    _check_noticed(ended, 0, tmp_path / "noted", "rank 0 is gone")
    if after:
        snapshot = Snapshot(tmp_path / "a")
        assert snapshot.verify().ok
        assert [0, 1, 2] == [snapshot.read_object("s/own", rank=rank)[0] for rank in range(3)]
        gc(tmp_path / "a")
        assert Snapshot(tmp_path / "a").verify().ok
    else:
        gc(tmp_path / "a")
        assert not (tmp_path / "a").exists()


def test_ranks_that_are_killed_together(tmp_path):
    def work(rank):
        if rank == 0:
            return _raised(lambda: _take(tmp_path / "a", rank))
        with _struck(rank, rank, LocalStorage, "create_file", _noting(tmp_path / f"noted-{rank}", signal.SIGKILL)):
            return _raised(lambda: _take(tmp_path / "a", rank))

    ended = worlds.run(3, work)
    assert [signal.SIGKILL] * 2 == [one.signal for one in ended[1:]]
    error, _ = ended[0].result
    assert error.rank in {1, 2}
    assert not (tmp_path / "a").exists()


def test_a_rank_that_is_stopped(tmp_path):
    """It gives no sign, but its process is there: it counts as hung, after the timeout."""

    def stop() -> None:
        (tmp_path / "stopped").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)

    def work(rank):
        with _struck(rank, 1, LocalStorage, "create_file", stop):
            found = _raised(lambda: Snapshot.take(tmp_path / "a", _state(rank), replicated=["s/shared"], timeout=2))
        if rank == 0:
            os.kill(int((tmp_path / "stopped").read_text()), signal.SIGKILL)
        return found

    ended = worlds.run(3, work)
    assert signal.SIGKILL == ended[1].signal
    for one in (ended[0], ended[2]):
        error, _ = one.result
        with pytest.raises(RankTimeoutError, match="rank 1 does not go on: for 2 s it has done nothing"):
            raise error
    assert not (tmp_path / "a").exists()


KILLED = pytest.mark.campaign("Several ranks or none", "SIGKILL of one rank of three, at each of its steps and at random times")


def _incremental(folder: Path, rank: int, **options: Any) -> Any:
    return _take(folder, rank, base=folder.parent / "base", **options)


def _check_whole_or_none(folder: Path, campaign: Campaign) -> bool:
    """Whether the snapshot is there, all of it; nothing else is, after ``gc``."""
    gc(folder)
    try:
        snapshot = Snapshot(folder)
        named = {"snapshot.json", *(record.name for record in snapshot.manifest.files)}
    except SnapshotNotFoundError:
        left = list(folder.rglob("*")) if folder.exists() else []
        campaign.count("leftovers after gc", len(left))
        assert [] == left
        return False
    assert snapshot.verify().ok
    assert [0, 1, 2] == [snapshot.read_object("s/own", rank=rank)[0] for rank in range(3)]
    assert named == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return True


def _run_and_kill(folder: Path, take: Callable[[Path, int], Any], victim: int, number: int) -> list[Any]:
    """Kill a rank before the ``number``-th change that it makes; 0 kills none, and counts."""

    def work(rank: int) -> int:
        changes = Changes(number, lambda *_: os.kill(os.getpid(), signal.SIGKILL)) if rank == victim else Changes()
        with watched(changes), contextlib.suppress(RankFailedError):
            take(folder, rank)
        return len(changes.log)

    return worlds.run(3, work, keep_store=True)


@KILLED
@pytest.mark.parametrize("take", [_take, _async_take, _incremental], ids=["take", "async", "incremental"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_at_any_change(tmp_path, take, victim, campaign):
    """On the last ranks nothing is seen of what they have written, on the first it is all there or nothing."""
    campaign.count("visible halves", 0)
    worlds.results(3, lambda rank: _take(tmp_path / "base", rank) and None)
    steps = _run_and_kill(tmp_path / "counted", take, victim, 0)[victim].value
    for number in campaign.each(range(1, steps + 1), short=1):
        folder = tmp_path / f"{number}"
        ended = _run_and_kill(folder, take, victim, number)
        assert signal.SIGKILL == ended[victim].signal
        is_there = _check_whole_or_none(folder, campaign)
        campaign.count("there, all of it", is_there)
        assert victim == 0 or not is_there
        assert Snapshot(tmp_path / "base").verify().ok


@KILLED
def test_a_rank_that_is_killed_at_a_random_time(tmp_path, campaign):
    dice = random.Random(0)
    worlds.results(3, lambda rank: _take(tmp_path / "base", rank) and None)
    for number in range(campaign.choose(2, 200)):
        victim, after, take = dice.randrange(3), dice.uniform(0, 0.3), dice.choice([_take, _async_take, _incremental])

        def work(rank, folder=tmp_path / f"{number}", victim=victim, after=after, take=take):
            if rank == victim:
                threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
            with contextlib.suppress(RankFailedError):
                take(folder, rank, timeout=10)  # who is killed before it has come is not missed before that
            if rank == victim:
                time.sleep(60)

        ended = worlds.run(3, work, keep_store=True)
        assert signal.SIGKILL == ended[victim].signal
        assert [None, None] == [one.error for rank, one in enumerate(ended) if rank != victim]
        campaign.count("there, all of it", _check_whole_or_none(tmp_path / f"{number}", campaign))
        campaign.tried()
    assert Snapshot(tmp_path / "base").verify().ok


def test_a_lease_names_the_first_rank_alone(tmp_path):
    def work(rank):
        with _struck(rank, 0, attempts.Attempt, "commit", lambda: time.sleep(1)):
            pending = Snapshot.async_take(tmp_path / "a", _state(rank), replicated=["s/shared"])
            until, leases = time.monotonic() + 30, []
            while not leases and time.monotonic() < until:
                written = [path.read_bytes() for path in (tmp_path / "a").glob(".attempt-*")]
                leases = [json.loads(lease)["pid"] for lease in written if lease]
            pending.wait()
            return os.getpid(), leases

    found = worlds.results(2, work)
    assert [[found[0][0]]] * 2 == [leases for _, leases in found]
