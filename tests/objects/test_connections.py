"""From URLs and options to clients: which one serves, whose options count, what is refused, and that no secret is shown."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from expstate import Snapshot, configure, errors, settings
from expstate.notebook.place import Place
from expstate.storage.objects import connections
from expstate.storage.objects.storage import ObjectStorage
from expstate.storage.options import options_of
from expstate.storage.registry import open_storage

KEYS = {"key": "AKIDEXAMPLE", "secret": "wJalrXUtnFEMIexamplekey", "endpoint_url": "http://127.0.0.1:9"}


@pytest.fixture(autouse=True)
def _nothing_configured() -> Iterator[None]:
    yield
    configure(storage_options={"s3://bucket": {}, "s3://bucket/runs": {}, "s3://bucket/lab": {}})
    connections.close_all()


def name_of(storage: object) -> str:
    assert isinstance(storage, ObjectStorage)
    return type(storage.client).__name__


@pytest.mark.parametrize(
    ("transport", "options", "expected"),
    [
        ("", KEYS | {"client_kwargs": {"region_name": "us-east-1"}}, "ObstoreClient"),
        ("fsspec", KEYS, "S3Client"),
        ("obstore", KEYS | {"client_kwargs": {"region_name": "us-east-1"}}, "ObstoreClient"),
        ("", KEYS | {"profile": "lab"}, "S3Client"),
    ],
)
def test_obstore_serves_where_it_can(transport: str, options: dict[str, object], expected: str) -> None:
    with settings.override(transport=transport):
        assert expected == name_of(open_storage("s3://bucket/run", options))


def test_what_obstore_cannot_do_is_said_once_in_the_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_said", set())
    with caplog.at_level(logging.INFO, logger="expstate"):
        for bucket in ("one", "two"):
            open_storage(f"s3://{bucket}/run", KEYS | {"profile": "lab"})

    assert ["s3:// is reached by s3fs, because obstore cannot do what profile asks for"] == [one.getMessage() for one in caplog.records]


def test_obstore_alone_refuses_what_it_cannot_do() -> None:
    with settings.override(transport="obstore"), pytest.raises(errors.InvalidArgumentError, match="profile"):
        open_storage("s3://bucket/run", KEYS | {"profile": "lab"})


def test_the_longest_url_counts_and_options_that_are_passed_come_on_top() -> None:
    configure(storage_options={"s3://bucket": {"profile": "a", "anon": False}, "s3://bucket/runs": {"profile": "b"}})

    assert {"profile": "a", "anon": False} == options_of("s3://bucket/other", None)
    assert {"profile": "b"} == options_of("s3://bucket/runs/1", None)
    assert {"profile": "b", "key": "k"} == options_of("s3://bucket/runs", {"key": "k"})
    assert {} == options_of("s3://bucket2/runs", None)
    configure(storage_options={"s3://bucket/runs": {}})
    assert {"profile": "a", "anon": False} == options_of("s3://bucket/runs/1", None)


@pytest.mark.parametrize("given", [None, {"bucket": {}}, {"s3://bucket": 5}, {5: {}}])
def test_what_is_no_mapping_of_urls_is_refused(given: object) -> None:
    with pytest.raises(errors.InvalidArgumentError):
        configure(storage_options=given)


def test_one_client_serves_a_bucket_and_new_credentials_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with settings.override(transport="fsspec"):
        one, other = (open_storage(f"s3://bucket/{name}", KEYS) for name in ("a", "b"))
        assert isinstance(one, ObjectStorage)
        assert isinstance(other, ObjectStorage)
        assert one.client is other.client
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
        later = open_storage("s3://bucket/a", KEYS)
        assert isinstance(later, ObjectStorage)
        assert one.client is not later.client


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEY:SECRETSECRET@bucket/run",
        "s3://bucket/run?X-Amz-Signature=SECRETSECRET",
        "s3://bucket/../x",
        "s3://bucket//x",
        "gs://a::b/x",
    ],
)
def test_urls_with_credentials_or_ways_elsewhere_are_refused(url: str) -> None:
    with pytest.raises(errors.InvalidArgumentError) as caught:
        Snapshot(url)
    assert "SECRETSECRET" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["http", "reference", "simplecache", "local", "nowhere"])
def test_schemes_that_are_no_place_for_snapshots_are_refused(scheme: str) -> None:
    with pytest.raises(errors.UnsupportedSchemeError, match=f"{scheme}://"):
        Snapshot(f"{scheme}://host/run")


@pytest.mark.parametrize(
    "url", ["simplecache::s3://bucket/run", "filecache::gs://bucket/run", "zip://x::s3://bucket/run", "a::b::s3://c/d"]
)
def test_chained_urls_are_refused_and_are_no_folders_here(url: str) -> None:
    with pytest.raises((errors.InvalidArgumentError, errors.UnsupportedSchemeError)):
        open_storage(url)


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = connections.importlib.util.find_spec
    monkeypatch.setattr(connections.importlib.util, "find_spec", lambda name: None if name in {"obstore", "s3fs"} else real(name))
    with pytest.raises(errors.UnsupportedSchemeError, match=r"pip install 'expstate\[s3\]'"):
        open_storage("s3://bucket/run", KEYS)


@pytest.mark.parametrize("transport", ["fsspec", "obstore"])
def test_no_secret_is_shown(transport: str) -> None:
    options = KEYS | {"client_kwargs": {"region_name": "us-east-1"}}
    with settings.override(transport=transport, retry_seconds=0.2):
        snapshot = Snapshot("s3://bucket/run", storage_options=options)
        with pytest.raises(errors.StorageError) as caught:
            snapshot.keys()
        storage = open_storage("s3://bucket/run", options)
    shown = [repr(snapshot), str(snapshot), str(caught.value), repr(storage), str(settings.current())]
    assert isinstance(storage, ObjectStorage)
    assert all(KEYS["secret"] not in text for text in [*shown, repr(storage.client)])


def test_options_of_use_count_for_all_that_a_notebook_does_there() -> None:
    place = Place(SimpleNamespace(user_ns={}))
    place.use("s3://bucket/lab", {"profile": "lab"})

    assert {"profile": "lab"} == options_of(place.new(), None)
