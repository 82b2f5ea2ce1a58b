"""A bucket by obstore keeps what a client of an object store must keep, and nothing of what it is told in confidence gets out."""

from __future__ import annotations

import array
import contextlib
import mmap
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from expstate.errors import (
    ExpstateError,
    InvalidArgumentError,
    ManifestTooLargeError,
    NoSpaceError,
    StorageError,
    StoragePermissionError,
)
from expstate.storage.objects import obstore as module
from expstate.storage.objects.client import ABSENT, ObjectClient, TransientError
from expstate.storage.objects.obstore import ObstoreClient, client

from .faults import Action, Fault, Hang, Lost, Reset, Shrink, Status, Truncate, s3_error
from .proxy import FaultProxy
from .servers import SECRET, S3Server

MIB = 1 << 20
KEYS = [
    *("a b", "a+b", "a%b", "a%2Fb", "a#b", "a&b=c?d", "a~b*c", "a[b]{c}", "a'b\"c", "a:b;c,d@e!$", "a|b^c`d<e>"),
    *("größe/ñ", "e\u0301", "日本/語", "\U0001f600", "a.b/..c/d..", ".hidden"),
]
REFUSED_KEYS = ["a//b", "/a", "a/", ".", "a/../b", "a/./b", "a\nb", "a\x7fb"]

NOBODY = {"endpoint_url": "http://127.0.0.1:9", "anon": True}
# Seconds after which the client gives up where nothing will come.
IMPATIENT = {"config_kwargs": {"read_timeout": 0.3}}

METHODS: dict[str, Callable[[ObjectClient], object]] = {
    "put": lambda bucket: bucket.put("key", [b"data"]),
    "create": lambda bucket: bucket.put("key", [b"data"], condition=ABSENT),
    "get": lambda bucket: bucket.get("key", 0, 4),
    "get_whole": lambda bucket: bucket.get_whole("key"),
    "head": lambda bucket: bucket.head("key"),
    "write_id": lambda bucket: bucket.write_id("key"),
    "list": lambda bucket: list(bucket.list("")),
    "folders": lambda bucket: list(bucket.folders("")),
    "delete": lambda bucket: bucket.delete("key"),
    "copy": lambda bucket: bucket.copy(bucket, "key", "copy"),
}
of_each_method = pytest.mark.parametrize("ask", METHODS.values(), ids=METHODS)


@pytest.fixture
def bucket(s3_server: S3Server, s3_bucket: str) -> ObstoreClient:
    return client("s3", s3_bucket, s3_server.storage_options())


@pytest.fixture(scope="module")
def shared(s3_server: S3Server) -> Iterator[ObstoreClient]:
    """A bucket for all tests that need none of their own: it takes a while to make one."""
    s3_server.make_bucket("shared")
    yield client("s3", "shared", s3_server.storage_options())
    s3_server.remove_bucket("shared")


@pytest.fixture
def proxied(s3_server: S3Server, s3_bucket: str, s3_proxy: FaultProxy) -> ObstoreClient:
    """Through the proxy, with an object ``key``."""
    bucket = client("s3", s3_bucket, s3_server.storage_options(endpoint_url=s3_proxy.url))
    bucket.put("key", [b"data"])
    s3_proxy.requests.clear()
    return bucket


