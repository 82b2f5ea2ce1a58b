"""Buckets of Amazon S3, and of servers that speak like it, by s3fs: its options and session, and one request of aiobotocore a call.

Gets a bucket and storage options as s3fs takes them; hands on bytes and our errors. Nothing here tries anything again, but for what the
user's own ``config_kwargs`` say.
"""

from __future__ import annotations

import contextlib
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from aiobotocore.httpsession import AIOHTTPSession  # type: ignore[import-untyped, unused-ignore]
from botocore.exceptions import ClientError  # type: ignore[import-untyped, unused-ignore]
from botocore.httpchecksum import AwsChunkedWrapper  # type: ignore[import-untyped, unused-ignore]
from s3fs import S3FileSystem  # type: ignore[import-untyped, unused-ignore]

from expstate.errors import InvalidArgumentError, StorageError
from expstate.storage.objects.body import Body, ChunkedBody
from expstate.storage.objects.client import ABSENT, WRITE_ID, ObjectClient, ObjectInfo, Upload
from expstate.storage.objects.failures import refusal
from expstate.storage.objects.fsspec import FsspecClient
from expstate.storage.objects.replies import filled, is_past_end, joined

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence

    from expstate.storage.objects.client import Buffer

_PART_BYTES = 5 << 20
_READ_BYTES = 1 << 20
_CONNECT_SECONDS = 10
_READ_SECONDS = 60
_CONNECTIONS = 64


def client(scheme: str, bucket: str, storage_options: Mapping[str, Any]) -> S3Client:
    """The client of a bucket. Nothing is read yet, and no connection is made.

    Parameters
    ----------
    scheme : str
        For messages: ``"s3"`` or ``"s3a"``.
    bucket : str
        Its name.
    storage_options : mapping
        As ``s3fs.S3FileSystem`` takes them: ``key``, ``secret``, ``endpoint_url``, ``client_kwargs``, ``config_kwargs`` and so on.

    Raises
    ------
    InvalidArgumentError
        If the bucket's name has a user's name or a password before it.
    """
    if "@" in bucket:
        msg = f"{scheme}:// takes no user and password in the URL; pass storage_options with key and secret"
        raise InvalidArgumentError(msg)
    return S3Client(scheme, bucket, storage_options)


