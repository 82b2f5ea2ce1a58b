"""Incremental takes in object stores: the server copies what has not changed, and each snapshot has all of its objects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expstate import Snapshot

from .faults import Fault, gcs_error, s3_error
from .stores import MIB, Store, app_state, files, is_same


def moved_bytes(store: Store) -> int:
    """Bytes that went to the store or came back."""
    return sum(request.up + request.down for request in store.proxy.requests)


@pytest.mark.parametrize("is_async", [False, True])
def test_the_server_copies_what_has_not_changed(store: Store, *, is_async: bool) -> None:
    state = app_state(1)
    first = Snapshot.take(store.new(), state)
    state["model"]["layer.3"] += 1
    store.proxy.requests.clear()
    url = store.new()
    if is_async:
        Snapshot.async_take(url, state, base=first).wait()
    else:
        Snapshot.take(url, state, base=first)

    assert moved_bytes(store) < MIB // 2
    assert 3 <= sum(name.startswith("base/") for name in files(url))
    first.delete()
    second, live = Snapshot(url), app_state(2)
    assert second.verify().ok
    second.restore(live)
    assert is_same(state, live)
    second.delete()
    assert [] == files(url)


def test_a_disk_and_a_store_share_nothing(store: Store, tmp_path: Path) -> None:
    """What is elsewhere has to be written, and is."""
    state = app_state(1)
    first = Snapshot.take(tmp_path / "a", state)
    second = Snapshot.take(store.new(), state, base=first)
    third = Snapshot.take(tmp_path / "b", state, base=second)
    for snapshot in (second, third):
        assert not any(record.name.startswith("base/") for record in snapshot.manifest.files)
        assert snapshot.verify().ok


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_objects_that_cannot_be_copied_are_written(request: pytest.FixtureRequest, scheme: str) -> None:
    """A server that refuses to copy is no reason to fail."""
    store: Store = request.getfixturevalue(scheme)
    state = app_state(1)
    first = Snapshot.take(store.new(), state)
    if scheme == "s3":
        refused = store.proxy.add(Fault(s3_error(403, "AccessDenied"), headers="^x-amz-copy-source"))
    else:
        refused = store.proxy.add(Fault(gcs_error(403, "forbidden"), method="POST", path="rewriteTo|copyTo"))
    second = Snapshot.take(store.new(), state, base=first)
    store.proxy.clear()

    assert refused.hits
    assert second.verify().ok
    assert not any(record.name.startswith("base/") for record in second.manifest.files)
    assert torch.equal(state["model"]["large"], second.read_object("model/large"))
