"""However many takes there are, nothing grows: memory, descriptors, threads, the catalog; and no take is lost when they come too fast."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import TMonitor

from expstate import Catalog, Snapshot, StateDict
from expstate.engine import ancestry, busy
from expstate.errors import StorageError, TakeCancelledError, TakeSkippedError
from expstate.storage.registry import open_storage
from expstate.testing import FaultyStorage
from tests.campaign import Campaign

MIB = 2**20


@dataclass(frozen=True)
class Use:
    """What this process uses."""

    python_bytes: int
    resident_bytes: int
    descriptors: int
    threads: int

    @classmethod
    def now(cls) -> Use:
        gc.collect()
        # Python remembers some thousand names of attributes that were looked up, and with each the text by which it was asked.
        (getattr(sys, "_clear_internal_caches", None) or sys._clear_type_cache)()
        status = Path("/proc/self/status").read_text(encoding="ascii")
        resident = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        names = os.listdir("/proc/self/fd")
        return cls(tracemalloc.get_traced_memory()[0], int(resident.split()[1]) * 1024, len(names), _threads())


def _threads() -> int:
    """Threads of this process but for two that stay a while: the timer that frees idle buffers, and tqdm's, which looks after all bars."""
    return sum(not isinstance(thread, (threading.Timer, TMonitor)) for thread in threading.enumerate())


def state_of(number: int) -> dict[str, Any]:
    return {"model": StateDict(own=torch.full((50_000,), float(number)), same=torch.arange(50_000)), "progress": StateDict(step=number)}


def full(place: Path, number: int, catalog: Catalog, _last: Snapshot | None) -> Snapshot:
    return Snapshot.take(place, state_of(number), step=number, metrics={"loss": 1 / (number + 1)}, catalog=catalog)


def incremental(place: Path, number: int, catalog: Catalog, last: Snapshot | None) -> Snapshot:
    return Snapshot.take(place, state_of(number), step=number, catalog=catalog, base=last)


def asynchronous(place: Path, number: int, catalog: Catalog, last: Snapshot | None) -> Snapshot:
    return Snapshot.async_take(place, state_of(number), step=number, catalog=catalog, base=last).wait()


def failing(place: Path, number: int, catalog: Catalog, last: Snapshot | None) -> Snapshot:
    """One that fails, and one that does not."""
    storage = FaultyStorage(open_storage(place.with_name(f"failing-{number}")))
    storage.fail("write", error=StorageError("broken"))
    with pytest.raises(StorageError, match="broken"):
        Snapshot.take(storage.url, state_of(number), catalog=catalog)
    return full(place, number, catalog, last)


@pytest.mark.slow
@pytest.mark.campaign("Within the budget", "thousands of takes, with prune in between")
@pytest.mark.parametrize("take", [full, incremental, asynchronous, failing])
def test_takes_and_prunes_do_not_make_a_process_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, take: Callable[..., Snapshot], campaign: Campaign
) -> None:
    """Compared at two moments when all that is kept for later is there, and equally many snapshots are."""
    monkeypatch.setenv("EXPSTATE_PROJECT", "soak")
    monkeypatch.setenv("EXPSTATE_PROVENANCE", "full" if take is full else "off")
    ancestry.forget()
    catalog = Catalog(tmp_path / "catalog.db")
    last: Snapshot | None = None
    number = 0

    def rounds(count: int) -> None:
        nonlocal last, number
        for _ in range(count):
            last = take(tmp_path / "runs" / f"{number}", number, catalog, last)
            number += 1
            campaign.tried()
            if number % 10 == 0:
                catalog.prune(keep_last=5).apply()

    half = campaign.choose(10, 1_250)
    tracemalloc.start()
    try:
        rounds(half)
        before, size = Use.now(), _catalog_bytes(catalog)
        rounds(half)
        after, grown = Use.now(), _catalog_bytes(catalog)
    finally:
        tracemalloc.stop()
    kept = len(catalog)
    catalog.close()

    assert 5 == kept == len(list((tmp_path / "runs").iterdir()))
    assert (before.descriptors, before.threads) == (after.descriptors, after.threads)
    # What grows with each take would be more than a byte of each object of it, or a page.
    assert after.python_bytes - before.python_bytes < max(200_000, 100 * half), tracemalloc
    assert after.resident_bytes - before.resident_bytes < 8 * MIB + 1024 * half
    assert grown - size <= max(64 * 1024, size // 2)
    campaign.count("bytes of memory more after the second half", max(0, after.python_bytes - before.python_bytes))


def _catalog_bytes(catalog: Catalog) -> int:
    with catalog.database.reading() as connection:
        pages, free = (connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("page_count", "freelist_count"))
    return 4096 * (int(pages) - int(free))


@pytest.mark.campaign("Never silent in the background", "takes that come faster than the disk can write")
@pytest.mark.parametrize("on_busy", busy.POLICIES)
def test_takes_that_come_faster_than_the_disk_are_all_accounted_for(tmp_path: Path, on_busy: str, campaign: Campaign) -> None:
    """Each is there whole, or says that it was skipped or replaced; the memory that they hold does not add up."""
    before = _threads()
    pending = []
    for number in range(campaign.choose(15, 500)):
        storage = FaultyStorage(open_storage(tmp_path / f"{number}"))
        storage.run("finish", None, function=lambda: time.sleep(0.01))
        state = state_of(number)
        pending.append((number, Snapshot.async_take(storage.url, state, on_busy=on_busy)))
        state["model"]["own"].fill_(-1)
        campaign.tried()
    there, told = [], []
    for number, one in pending:
        try:
            snapshot = one.wait()
        except (TakeSkippedError, TakeCancelledError):
            told.append(number)
            continue
        assert snapshot.verify().ok
        assert number == snapshot.read_object("progress/step")
        assert bool((snapshot.read_object("model/own") == number).all())
        there.append(number)

    assert len(pending) == len(there) + len(told)
    assert {"wait": not told, "skip": 0 in there, "replace": len(pending) - 1 in there}[on_busy]
    assert {f"{number}" for number in there} == {path.name for path in tmp_path.iterdir() if any(path.iterdir())}
    until = time.monotonic() + 10
    while _threads() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert before >= _threads()
    campaign.count("takes that were skipped or replaced, and said so", len(told))