class S3Client(FsspecClient):
    """A bucket by s3fs.

    Parameters
    ----------
    scheme, bucket, storage_options
        As for ``client``.
    """

    least_part_bytes = _PART_BYTES

    def __init__(self, scheme: str, bucket: str, storage_options: Mapping[str, Any]) -> None:
        super().__init__(scheme, bucket, storage_options)
        self.is_conditional = True
        self._bucket = bucket

    @staticmethod
    def _find_kind(scheme: str) -> Any:  # noqa: ARG004 - of the class that this one extends
        return S3FileSystem

    def _make(self) -> Any:
        config = {
            "connect_timeout": _CONNECT_SECONDS,
            "http_session_cls": _Session,
            "max_pool_connections": _CONNECTIONS,
            "read_timeout": _READ_SECONDS,
            "retries": {"max_attempts": 0},
            **(self._options.get("config_kwargs") or {}),
        }
        options = {**self._options, "config_kwargs": config, "asynchronous": True, "use_listings_cache": False}
        return self._open(**options)

    # Requests

    async def _connect(self, files: Any) -> None:
        try:
            await files.set_session()
        except (TypeError, ValueError) as error:
            failure = self._misfit(error)
        else:
            return
        raise failure

    async def _request(self, files: Any, name: str, **kwargs: Any) -> Any:
        """Make one request: by botocore's own client, since s3fs tries again what fails."""
        await self._connect(files)
        s3 = await files.get_s3(self._bucket)
        # Without it each put waits for the server to ask for its body, for ever if that is not among what the server does.
        s3.meta.events.register_last("before-call.s3", _expect_nothing, unique_id="expstate")
        method = getattr(s3, name)
        known = files._get_s3_method_kwargs(method, files.req_kw, Bucket=self._bucket, **kwargs)  # noqa: SLF001 - what the user wants of each request
        if missing := kwargs.keys() - known.keys():
            msg = f"the installed botocore does not know {', '.join(sorted(missing))} of {name}; upgrade s3fs"
            raise StorageError(msg)
        return await method(**known)

    def _ask(self, what: str, key: str, name: str, **kwargs: Any) -> Any:
        return self._run(what, key, lambda files: self._request(files, name, **kwargs))

    # Whole objects

    def put(self, key: str, data: Sequence[Buffer], *, condition: str | None = None, write_id: str = "") -> None:
        kwargs: dict[str, Any] = {}
        if condition == ABSENT:
            kwargs["IfNoneMatch"] = "*"
        elif condition is not None:
            kwargs["IfMatch"] = condition
        if write_id:
            given = self._options.get("s3_additional_kwargs") or {}
            kwargs["Metadata"] = {**given.get("Metadata", {}), WRITE_ID: write_id}
        try:
            self._send("put_object", key, data, **kwargs)
        except FileNotFoundError as error:
            if condition and _code(error) == "NoSuchKey":  # AWS's answer where there is nothing to compare with
                msg = f"writing '{self.url}/{key}' failed: it is not there any more"
                raise FileExistsError(msg) from error
            raise

    def _send(self, name: str, key: str, data: Sequence[Buffer], **kwargs: Any) -> Any:
        config = self._options.get("config_kwargs") or {}
        body = Body(data, config.get("read_timeout") or _READ_SECONDS)
        try:
            return self._ask("writing", key, name, Key=key, Body=body, **kwargs)
        finally:
            body.release()

    def get(self, key: str, start: int, stop: int, *, version: str | None = None) -> Buffer:
        if stop <= start:
            return b""
        kwargs = {} if version is None else {"IfMatch": version}

        async def read(files: Any) -> Buffer:
            try:
                reply = await self._request(files, "get_object", Key=key, Range=f"bytes={start}-{stop - 1}", **kwargs)
            except ClientError as error:
                if is_past_end(error):
                    return b""
                raise
            # A server that does not know ranges sends all of it.
            skipped = 0 if reply["ResponseMetadata"]["HTTPStatusCode"] == HTTPStatus.PARTIAL_CONTENT else start
            size = min(stop - start, reply.get("ContentLength") or stop - start)
            return await filled(_chunks(reply["Body"], skipped + stop - start), size, skipped)

        return self._run("reading", key, read)

    def get_whole(self, key: str, limit: int | None = None) -> tuple[bytes, str]:
        async def read(files: Any) -> tuple[bytes, str]:
            reply = await self._request(files, "get_object", Key=key)
            data = await joined(_chunks(reply["Body"]), f"{self.url}/{key}", reply.get("ContentLength") or 0, limit)
            return data, reply.get("ETag", "")

        return self._run("reading", key, read)

    def head(self, key: str) -> ObjectInfo:
        reply = self._ask("looking at", key, "head_object", Key=key)
        return self._info(key, {**reply, "size": reply.get("ContentLength")})

    def write_id(self, key: str) -> str | None:
        reply = self._ask("looking at", key, "head_object", Key=key)
        found: str | None = reply.get("Metadata", {}).get(WRITE_ID)
        return found

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for page in self._pages(Prefix=prefix):
            for found in page.get("Contents", ()):
                yield self._info(found["Key"], {**found, "size": found.get("Size")})

    def folders(self, prefix: str) -> Iterator[str]:
        for page in self._pages(Prefix=prefix, Delimiter="/"):
            for found in page.get("CommonPrefixes", ()):
                yield found["Prefix"][len(prefix) :].rstrip("/")

    def _pages(self, **kwargs: Any) -> Iterator[Any]:
        token: dict[str, str] = {}
        while True:
            page = self._ask("listing", kwargs["Prefix"], "list_objects_v2", **kwargs, **token)
            yield page
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str, *, version: str | None = None) -> None:
        kwargs = {} if version is None else {"IfMatch": version}
        try:
            self._ask("removing", key, "delete_object", Key=key, **kwargs)
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # to a condition, some say so where there is nothing at all
                self.head(key)
                raise
        except StorageError as error:
            answer = refusal(error)
            if version is None or answer is None or answer.status != HTTPStatus.NOT_IMPLEMENTED:
                raise
            self._ask("removing", key, "delete_object", Key=key)  # by a server that knows no conditions here

    def copy(self, source: ObjectClient, source_key: str, key: str) -> bool:
        if not isinstance(source, S3Client) or source.store != self.store:
            return False
        try:
            self._ask("copying to", key, "copy_object", Key=key, CopySource={"Bucket": source._bucket, "Key": source_key})  # noqa: SLF001 - another of this class
        except StorageError as error:
            # Among others for objects of more than 5 GiB.
            if _code(error) in {"InvalidRequest", "EntityTooLarge", "NotImplemented"}:
                return False
            raise
        return True

    # In parts

    def begin_upload(self, key: str) -> str:
        reply = self._ask("writing", key, "create_multipart_upload", Key=key)
        upload_id: str = reply["UploadId"]
        return upload_id

    def put_part(self, key: str, upload_id: str, number: int, data: Sequence[Buffer]) -> str:
        reply = self._send("upload_part", key, data, UploadId=upload_id, PartNumber=number)
        tag: str = reply["ETag"]
        return tag

    def finish_upload(self, key: str, upload_id: str, parts: Mapping[int, str]) -> None:
        told = [{"PartNumber": number, "ETag": parts[number]} for number in sorted(parts)]
        self._ask("writing", key, "complete_multipart_upload", Key=key, UploadId=upload_id, MultipartUpload={"Parts": told})

    def abort_upload(self, key: str, upload_id: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._ask("removing the parts of", key, "abort_multipart_upload", Key=key, UploadId=upload_id)

    def uploads(self, prefix: str) -> Iterator[Upload]:
        marker: dict[str, str] = {}
        while True:
            page = self._ask("listing", prefix, "list_multipart_uploads", Prefix=prefix, **marker)
            for found in page.get("Uploads", ()):
                if found["Key"].startswith(prefix):
                    yield Upload(found["Key"], found["UploadId"], found["Initiated"].timestamp())
            if not page.get("IsTruncated"):
                return
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page.get("NextUploadIdMarker", "")}


