"""A bucket in which others are at work too: what they do is seen at once, and how old it is is told by the server's clock alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from expstate import Catalog, Snapshot, errors, gc, settings
from expstate.engine import collect, lease
from expstate.storage.objects.storage import ObjectStorage
from expstate.storage.registry import open_storage
from expstate.testing.cases import TOKEN

from .faults import Fault, Hang, gcs_error, s3_error
from .operations import two_days_later
from .stores import Store, few, files

DAY = 24 * 3600.0
LEASE = f".attempt-{TOKEN}.json"
DATA = f"model-00001-{TOKEN}.safetensors"


def abandon(storage: ObjectStorage) -> None:
    """What a take on another machine has left, or still has there."""
    there = '{"id":"%s","action":"take","host":"h","boot":"b","namespace":null,"pid":1,"started":1,"heartbeat":%f}'
    storage.create(LEASE, (there % (TOKEN + 24 * "0", time.time())).encode(), token=TOKEN)
    storage.create(DATA, b"left", token=TOKEN)


# What others write


def test_what_another_client_does_is_seen_at_once(store: Store, tmp_path: Path) -> None:
    """By clients that have looked there before: nothing is remembered of a listing or an object."""
    url = store.new()
    root = url.rpartition("/")[0]
    catalog = Catalog(tmp_path / "catalog.db")
    ours = Snapshot(url)
    with pytest.raises(errors.SnapshotNotFoundError):
        ours.keys()
    assert [] == files(url)
    assert () == gc(root).removed
    assert () == catalog.scan(root).entered

    first = Snapshot.take(url, few(1), storage_options=store.direct)
    assert ("model",) == tuple(ours.keys())
    assert first.id == ours.id
    assert {"snapshot.json", *(record.name for record in first.manifest.files)} == set(files(url))
    assert (url,) == catalog.scan(root).entered
    with pytest.raises(errors.SnapshotExistsError):
        Snapshot.take(url, few(2))

    second = Snapshot.take(url, few(3), overwrite=True, storage_options=store.direct)
    assert torch.equal(torch.full((20,), 3.0), Snapshot(url).read_object("model/bias"))
    with pytest.raises(errors.SnapshotReplacedError):
        ours.read_object("model/bias")
    second.delete()
    assert [] == files(url)
    with pytest.raises(errors.SnapshotNotFoundError):
        Snapshot(url).keys()


def test_gc_sees_what_another_client_left(store: Store) -> None:
    url = store.new()
    assert () == gc(url).alive
    abandon(open_storage(url, store.direct))
    assert (f"{url}/{LEASE}",) == gc(url).alive
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "LEASE_SECONDS", -5.0)
        (left,) = gc(url).removed

    assert (DATA, LEASE) == left.files
    assert [] == list(open_storage(url, store.direct).list())


# What time it is


def test_gc_removes_what_told_the_time_a_day_ago(store: Store) -> None:
    """An object that is there for a moment, when whoever asked for the time was killed or could not remove it."""
    url = store.new()
    Snapshot.take(url, few(1))
    before = files(url)
    fault = gcs_error(403, "forbidden") if store.root.startswith("gs") else s3_error(403, "AccessDenied")
    store.proxy.add(Fault(fault, method="DELETE", times=None))
    open_storage(url).clock()
    store.proxy.clear()
    (left,) = set(files(url)) - set(before)
    assert left.startswith(".clock-")

    assert () == gc(url).removed
    with two_days_later(url):
        assert [("clock", (left,))] == [(found.action, found.files) for found in gc(url).removed]
    assert before == files(url)
    assert Snapshot(url).verify().ok


@contextlib.contextmanager
def clock_wrong_by(seconds: float) -> Iterator[None]:
    right = time.time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: right() + seconds)
        yield


@contextlib.contextmanager
def leases_of_now_are_old() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (lease, collect):
            patch.setattr(module, "LEASE_SECONDS", -5.0)
        yield


@pytest.mark.parametrize("days", [-2, 2])
def test_a_take_is_alive_whatever_the_clock_of_the_one_who_cleans_up_says(store: Store, days: int) -> None:
    url, state = store.new(), few(1)
    hanging = store.proxy.add(Fault(Hang(), method="PUT|POST", nth=3))
    pending = Snapshot.async_take(url, state)
    while not hanging.hits:
        time.sleep(0.01)
    with clock_wrong_by(days * DAY), pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "boot_id", lambda: "another machine")
        report = collect.collect([open_storage(url, store.direct)], dry_run=False)
    store.proxy.clear()

    assert () == report.removed
    assert 1 == len(report.alive)
    assert pending.wait(60).verify().ok


@pytest.mark.parametrize("days", [-2, 2])
def test_what_is_abandoned_goes_whatever_the_clock_says(store: Store, days: int) -> None:
    url = store.new()
    with clock_wrong_by(days * DAY):
        abandon(store.storage(url))
        assert () == gc(url).removed
        with leases_of_now_are_old():
            (left,) = gc(url).removed

    assert (DATA, LEASE) == left.files
    assert [] == files(url)


@pytest.mark.parametrize("days", [-2, 2])
def test_the_clock_of_this_machine_would_mislead(store: Store, days: int) -> None:
    """The same with that clock: one that is ahead removes what is alive, one that is behind keeps what is not."""
    url = store.new()
    with clock_wrong_by(days * DAY), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectStorage, "clock", lambda _: time.time())
        abandon(store.storage(url))
        if days > 0:
            assert 1 == len(gc(url).removed)
        else:
            with leases_of_now_are_old():
                assert () == gc(url).removed


@pytest.mark.parametrize("days", [-2, 2])
def test_uploads_are_as_old_as_the_server_says(s3: Store, days: int) -> None:
    url = s3.new()
    with settings.override(transport="fsspec"), clock_wrong_by(days * DAY):
        storage = s3.storage(url)
        storage.client.begin_upload(f"{storage.prefix}/{DATA}")
        assert 0 == gc(url).uploads
        with leases_of_now_are_old():
            assert 1 == gc(url).uploads


def test_a_server_that_does_not_say_what_time_it_is_is_not_guessed_at(store: Store) -> None:
    """The clock of this machine would make a take dead that is at work. The server is asked by an object that is written."""
    url = store.new()
    abandon(store.storage(url))
    refused = gcs_error(503, "backendError") if store.root.startswith("gs") else s3_error(503, "SlowDown")
    store.proxy.add(Fault(refused, method="PUT|POST"))
    with clock_wrong_by(2 * DAY), settings.override(retry_seconds=0.2), pytest.raises(errors.StorageError):
        gc(url)
    store.proxy.clear()

    assert [LEASE, DATA] == files(url)
