"""The proxy breaks what it is told to break, in the way it is told, and nothing else."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from typing import Any
from urllib.parse import urlsplit

import pytest

from .faults import Delay, Fault, Flip, Hang, Lost, Reset, Shrink, Status, Truncate, gcs_error, s3_error
from .proxy import FaultProxy
from .servers import GcsServer, S3Server, open_filesystem

DATA = bytes(range(256)) * 40
# Seconds after which a client gives up where nothing will come. Where something will, it waits as long as it takes.
PATIENCE = 0.3


class Client:
    """A client for GCS that tries nothing twice, with an object ``data`` in a new bucket."""

    def __init__(self, proxy: FaultProxy, bucket: str) -> None:
        self._address = urlsplit(proxy.url)
        self._bucket = bucket
        assert http.client.OK == self.put("data", DATA)[0]
        proxy.requests.clear()

    def connect(self, timeout: float = 60) -> contextlib.closing[http.client.HTTPConnection]:
        return contextlib.closing(http.client.HTTPConnection(self._address.hostname or "", self._address.port, timeout=timeout))

    def ask(self, method: str, target: str, body: Any = None, *, timeout: float = 60, **headers: str) -> tuple[int, dict[str, str], bytes]:
        with self.connect(timeout) as connection:
            connection.request(method, target, body, headers)
            with connection.getresponse() as reply:
                return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()

    def put(self, key: str, data: Any, **more: Any) -> tuple[int, dict[str, str], bytes]:
        return self.ask("POST", f"/upload/storage/v1/b/{self._bucket}/o?uploadType=media&name={key}", data, **more)

    def get(self, key: str = "data", **more: Any) -> bytes:
        status, _, body = self.ask("GET", f"/storage/v1/b/{self._bucket}/o/{key}?alt=media", **more)
        if status == http.client.NOT_FOUND:
            raise FileNotFoundError(key)
        return body


@pytest.fixture
def client(gcs_proxy: FaultProxy, gcs_bucket: str) -> Client:
    return Client(gcs_proxy, gcs_bucket)


def test_what_no_fault_hits_goes_by_and_is_noted(client: Client, gcs_proxy: FaultProxy) -> None:
    gcs_proxy.add(Fault(Reset(), method="DELETE"))
    gcs_proxy.add(Fault(Reset(), path="elsewhere"))
    gcs_proxy.add(Fault(Reset(), headers="^range:"))

    client.put("new%20key", DATA)
    assert DATA == client.get("new%20key")
    assert DATA == client.get()
    with pytest.raises(ConnectionError):
        client.get(Range="bytes=0-1")
    put, get, *_, ranged = gcs_proxy.requests
    assert ("POST", "uploadType=media&name=new%20key", 200, len(DATA), 0, None) == (put.method, put.query, put.status, put.up, 0, put.fault)
    assert ("GET", "alt=media", 200, 0, len(DATA)) == (get.method, get.query, get.status, get.up, get.down)
    assert get.path.endswith("/o/new key")
    assert ("bytes=0-1", 0, Reset()) == (ranged.headers["range"], ranged.status, ranged.fault.action)


def test_bodies_in_chunks_of_unknown_length_go_by(client: Client, gcs_proxy: FaultProxy) -> None:
    client.put("chunked", iter([DATA[:100], DATA[100:]]))

    assert "chunked" == gcs_proxy.requests[-1].headers["transfer-encoding"]
    assert DATA == client.get("chunked")


def test_a_reply_in_chunks_goes_by_and_can_be_broken(client: Client, gcs_proxy: FaultProxy) -> None:
    for number in range(20):
        client.put(f"key-{number}", b"")
    listing = f"/storage/v1/b/{client._bucket}/o"

    _, headers, whole = client.ask("GET", listing)
    assert "chunked" == headers["transfer-encoding"]
    assert 21 == len(json.loads(whole)["items"])
    gcs_proxy.add(Fault(Shrink(), times=1))
    assert whole[: len(whole) // 2] == client.ask("GET", listing)[2]
    gcs_proxy.add(Fault(Truncate(), times=1))
    with pytest.raises(http.client.IncompleteRead):
        client.ask("GET", listing)
    gcs_proxy.add(Fault(Flip(at=len(whole) - 1), times=1))
    assert whole[:-1] + bytes([whole[-1] ^ 1]) == client.ask("GET", listing)[2]


def test_a_connection_serves_many_requests_answered_by_either(client: Client, gcs_proxy: FaultProxy) -> None:
    gcs_proxy.add(Fault(gcs_error(429, "rateLimitExceeded", **{"Retry-After": "1"}), nth=2, times=2))
    replies = []
    with client.connect() as connection:
        for _ in range(5):
            connection.request("GET", f"/storage/v1/b/{client._bucket}/o/data?alt=media", DATA)
            with connection.getresponse() as reply:
                replies.append((reply.status, reply.headers["Retry-After"], len(reply.read())))
            socket = connection.sock
        assert socket is connection.sock

    assert [200, 429, 429, 200, 200] == [status for status, _, _ in replies]
    assert [None, "1", "1", None, None] == [after for _, after, _ in replies]
    assert (5, 2) == (gcs_proxy._faults[0].seen, gcs_proxy._faults[0].hits)


@pytest.mark.parametrize("slow", ["delay", "latency"])
def test_a_delay_holds_a_request_back_and_then_lets_it_go_its_way(client: Client, gcs_proxy: FaultProxy, slow: str) -> None:
    def hold(seconds: float) -> None:
        if slow == "delay":
            gcs_proxy.add(Fault(Delay(seconds)))
        else:
            gcs_proxy.latency = seconds

    hold(3600)
    with pytest.raises(TimeoutError):
        client.get(timeout=PATIENCE)
    gcs_proxy.clear()
    hold(0.01)
    assert DATA == client.get()
    gcs_proxy.add(Fault(Status(500)))
    assert 500 == client.put("other", b"")[0]


def test_a_reset_connection_has_brought_nothing_to_the_server(client: Client, gcs_proxy: FaultProxy) -> None:
    fault = gcs_proxy.add(Fault(Reset(), method="POST", times=1))

    with pytest.raises(ConnectionError):
        client.put("key", DATA)
    with pytest.raises(FileNotFoundError):
        client.get("key")
    client.put("key", DATA)
    assert DATA == client.get("key")
    assert (2, 1) == (fault.seen, fault.hits)


def test_a_lost_reply_has_been_preceded_by_the_deed(client: Client, gcs_proxy: FaultProxy) -> None:
    gcs_proxy.add(Fault(Lost(), method="POST"))

    with pytest.raises(http.client.RemoteDisconnected):
        client.put("key", DATA)
    assert DATA == client.get("key")


def test_a_status_is_answered_in_the_place_of_the_server(client: Client, gcs_proxy: FaultProxy) -> None:
    gcs_proxy.add(Fault(s3_error(503, "SlowDown"), method="POST"))
    gcs_proxy.add(Fault(Status(308), method="PUT"))

    status, headers, body = client.put("key", DATA)
    assert (503, "application/xml", str(len(body))) == (status, headers["content-type"], headers["content-length"])
    assert b"<Code>SlowDown</Code>" in body
    with pytest.raises(FileNotFoundError):
        client.get("key")
    assert (308, {"content-length": "0"}, b"") == client.ask("PUT", "/anything", DATA)
    gcs_proxy.clear()
    assert 200 == client.put("key", DATA)[0]
    assert DATA == client.get("key")


def test_a_client_that_asks_before_it_sends_its_body_is_answered(client: Client, gcs_proxy: FaultProxy) -> None:
    gcs_proxy.add(Fault(Status(500), nth=2))

    assert 200 == client.put("key", DATA, Expect="100-continue")[0]
    assert 500 == client.put("key", b"other", Expect="100-continue")[0]
    gcs_proxy.clear()
    assert DATA == client.get("key")


@pytest.mark.parametrize("keep", [None, 0, 1])
def test_a_truncated_reply_ends_before_its_length(client: Client, gcs_proxy: FaultProxy, keep: int | None) -> None:
    gcs_proxy.add(Fault(Truncate(keep), times=1))

    with pytest.raises(http.client.IncompleteRead) as caught:
        client.get()
    assert DATA[: len(DATA) // 2 if keep is None else keep] == caught.value.partial
    assert len(DATA) == len(caught.value.partial) + (caught.value.expected or 0)
    assert DATA == client.get()


@pytest.mark.parametrize("keep", [None, 0, 1])
def test_a_shrunk_reply_looks_whole(client: Client, gcs_proxy: FaultProxy, keep: int | None) -> None:
    gcs_proxy.add(Fault(Shrink(keep), times=1))

    assert DATA[: 100 if keep is None else keep] == client.get(Range="bytes=0-199")
    assert 206 == gcs_proxy.requests[-1].status
    assert DATA[:200] == client.get(Range="bytes=0-199")


@pytest.mark.parametrize("upload", [False, True], ids=["reply", "request"])
@pytest.mark.parametrize("at", [None, 0, len(DATA) - 1])
def test_a_flip_changes_one_bit(client: Client, gcs_proxy: FaultProxy, at: int | None, upload: bool) -> None:
    gcs_proxy.add(Fault(Flip(at, upload=upload), method="POST" if upload else "GET", times=1))

    client.put("key", DATA)
    flipped = client.get("key")
    place = len(DATA) // 2 if at is None else at
    assert DATA[:place] + bytes([DATA[place] ^ 1]) + DATA[place + 1 :] == flipped
    client.put("key", DATA)
    assert DATA == client.get("key")


@pytest.mark.parametrize("stored", [False, True])
def test_a_request_that_hangs_is_not_answered_until_the_proxy_is_healed(client: Client, gcs_proxy: FaultProxy, stored: bool) -> None:
    gcs_proxy.add(Fault(Hang(stored=stored), method="POST"))
    errors: list[BaseException] = []

    def put() -> None:
        try:
            client.put("key", DATA)
        except http.client.HTTPException as error:
            errors.append(error)

    with pytest.raises(TimeoutError):
        client.put("key", DATA, timeout=PATIENCE)
    thread = threading.Thread(target=put)
    thread.start()
    while len(gcs_proxy.requests) < 2:
        thread.join(0.01)
    assert thread.is_alive()
    gcs_proxy.clear()
    thread.join()
    assert [http.client.RemoteDisconnected] == [type(error) for error in errors]
    if stored:
        assert DATA == client.get("key")
    else:
        with pytest.raises(FileNotFoundError):
            client.get("key")


def test_signatures_hold_through_the_proxy_and_a_changed_upload_breaks_them(
    s3_server: S3Server, s3_bucket: str, s3_proxy: FaultProxy
) -> None:
    with open_filesystem("s3", **s3_server.storage_options(endpoint_url=s3_proxy.url)) as filesystem:
        filesystem.pipe_file(f"{s3_bucket}/key", DATA)
        assert DATA == filesystem.cat_file(f"{s3_bucket}/key")
        s3_proxy.requests.clear()
        s3_proxy.add(Fault(Flip(upload=True), times=1))
        filesystem.pipe_file(f"{s3_bucket}/key", DATA[1:])  # s3fs sends it once more
        assert DATA[1:] == filesystem.cat_file(f"{s3_bucket}/key")

    assert [400, 200] == [request.status for request in s3_proxy.requests if request.method == "PUT"]


def test_s3fs_tries_again_what_was_broken_once(s3_server: S3Server, s3_bucket: str, s3_proxy: FaultProxy) -> None:
    with open_filesystem("s3", **s3_server.storage_options(endpoint_url=s3_proxy.url)) as filesystem:
        for action in (Reset(), Lost(), s3_error(500, "InternalError")):
            fault = s3_proxy.add(Fault(action, method="PUT", times=1))
            filesystem.pipe_file(f"{s3_bucket}/key", DATA)
            assert 1 == fault.hits
            assert DATA == filesystem.cat_file(f"{s3_bucket}/key")


def test_closing_the_proxy_lets_go_of_what_hangs(gcs_server: GcsServer, gcs_bucket: str) -> None:
    with FaultProxy(gcs_server.url) as proxy:
        client = Client(proxy, gcs_bucket)
        proxy.add(Fault(Hang()))
        with client.connect() as connection:
            connection.request("GET", "/")
            while not proxy.requests:
                threading.Event().wait(0.01)
            proxy.close()
            with pytest.raises(http.client.RemoteDisconnected):
                connection.getresponse()
            assert not proxy._thread.is_alive()