def pages(data: bytes) -> mmap.mmap:
    memory = mmap.mmap(-1, max(1, len(data)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[: len(data)] = data
    return memory


# Whole objects


@pytest.mark.parametrize(
    ("buffers", "expected"),
    [
        ([], b""),
        ([b"", memoryview(b"")], b""),
        ([b"ab"], b"ab"),
        ([b"ab", bytearray(b"cd"), memoryview(b"xefx")[1:3], b"", memoryview(pages(b"gh"))[:2]], b"abcdefgh"),
        ([memoryview(array.array("I", [1, 2]))], array.array("I", [1, 2]).tobytes()),
        ([memoryview(bytes(range(12))).cast("B", (3, 4))], bytes(range(12))),
        ([bytes(range(256)) * (5 * 4096)] * 2, bytes(range(256)) * (10 * 4096)),
    ],
    ids=["none", "empty", "one", "of all kinds", "of numbers", "with a shape", "large"],
)
def test_an_object_is_its_buffers_one_after_the_other(shared: ObstoreClient, buffers: list[Any], expected: bytes) -> None:
    shared.put("folder/key", buffers)

    assert expected == shared.get_whole("folder/key")[0]
    assert expected == bytes(shared.get("folder/key", 0, len(expected)))


@pytest.mark.parametrize("condition", [None, ABSENT])
def test_nobody_reads_the_buffers_after_a_put(bucket: ObstoreClient, condition: str | None) -> None:
    bucket.put("there", [b"data"])
    memory = pages(bytes(8 * MIB))
    # pytest.raises would keep the frames, and these what they were handed.
    with memoryview(memory) as view, contextlib.suppress(FileExistsError):
        bucket.put("there", [view[: 3 * MIB], view[3 * MIB :]], condition=condition)
        assert condition is None

    memory.close()  # would not be possible


def test_an_object_is_created_once(bucket: ObstoreClient) -> None:
    bucket.put("key", [b"first"], condition=ABSENT, write_id="first")
    with pytest.raises(FileExistsError, match="PreconditionFailed"):
        bucket.put("key", [b"second"], condition=ABSENT, write_id="second")

    assert b"first" == bucket.get_whole("key")[0]
    assert "first" == bucket.write_id("key")


def test_of_many_that_create_an_object_one_wins(bucket: ObstoreClient) -> None:
    def create(number: int) -> int | None:
        try:
            bucket.put("key", [b"%d" % number], condition=ABSENT)
        except (FileExistsError, TransientError):
            return None
        return number

    with ThreadPoolExecutor(8) as threads:
        winners = [number for number in threads.map(create, range(8)) if number is not None]

    assert 1 == len(winners)
    assert b"%d" % winners[0] == bucket.get_whole("key")[0]


def test_only_the_version_that_is_named_is_replaced(bucket: ObstoreClient) -> None:
    bucket.put("key", [b"first"])
    first = bucket.head("key").version
    bucket.put("key", [b"second"], condition=first)
    with pytest.raises(FileExistsError):
        bucket.put("key", [b"third"], condition=first)

    assert (b"second", bucket.head("key").version) == bucket.get_whole("key")


def test_what_is_gone_is_not_replaced(bucket: ObstoreClient) -> None:
    bucket.put("key", [b"first"])
    version = bucket.head("key").version
    bucket.delete("key")
    with pytest.raises(FileExistsError):
        bucket.put("key", [b"second"], condition=version)

    assert [] == list(bucket.list(""))


def test_what_aws_says_of_an_object_that_is_gone_is_a_condition_that_is_not_fulfilled(proxied: ObstoreClient, s3_proxy: FaultProxy) -> None:
    s3_proxy.add(Fault(s3_error(404, "NoSuchKey"), method="PUT"))

    with pytest.raises(FileExistsError):
        proxied.put("key", [b"second"], condition='"first"')
    with pytest.raises(FileNotFoundError):
        proxied.put("key", [b"second"])


def test_a_server_that_cannot_tell_is_asked_again(proxied: ObstoreClient, s3_proxy: FaultProxy) -> None:
    s3_proxy.add(Fault(s3_error(409, "ConditionalRequestConflict"), method="PUT"))

    with pytest.raises(TransientError, match="ConditionalRequestConflict"):
        proxied.put("other", [b"data"], condition=ABSENT)


def test_bytes_are_read_by_ranges(bucket: ObstoreClient) -> None:
    bucket.put("key", [bytes(range(100))])

    assert bytes(range(10, 20)) == bytes(bucket.get("key", 10, 20))
    assert bytes(range(90, 100)) == bytes(bucket.get("key", 90, 200))
    assert b"" == bytes(bucket.get("key", 100, 200))
    assert b"" == bytes(bucket.get("key", 500, 501))
    assert b"" == bytes(bucket.get("key", 50, 50))


def test_only_the_version_that_is_named_is_read(bucket: ObstoreClient) -> None:
    bucket.put("key", [b"first"])
    version = bucket.head("key").version

    assert b"irs" == bytes(bucket.get("key", 1, 4, version=version))
    bucket.put("key", [b"second"])
    with pytest.raises(FileExistsError):
        bucket.get("key", 1, 4, version=version)


def test_an_object_that_is_too_large_is_not_read(proxied: ObstoreClient, s3_proxy: FaultProxy) -> None:
    data = bytes(range(256)) * (64 * 1024)
    proxied.put("large", [data])

    assert data == proxied.get_whole("large", len(data))[0]
    with pytest.raises(ManifestTooLargeError, match=r"16,777,216 bytes.*16,777,215"):
        proxied.get_whole("large", len(data) - 1)
    assert s3_proxy.requests[-1].down < len(data)


def test_what_is_known_of_an_object(bucket: ObstoreClient) -> None:
    bucket.put("folder/key", [b"data"])
    info = bucket.head("folder/key")

    assert ("folder/key", 4) == (info.key, info.size)
    assert info.version == bucket.get_whole("folder/key")[1]
    assert abs(time.time() - info.modified_at) < 3600
    assert [info] == list(bucket.list("folder/"))


def test_the_write_id_stays_with_the_object(bucket: ObstoreClient) -> None:
    bucket.put("key", [b"data"])
    assert bucket.write_id("key") is None
    bucket.put("key", [], write_id="0123456789abcdef")

    assert "0123456789abcdef" == bucket.write_id("key")


def test_an_object_is_removed_once_or_more(bucket: ObstoreClient) -> None:
    bucket.put("key", [b"data"])
    bucket.put("key2", [b"data"])
    for _ in range(2):
        bucket.delete("key")

    assert ["key2"] == [info.key for info in bucket.list("")]


# Keys


@pytest.mark.parametrize("key", KEYS)
def test_a_key_may_have_any_characters(shared: ObstoreClient, key: str) -> None:
    folder = f"{uuid.uuid4()}/"
    key = f"{folder}{key}"
    shared.put(key, [key.encode()], condition=ABSENT, write_id="id")

    assert key.encode() == shared.get_whole(key)[0]
    assert key == shared.head(key).key
    assert "id" == shared.write_id(key)
    assert [key] == [info.key for info in shared.list(folder)]
    assert shared.copy(shared, key, f"{key} copy")
    assert {key, f"{key} copy"} == {info.key for info in shared.list(folder)}
    for one in (key, f"{key} copy"):
        shared.delete(one)
    assert [] == list(shared.list(folder))


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_a_key_that_obstore_would_change_is_refused(key: str) -> None:
    bucket = client("s3", "bucket", NOBODY)
    for ask in (
        lambda: bucket.put(key, [b"data"]),
        lambda: bucket.get(key, 0, 1),
        lambda: bucket.get_whole(key),
        lambda: bucket.head(key),
        lambda: bucket.write_id(key),
        lambda: bucket.delete(key),
        lambda: bucket.copy(bucket, "key", key),
        lambda: bucket.copy(bucket, key, "key"),
        lambda: bucket.folders(f"{key}/"),
        lambda: list(bucket.list(f"{key}/")),
    ):
        with pytest.raises(InvalidArgumentError, match="obstore cannot name"):
            ask()


def test_all_objects_are_listed(bucket: ObstoreClient) -> None:
    names = {f"many/{number % 3}/{number:04}" for number in range(1500)}
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: bucket.put(name, [b"data"]), sorted(names)))
    bucket.put("many1", [b"data"])
    bucket.put("other/many", [b"data"])

    assert names == {info.key for info in bucket.list("many/")}
    assert names | {"many1"} == {info.key for info in bucket.list("man")}
    assert {name for name in names if name.startswith("many/1/01")} == {info.key for info in bucket.list("many/1/01")}
    assert names | {"many1", "other/many"} == {info.key for info in bucket.list("")}
    assert [] == list(bucket.list("nothing/"))
    assert ["many", "other"] == sorted(bucket.folders(""))
    assert ["0", "1", "2"] == sorted(bucket.folders("many/"))
    assert [] == list(bucket.folders("nothing/"))


