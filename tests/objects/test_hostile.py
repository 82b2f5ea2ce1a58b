"""A bucket that a stranger has written to: what is asked of the server are plain names in the snapshot's folder, whatever is said there."""

from __future__ import annotations

import contextlib
import json
import re
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import torch

from expstate import Catalog, Snapshot, StateDict, configure, errors, gc, settings
from expstate.engine import collect, lease
from expstate.format import names
from expstate.storage.registry import open_storage
from tests.catalog.made import enter
from tests.format.forging import OUTSIDE, body_of, seal

from .faults import Request
from .stores import Store, few, files

SMALL = {"snapshot.json", "annotations.json"}


class Forged:
    """A snapshot of two keys whose manifest can be edited, and of which every request is seen."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.url = store.new()
        self.state = few(1) | {"other": StateDict(weight=torch.ones(30))}
        taken = Snapshot.take(self.url, self.state)
        self.storage = store.storage(self.url)
        self.token = names.attempt_of(taken.id)
        self.document: dict[str, Any] = json.loads(self.storage.read("snapshot.json"))
        del self.document["blake3"]
        self.names = {record.name for record in taken.manifest.files}

    def key(self, name: str) -> str:
        return f"{self.storage.prefix}/{name}"

    def write(self) -> Snapshot:
        """Put the manifest in place; requests are counted from then on."""
        self.storage.client.put(self.key("snapshot.json"), [seal(body_of(self.document))])
        self.store.proxy.requests.clear()
        return Snapshot(self.url)

    def asked(self) -> set[str]:
        """What objects have been asked for, without the folder; a listing is an empty name, what is elsewhere has its whole path."""
        return {self._name(request) for request in self.store.proxy.requests}

    def _name(self, request: Request) -> str:
        bucket = self.store.root.partition("://")[2]
        query = parse_qs(request.query)
        path = request.path
        for start in (f"/storage/v1/b/{bucket}/o", f"/download/storage/v1/b/{bucket}/o", f"/{bucket}"):
            # A HEAD that is refused botocore takes for one to a bucket of another region, and asks for that.
            if path.rstrip("/") == start and (request.method == "HEAD" or query.get("prefix") == [self.key("")]):
                return ""
            path = path.removeprefix(f"{start}/{self.key('')}")
        return path if request.headers["host"] == self.store.proxy.url.rpartition("/")[2] else f"{request.headers['host']}{path}"


@pytest.fixture
def forged(store: Store) -> Forged:
    return Forged(store)


def live() -> dict[str, StateDict]:
    return few(2) | {"other": StateDict(weight=torch.zeros(30))}


ACTIONS: dict[str, Callable[[Snapshot, Path], object]] = {
    "open": lambda snapshot, to: snapshot.manifest,
    "entries": lambda snapshot, to: snapshot.entries(),
    "restore": lambda snapshot, to: snapshot.restore(live()),
    "read_object": lambda snapshot, to: snapshot.read_object("model/weight"),
    "verify": lambda snapshot, to: snapshot.verify(),
    "diff": lambda snapshot, to: snapshot.diff(live(), stats=True),
    "copy": lambda snapshot, to: snapshot.copy(to / "copy"),
    "copy within the bucket": lambda snapshot, to: snapshot.copy(f"{snapshot.path}-copy"),
    "export": lambda snapshot, to: snapshot.export(to / "exported"),
    "delete": lambda snapshot, to: snapshot.delete(),
}


# H1 to H5: where data files are


def test_of_a_genuine_one_its_own_files_are_asked_for(forged: Forged, tmp_path: Path) -> None:
    """By the same look at the requests, so that finding nothing else tells something."""
    snapshot = forged.write()
    for name in ("restore", "verify", "diff", "copy", "export"):
        ACTIONS[name](snapshot, tmp_path)

    assert forged.names < forged.asked()
    assert forged.asked() <= forged.names | SMALL | {""}


@pytest.mark.parametrize("action", ACTIONS)
def test_a_file_outside_the_folder_is_never_asked_for(forged: Forged, tmp_path: Path, action: str) -> None:
    """Whatever a manifest calls its files: paths, other URLs, chains of them (H1 to H4)."""
    for name in OUTSIDE:
        forged.document["files"][0][0] = name.format(token=forged.token)
        snapshot = forged.write()
        with pytest.raises(errors.UnsafePathError, match="names a file"):
            ACTIONS[action](snapshot, tmp_path)
        asked = forged.asked()
        if action == "copy within the bucket":
            asked = {re.sub(r".*-copy/(snapshot\.json)$", r"\1", path) for path in asked}
        assert asked <= SMALL, name

    assert forged.names | {"snapshot.json"} == set(files(forged.url))
    assert [] == list(tmp_path.iterdir())


def test_a_storage_asks_for_nothing_outside_its_folder(forged: Forged) -> None:
    """Even if what read the manifest had let such a name pass."""
    forged.store.proxy.requests.clear()
    for name in (name.format(token=forged.token) for name in OUTSIDE):
        for act in (forged.storage.open_file, forged.storage.read, forged.storage.stat, forged.storage.delete):
            with contextlib.suppress(errors.ExpstateError, FileNotFoundError):
                act(name)
    asked = forged.asked()

    assert f"~/x-00001-{forged.token}.safetensors" in asked  # a key like any other
    assert not [name for name in asked if name.startswith("/") or "://" in name or {".", ".."} & set(name.split("/"))]


def test_a_manifest_chooses_no_server_and_no_options(forged: Forged) -> None:
    """Fields in which it might are none: they are ignored (H4, H5)."""
    forged.document["storage_options"] = {"endpoint_url": "http://127.0.0.1:9", "anon": True}
    forged.document["base"] = "s3://evil/x"
    forged.document["entries"][1].append("http://127.0.0.1:9/")
    snapshot = forged.write()

    assert snapshot.verify().ok
    assert forged.asked() <= forged.names | SMALL | {""}


def test_a_lease_leads_gc_to_nothing_outside_its_folder(forged: Forged) -> None:
    """Files that it names are removed only if they could be a snapshot's, and lie there."""
    kept = Snapshot.take(f"{forged.url.rpartition('/')[0]}/neighbour", few(3))
    listed = [*(name.format(token=forged.token) for name in OUTSIDE), f"../neighbour/{kept.manifest.files[0].name}"]
    there = {"id": "0" * 32, "action": "delete", "host": "h", "boot": "b", "namespace": None, "pid": 1, "started": 1, "heartbeat": 0}
    forged.storage.create(".attempt-00000000.json", json.dumps(there | {"files": listed}).encode(), token="0" * 8)
    forged.store.proxy.requests.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "LEASE_SECONDS", -5.0)
        (left,) = collect.collect([forged.storage], dry_run=False).removed

    assert (".attempt-00000000.json",) == left.files
    removed = {request.path.rpartition("/")[2] for request in forged.store.proxy.requests if request.method == "DELETE"}
    assert [".attempt-00000000.json"] == [name for name in removed if not name.startswith(".clock-")]
    assert kept.verify().ok
    assert Snapshot(forged.url).verify().ok


