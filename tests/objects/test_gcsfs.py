"""The client by gcsfs keeps what is asked of clients, on fake-gcs-server."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest

from expstate.errors import InvalidArgumentError, NoSpaceError, StoragePermissionError
from expstate.storage.objects.client import ABSENT, ObjectClient, TransientError

pytest.importorskip("gcsfs")

import google.auth.exceptions
import google.oauth2.credentials

from expstate.storage.objects.gcsfs import client

from .client_tests import MIB, SECRET, ClientTests, FaultTests, fails
from .faults import Fault, Flip, Status, gcs_error
from .proxy import FaultProxy
from .servers import GcsServer


class TestGcsfs(ClientTests, FaultTests):
    compares_versions = False  # the server does not; what is sent is looked at below
    tells_buckets = False
    opens_in = """
        from expstate.storage.objects.gcsfs import client as open_client
        client = open_client("gs", {bucket!r}, {options!r})
    """

    @pytest.fixture
    def bucket(self, gcs_bucket: str) -> str:
        return gcs_bucket

    @pytest.fixture
    def options(self, gcs_server: GcsServer) -> dict[str, Any]:
        return gcs_server.storage_options()

    @pytest.fixture
    def proxy(self, gcs_proxy: FaultProxy) -> FaultProxy:
        return gcs_proxy

    def open(self, bucket: str, options: dict[str, Any]) -> ObjectClient:
        return client("gs", bucket, options)

    def error(self, code: int, name: str) -> Status:
        return gcs_error(code, name)

    def impatient(self, options: dict[str, Any]) -> dict[str, Any]:
        return {**options, "requests_timeout": 1}

    # Conditions

    def test_conditions_are_sent_as_generations(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        version = proxied.head("key").version
        assert version.isdecimal()
        proxy.requests.clear()
        proxied.put("new", [b"data"], condition=ABSENT)
        proxied.put("key", [b"0123456789"], condition=version)
        proxied.delete("key", version="123")
        assert ["ifGenerationMatch=0", f"ifGenerationMatch={version}", "ifGenerationMatch=123"] == [
            part for request in proxy.requests for part in request.query.split("&") if part.startswith("if")
        ]

    @pytest.mark.parametrize("what", ["put", "delete", "get"])
    def test_a_condition_that_is_not_fulfilled_is_told(self, proxied: ObjectClient, proxy: FaultProxy, what: str) -> None:
        actions = {
            "put": lambda: proxied.put("key", [b"data"], condition="123"),
            "delete": lambda: proxied.delete("key", version="123"),
            "get": lambda: proxied.get("key", 0, 5, version="123"),
        }
        proxy.add(Fault(gcs_error(412, "conditionNotMet")))
        assert "412 conditionNotMet" in str(fails(actions[what], FileExistsError))
        assert len(proxy.requests) == 1

    # What the server says that it has stored

    @pytest.mark.parametrize("wrong", [{"size": "3"}, {"crc32c": "AAAAAA=="}, {"size": "3", "crc32c": "AAAAAA=="}])
    def test_what_the_server_has_stored_otherwise_is_removed(self, proxied: ObjectClient, proxy: FaultProxy, wrong: dict[str, str]) -> None:
        proxied.put("new", [b"data"])  # what a server with other bytes would have
        generation = proxied.head("new").version
        said = {"name": "new", "size": "4", "crc32c": "rth90Q==", "generation": generation} | wrong
        proxy.add(Fault(Status(200, json.dumps(said).encode(), {"Content-Type": "application/json"}), method="POST"))
        proxy.requests.clear()
        error = fails(lambda: proxied.put("new", [b"data"]), TransientError)
        assert all(name in str(error) for name in wrong)
        assert [(request.method, request.query) for request in proxy.requests][1:] == [("DELETE", f"ifGenerationMatch={generation}")]
        fails(lambda: proxied.head("new"), FileNotFoundError)

    @pytest.mark.parametrize("said", [b"", b"{}", b"null", b"[]", b'{"name": "new"}'])
    def test_a_server_that_does_not_say_what_it_has_stored_is_not_believed(
        self, proxied: ObjectClient, proxy: FaultProxy, said: bytes
    ) -> None:
        proxy.add(Fault(Status(200, said, {"Content-Type": "application/json"}), method="POST"))
        fails(lambda: proxied.put("new", [b"data"]), TransientError)

    def test_an_upload_that_is_said_to_be_incomplete_is_none(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        proxy.add(Fault(Status(308), method="POST"))
        with pytest.raises(OSError, match="308"):
            proxied.put("new", [b"data"])

    def test_a_bit_that_turns_on_the_way_is_not_stored(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        proxy.add(Fault(Flip(upload=True), method="POST"))
        fails(lambda: proxied.put("new", [bytes(MIB)], condition=ABSENT), TransientError)
        proxy.clear()
        fails(lambda: proxied.head("new"), FileNotFoundError)

    def test_a_bit_that_turns_on_the_way_does_not_cost_what_was_there(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        """The server here stores it all the same, in the place of what was to be replaced."""
        proxied.put("new", [b"before"])
        version = proxied.head("new").version
        proxy.add(Fault(Flip(upload=True), method="POST", times=1))
        proxied.put("new", [bytes(MIB)], condition=version)
        assert proxied.get_whole("new")[0] == bytes(MIB)
        fails(lambda: proxied.put("new", [b"data"], condition=version), FileExistsError)

    def test_an_object_that_is_stored_under_another_name_is_removed(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        proxied.put("else", [b"data"])
        said = {"name": "else", "size": "4", "crc32c": "rth90Q==", "generation": proxied.head("else").version}
        proxy.add(Fault(Status(200, json.dumps(said).encode(), {"Content-Type": "application/json"}), method="POST"))
        assert "another name" in str(fails(lambda: proxied.put("new", [b"data"]), TransientError))
        fails(lambda: proxied.head("else"), FileNotFoundError)

    def test_without_the_fast_checksum_another_is_compared(
        self, proxied: ObjectClient, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("google_crc32c.implementation", "python")
        proxied.put("new", [b"da", b"ta"])
        assert proxied.get_whole("new")[0] == b"data"
        proxy.add(Fault(Flip(upload=True), method="POST"))
        assert "md5Hash" in str(fails(lambda: proxied.put("new", [bytes(MIB)]), TransientError))

    def test_an_object_is_one_request_whatever_its_size(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        assert proxied.least_part_bytes is None
        data = memoryview(bytearray(b"0123456789abcdef" * (4 * MIB)))
        proxied.put("new", [data, data[: MIB + 1]], write_id="id")
        assert len(proxy.requests) == 1
        assert proxied.head("new").size == 65 * MIB + 1
        assert bytes(proxied.get("new", 64 * MIB - 8, 64 * MIB + 8)) == b"89abcdef01234567"

    # What it says when it does not

    def test_too_many_requests_may_be_said_as_a_403(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        proxy.add(Fault(gcs_error(403, "rateLimitExceeded")))
        assert fails(lambda: proxied.head("key"), TransientError).throttled

    def test_a_full_quota_is_told(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        proxy.add(Fault(gcs_error(403, "quotaExceeded")))
        fails(lambda: proxied.put("new", [b"data"]), NoSpaceError)

    @pytest.mark.parametrize(
        "body", [b"", b"plain words", b"<html>", b'{"error": "words"}', b'{"error": {}}', b'{"error": {"errors": []}}', b"\xff"]
    )
    def test_an_error_may_be_worded_in_any_way(self, proxied: ObjectClient, proxy: FaultProxy, body: bytes) -> None:
        proxy.add(Fault(Status(500, body)))
        assert "500" in str(fails(lambda: proxied.head("key"), TransientError))

    def test_a_server_that_does_not_know_ranges_sends_all(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        proxy.add(Fault(Status(200, b"0123456789"), method="GET"))
        assert bytes(proxied.get("key", 3, 7)) == b"3456"
        assert bytes(proxied.get("key", 3, 70)) == b"3456789"
        assert bytes(proxied.get("key", 30, 70)) == b""

    # Options

    def test_a_copy_goes_on_until_it_is_done(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        half = json.dumps({"done": False, "rewriteToken": "token/1"}).encode()
        proxy.add(Fault(Status(200, half, {"Content-Type": "application/json"}), times=1))
        assert proxied.copy(proxied, "key", "copy")
        assert [request.query for request in proxy.requests] == ["", "rewriteToken=token%2F1"]
        assert proxied.write_id("copy") == "id"

    def test_who_pays_is_sent(self, bucket: str, options: dict[str, Any], proxy: FaultProxy) -> None:
        own = {"requester_pays": "payer", "endpoint_url": proxy.url, "session_kwargs": {"headers": {"X-Mine": "yes"}}}
        with contextlib.closing(client("gs", bucket, {**options, **own})) as paying:
            paying.put("key", [b"data"])
            paying.get("key", 0, 4)
            assert all("userProject=payer" in request.query and request.headers["x-mine"] == "yes" for request in proxy.requests)

    def test_credentials_are_sent_and_renewed_outside_the_loop(self, bucket: str, options: dict[str, Any], proxy: FaultProxy) -> None:
        token = google.oauth2.credentials.Credentials(SECRET)
        with contextlib.closing(client("gs", bucket, {**options, "token": token, "endpoint_url": proxy.url})) as known:
            known.put("key", [b"data"])
            assert {request.headers["authorization"] for request in proxy.requests} == {f"Bearer {SECRET}"}
            proxy.add(Fault(gcs_error(401, "authError")))
            assert "credentials" in str(fails(lambda: known.head("key"), StoragePermissionError))

    def test_credentials_that_cannot_be_renewed_are_told(self, bucket: str, options: dict[str, Any]) -> None:
        token = google.oauth2.credentials.Credentials(None)
        with contextlib.closing(client("gs", bucket, {**options, "token": token})) as expired:
            assert "credentials" in str(fails(lambda: expired.put("key", [b"data"]), StoragePermissionError))

    def test_options_that_do_not_fit_are_told(self, bucket: str, options: dict[str, Any]) -> None:
        for wrong in ({"access": "everything"}, {"session_kwargs": {"colour": SECRET}}, {"token": 5}):
            with contextlib.closing(client("gs", bucket, {**options, **wrong})) as mistaken:
                fails(lambda: mistaken.head("key"), InvalidArgumentError)

    def test_a_url_has_no_password(self) -> None:
        with pytest.raises(InvalidArgumentError, match="storage_options") as caught:
            client("gs", f"me:{SECRET}@bucket", {})
        assert SECRET not in str(caught.value)