def test_a_listing_is_not_kept(bucket: ObstoreClient, s3_server: S3Server, s3_bucket: str) -> None:
    assert [] == list(bucket.list(""))
    client("s3", s3_bucket, s3_server.storage_options()).put("folder/key", [b"data"])

    assert ["folder/key"] == [info.key for info in bucket.list("")]
    assert ["folder"] == list(bucket.folders(""))


# Copies


def test_the_server_copies_within_a_bucket(bucket: ObstoreClient, s3_server: S3Server, s3_bucket: str) -> None:
    other = client("s3a", s3_bucket, s3_server.storage_options())
    bucket.put("key", [b"data"], write_id="id")

    assert bucket.store == other.store
    assert other.copy(bucket, "key", "copy")
    assert b"data" == other.get_whole("copy")[0]
    assert "id" == other.write_id("copy")


@pytest.mark.parametrize("change", [{"key": "another"}, {"token": "a-token"}, {"anon": True}, {"endpoint_url": "http://127.0.0.1:9"}])
def test_the_server_copies_nothing_for_others(shared: ObstoreClient, s3_server: S3Server, change: dict[str, Any]) -> None:
    other = client("s3", "shared", s3_server.storage_options(**change))

    assert shared.store != other.store
    assert not shared.copy(other, "key", "copy")
    assert not shared.copy(client("s3", "another", s3_server.storage_options()), "key", "copy")