# H6: what is in the folder


def test_objects_that_stand_for_folders_are_no_files(store: Store) -> None:
    """Consoles make objects whose keys end in a slash; they are neither read nor removed."""
    url = store.new()
    storage = store.storage(url)
    with settings.override(transport="fsspec"):  # obstore makes no such keys
        raw = store.storage(url).client
        for name in ("", "base/", "sub/", "sub/deeper/"):
            raw.put(f"{storage.prefix}/{name}", [])
        made = {info.key for info in raw.list(f"{storage.prefix}/")}
    snapshot = Snapshot.take(url, few(1))
    report = snapshot.verify()
    # Where obstore lists them they have lost the slash, and are files of whoever knows what.
    expected = ("base", "sub") if settings.current().transport == "obstore" else ()
    live = few(2)
    snapshot.restore(live)

    assert report.ok
    assert expected == report.unknown_files
    assert torch.equal(torch.full((20,), 1.0), live["model"]["bias"])
    assert () == gc(url).removed
    snapshot.copy(f"{url}-copy").delete()
    snapshot.delete()
    with settings.override(transport="fsspec"):
        assert made == {info.key for info in raw.list(f"{storage.prefix}/")}


@pytest.mark.parametrize("size", [0, 1, -1, 5])
def test_an_object_of_another_size_is_damage(forged: Forged, tmp_path: Path, size: int) -> None:
    """Cut short, or with more behind it than was taken; a number below zero is how many bytes are missing, five are too many."""
    name = next(iter(forged.names))
    data = forged.storage.read(name)
    forged.storage.client.put(forged.key(name), [data + b"12345" if size == 5 else data[:size]])
    snapshot = forged.write()
    state = live()
    with pytest.raises(errors.SnapshotCorruptError, match=re.escape(name)):
        snapshot.restore(state)
    with pytest.raises(errors.SnapshotCorruptError, match=re.escape(name)):
        snapshot.copy(tmp_path / "copy")

    assert all(torch.equal(value, state[key][path]) for key, given in live().items() for path, value in given.items())
    assert {name} == {damage.file for damage in snapshot.verify().damages}
    assert not (tmp_path / "copy").exists()


