"""Snapshots in object stores: taken, found, compared, read and put back as on a disk, and never half there."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import uuid
from pathlib import Path
from urllib.parse import parse_qs

import pytest
import torch

from expstate import Catalog, Snapshot, StateDict, configure, errors, gc, settings
from expstate.engine.lease import LEASE_SECONDS
from expstate.storage.registry import open_storage
from expstate.testing.cases import TOKEN

from .faults import Fault, Flip, Hang, Lost, Reset, Shrink, Status, gcs_error, s3_error
from .proxy import FaultProxy
from .servers import GcsServer, S3Server
from .stores import MIB, Store, app_state, few, files, is_same

# What works


def test_a_snapshot_is_taken_read_and_put_back(store: Store) -> None:
    url, state, live = store.new(), app_state(1), app_state(2)
    snapshot = Snapshot.take(url, state, name="first", metrics={"loss": 0.5})

    assert url == snapshot.path
    assert Snapshot(url).verify().ok
    Snapshot(url).restore(live)
    assert is_same(state, live)
    assert live["model"]["tied"] is live["model"]["large"]
    assert torch.equal(state["model"]["layer.3"], Snapshot(url).read_object("model/layer.3"))
    assert torch.equal(state["model"]["large"][100:200], Snapshot(url).read_object("model/large", rows=slice(100, 200)))
    assert not Snapshot(url).diff(state)
    live["model"]["layer.0"] += 1
    assert ("model/layer.0",) == Snapshot(url).diff(live, stats=True).changed


def test_takes_go_on_in_the_background(store: Store) -> None:
    state = app_state(1)
    pending = Snapshot.async_take(store.new(), state)
    before = {name: value.clone() for name, value in state["model"].items()}
    for value in state["model"].values():
        value.zero_()
    live = app_state(2)
    pending.wait().restore(live)

    assert all(torch.equal(value, live["model"][name]) for name, value in before.items())


def test_a_path_is_taken_once_unless_it_is_overwritten(store: Store) -> None:
    url = store.new()
    Snapshot.take(url, app_state(1))
    with pytest.raises(errors.SnapshotExistsError):
        Snapshot.take(url, app_state(2))
    second = Snapshot.take(url, app_state(3), overwrite=True)

    assert 3 == Snapshot(url).read_object("progress/step")
    assert {"snapshot.json", *(record.name for record in second.manifest.files)} == set(files(url))


def test_a_snapshot_that_was_replaced_while_it_is_open_says_so(store: Store) -> None:
    url = store.new()
    old = Snapshot.take(url, app_state(1))
    Snapshot.take(url, app_state(2), overwrite=True)

    with pytest.raises(errors.SnapshotReplacedError):
        old.restore(app_state(3))


def test_of_two_takers_one_wins(store: Store) -> None:
    url = store.new()
    outcomes: list[int] = []
    barrier = threading.Barrier(4)

    def take(number: int) -> None:
        barrier.wait()
        try:
            Snapshot.take(url, {"progress": StateDict(step=number, weight=torch.zeros(1000))})
        except errors.SnapshotExistsError:
            return
        outcomes.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert outcomes == [Snapshot(url).read_object("progress/step")]
    assert Snapshot(url).verify().ok
    assert {"snapshot.json", *(record.name for record in Snapshot(url).manifest.files)} == set(files(url))


def test_it_is_copied_to_disk_and_back_and_deleted(store: Store, tmp_path: Path) -> None:
    url, state = store.new(), app_state(1)
    there = Snapshot.take(url, state)
    here = there.copy(tmp_path / "copy")
    again = here.copy(f"{url}-again")
    other = there.copy(f"{url}-other")

    for snapshot in (here, again, other):
        assert there.id == snapshot.id
        assert snapshot.verify().ok
    other.delete()
    assert [] == files(f"{url}-other")
    with pytest.raises(errors.SnapshotNotFoundError):
        Snapshot(f"{url}-other").keys()


def test_what_one_has_from_another_is_its_own(store: Store) -> None:
    """The store keeps a copy for each, so that deleting one sets all of it free."""
    state = app_state(1)
    first = Snapshot.take(store.new(), state)
    second = Snapshot.take(store.new(), state, base=first)
    kept = {snapshot: sum(info.size for info in open_storage(snapshot.path).list()) for snapshot in (first, second)}

    assert first.nbytes_written > second.nbytes_written
    assert list(kept.values()) == [first.nbytes_unique, second.nbytes_unique]
    first.delete()
    assert second.verify().ok
    assert kept[second] == second.nbytes_unique


def test_the_catalog_knows_it_and_scan_finds_it(store: Store, tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "catalog.db")
    url = store.new()
    Snapshot.take(url, app_state(1), name="far", metrics={"loss": 0.25}, catalog=catalog)
    catalog.alias("far", "best")
    catalog.tag("far", "paper")

    assert Snapshot.find("best", catalog=catalog).verify().ok
    rebuilt = Catalog(tmp_path / "rebuilt.db")
    rebuilt.scan(url.rpartition("/")[0])
    (record,) = rebuilt.search("loss < 0.5 and tag = paper", project="*")
    assert (url, ("best",)) == (record.url, record.aliases)
    with pytest.raises(errors.SnapshotPinnedError):
        Snapshot(url).delete()


def test_what_a_dead_take_left_is_collected(store: Store) -> None:
    url = store.new()
    storage = open_storage(url)
    dead = '{"id":"%s","action":"take","host":"h","boot":null,"namespace":null,"pid":1,"started":1,"heartbeat":0}'
    storage.create(f".attempt-{TOKEN}.json", (dead % (TOKEN + 24 * "0")).encode(), token=TOKEN)
    storage.create(f"model-00001-{TOKEN}.safetensors", b"left", token=TOKEN)
    Snapshot.take(f"{url}/nested", app_state(1))

    assert () == gc(url).removed  # it may still be at work
    ahead = storage.clock() + 2 * LEASE_SECONDS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(storage), "clock", lambda _: ahead)
        (left,) = gc(url).removed
    assert 2 == len(left.files)
    assert [] == files(url)
    assert Snapshot(f"{url}/nested").verify().ok


@pytest.mark.parametrize("transport", ["fsspec", "obstore"])
def test_uploads_that_were_not_ended_are_thrown_away_when_they_are_old(s3: Store, transport: str) -> None:
    url = s3.new()
    with settings.override(transport="fsspec"):
        storage = open_storage(url)
    storage.client.begin_upload(f"{storage.prefix}/model-00001-{TOKEN}.safetensors")

    with settings.override(transport=transport):
        assert 0 == gc(url).uploads
        reached = type(open_storage(url))
        ahead = storage.clock() + 2 * LEASE_SECONDS
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reached, "clock", lambda _: ahead)
            assert 0 == gc(url, dry_run=True).uploads
            assert 1 == gc(url).uploads
            assert 0 == gc(url).uploads


def test_a_full_data_file_is_one_request(store: Store) -> None:
    """Though with its header it is larger than what a data file should have."""
    state = {"model": StateDict(weight=torch.randn(12, MIB // 4))}
    with settings.override(object_file_bytes=6 * MIB):
        snapshot = Snapshot.take(store.new(), state)
    uploads = [request for request in store.proxy.requests if request.method in {"PUT", "POST"} and request.up > MIB]

    assert [True, True] == [record.size > 6 * MIB for record in snapshot.manifest.files]
    assert len(uploads) == 2
    assert all("partNumber" not in request.query for request in uploads)


def test_a_row_that_is_larger_than_a_data_file_goes_in_parts(s3: Store) -> None:
    with settings.override(transport="fsspec"):
        state, live = ({"model": StateDict(wide=torch.randn(1, 3 * MIB), few=torch.randn(9))} for _ in range(2))
        snapshot = Snapshot.take(s3.new(), state)
        snapshot.restore(live)

    queries = [parse_qs(request.query) for request in s3.proxy.requests]
    assert {"1", "2", "3"} == {query["partNumber"][0] for query in queries if "partNumber" in query}
    assert is_same(state, live)
    assert snapshot.verify().ok


def test_reading_one_tensor_takes_few_requests(store: Store) -> None:
    url, state = store.new(), app_state(1)
    Snapshot.take(url, state)
    store.proxy.requests.clear()

    assert torch.equal(state["model"]["layer.7"], Snapshot(url).read_object("model/layer.7"))
    assert len(store.proxy.requests) <= 3, [(request.method, request.target) for request in store.proxy.requests]


# What goes wrong


def refused(store: Store, code: int) -> object:
    names = {500: "InternalError", 503: "SlowDown", 409: "ConditionalRequestConflict", 403: "AccessDenied", 429: "rateLimitExceeded"}
    return gcs_error(code, names[code]) if store.root.startswith("gs") else s3_error(code, names[code])


@pytest.mark.parametrize("code", [500, 503, 409])
def test_a_request_that_fails_for_a_while_is_tried_again(store: Store, code: int) -> None:
    store.proxy.add(Fault(refused(store, code), method="PUT|POST", times=3))
    url, state, live = store.new(), app_state(1), app_state(2)
    snapshot = Snapshot.take(url, state)
    store.proxy.add(Fault(refused(store, code), method="GET", times=2))
    snapshot.restore(live)

    assert is_same(state, live)


def test_a_request_that_fails_for_ever_is_an_error_that_says_what_the_server_said(store: Store) -> None:
    url = store.new()
    with settings.override(retry_seconds=2):
        # The lease comes first, which is there already when the data files are refused.
        store.proxy.add(Fault(refused(store, 503), method="PUT|POST", nth=3, times=1000))
        with pytest.raises(errors.StorageError, match=r"tim.*in \d+ s"):
            Snapshot.take(url, app_state(1))
    store.proxy.clear()

    assert [] == files(url)


def test_a_scan_has_the_patience_that_the_settings_say(store: Store, tmp_path: Path) -> None:
    """Though it looks into folders in threads of its own."""
    url = store.new()
    Snapshot.take(url, few(1))
    refusing = store.proxy.add(Fault(refused(store, 500), method="GET|HEAD", path=r"snapshot\.json"))
    with settings.override(retry_seconds=0.5):
        (problem,) = Catalog(tmp_path / "catalog.db").scan(url).damaged

    assert url == problem.path.removesuffix("/snapshot.json")
    assert 1 <= refusing.hits <= 4


def test_what_is_not_allowed_is_no_matter_of_patience(store: Store) -> None:
    store.proxy.add(Fault(refused(store, 403), method="PUT|POST", times=1000))
    with pytest.raises(errors.StoragePermissionError, match=r"credentials|permission|access"):
        Snapshot.take(store.new(), app_state(1))


def test_a_lost_reply_to_the_commit_is_no_conflict(store: Store) -> None:
    url = store.new()
    store.proxy.add(Fault(Lost(), method="PUT|POST", path=r"snapshot\.json" if store.root.startswith("s3") else r"upload", nth=1, times=1))
    Snapshot.take(url, app_state(1))

    assert Snapshot(url).verify().ok


def test_broken_connections_are_made_again(store: Store) -> None:
    store.proxy.add(Fault(Reset(), nth=3, times=3))
    state, live = app_state(1), app_state(2)
    Snapshot.take(store.new(), state).restore(live)

    assert is_same(state, live)


@pytest.mark.parametrize("action", [Shrink(1000), Flip(500)])
def test_a_body_that_is_short_or_wrong_once_is_read_again(store: Store, action: object) -> None:
    state, live = app_state(1), app_state(2)
    snapshot = Snapshot.take(store.new(), state)
    store.proxy.add(Fault(action, method="GET", path="safetensors", headers="^range:", times=1))
    snapshot.restore(live)

    assert is_same(state, live)


def test_a_body_that_is_wrong_each_time_is_damage_that_is_named(store: Store) -> None:
    snapshot = Snapshot.take(store.new(), app_state(1))
    store.proxy.add(Fault(Flip(500), method="GET", path="safetensors", headers="^range:", times=1000))

    with pytest.raises((errors.SnapshotCorruptError, errors.RestoreInterruptedError), match=r"entry 'model/"):
        snapshot.restore(app_state(2))


def test_an_upload_that_is_said_to_be_incomplete_is_no_success(gs: Store) -> None:
    """GCS says 308 to the last chunk of an upload of which it has kept nothing; here it says so to all that comes after the lease."""
    url = gs.new()
    refusing = gs.proxy.add(Fault(Status(308), method="POST", nth=3))
    with pytest.raises(errors.StorageError, match="308"):
        Snapshot.take(url, app_state(1))
    gs.proxy.clear()

    assert refusing.hits
    assert [] == files(url)


def test_what_was_not_stored_in_spite_of_the_answer_is_noticed(store: Store) -> None:
    """The upload of a data file is said to have succeeded, and dropped."""
    url, state = store.new(), few(1)
    (size,) = [record.size for record in Snapshot.take(store.new(), state).manifest.files]
    if store.root.startswith("gs"):
        said = Status(200, json.dumps({"size": str(size)}).encode(), {"Content-Type": "application/json"})
        lost = store.proxy.add(Fault(said, method="POST", nth=2, times=1))  # after the lease
    else:
        lost = store.proxy.add(Fault(Status(200, headers={"ETag": '"5"'}), method="PUT", path="safetensors"))
    with pytest.raises(errors.SnapshotWriteError, match=rf"with {size:,} bytes and now has 0"):
        Snapshot.take(url, state)

    assert lost.hits == 1
    assert [] == files(url)


@pytest.mark.parametrize("wrong", ["size", "md5Hash", "crc32c"])
def test_what_was_stored_otherwise_is_noticed(gs: Store, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GCS says which bytes it has stored; ours are sent again, and if that does not help, there is no snapshot."""
    if wrong == "md5Hash":
        monkeypatch.setattr("google_crc32c.implementation", "python")
    state = few(1)
    (size,) = [record.size for record in Snapshot.take(gs.new(), state).manifest.files]
    said = Status(200, json.dumps({"size": str(size), wrong: "7"}).encode(), {"Content-Type": "application/json"})
    once = gs.proxy.add(Fault(said, method="POST", nth=2, times=1))  # after the lease
    assert Snapshot.take(gs.new(), state).verify().ok
    assert once.hits == 1

    url = gs.new()
    gs.proxy.add(Fault(said, method="POST", nth=2))
    with settings.override(retry_seconds=0.5), pytest.raises(errors.StorageError, match=rf"safetensors.*stored another {wrong}$"):
        Snapshot.take(url, state)
    gs.proxy.clear()
    assert [] == files(url)


