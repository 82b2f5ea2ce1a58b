"""Buckets of Google Cloud Storage by gcsfs: its options, credentials and session, and one request of the JSON API a call.

Gets a bucket and storage options as gcsfs takes them; hands on bytes and our errors. An object of any size is put by one request, and its
size and checksum are compared with what the server says that it has stored.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import uuid
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote, urlencode

import aiohttp
import google_crc32c
from yarl import URL

from expstate.errors import InvalidArgumentError, StorageError
from expstate.storage.objects.body import Body
from expstate.storage.objects.client import ABSENT, WRITE_ID, ObjectClient, ObjectInfo, TransientError
from expstate.storage.objects.failures import RefusedError
from expstate.storage.objects.fsspec import FsspecClient
from expstate.storage.objects.replies import filled, is_past_end, joined

# Else gcsfs asks what kind each bucket is, which takes a minute where an endpoint does not know that question.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
from gcsfs.core import GCSFileSystem  # type: ignore[import-untyped, unused-ignore] # it has no types

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence

    from expstate.storage.objects.client import Buffer

_CONNECT_SECONDS = 10
_READ_SECONDS = 60
_HASH_BYTES = 1 << 20
_MOST_SAID_BYTES = 1 << 16
_FIELDS = "name,size,updated,timeCreated,generation"


def client(scheme: str, bucket: str, storage_options: Mapping[str, Any]) -> GcsClient:
    """The client of a bucket. Nothing is read yet, and no connection is made.

    Parameters
    ----------
    scheme : str
        For messages: ``"gs"`` or ``"gcs"``.
    bucket : str
        Its name.
    storage_options : mapping
        As ``gcsfs.GCSFileSystem`` takes them: ``token``, ``project``, ``endpoint_url``, ``session_kwargs`` and so on.

    Raises
    ------
    InvalidArgumentError
        If the bucket's name has a user's name or a password before it.
    """
    if "@" in bucket:
        msg = f"{scheme}:// takes no user and password in the URL; pass storage_options with token"
        raise InvalidArgumentError(msg)
    return GcsClient(scheme, bucket, storage_options)


class GcsClient(FsspecClient):
    """A bucket by gcsfs.

    Parameters
    ----------
    scheme, bucket, storage_options
        As for ``client``.
    """

    def __init__(self, scheme: str, bucket: str, storage_options: Mapping[str, Any]) -> None:
        super().__init__(scheme, bucket, storage_options)
        self.is_conditional = True
        self._bucket = bucket

    @staticmethod
    def _find_kind(scheme: str) -> Any:  # noqa: ARG004 - of the class that this one extends
        # Not gcsfs.GCSFileSystem, which is another class where the variable above came too late.
        return GCSFileSystem

    def _make(self) -> Any:
        return self._open(**self._options, asynchronous=True, use_listings_cache=False)

    # Requests

    async def _connect(self, files: Any) -> aiohttp.ClientSession:
        try:
            session: aiohttp.ClientSession = await files._set_session()  # noqa: SLF001 - as documented for asynchronous use
        except (TypeError, ValueError) as error:
            failure = self._misfit(error)
        else:
            return session
        raise failure

    @contextlib.asynccontextmanager
    async def _reply(
        self, files: Any, method: str, url: str, query: Mapping[str, str | None], body: Body | None = None, **kwargs: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The reply to one request: by gcsfs's session, since gcsfs tries again what fails."""
        session = await self._connect(files)
        session._retry_connection = False  # noqa: SLF001 - aiohttp has no public switch for sending a request again
        params = urlencode(files._get_params(query))  # noqa: SLF001 - who pays
        headers = files._get_headers(kwargs.pop("headers", None))  # noqa: SLF001 - the credentials
        if files.requests_timeout is not None:
            given = files.requests_timeout
            kwargs["timeout"] = given if isinstance(given, aiohttp.ClientTimeout) else aiohttp.ClientTimeout(total=given)
        elif "timeout" not in files.session_kwargs:
            kwargs["timeout"] = aiohttp.ClientTimeout(sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
        url = f"{url}?{params}" if params else url
        try:
            reply = await session.request(method, URL(url, encoded=True), headers=headers, data=body, **kwargs)
        except BaseException:
            if body is not None:
                body.abort()
            raise
        async with reply:
            try:
                if not HTTPStatus.OK <= reply.status < HTTPStatus.MULTIPLE_CHOICES:
                    raise _refused(reply.status, await reply.content.read(_MOST_SAID_BYTES))
                yield reply
            finally:
                if body is not None:
                    body.answered()

    def _ask(self, what: str, key: str, method: str, path: str, **query: str | None) -> Any:
        """What the server says to a request without a body."""

        async def ask(files: Any) -> Any:
            async with self._reply(files, method, f"{files.base}{path}", query) as reply:
                return _decoded(await reply.read())

        return self._run(what, key, ask)

    def _try(self, what: str, key: str, action: Any) -> Any:
        def fresh(files: Any) -> Any:
            # In this thread: new credentials are asked for by requests, which would hold up the loop.
            files.credentials.maybe_refresh()
            return action(files)

        return super()._try(what, key, fresh)

    def _object(self, key: str) -> str:
        return f"b/{quote(self._bucket, safe='')}/o/{quote(key, safe='')}"

    # Whole objects

    def put(self, key: str, data: Sequence[Buffer], *, condition: str | None = None, write_id: str = "") -> None:
        size = sum(memoryview(buffer).nbytes for buffer in data)
        kind, digest = _digest(data)
        told: dict[str, Any] = {"name": key, kind: digest}
        if write_id:
            told["metadata"] = {WRITE_ID: write_id}
        # Of its own each time, so that no data can hold it.
        boundary = uuid.uuid4().hex
        head = (
            f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{json.dumps(told)}\r\n"
            f"--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n"
        )
        parts = [head.encode(), *data, f"\r\n--{boundary}--\r\n".encode()]
        sent = {"name": key, "size": str(size), kind: digest}
        stored = self._send(key, parts, boundary, "0" if condition == ABSENT else condition)
        has_replaced = condition not in {None, ABSENT} and stored.get("name", key) == key and stored.get("generation")
        if has_replaced and not _is_as_sent(stored, sent):
            # What was there is gone: the right bytes in its place are all that helps.
            stored = self._send(key, parts, boundary, str(stored["generation"]))
        if not _is_as_sent(stored, sent):
            self._take_back(key, stored, sent)

    def _send(self, key: str, parts: Sequence[Buffer], boundary: str, condition: str | None) -> Any:
        """Upload an object by one request; what the server says that it has stored."""
        body = Body(parts, _READ_SECONDS)
        query = {"uploadType": "multipart", "ifGenerationMatch": condition}

        async def send(files: Any) -> Any:
            url = f"{files._location}/upload/storage/v1/b/{quote(self._bucket, safe='')}/o"  # noqa: SLF001 - where else than the rest
            headers = {"Content-Type": f"multipart/related; boundary={boundary}"}
            async with self._reply(files, "POST", url, query, body, headers=headers) as reply:
                return _decoded(await reply.read())

        try:
            return self._run("writing", key, send)
        finally:
            body.release()

    def _take_back(self, key: str, stored: Mapping[str, Any], sent: Mapping[str, str]) -> NoReturn:
        """Remove what is not what was sent, and say so."""
        if stored.get("generation"):
            with contextlib.suppress(StorageError, OSError):
                self.delete(str(stored.get("name", key)), version=str(stored["generation"]))
        wrong = _differing(stored, sent)
        told = f"says that it has stored another {' and '.join(wrong)}" if wrong else "does not say what it has stored"
        msg = f"writing '{self.url}/{key}' failed: the server {told}"
        raise TransientError(msg)

    def get(self, key: str, start: int, stop: int, *, version: str | None = None) -> Buffer:
        if stop <= start:
            return b""
        query = {"alt": "media", "ifGenerationMatch": version}

        async def read(files: Any) -> Buffer:
            headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
            try:
                async with self._reply(files, "GET", f"{files.base}{self._object(key)}", query, headers=headers) as reply:
                    _check_generation(reply, version)
                    # A server that does not know ranges sends all of it.
                    skipped = 0 if reply.status == HTTPStatus.PARTIAL_CONTENT else start
                    size = min(stop - start, reply.content_length or stop - start)
                    return await filled(_chunks(reply, skipped + stop - start), size, skipped)
            except RefusedError as error:
                if is_past_end(error):
                    return b""
                raise

        return self._run("reading", key, read)

    def get_whole(self, key: str, limit: int | None = None) -> tuple[bytes, str]:
        async def read(files: Any) -> tuple[bytes, str]:
            headers = {"Accept-Encoding": "identity"}
            async with self._reply(files, "GET", f"{files.base}{self._object(key)}", {"alt": "media"}, headers=headers) as reply:
                data = await joined(_chunks(reply), f"{self.url}/{key}", reply.content_length or 0, limit)
                return data, reply.headers.get("X-Goog-Generation", "")

        return self._run("reading", key, read)

    def head(self, key: str) -> ObjectInfo:
        return self._info(key, self._ask("looking at", key, "GET", self._object(key), fields=_FIELDS))

    def write_id(self, key: str) -> str | None:
        found = self._ask("looking at", key, "GET", self._object(key), fields="metadata")
        written: str | None = (found.get("metadata") or {}).get(WRITE_ID)
        return written

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for page in self._pages(prefix, f"items({_FIELDS}),nextPageToken"):
            yield from (self._info(found["name"], found) for found in page.get("items", ()))

    def folders(self, prefix: str) -> Iterator[str]:
        for page in self._pages(prefix, "prefixes,nextPageToken", delimiter="/"):
            for found in page.get("prefixes", ()):
                yield found[len(prefix) :].rstrip("/")

    def _pages(self, prefix: str, fields: str, **query: str) -> Iterator[Any]:
        token = None
        path = f"b/{quote(self._bucket, safe='')}/o"
        while True:
            page = self._ask("listing", prefix, "GET", path, prefix=prefix or None, fields=fields, pageToken=token, **query)
            yield page
            token = page.get("nextPageToken")
            if not token:
                return

    def delete(self, key: str, *, version: str | None = None) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._ask("removing", key, "DELETE", self._object(key), ifGenerationMatch=version)

    def copy(self, source: ObjectClient, source_key: str, key: str) -> bool:
        if not isinstance(source, GcsClient) or source.store != self.store:
            return False
        path = f"{source._object(source_key)}/rewriteTo/{self._object(key)}"  # noqa: SLF001 - another of this class
        token = None
        while True:
            done = self._ask("copying to", key, "POST", path, rewriteToken=token)
            token = done.get("rewriteToken")
            if done.get("done", True) or not token:
                return True


async def _chunks(reply: aiohttp.ClientResponse, most: int | None = None) -> AsyncGenerator[bytes, None]:
    """What a server sends, as it comes, until there is no more or ``most`` bytes have come."""
    came = 0
    while (chunk := await reply.content.readany()) and (most is None or came < most):
        came += len(chunk)
        yield chunk


def _check_generation(reply: aiohttp.ClientResponse, version: str | None) -> None:
    """See that a server has kept the condition, which not all do."""
    if version is not None and reply.headers.get("X-Goog-Generation", version) != version:
        raise RefusedError(HTTPStatus.PRECONDITION_FAILED, "conditionNotMet", "another generation is there")


def _differing(stored: Mapping[str, Any], sent: Mapping[str, str]) -> list[str]:
    """What the server has stored otherwise, as far as it says."""
    return [name for name, value in sent.items() if name in stored and str(stored[name]) != value]


def _is_as_sent(stored: Mapping[str, Any], sent: Mapping[str, str]) -> bool:
    return "size" in stored and not _differing(stored, sent)


def _digest(data: Sequence[Buffer]) -> tuple[str, str]:
    """The name and value of the checksum that is cheap here."""
    if google_crc32c.implementation != "c":
        md5 = hashlib.md5(usedforsecurity=False)
        for buffer in data:
            md5.update(buffer)
        return "md5Hash", base64.b64encode(md5.digest()).decode()
    crc = 0
    for view in (memoryview(buffer).cast("B") for buffer in data if memoryview(buffer).nbytes):
        for start in range(0, len(view), _HASH_BYTES):
            crc = google_crc32c.extend(crc, bytes(view[start : start + _HASH_BYTES]))
    return "crc32c", base64.b64encode(crc.to_bytes(4, "big")).decode()


def _decoded(content: bytes) -> dict[str, Any]:
    """What a server said in JSON; nothing if it was something else."""
    try:
        found = json.loads(content or b"null")
    except ValueError:
        msg = "the server's reply cannot be read"
        raise TransientError(msg) from None
    return found if isinstance(found, dict) else {}


def _refused(status: int, content: bytes) -> RefusedError:
    """What the server said, out of its JSON if it is that."""
    text = content.decode(errors="replace")
    try:
        error = json.loads(text)["error"]
        reasons = [found.get("reason", "") for found in error.get("errors", ())]
        return RefusedError(status, next(iter(reasons), "").replace(" ", ""), error.get("message", ""))
    except (ValueError, LookupError, TypeError, AttributeError):
        return RefusedError(status, "", text)