@pytest.mark.parametrize("fault", [s3_error(501, "NotImplemented"), s3_error(400, "InvalidRequest"), Status(501)])
def test_a_server_that_cannot_copy_says_so(proxied: ObstoreClient, s3_proxy: FaultProxy, fault: Action) -> None:
    s3_proxy.add(Fault(fault, headers="x-amz-copy-source"))

    assert not proxied.copy(proxied, "key", "copy")


# What goes wrong


@pytest.mark.parametrize("name", ["get", "get_whole", "head", "write_id", "copy"])
def test_a_missing_object_is_not_found(shared: ObstoreClient, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="s3://shared/key"):
        METHODS[name](shared)


@pytest.mark.parametrize("name", ["get", "get_whole", "head", "write_id", "list", "folders"])
def test_a_missing_bucket_is_not_found(s3_server: S3Server, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="s3://no-such-bucket/"):
        METHODS[name](client("s3", "no-such-bucket", s3_server.storage_options()))


def test_nothing_is_removed_from_a_missing_bucket(proxied: ObstoreClient, s3_proxy: FaultProxy) -> None:
    s3_proxy.add(Fault(s3_error(404, "NoSuchBucket")))

    for ask in (METHODS["delete"], METHODS["put"], lambda bucket: bucket.put("key", [b"data"], condition='"first"')):
        with pytest.raises(FileNotFoundError, match="NoSuchBucket"):
            ask(proxied)


@of_each_method
@pytest.mark.parametrize("wrong", [{"secret": "wrong-secret"}, {"key": "WRONGKEY"}, {"anon": True}], ids=["secret", "key", "anon"])
def test_wrong_credentials_are_named_but_not_shown(
    shared: ObstoreClient, s3_server: S3Server, wrong: dict[str, Any], ask: Callable[[ObjectClient], object]
) -> None:
    with pytest.raises(StoragePermissionError, match=r"s3://shared/.* failed: 403.*check the credentials") as caught:
        ask(client("s3", "shared", s3_server.storage_options(**wrong)))

    text = "".join(traceback.format_exception(caught.value))
    assert not [secret for secret in ("wrong-secret", "WRONGKEY", SECRET) if secret in text + repr(caught.value)]


@of_each_method
def test_what_a_server_repeats_is_not_shown(s3_server: S3Server, s3_proxy: FaultProxy, ask: Callable[[ObjectClient], object]) -> None:
    keys = {"key": "THE-KEY-ID", "secret": "the-secret-key", "token": "the/session+token"}
    told = " ".join(keys.values())
    body = f"<Error><Code>SignatureDoesNotMatch</Code><Message>it is {told}.</Message><StringToSign>{told}</StringToSign></Error>"
    s3_proxy.add(Fault(Status(403, body.encode(), {"x-told": told})))
    # There is nothing but the status in the reply to a HEAD.
    with pytest.raises(StoragePermissionError, match=r"Forbidden|it is \*\*\* \*\*\* \*\*\*") as caught:
        ask(client("s3", "bucket", s3_server.storage_options(endpoint_url=s3_proxy.url, **keys)))

    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + repr(caught.value.__cause__)
    assert not [secret for secret in keys.values() if secret in shown]
    assert caught.value.__context__ is None
    assert "StringToSign" not in shown


def test_a_client_does_not_show_its_secrets(shared: ObstoreClient) -> None:
    connection = shared._connection
    shown = [repr(each) for each in (shared, shared.store, connection, shared._store, shared.url)]

    assert SECRET in connection.secrets
    assert not [text for text in shown if SECRET in text]