class _Session(AIOHTTPSession):  # type: ignore[misc] # a class without types
    """aiobotocore's way to aiohttp, by which a request is sent once, and one that was cancelled is cut off."""

    async def _get_session(self, *proxy: Any) -> Any:
        session = await super()._get_session(*proxy)
        session._retry_connection = False  # noqa: SLF001 - aiohttp has no public switch for sending a request again
        return session

    async def send(self, request: Any) -> Any:
        body = request.body
        if isinstance(body, AwsChunkedWrapper):
            body = request.body = ChunkedBody(body, self._timeout.sock_read or _READ_SECONDS)
        if not isinstance(body, (Body, ChunkedBody)):
            return await super().send(request)
        try:
            reply = await super().send(request)
        except BaseException:
            body.abort()
            raise
        body.answered()
        return reply


def _expect_nothing(params: dict[str, Any], **_: Any) -> None:
    params["headers"].pop("Expect", None)


async def _chunks(body: Any, most: int | None = None) -> AsyncGenerator[bytes, None]:
    """What a server sends, as it comes; no more than ``most`` bytes of it, where that is given.

    Read until there is no more, so that it is known to be complete, and the connection can be used again.
    """
    async with body:
        left = most
        while chunk := await body.read(_READ_BYTES if left is None else min(_READ_BYTES, left) or 1):
            if left is not None:
                if not left:  # more than was asked for
                    return
                left -= len(chunk)
            yield chunk


def _code(error: Exception) -> str:
    answer = refusal(error)
    return "" if answer is None else answer.code
