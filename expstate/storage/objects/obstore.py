"""S3 and GCS by the package ``obstore``: requests are made without the interpreter's lock, and buffers sent from where they are.

``client`` gets a bucket and fsspec's options; it hands on an ``ObstoreClient``, or says that s3fs or gcsfs must serve. Objects are put
whole: ``obstore`` has no uploads whose parts can be sent one by one.
"""

from __future__ import annotations

import html
import json
import re
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import GCSStore, S3Store

from expstate.errors import InvalidArgumentError, ManifestTooLargeError
from expstate.storage.objects.client import WRITE_ID, ObjectClient, ObjectInfo
from expstate.storage.objects.failures import RefusedError, explain
from expstate.storage.objects.obstore_options import CannotTranslateError, Connection, translate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from obstore import GetOptions, ObjectMeta, PutMode

    from expstate.storage.objects.client import Buffer

__all__ = ["CannotTranslateError", "ObstoreClient", "client"]

Result = TypeVar("Result")

_LISTED_AT_ONCE: Final = 1000
_MIB: Final = 1 << 20
# The largest body of a put, and how long it may take. obstore knows no other limit for what is sent: its wait for a reply begins with the
# request, not after its last byte. So what is small has the limits of reading.
_PUT_SECONDS: Final = ((64 * _MIB, 300.0), (float("inf"), 3600.0))
_SMALL_PUT: Final = _MIB
_LONGEST_SECONDS: Final = 3600.0
_RELEASE_SECONDS: Final = 5.0

_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f]")
_STATUS: Final = re.compile(r"(?:status code: (\d{3})([^:]*)|error response:)")
_URL: Final = re.compile(r"performing [A-Z]+ (\S+) ")
_REASON: Final = re.compile(r'(?:message|error): "((?:[^"\\]|\\.)*)"')
# Of a server that does not prove who it is, or does not speak TLS; or of a URL that is none.
_FINAL: Final = re.compile(r"Invalid(?:Certificate|Message)[\s(\w]*|BadScheme")
# Who is asked for credentials, and not for objects.
_CREDENTIALS: Final = re.compile(r"169\.254\.|accounts\.google\.|fd00:ec2|metadata\.|oauth2\.|sts\.")
_NO_BUCKET: Final = "NoSuchBucket"
_NO_COPY: Final = frozenset({"EntityTooLarge", "InvalidRequest", "MethodNotAllowed", "NotImplemented"})


def client(scheme: str, bucket: str, storage_options: Mapping[str, Any]) -> ObstoreClient:
    """A client for a bucket of S3 or GCS, with the options that s3fs and gcsfs take.

    Parameters
    ----------
    scheme : str
        ``s3``, ``s3a``, ``gs`` or ``gcs``.
    bucket : str
        The name of the bucket.
    storage_options : mapping of str to object
        fsspec's: see ``obstore_options``.

    Raises
    ------
    CannotTranslateError
        If ``obstore`` cannot honour an option or a variable of the environment; then s3fs or gcsfs can.
    """
    connection = translate(scheme, bucket, storage_options)
    found = _try(lambda: ObstoreClient(f"{scheme}://{bucket}", connection))
    if isinstance(found, Exception):
        # Credentials or certificates of a form that it does not read; or an obstore that is too old to know a setting.
        option = (
            "token" if connection.protocol == "gs" else "AWS_CA_BUNDLE" if "root_certificate" in connection.client_options else "obstore"
        )
        raise CannotTranslateError(option)
    return found