ERRORS: dict[str, tuple[Action, type[Exception], bool | None]] = {
    "reset": (Reset(), TransientError, False),
    "lost": (Lost(), TransientError, False),
    "hangs": (Hang(), TransientError, False),
    "400": (s3_error(400, "InvalidArgument"), StorageError, None),
    "400 late": (s3_error(400, "RequestTimeout"), TransientError, False),
    "400 damaged": (s3_error(400, "BadDigest"), TransientError, False),
    "400 expired": (s3_error(400, "ExpiredToken"), StoragePermissionError, None),
    "401": (Status(401), StoragePermissionError, None),
    "403": (Status(403), StoragePermissionError, None),
    "408": (Status(408), TransientError, False),
    "429": (Status(429), TransientError, True),
    "301": (Status(301), StoragePermissionError, None),
    "500": (s3_error(500, "InternalError"), TransientError, False),
    "501": (s3_error(501, "NotImplemented"), StorageError, None),
    "502": (Status(502, b"<html>Bad Gateway</html>"), TransientError, False),
    "503": (s3_error(503, "SlowDown"), TransientError, True),
    "503 of another": (Status(503, b"busy"), TransientError, True),
    "504": (Status(504), TransientError, False),
    "507": (Status(507), NoSpaceError, None),
}


@pytest.mark.parametrize(("fault", "kind", "is_throttled"), ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("name", ["put", "get", "list"])
def test_what_went_wrong_is_said_and_nothing_tried_again(
    s3_server: S3Server, s3_proxy: FaultProxy, name: str, fault: Action, kind: type[Exception], is_throttled: bool | None
) -> None:
    s3_proxy.add(Fault(fault))
    with pytest.raises(ExpstateError, match=r"s3://bucket/.* failed: ") as caught:
        METHODS[name](client("s3", "bucket", s3_server.storage_options(endpoint_url=s3_proxy.url, **IMPATIENT)))

    assert kind is type(caught.value)
    assert is_throttled == getattr(caught.value, "throttled", None)
    assert 1 == len(s3_proxy.requests)


@pytest.mark.parametrize("name", ["get", "get_whole"])
def test_a_reply_that_breaks_off_is_asked_for_again(proxied: ObstoreClient, s3_proxy: FaultProxy, name: str) -> None:
    s3_proxy.add(Fault(Truncate(), method="GET"))

    with pytest.raises(TransientError):
        METHODS[name](proxied)
    assert 1 == len(s3_proxy.requests)


def test_a_short_reply_is_handed_on(proxied: ObstoreClient, s3_proxy: FaultProxy) -> None:
    s3_proxy.add(Fault(Shrink(keep=3), method="GET"))

    assert b"dat" == bytes(proxied.get("key", 0, 4))


def test_a_page_of_a_listing_may_fail(proxied: ObstoreClient, s3_proxy: FaultProxy) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: proxied.put(f"many/{number}", [b"data"]), range(1200)))
    s3_proxy.add(Fault(s3_error(503, "SlowDown"), path="list-type", nth=2))
    listed = proxied.list("many/")
    with pytest.raises(TransientError, match="SlowDown") as caught:
        list(listed)

    assert caught.value.throttled


def test_nobody_answers() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        bucket = client("s3", "bucket", {"endpoint_url": f"http://127.0.0.1:{taken.getsockname()[1]}", "key": "key", "secret": "secret"})
        with pytest.raises(TransientError, match=r"Connection refused \(127\.0\.0\.1\)"):
            bucket.get("key", 0, 1)


def test_a_server_that_does_not_speak_tls_is_asked_once(s3_server: S3Server) -> None:
    bucket = client("s3", "bucket", s3_server.storage_options(endpoint_url=s3_server.url.replace("http:", "https:")))
    with pytest.raises(StorageError, match="InvalidMessage") as caught:
        bucket.get("key", 0, 1)

    assert not isinstance(caught.value, TransientError)


def test_a_panic_of_obstore_is_an_error() -> None:
    with pytest.raises(StorageError, match="panicked"):
        client("s3", "bucket", NOBODY).put("key", [b"data"], condition="no\nheader")


def test_an_interrupt_is_not_swallowed() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        module._try(interrupt)


def said(what: str, store: str = "S3", *, structure: str = "") -> str:
    return f"Generic {store} error: {what}\n\nDebug source:\nGeneric {{ {structure} }}"


