"""A bucket of GCS by obstore: objects on a server that keeps no conditions, and conditions on one that keeps little else."""

from __future__ import annotations

import dataclasses
import http.server
import threading
import time
from collections.abc import Iterator
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from expstate.storage.objects.client import ABSENT
from expstate.storage.objects.obstore import CannotTranslateError, ObstoreClient, client
from expstate.storage.objects.obstore_options import translate

from .servers import MissingError, S3Server
from .test_obstore import KEYS, MIB


@pytest.fixture(scope="module")
def xml_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server that keeps objects for obstore's client for GCS, and no conditions."""
    try:
        server = S3Server(tmp_path_factory.mktemp("xml"), keys=False)
    except MissingError as error:
        pytest.skip(str(error))
    with server:
        yield server


def gcs_client(url: str, bucket: str) -> ObstoreClient:
    connection = translate("gs", bucket, {"token": "anon"})
    config, options = connection.config | {"base_url": url}, connection.client_options | {"allow_http": True}
    return ObstoreClient(f"gs://{bucket}", dataclasses.replace(connection, config=config, client_options=options))


def test_gcs_keeps_objects(xml_server: S3Server) -> None:
    xml_server.make_bucket("gcs-bucket")
    bucket = gcs_client(xml_server.url, "gcs-bucket")
    data = bytes(range(256)) * (8 * 1024)
    for key in KEYS:
        bucket.put(f"folder/{key}", [data[:MIB], memoryview(data)[MIB:]])

    assert {f"folder/{key}" for key in KEYS} == {info.key for info in bucket.list("folder/")}
    assert ["folder"] == list(bucket.folders(""))
    assert data[5:1000] == bytes(bucket.get("folder/a b", 5, 1000))
    assert data == bucket.get_whole("folder/a b")[0]
    assert len(data) == bucket.head("folder/a b").size
    for _ in range(2):
        bucket.delete("folder/a b")
    with pytest.raises(FileNotFoundError):
        bucket.head("folder/a b")


class _Gcs(http.server.BaseHTTPRequestHandler):
    """As little of GCS as tells what it is asked: generations, conditions on them, metadata, copies."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, tuple[int, bytes, dict[str, str]]]

    def do_PUT(self) -> None:
        key, data = self._key(), self.rfile.read(int(self.headers["Content-Length"]))
        source = self.headers["x-goog-copy-source"]
        condition = self.headers["x-goog-if-generation-match"]
        if condition is not None and int(condition) != self.objects.get(key, (0,))[0]:
            self._reply(412, b"<Error><Code>PreconditionFailed</Code><Message>no</Message><Details>not this one</Details></Error>")
            return
        meta = {name: value for name, value in self.headers.items() if name.lower().startswith("x-goog-meta-")}
        if source is not None:
            _, data, meta = self.objects[unquote(source)]
        self.objects[key] = (time.time_ns(), data, meta)
        self._reply(200)

    def do_GET(self) -> None:
        generation, data, _ = self.objects.get(self._key(), (0, b"", {}))
        wanted = parse_qs(urlsplit(self.path).query).get("generation", [str(generation)])
        if not generation or [str(generation)] != wanted:
            self._reply(404, b"<Error><Code>NoSuchKey</Code></Error>")
        elif (asked := self.headers["Range"]) is not None:
            start, last = map(int, asked.removeprefix("bytes=").split("-"))
            part = data[start : last + 1]
            self._reply(206, part, **{"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(data)}"})
        else:
            self._reply(200, data)

    do_HEAD = do_GET  # noqa: N815 - the name is that of http.server

    def do_DELETE(self) -> None:
        is_there = self.objects.pop(self._key(), None) is not None
        self._reply(204 if is_there else 404)

    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).removeprefix("/")

    def _reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        generation, _, meta = self.objects.get(self._key(), (0, b"", {}))
        known = {"ETag": f'"{generation}"', "Last-Modified": "Tue, 01 Sep 2026 00:00:00 GMT", "x-goog-generation": str(generation)}
        self.send_response(status)
        for name, value in {**known, **meta, **headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def gcs() -> Iterator[ObstoreClient]:
    handler = type("_Handler", (_Gcs,), {"objects": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield gcs_client("http://{}:{}".format(*server.server_address), "bucket")
        server.shutdown()
        thread.join()


def test_conditions_on_gcs_are_generations(gcs: ObstoreClient) -> None:
    gcs.put("folder/key", [b"first"], condition=ABSENT, write_id="id")
    first = gcs.head("folder/key").version
    with pytest.raises(FileExistsError, match="no not this one"):
        gcs.put("folder/key", [b"second"], condition=ABSENT)
    gcs.put("folder/key", [b"second"], condition=first, write_id="id2")
    with pytest.raises(FileExistsError):
        gcs.put("folder/key", [b"third"], condition=first)
    second = gcs.head("folder/key").version

    assert first.isdecimal()
    assert (b"second", second) == gcs.get_whole("folder/key")
    assert "id2" == gcs.write_id("folder/key")
    assert b"eco" == bytes(gcs.get("folder/key", 1, 4, version=second))
    with pytest.raises(FileNotFoundError):
        gcs.get("folder/key", 1, 4, version=first)


def test_gcs_copies_and_removes(gcs: ObstoreClient) -> None:
    gcs.put("folder/a b", [b"data"], write_id="id")

    assert gcs.copy(gcs, "folder/a b", "folder/copy")
    assert b"data" == gcs.get_whole("folder/copy")[0]
    assert "id" == gcs.write_id("folder/copy")
    for _ in range(2):
        gcs.delete("folder/copy")
    with pytest.raises(FileNotFoundError):
        gcs.head("folder/copy")


def test_an_account_that_obstore_cannot_read_is_for_gcsfs() -> None:
    account = {"type": "service_account", "client_email": "a@b", "private_key": "no key", "private_key_id": "id"}
    with pytest.raises(CannotTranslateError, match="token") as caught:
        client("gs", "bucket", {"token": account})

    assert caught.value.__context__ is None