class ObstoreClient(ObjectClient):
    """A bucket of S3 or GCS.

    Conditions on S3 are ETags, on GCS generations. A deletion has no condition. A copy is one request, and within the bucket.

    Parameters
    ----------
    url : str
        Of the bucket, as it may be shown.
    connection : Connection
        How it is reached.
    """

    def __init__(self, url: str, connection: Connection) -> None:
        self.url = url
        self.store = connection.identity
        self._connection = connection
        self._is_s3 = connection.protocol == "s3"
        self._store = self._open(_LONGEST_SECONDS, connection.read_seconds)
        self._put_stores: dict[float, S3Store | GCSStore] = {}

    def _open(self, seconds: float, read_seconds: float | None = None) -> S3Store | GCSStore:
        connection = self._connection
        options = connection.client_options | {"timeout": f"{int(seconds)}s"}
        if read_seconds is not None:
            options["read_timeout"] = f"{int(read_seconds * 1000)}ms"
        arguments: dict[str, Any] = {"config": connection.config, "client_options": options, "retry_config": {"max_retries": 0}}
        if not self._is_s3:
            return GCSStore(connection.bucket, **arguments)
        if keys := connection.keys:
            # Not in the config: there obstore would add the token of the environment to another's keys.
            arguments["credential_provider"] = lambda: {**keys, "expires_at": None}
        # One object by DELETE: not every server has the other way.
        arguments["config"] = connection.config | {"disable_bulk_delete": True}
        return S3Store(connection.bucket, **arguments)

    def _store_for(self, size: int) -> S3Store | GCSStore:
        """The store whose limits suit a put of so many bytes."""
        if size <= _SMALL_PUT:
            return self._store
        seconds = next(seconds for largest, seconds in _PUT_SECONDS if size <= largest)
        if seconds not in self._put_stores:
            self._put_stores[seconds] = self._open(seconds)
        return self._put_stores[seconds]

    # Whole objects

    def put(self, key: str, data: Sequence[Buffer], *, condition: str | None = None, write_id: str = "") -> None:
        path = _path(key)
        # Views of our own, of which it can be told when nobody reads them any more.
        views = [memoryview(buffer).cast("B") for buffer in data if memoryview(buffer).nbytes]
        mode: PutMode = "overwrite" if condition is None else "create"
        if condition:
            mode = {"e_tag": condition} if self._is_s3 else {"version": condition}
        attributes: dict[str, str] = {WRITE_ID: write_id} if write_id else {}
        store = self._store_for(sum(map(len, views)))
        try:
            result = _try(lambda: obstore.put(store, path, views, mode=mode, attributes=attributes, use_multipart=False))
        finally:
            _release(views)
        if isinstance(result, Exception):
            # AWS's answer where there is no object to compare with.
            is_gone = bool(condition) and _status(result) == HTTPStatus.NOT_FOUND and not _is_bucket_missing(result)
            raise self._error(RefusedError(HTTPStatus.PRECONDITION_FAILED, "NoSuchKey") if is_gone else result, "writing", key)

    def get(self, key: str, start: int, stop: int, *, version: str | None = None) -> Buffer:
        path = _path(key)
        if start >= stop:
            return b""
        options: GetOptions = {"range": (start, stop)}
        if version:
            options["if_match" if self._is_s3 else "version"] = version
        result = _try(lambda: obstore.get(self._store, path, options=options).bytes())
        if not isinstance(result, Exception):
            return memoryview(result)
        if _status(result) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # behind the end
            return b""
        raise self._error(result, "reading", key)

    def get_whole(self, key: str, limit: int | None = None) -> tuple[bytes, str]:
        path = _path(key)

        def read() -> tuple[bytes | int, str]:
            result = obstore.get(self._store, path)
            meta = result.meta
            if limit is not None and meta["size"] > limit:
                return meta["size"], ""
            return result.bytes().to_bytes(), self._version(meta)

        found, version = self._ask("reading", key, read)
        if isinstance(found, int):
            msg = f"{self._name(key)} has {found:,} bytes, and no more than {limit:,} are read"
            raise ManifestTooLargeError(msg)
        return found, version

    def head(self, key: str) -> ObjectInfo:
        path = _path(key)
        return self._info(self._ask("looking at", key, lambda: obstore.head(self._store, path)))

    def write_id(self, key: str) -> str | None:
        path = _path(key)
        # obstore.head leaves these out.
        return self._ask("looking at", key, lambda: obstore.get(self._store, path, options={"head": True}).attributes).get(WRITE_ID)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        # obstore lists folders only.
        folder = _path(prefix.rpartition("/")[0]) or None
        stream = self._ask("listing", prefix, lambda: obstore.list(self._store, folder, chunk_size=_LISTED_AT_ONCE))
        while (page := self._ask("listing", prefix, lambda: next(stream, None))) is not None:
            yield from (self._info(meta) for meta in page if meta["path"].startswith(prefix))

    def folders(self, prefix: str) -> Iterator[str]:
        folder = _path(prefix.removesuffix("/")) or None
        result = self._ask("listing", prefix, lambda: obstore.list_with_delimiter(self._store, folder))
        return (path[len(prefix) :] for path in result["common_prefixes"])

    def delete(self, key: str, *, version: str | None = None) -> None:  # noqa: ARG002 - obstore has no conditions here
        path = _path(key)
        result = _try(lambda: obstore.delete(self._store, path))
        if isinstance(result, Exception) and (_status(result) != HTTPStatus.NOT_FOUND or _is_bucket_missing(result)):
            raise self._error(result, "removing", key)

    def copy(self, source: ObjectClient, source_key: str, key: str) -> bool:
        if source.store != self.store:
            return False
        source_path, path = _path(source_key), _path(key)
        # With the longest limit: the reply comes when all is copied.
        store = self._store_for(1 << 40)
        result = _try(lambda: obstore.copy(store, source_path, path))
        if not isinstance(result, Exception):
            return True
        if isinstance(result, RefusedError) and (result.code in _NO_COPY or result.status == HTTPStatus.NOT_IMPLEMENTED):
            return False  # such as objects of more than 5 GiB on S3
        raise self._error(result, "copying", source_key)

    # What is common to them

    def _version(self, meta: ObjectMeta) -> str:
        return (meta["e_tag"] if self._is_s3 else meta["version"]) or ""

    def _info(self, meta: ObjectMeta) -> ObjectInfo:
        return ObjectInfo(meta["path"], meta["size"], meta["last_modified"].timestamp(), self._version(meta))

    def _ask(self, action: str, key: str, request: Callable[[], Result]) -> Result:
        result = _try(request)
        if isinstance(result, Exception):
            raise self._error(result, action, key)
        return result

    def _name(self, key: str) -> str:
        return repr(f"{self.url}/{key}")

    def _error(self, failure: Exception, action: str, key: str) -> Exception:
        return explain(failure, f"{action} {self._name(key)}", {"secrets": self._connection.secrets})