def test_a_file_that_is_claimed_to_be_enormous_is_not_waited_for(forged: Forged) -> None:
    """Its real size is asked for before a byte of it, or any memory."""
    forged.document["files"][0][1] = 2**40
    snapshot = forged.write()
    with pytest.raises(errors.ExpstateError):
        snapshot.restore(live())

    assert not any(request.headers.get("range") for request in forged.store.proxy.requests)


def test_a_key_that_others_begin_with_is_no_folder_of_theirs(store: Store) -> None:
    """``step-1`` is neither ``step-10`` nor an object of that very name."""
    url = store.new()
    storage = store.storage(url)
    storage.client.put(storage.prefix, [b"an object where the folder is"])
    first, tenth = Snapshot.take(url, few(1)), Snapshot.take(f"{url}0", few(10))
    under = Snapshot.take(f"{url}/nested", few(5))
    for folder in (url, f"{url}0"):
        open_storage(folder).create(".attempt-00000000.json", b"torn", token="0" * 8)

    assert first.verify().ok
    assert () == first.verify().unknown_files
    assert (f"{url}/.attempt-00000000.json",) == gc(url).alive
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "LEASE_SECONDS", -5.0)
        assert [url] == [left.url for left in gc(url).removed]
    assert ".attempt-00000000.json" in files(f"{url}0")
    first.delete()
    assert [] == files(url)
    assert tenth.verify().ok
    assert under.verify().ok
    assert b"an object where the folder is" == storage.client.get_whole(storage.prefix)[0]


# H26: where a catalog says that snapshots lie


HOSTILE = [
    "http://{host}/latest/meta-data",
    "https://user:CANARY-1234@{host}/run?X-Amz-Signature=CANARY-1234",
    "simplecache::{root}/run",
    "{root}::http://{host}/x",
    "reference://{host}/x",
    "webhdfs://{host}/x",
    "memory://run",
]
MALFORMED = ["{scheme}://me:CANARY-1234@bucket/run", "{scheme}://bucket/run?X-Amz-Signature=CANARY-1234", "{root}/../run", "{root}//run"]


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with contextlib.closing(Catalog(tmp_path / "catalog" / "catalog.db")) as opened:
        yield opened


@pytest.mark.parametrize("url", [*HOSTILE, *MALFORMED])
def test_a_record_makes_nobody_connect_elsewhere(s3: Store, catalog: Catalog, url: str) -> None:
    """Whoever can write to a catalog chooses neither scheme nor server, credentials or folders above (H26)."""
    enter(catalog, id="a" * 32, url=url.format(host=s3.proxy.url.rpartition("/")[2], root=s3.root, scheme="s3"), host="")
    kind = errors.UntrustedLocationError if url in HOSTILE else errors.InvalidArgumentError
    for options in (None, s3.options):
        with pytest.raises(kind) as caught:
            Snapshot.find("aaaa", catalog=catalog, storage_options=options)
        assert "CANARY" not in "".join(traceback.format_exception(caught.value))
    for act in (lambda: catalog.delete("aaaa"), lambda: catalog.pin("aaaa"), catalog.gc, catalog.check, catalog.scan):
        with contextlib.suppress(errors.ExpstateError, errors.CatalogWarning):
            act()

    assert [] == s3.proxy.requests


def test_a_scheme_that_is_not_trusted_is_opened_when_the_setting_names_it(catalog: Catalog) -> None:
    url = f"memory://run-{uuid.uuid4().hex}/step-1"
    taken = Snapshot.take(url, few(1), name="mine", catalog=catalog)
    with pytest.raises(errors.UntrustedLocationError, match="EXPSTATE_SCHEMES"):
        Snapshot.find("mine", catalog=catalog)
    with settings.override(schemes="memory"):
        assert taken.id == Snapshot.find("mine", catalog=catalog).id


@pytest.mark.parametrize("scheme", ["s3a", "gcs"])
def test_other_names_of_trusted_schemes_are_trusted(buckets: dict[str, str], s3: Store, gs: Store, catalog: Catalog, scheme: str) -> None:
    """They lead where ``s3://`` and ``gs://`` do."""
    store = s3 if scheme == "s3a" else gs
    root = f"{scheme}://{store.root.partition('://')[2]}"
    configure(storage_options={root: store.options})
    taken = Snapshot.take(f"{root}/run-{uuid.uuid4().hex}", few(1), name="mine", catalog=catalog)

    assert taken.id == Snapshot.find("mine", catalog=catalog).id
    configure(storage_options={root: {}})