def test_bits_that_turn_on_the_way_are_sent_again(store: Store) -> None:
    state, live = app_state(1), app_state(2)
    fault = store.proxy.add(Fault(Flip(upload=True), method="PUT|POST", nth=3, times=2))
    snapshot = Snapshot.take(store.new(), state)
    snapshot.restore(live)

    assert fault.hits == 2
    assert is_same(state, live)


def test_an_interrupt_leaves_nothing_and_nothing_appears_later(store: Store) -> None:
    url = store.new()
    begun = threading.Event()

    def interrupt() -> None:
        begun.wait()
        signal.raise_signal(signal.SIGINT)

    real = open_storage(url).client.put

    def put(key: str, *given: object, **options: object) -> None:
        if key.endswith(".safetensors"):
            begun.set()
        real(key, *given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(open_storage(url).client), "put", lambda _, *given, **options: put(*given, **options))
        store.proxy.latency = 0.1
        killer = threading.Thread(target=lambda: (begun.wait(), os.kill(os.getpid(), signal.SIGINT)))
        killer.start()
        with pytest.raises(KeyboardInterrupt):
            Snapshot.take(url, app_state(1))
        killer.join()
    store.proxy.latency = 0

    assert [] == files(url)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_take_whose_requests_hang_is_cancelled_at_once(
    buckets: dict[str, str], s3_server: S3Server, gcs_server: GcsServer, scheme: str
) -> None:
    server = s3_server if scheme == "s3" else gcs_server
    root = f"{scheme}://{buckets[scheme]}"
    with FaultProxy(server.url) as proxy, settings.override(transport="fsspec", object_file_bytes=MIB):
        configure(storage_options={root: server.storage_options(endpoint_url=proxy.url)})
        url = f"{root}/run-{uuid.uuid4().hex[:8]}"
        hanging = proxy.add(Fault(Hang(), method="PUT|POST", nth=3, times=1000))
        pending = Snapshot.async_take(url, app_state(1))
        while not hanging.hits:
            time.sleep(0.01)
        threading.Timer(0.1, pending.cancel).start()
        # Not the minute that a reply is waited for.
        with pytest.raises(errors.TakeCancelledError):
            pending.wait(30)
        proxy.clear()
        assert [] == files(url)
        configure(storage_options={root: {}})