def _path(key: str) -> str:
    """A key as obstore takes it: it changes some that S3 and GCS know, and refuses others."""
    if _CONTROLS.search(key) or (key and not {"", ".", ".."}.isdisjoint(key.split("/"))):
        msg = f"key {key!r} has an empty part, '.', '..' or a control character, which obstore cannot name"
        raise InvalidArgumentError(msg)
    return key


def _status(failure: Exception) -> int:
    return failure.status if isinstance(failure, RefusedError) else 0


def _is_bucket_missing(failure: Exception) -> bool:
    return isinstance(failure, RefusedError) and failure.code == _NO_BUCKET


def _try(request: Callable[[], Result]) -> Result | Exception:
    """What a request gives, or why there is nothing.

    Exceptions of obstore's are not let out, nor kept as causes: their texts hold whole replies, in which a server may repeat what it was
    sent. Rust's panics are no exceptions to Python, and would end a thread that handles all of these.
    """
    try:
        return request()
    except (BaseError, OSError, ValueError) as error:
        text = str(error)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        text = "obstore panicked"
    return _failure(text)


def _failure(text: str) -> Exception:
    """Read what obstore says of an error: a sentence, then the same once more as a structure of Rust's."""
    sentence, _, structure = text.partition("\n\nDebug source:")
    url = _URL.search(sentence)
    server = (urlsplit(url[1]).hostname or "") if url else ""
    if (found := _STATUS.search(sentence)) is not None:
        status = int(found[1] or HTTPStatus.INTERNAL_SERVER_ERROR)  # or an error after the server has said that all is well
        code, said = _parts(sentence[found.end() :])
        if _CREDENTIALS.match(server) and status in {HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND}:
            return RefusedError(HTTPStatus.UNAUTHORIZED, code, f"{server} gives no credentials")
        return RefusedError(status, code, said or ("" if code else (found[2] or "").strip()))
    if "Received redirect" in sentence:
        return RefusedError(HTTPStatus.MOVED_PERMANENTLY, "", "the bucket is elsewhere")
    if "HTTP error" in sentence:
        return _without_reply(structure, server)
    # obstore's own, such as a reply that it does not understand.
    return EOFError(sentence) if "UnexpectedRange" in structure else ValueError(sentence)


def _without_reply(structure: str, server: str) -> Exception:
    where = f" ({server})" if server else ""
    if (final := _FINAL.search(structure)) is not None:
        return ValueError(" ".join(re.findall(r"\w+", final[0])) + where)
    kind = next(iter(re.findall(r"kind: (\w+)", structure)), "")
    reasons = _REASON.findall(structure)
    if kind == "Timeout":
        return TimeoutError(f"no reply in time{where}")
    return ConnectionError((reasons[-1] if reasons else "the connection broke") + where)


def _parts(body: str) -> tuple[str, str]:
    """The server's code for an error and its message, from XML or JSON; nothing else of a reply is shown."""
    tags = {name: found[1] for name in ("Code", "Message", "Details") if (found := re.search(rf"<{name}>([^<]*)</{name}>", body))}
    if not tags and (found := re.search(r"\{.*\}", body, re.DOTALL)):
        try:
            given = json.loads(found[0])
        except ValueError:
            given = {}
        error = given.get("error")
        tags = {"Code": error, "Message": str(given.get("error_description", ""))} if isinstance(error, str) else {}
    code, *texts = (html.unescape(tags.get(name, "")) for name in ("Code", "Message", "Details"))
    return code, " ".join(filter(None, texts))


def _release(views: Sequence[memoryview]) -> None:
    """Let go of buffers, once no connection reads them any more.

    It does for a while where a server refused before it had got all. What is sent then is thrown away by the server, so a connection that
    takes too long is left alone.
    """
    until, pause = time.monotonic() + _RELEASE_SECONDS, 0.0001
    for view in views:
        while True:
            try:
                view.release()
            except BufferError:
                if time.monotonic() > until:
                    return
                time.sleep(pause)
                pause = min(0.01, pause * 2)
            else:
                break
