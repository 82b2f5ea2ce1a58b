"""The client by s3fs keeps what is asked of clients, on SeaweedFS."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from expstate.errors import InvalidArgumentError, StorageError, StoragePermissionError
from expstate.storage.objects.client import ABSENT, ObjectClient, TransientError

pytest.importorskip("s3fs")

from expstate.storage.objects.loop import Loop
from expstate.storage.objects.s3fs import S3Client, client

from .client_tests import MIB, SECRET, ClientTests, FaultTests, fails, interrupted
from .faults import Delay, Fault, Flip, Lost, Status, s3_error
from .proxy import FaultProxy
from .servers import S3Server

PART = S3Client.least_part_bytes


class TestS3fs(ClientTests, FaultTests):
    makes_buckets = True
    opens_in = """
        from expstate.storage.objects.s3fs import client as open_client
        client = open_client("s3", {bucket!r}, {options!r})
    """

    @pytest.fixture
    def bucket(self, s3_bucket: str) -> str:
        return s3_bucket

    @pytest.fixture
    def options(self, s3_server: S3Server) -> dict[str, Any]:
        return s3_server.storage_options()

    @pytest.fixture
    def proxy(self, s3_proxy: FaultProxy) -> FaultProxy:
        return s3_proxy

    def open(self, bucket: str, options: dict[str, Any]) -> ObjectClient:
        return client("s3", bucket, options)

    def error(self, code: int, name: str) -> Status:
        return s3_error(code, name)

    def impatient(self, options: dict[str, Any]) -> dict[str, Any]:
        return {**options, "config_kwargs": {"read_timeout": 1}}

    # Options

    def test_the_credentials_must_be_right(self, bucket: str, options: dict[str, Any]) -> None:
        for wrong in (
            {"secret": SECRET},
            {"key": "AKIA-NOBODY-OF-THIS-NAME", "secret": SECRET},
            {"key": None, "secret": None, "anon": True},
        ):
            with contextlib.closing(client("s3", bucket, {**options, **wrong})) as stranger:
                for action in (
                    lambda: stranger.put("key", [b"data"]),
                    lambda: stranger.get("key", 0, 1),
                    lambda: stranger.head("key"),
                    lambda: stranger.list(""),
                    lambda: stranger.begin_upload("key"),
                ):
                    assert "credentials" in str(fails(action, StoragePermissionError))

    def test_without_credentials_the_message_says_so(self, bucket: str, options: dict[str, Any]) -> None:
        with contextlib.closing(client("s3", bucket, {**options, "key": None, "secret": None})) as nobody:
            assert "credentials" in str(fails(lambda: nobody.put("key", [b"data"]), StoragePermissionError))

    def test_options_that_s3fs_does_not_know_are_named(self, bucket: str, options: dict[str, Any]) -> None:
        for wrong in ({"colour": SECRET}, {"config_kwargs": {"colour": SECRET}}, {"client_kwargs": {"colour": SECRET}}):
            with contextlib.closing(client("s3", bucket, {**options, **wrong})) as mistaken:
                assert "colour" in str(fails(lambda: mistaken.head("key"), InvalidArgumentError))

    def test_an_endpoint_with_a_password_is_not_shown(self, bucket: str, options: dict[str, Any]) -> None:
        with contextlib.closing(client("s3", bucket, {**options, "endpoint_url": f"http://me:{SECRET}@127.0.0.1:1"})) as mistaken:
            with pytest.raises(StorageError) as caught:
                mistaken.head("key")
            assert SECRET not in str(caught.value)
            assert caught.value.__context__ is None

    def test_a_url_has_no_password(self) -> None:
        with pytest.raises(InvalidArgumentError, match="storage_options") as caught:
            client("s3", f"me:{SECRET}@bucket", {})
        assert SECRET not in str(caught.value)

    def test_the_users_own_settings_win(self, bucket: str, options: dict[str, Any], proxy: FaultProxy) -> None:
        own = {"config_kwargs": {"retries": {"max_attempts": 2, "mode": "standard"}}, "endpoint_url": proxy.url}
        with contextlib.closing(client("s3", bucket, {**options, **own})) as persistent:
            proxy.add(Fault(s3_error(500, "InternalError")))
            fails(lambda: persistent.head("key"), TransientError)
            assert len(proxy.requests) > 1

    def test_what_the_user_adds_to_requests_is_sent(self, bucket: str, options: dict[str, Any], proxy: FaultProxy) -> None:
        own = {
            "s3_additional_kwargs": {"StorageClass": "STANDARD", "Metadata": {"mine": "yes"}},
            "requester_pays": True,
            "endpoint_url": proxy.url,
        }
        with contextlib.closing(client("s3", bucket, {**options, **own})) as adding:
            adding.put("key", [b"data"], write_id="id")
            assert adding.write_id("key") == "id"
            sent = proxy.requests[0].headers
            assert (sent["x-amz-storage-class"], sent["x-amz-meta-mine"], sent["x-amz-request-payer"]) == ("STANDARD", "yes", "requester")

    def test_no_put_waits_for_leave_to_send(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        proxied.put("new", [b"data"])
        assert "expect" not in proxy.requests[0].headers

    def test_a_bit_that_turns_on_the_way_is_not_stored(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        proxy.add(Fault(Flip(upload=True), method="PUT"))
        fails(lambda: proxied.put("new", [bytes(MIB)]), TransientError)
        proxy.clear()
        fails(lambda: proxied.head("new"), FileNotFoundError)

    def test_a_version_that_is_gone_is_not_replaced(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        """AWS says 404 where other servers say 412."""
        proxy.add(Fault(s3_error(404, "NoSuchKey"), method="PUT"))
        fails(lambda: proxied.put("key", [b"data"], condition='"version"'), FileExistsError)
        fails(lambda: proxied.put("key", [b"data"]), FileNotFoundError)

    def test_a_condition_that_a_server_does_not_know_is_not_sent_again(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        proxy.add(Fault(s3_error(501, "NotImplemented"), method="DELETE", headers="if-match"))
        proxied.delete("key", version='"version"')
        assert [request.method for request in proxy.requests] == ["DELETE", "DELETE"]
        assert not list(proxied.list(""))

    def test_a_server_that_does_not_know_ranges_sends_all(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        proxy.add(Fault(Status(200, b"0123456789"), method="GET"))
        assert bytes(proxied.get("key", 3, 7)) == b"3456"
        assert bytes(proxied.get("key", 3, 70)) == b"3456789"
        assert bytes(proxied.get("key", 30, 70)) == b""

    # In parts

    def test_an_object_is_made_of_parts_in_any_order(self, client: ObjectClient) -> None:
        upload = client.begin_upload("folder/key")
        assert [(found.key, found.upload_id) for found in client.uploads("folder/")] == [("folder/key", upload)]
        assert not list(client.uploads("other/"))
        parts = {number: client.put_part("folder/key", upload, number, [bytes([number]) * PART, b"!"]) for number in (3, 1, 2)}
        assert not list(client.list(""))
        client.finish_upload("folder/key", upload, parts)
        assert client.get_whole("folder/key")[0] == b"".join(bytes([number]) * PART + b"!" for number in (1, 2, 3))
        assert not list(client.uploads(""))

    def test_an_upload_is_thrown_away(self, client: ObjectClient) -> None:
        upload = client.begin_upload("key")
        client.put_part("key", upload, 1, [b"data"])
        client.abort_upload("key", upload)
        client.abort_upload("key", upload)
        assert not list(client.uploads(""))
        assert not list(client.list(""))
        fails(lambda: client.put_part("key", upload, 1, [b"data"]), FileNotFoundError)

    def test_uploads_are_listed_page_by_page(self, client: ObjectClient) -> None:
        begun = {client.begin_upload(f"key-{number % 300}") for number in range(1050)}
        assert begun == {found.upload_id for found in client.uploads("key")}

    def test_parts_are_sent_once(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        upload = proxied.begin_upload("new")
        part = proxied.put_part("new", upload, 1, [b"data"])
        proxy.add(Fault(s3_error(500, "InternalError")))
        for action in (
            lambda: proxied.begin_upload("new"),
            lambda: proxied.put_part("new", upload, 1, [b"data"]),
            lambda: proxied.finish_upload("new", upload, {1: part}),
            lambda: proxied.abort_upload("new", upload),
            lambda: proxied.uploads(""),
        ):
            proxy.requests.clear()
            fails(action, TransientError)
            assert len(proxy.requests) == 1

    def test_an_error_in_a_reply_that_says_200_is_one(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        upload = proxied.begin_upload("new")
        part = proxied.put_part("new", upload, 1, [b"data"])
        proxy.add(Fault(Status(200, s3_error(200, "InternalError").body, {"Content-Type": "application/xml"})))
        fails(lambda: proxied.finish_upload("new", upload, {1: part}), TransientError)
        fails(lambda: proxied.copy(proxied, "key", "copy"), TransientError)

    def test_no_part_appears_after_an_interrupt(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        upload = proxied.begin_upload("new")
        proxy.add(Fault(Delay(1), method="PUT"))
        interrupted(lambda: proxied.put_part("new", upload, 1, [bytes(PART)]), 0.3)
        proxy.clear()
        proxied.abort_upload("new", upload)
        assert not list(proxied.uploads(""))

    def test_a_lost_reply_to_the_end_of_an_upload_leaves_the_object(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        upload = proxied.begin_upload("new")
        part = proxied.put_part("new", upload, 1, [b"data"])
        proxy.add(Fault(Lost(), method="POST"))
        fails(lambda: proxied.finish_upload("new", upload, {1: part}), TransientError)
        proxy.clear()
        assert proxied.get_whole("new")[0] == b"data"

    def test_a_conflict_is_not_taken_for_an_object_that_exists(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        proxy.add(Fault(s3_error(409, "ConditionalRequestConflict"), headers="if-none-match"))
        fails(lambda: proxied.put("new", [b"data"], condition=ABSENT), TransientError)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificate and the key of a server at ``localhost``, in one file."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(timezone.utc)
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - timedelta(1), now + timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("certificate") / "localhost.pem"
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(built.public_bytes(serialization.Encoding.PEM) + secret)
    return path


class TestS3fsOverTls:
    """As with Amazon: bodies in chunks with the checksum behind them, through a proxy that breaks things behind the encryption."""

    @pytest.fixture
    def url(self, certificate: Path, s3_proxy: FaultProxy) -> Iterator[str]:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)

        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while piece := await reader.read(1 << 18):
                    writer.write(piece)
                    await writer.drain()
            writer.close()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", urlsplit(s3_proxy.url).port)
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(pump(reader, other_writer), pump(other_reader, writer))
            writer.transport.abort()
            other_writer.transport.abort()

        with contextlib.closing(Loop("tls")) as loop:
            server = loop.run(lambda: asyncio.start_server(serve, "127.0.0.1", 0, ssl=context))
            yield f"https://localhost:{server.sockets[0].getsockname()[1]}"
            loop.run(lambda: _close(server))

    @pytest.fixture
    def client(self, s3_server: S3Server, s3_bucket: str, url: str, certificate: Path) -> Iterator[ObjectClient]:
        options = s3_server.storage_options(endpoint_url=url)
        options["client_kwargs"] = {**options["client_kwargs"], "verify": str(certificate)}
        with contextlib.closing(client("s3", s3_bucket, options)) as safe:
            yield safe

    def test_bodies_arrive_with_their_checksum(self, client: ObjectClient, s3_proxy: FaultProxy) -> None:
        data = memoryview(random.randbytes(9 * MIB))
        client.put("key", [data[:100], data[100 : 3 * MIB], b"", data[3 * MIB :]], condition=ABSENT, write_id="id")
        (request,) = s3_proxy.requests
        assert "aws-chunked" in request.headers["content-encoding"]
        assert request.headers["x-amz-trailer"] == "x-amz-checksum-crc32"
        assert bytes(client.get("key", 0, 9 * MIB)) == data
        assert client.get_whole("key")[0] == data
        assert client.write_id("key") == "id"
        fails(lambda: client.put("key", [data], condition=ABSENT), FileExistsError)
        client.put("empty", [])
        assert client.head("empty").size == 0
        upload = client.begin_upload("parts")
        client.finish_upload("parts", upload, {1: client.put_part("parts", upload, 1, [data])})
        assert client.get_whole("parts")[0] == data

    def test_a_bit_that_turns_behind_the_encryption_is_not_stored(self, client: ObjectClient, s3_proxy: FaultProxy) -> None:
        s3_proxy.add(Fault(Flip(at=1000, upload=True), method="PUT"))
        fails(lambda: client.put("key", [bytes(MIB)]), TransientError)
        s3_proxy.clear()
        fails(lambda: client.head("key"), FileNotFoundError)

    def test_nothing_appears_after_an_interrupt(self, client: ObjectClient, s3_proxy: FaultProxy) -> None:
        client.put("key", [b"data"])
        s3_proxy.add(Fault(Delay(1.5), method="PUT"))
        interrupted(lambda: client.put("new", [bytes(32 * MIB)]))
        s3_proxy.clear()
        time.sleep(2)
        assert [info.key for info in client.list("")] == ["key"]

    def test_a_server_that_cannot_be_trusted_is_not_tried_again(self, s3_server: S3Server, s3_bucket: str, url: str) -> None:
        with contextlib.closing(client("s3", s3_bucket, s3_server.storage_options(endpoint_url=url))) as wary:
            assert "certificate" in str(fails(lambda: wary.put("key", [b"data"]), StorageError))


async def _close(server: asyncio.Server) -> None:
    server.close()