REFUSED = "in 1ms - Server returned non-2xx status code:"
SAID: dict[str, tuple[str, type[Exception], str]] = {
    "no role": (
        said(f"Error performing PUT http://169.254.169.254/latest/api/token {REFUSED} 404 Not Found: <html>none</html>"),
        StoragePermissionError,
        r"169\.254\.169\.254 gives no credentials; check the credentials",
    ),
    "no token": (
        said(
            f"Error performing token request: Error performing POST https://oauth2.googleapis.com/token {REFUSED} 400 Bad Request: "
            '{"error":"invalid_grant","error_description":"Bad JWT"}',
            "GCS",
        ),
        StoragePermissionError,
        "invalid_grant: oauth2.googleapis.com gives no credentials",
    ),
    "another region": (
        said("Error performing GET https://b.s3.us-east-1.amazonaws.com/k in 1ms - Received redirect without LOCATION, this normally..."),
        StoragePermissionError,
        "elsewhere; check the region",
    ),
    "an error in a success": (
        said(
            "Error performing PUT http://a/b/k in 1ms - Server returned error response: <Error><Code>SlowDown</Code>"
            "<Message>Slow &amp; steady</Message></Error>"
        ),
        TransientError,
        "SlowDown: Slow & steady",
    ),
    "JSON of another form": (said(f'x {REFUSED} 400 Bad Request: {{"error": {{"a": 1}}}}', "GCS"), StorageError, "400 Bad Request"),
    "no JSON": (said(f"x {REFUSED} 400 Bad Request: {{a}}"), StorageError, "400 Bad Request"),
    "no ranges": (said("Received non-partial response when range requested"), StorageError, "non-partial"),
    "another range": (said("Requested 0..9, got 0..5", structure="UnexpectedRange {}"), TransientError, "Requested 0..9, got 0..5"),
}


@pytest.mark.parametrize(("text", "kind", "message"), SAID.values(), ids=SAID)
def test_what_obstore_says_is_read(text: str, kind: type[Exception], message: str) -> None:
    bucket = client("s3", "bucket", NOBODY)
    with pytest.raises(kind, match=message) as caught:
        raise bucket._error(module._failure(text), "reading", "key")

    assert kind is type(caught.value)


# Threads


def test_a_request_that_hangs_does_not_keep_the_interpreter(proxied: ObstoreClient, s3_proxy: FaultProxy) -> None:
    s3_proxy.add(Fault(Hang(), method="GET"))
    with ThreadPoolExecutor(4) as threads:
        hanging = [threads.submit(proxied.get, "key", 0, 4) for _ in range(4)]
        while len(s3_proxy.requests) < 4:
            time.sleep(0.01)
        proxied.put("other", [b"data"])
        s3_proxy.clear()

        assert [TransientError] * 4 == [type(future.exception()) for future in hanging]
    assert b"data" == proxied.get_whole("other")[0]


def test_many_threads_use_one_client(shared: ObstoreClient) -> None:
    def use(number: int) -> bool:
        data = bytes([number]) * (MIB + number)
        shared.put(f"threads/{number}", [memoryview(data)[:MIB], data[MIB:]])
        return data == bytes(shared.get(f"threads/{number}", 0, len(data)))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(use, range(24)))


# A server that answers early


@contextlib.contextmanager
def early_server(*, reads_on: bool) -> Iterator[str]:
    """One that refuses a put when it has its head, and then reads the rest or does not."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = threading.Event()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 412 Precondition Failed\r\nContent-Length: 0\r\n\r\n")
                connection.settimeout(0.1)  # the client may keep the connection for later
                while reads_on and not done.is_set():
                    with contextlib.suppress(TimeoutError):
                        if not connection.recv(1 << 20):
                            break
                done.wait()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield "http://{}:{}".format(*listener.getsockname())
        finally:
            done.set()
            thread.join()


@pytest.mark.parametrize("reads_on", [True, False])
def test_a_refusal_before_all_was_sent_is_told_when_nobody_reads_on(reads_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RELEASE_SECONDS", 60 if reads_on else 0.1)
    data = bytearray(64 * MIB)
    with early_server(reads_on=reads_on) as url:
        bucket = client("s3", "bucket", {"endpoint_url": url, "key": "key", "secret": "secret"})
        with pytest.raises(FileExistsError):
            bucket.put("key", [memoryview(data)], condition=ABSENT)
        expected = contextlib.nullcontext() if reads_on else pytest.raises(BufferError)
        with expected:
            data.append(0)
        del bucket
