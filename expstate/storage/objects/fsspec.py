"""Any file system of fsspec as a client: ``FsspecClient``, and what the clients by s3fs and gcsfs have in common with it.

Gets a scheme, a bucket and storage options as fsspec's users know them; hands on bytes and our errors. File systems are never shared with
anybody, cache nothing, and run on a loop of the client's own if they are asynchronous.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
import weakref
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeVar

from fsspec import AbstractFileSystem, get_filesystem_class
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from expstate.errors import (
    InvalidArgumentError,
    StorageError,
    UnsafePathError,
    UnsupportedSchemeError,
)
from expstate.storage.objects.client import ABSENT, ObjectClient, ObjectInfo, TransientError
from expstate.storage.objects.failures import explain, masked
from expstate.storage.objects.loop import Loop
from expstate.storage.objects.replies import check_limit, is_past_end

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence

    from expstate.storage.objects.client import Buffer

Result = TypeVar("Result")

_FLAT = {"abfs", "abfss", "adl", "az", "gcs", "gs", "oss", "s3", "s3a"}
"""Schemes of stores without folders, where making one would make a bucket or an object."""
_AZURE = {"abfs", "abfss", "adl", "az"}
"""Schemes whose URLs have the container where others have a user's name, and whose copies may not be there yet when they are said to be."""
_OURS = {"asynchronous", "loop", "skip_instance_cache", "use_listings_cache"}
_VERSION_NAMES = ("generation", "ETag", "etag", "e_tag", "checksum", "md5", "content_md5")
_TIME_NAMES = ("mtime", "LastModified", "last_modified", "modified", "timeCreated", "updated", "created", "creation_time")
_FRACTION = re.compile(r"\.[0-9]+")

_memory_lock = threading.RLock()
"""What is in ``memory://`` is this process's: under it, a look and a write are one for all clients."""


def client(scheme: str, bucket: str, storage_options: Mapping[str, Any]) -> FsspecClient:
    """The client of a bucket, host or folder that fsspec can reach. Nothing is read yet, and no connection is made.

    Parameters
    ----------
    scheme : str
        Of the URL, such as ``"memory"``.
    bucket : str
        What the URL has between ``://`` and the next ``/``.
    storage_options : mapping
        For the file system.

    Raises
    ------
    UnsupportedSchemeError
        If fsspec knows no such scheme.
    ImportError
        If the package for it is missing.

    Examples
    --------
    >>> bucket = client("memory", "bucket", {})
    >>> bucket.put("folder/name", [b"he", b"llo"])
    >>> bytes(bucket.get("folder/name", 1, 3)), [info.size for info in bucket.list("folder/")]
    (b'el', [5])
    >>> bucket.delete("folder/name")
    """
    return FsspecClient(scheme, bucket, storage_options)


class FsspecClient(ObjectClient):
    """A bucket by any file system of fsspec.

    Conditions are kept by looking first, which somebody else can come between; only in ``memory://`` nobody can.

    Parameters
    ----------
    scheme, bucket, storage_options
        As for ``client``.
    """

    def __init__(self, scheme: str, bucket: str, storage_options: Mapping[str, Any]) -> None:
        self.url = f"{scheme}://{_shown(scheme, bucket)}"
        self._scheme = scheme
        self._kind = self._find_kind(scheme)
        url = f"{scheme}://{bucket}/x"
        self._root: str = self._kind._strip_protocol(url).removesuffix("x")  # noqa: SLF001 - fsspec's way to ask
        given = {**self._kind._get_kwargs_from_urls(url), **storage_options}  # noqa: SLF001 - as above
        self._options = {name: value for name, value in given.items() if name not in _OURS}
        # A number that tells nothing: what it is made from is salted anew in each process.
        self.store = (self._kind.__qualname__, hash(repr(sorted(self._options.items(), key=lambda item: item[0]))))
        self.is_conditional = issubclass(self._kind, MemoryFileSystem)
        self._own_lock = None if self.is_conditional else threading.RLock()
        self._loop = Loop(f"expstate-{scheme}") if issubclass(self._kind, AsyncFileSystem) else None
        self._making = threading.Lock()
        self._made: Any = None
        self._finalizer: Callable[[], object] | None = None
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"

    @staticmethod
    def _find_kind(scheme: str) -> Any:
        try:
            return get_filesystem_class(scheme)
        except ValueError as error:
            msg = f"no storage is known for {scheme}://: fsspec does not know it either"
            raise UnsupportedSchemeError(msg) from error

    # The file system

    def _make(self) -> Any:
        """A file system of this client alone, which remembers nothing."""
        # With a loop, and not as one that its user runs: many connect when they are made, and close what they have when they are garbage.
        made = self._open(**self._options, **({} if self._loop is None else {"loop": self._loop.running()}))
        if hasattr(made, "dircache"):  # as an option it would be passed on to what does not know it, by sftp for one
            made.dircache.use_listings_cache = False
        return made

    def _open(self, **options: Any) -> Any:
        try:
            return self._kind(**options, skip_instance_cache=True)
        except (TypeError, ValueError, KeyError) as error:
            failure = self._misfit(error)
        raise failure

    def _misfit(self, error: Exception) -> InvalidArgumentError:
        """For what a library says to options that it does not understand."""
        said = masked(f"{type(error).__name__}: {error}", self._options)
        return InvalidArgumentError(f"{self.url} cannot be opened by {self._kind.__name__} with these storage options: {said}")

    def _files(self) -> Any:
        with self._making:
            if self._is_closed:
                msg = f"{self.url} is closed"
                raise StorageError(msg)
            if self._made is None:
                self._made = self._make()
                self._finalizer = weakref.finalize(self, _let_go, self._made, self._loop, os.getpid())
                if self._loop is not None:
                    # Not at the interpreter's end: what others do to close their connections then may need it.
                    weakref.finalize(self._made, self._loop.close).atexit = False
            return self._made

    def _drop(self, files: Any) -> None:
        """Have the next request made by a new file system: one that has lost its connection, as that of sftp, does not make another."""
        with self._making:
            if files is None or self._made is not files:
                return
            finalizer, self._finalizer, self._made = self._finalizer, None, None
        if finalizer is not None:
            finalizer()

    def close(self) -> None:
        with self._making:
            self._is_closed = True
            finalizer, self._finalizer, self._made = self._finalizer, None, None
        if finalizer is not None:
            finalizer()

    # Requests

    def _try(self, what: str, key: str, action: Callable[[Any], Result]) -> Result:
        """What ``action`` gives for the file system; what it raises as one of our errors."""
        where = f"{self.url}/{key}" if key else self.url
        files = None
        try:
            files = self._files()
            return action(files)
        except Exception as error:  # noqa: BLE001 - told apart by its cause
            caught = error
        # Here, so that neither what has a secret in it is its context, nor what the caller is handling its cause.
        failure = explain(caught, f"{what} {where!r}", self._options)
        if isinstance(failure, TransientError) and self._loop is None:
            self._drop(files)
        raise failure

    def _run(self, what: str, key: str, function: Callable[[Any], Coroutine[Any, Any, Result]]) -> Result:
        """As ``_try``, for what runs on the loop."""
        loop = self._loop
        assert loop is not None
        return self._try(what, key, lambda files: loop.run(lambda: function(files)))

    def _call(self, what: str, key: str, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the file system, on the loop if that is asynchronous."""
        return self._try(what, key, lambda files: self._invoke(files, name, *args, **kwargs))

    def _invoke(self, files: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        if self._loop is not None:
            return self._loop.run(lambda: getattr(files, f"_{name}")(*args, **kwargs))
        with self._alone():
            return getattr(files, name)(*args, **kwargs)

    def _alone(self) -> contextlib.AbstractContextManager[Any]:
        """Keep other threads from a file system that was not made for them; only this one's calls go on."""
        if self._loop is not None:
            return contextlib.nullcontext()
        return self._own_lock or _memory_lock

    def _path(self, key: str) -> str:
        if any(part in {".", ".."} for part in key.split("/")) or "\0" in key:
            msg = f"key {key!r} points outside {self.url}"
            raise UnsafePathError(msg)
        return self._root + key

    def _key(self, path: str) -> str:
        return path.lstrip("/").removeprefix(self._root.lstrip("/"))

    # Whole objects

    def put(self, key: str, data: Sequence[Buffer], *, condition: str | None = None, write_id: str = "") -> None:  # noqa: ARG002 - no metadata
        path = self._path(key)
        # One buffer is joined too: the file system may keep what it is given.
        joined = b"".join(data)
        with self._alone():
            if condition is not None and condition != self._version(key):
                msg = f"writing '{self.url}/{key}' failed: it is there already, or was changed"
                raise FileExistsError(msg)
            self._in_folder(key, lambda: self._call("writing", key, "pipe_file", path, joined))

    def _in_folder(self, key: str, write: Callable[[], Result]) -> Result:
        """Write an object, and if its folder turns out to be missing, make that before."""
        try:
            return write()
        except FileNotFoundError:
            folder = self._path(key).rpartition("/")[0]
            if self._scheme in _FLAT or not folder or self._exists(folder):
                raise
            self._call("making the folder of", key, "makedirs", folder, exist_ok=True)
            return write()

    def _exists(self, folder: str) -> bool:
        found: bool = self._call("looking at", "", "exists", folder)
        return found

    def _version(self, key: str) -> str:
        try:
            return self.head(key).version
        except FileNotFoundError:
            return ABSENT

    def get(self, key: str, start: int, stop: int, *, version: str | None = None) -> Buffer:
        if stop <= start:
            return b""
        path = self._path(key)

        def read(files: Any) -> Any:
            try:
                return self._invoke(files, "cat_file", path, start=start, end=stop)
            except Exception as error:
                if is_past_end(error):
                    return b""
                raise

        with self._alone():
            if version is not None and self.is_conditional and self.head(key).version != version:
                msg = f"reading '{self.url}/{key}' failed: it was changed"
                raise FileExistsError(msg)
            data: Buffer = self._try("reading", key, read)
        return data

    def get_whole(self, key: str, limit: int | None = None) -> tuple[bytes, str]:
        # Looked at before it is read: of an object that is replaced between the two, the version is then old, and conditions on it fail.
        info = self.head(key)
        check_limit(f"{self.url}/{key}", info.size, limit)
        bounds = {} if limit is None else {"start": 0, "end": limit + 1}
        data = bytes(self._call("reading", key, "cat_file", self._path(key), **bounds)) if info.size else b""
        check_limit(f"{self.url}/{key}", len(data), limit)
        return data, info.version

    def head(self, key: str) -> ObjectInfo:
        path = self._path(key)
        self._forget()
        info = self._call("looking at", key, "info", path)
        if info.get("type") == "directory":
            msg = f"looking at '{self.url}/{key}' failed: it is a folder"
            raise FileNotFoundError(msg)
        return self._info(key, info)

    def _info(self, key: str, info: Mapping[str, Any]) -> ObjectInfo:
        if info.get("size") is None:
            msg = f"looking at '{self.url}/{key}' failed: its size is not told"
            raise StorageError(msg)
        size = int(info["size"])
        modified_at = next((stamp for name in _TIME_NAMES if (stamp := _seconds(info.get(name))) is not None), None)
        version = next((_text(info[name]) for name in _VERSION_NAMES if info.get(name)), "")
        if not version and modified_at is not None:
            version = f"{size}-{modified_at!r}"
        return ObjectInfo(key, size, time.time() if modified_at is None else modified_at, version)

    def _forget(self) -> None:
        """Have a file system look anew that remembers more than the listings that were switched off."""
        self._try("looking into", "", lambda files: files.invalidate_cache())

    def write_id(self, key: str) -> str | None:
        self.head(key)
        return None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        folder = prefix.rpartition("/")[0]
        self._forget()
        # Its own way is one for a store without folders; fsspec's leaves out without a word what it cannot read.
        general = AbstractFileSystem.find if self._loop is None else AsyncFileSystem._find  # noqa: SLF001 - fsspec's asynchronous names
        has_own = getattr(self._kind, general.__name__) is not general
        for info in self._found(folder) if has_own else self._walked(folder):
            key = self._key(info["name"])
            if info.get("type") == "file" and key.startswith(prefix):
                yield self._info(key, info)

    def _found(self, folder: str) -> Iterator[Mapping[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            yield from self._call("listing", folder, "find", self._path(folder).rstrip("/") or self._root, detail=True).values()

    def _walked(self, folder: str) -> Iterator[Mapping[str, Any]]:
        folders = [folder]
        while folders:
            for info in self._listed(folders.pop()):
                if info.get("islink"):
                    continue
                if info.get("type") == "directory":
                    folders.append(self._key(info["name"]).rstrip("/"))
                else:
                    yield info

    def _listed(self, folder: str) -> Iterator[Mapping[str, Any]]:
        path = self._path(folder).rstrip("/") or self._root
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile, if it was there at all
            yield from (
                info for info in self._call("listing", folder, "ls", path, detail=True) if info["name"].strip("/") != path.strip("/")
            )

    def folders(self, prefix: str) -> Iterator[str]:
        self._forget()
        for info in self._listed(prefix.rstrip("/")):
            if info.get("type") == "directory":
                yield info["name"].rstrip("/").rpartition("/")[2]

    def delete(self, key: str, *, version: str | None = None) -> None:
        with self._alone(), contextlib.suppress(FileNotFoundError):
            if version is not None and self.head(key).version != version:
                msg = f"removing '{self.url}/{key}' failed: it was changed"
                raise FileExistsError(msg)
            self._call("removing", key, "rm_file", self._path(key))

    def copy(self, source: ObjectClient, source_key: str, key: str) -> bool:
        if not isinstance(source, FsspecClient) or source.store != self.store or self._scheme in _AZURE:
            return False
        source_path, path = source._path(source_key), self._path(key)  # noqa: SLF001 - another of this class
        size = source.head(source_key).size

        def copy(files: Any) -> bool:
            try:
                self._invoke(files, "cp_file", source_path, path)
            except NotImplementedError:
                return False
            return True

        if not self._in_folder(key, lambda: self._try("copying to", key, copy)):
            return False
        if self.head(key).size != size:
            msg = f"copying to '{self.url}/{key}' failed: not all of '{source.url}/{source_key}' is there"
            raise StorageError(msg)
        return True


def _let_go(files: Any, loop: Loop | None, pid: int) -> None:
    """Close the connections of a file system, and its loop if nobody but this function needs that."""
    if pid != os.getpid():  # they are the parent's
        return
    if loop is None:
        for name in ("ftp", "client", "session"):  # of sftp, and of others
            close = getattr(getattr(files, name, None), "close", None)
            if callable(close):
                with contextlib.suppress(Exception):  # it may be closed already
                    close()
    elif hasattr(files, "_s3") or hasattr(files, "_session"):
        loop.close(lambda: _end_session(files))
    else:  # it closes them when it is garbage, on the loop, which ends after that
        loop.cancel()


async def _end_session(files: Any) -> None:
    """Close the connections of s3fs, or of a file system that is made like gcsfs."""
    if getattr(files, "_s3creator", None) is not None:
        await files._s3creator.__aexit__(None, None, None)  # noqa: SLF001 - there is no public way that waits
    elif getattr(files, "_session", None) is not None:
        await files._session.close()  # noqa: SLF001 - as above


def _shown(scheme: str, bucket: str) -> str:
    """A bucket as it may be shown.

    Examples
    --------
    >>> _shown("sftp", "me:password@host:22"), _shown("abfs", "box@account.dfs.core.windows.net")
    ('host:22', 'box@account.dfs.core.windows.net')
    """
    bucket = bucket.partition("?")[0]
    user, _, host = bucket.rpartition("@")
    return bucket if not user or (scheme in _AZURE and ":" not in user) else host


def _seconds(value: object) -> float | None:
    """Seconds since 1970 of what file systems give as a time, if it is one.

    Examples
    --------
    >>> _seconds("1970-01-01T00:01:00.25Z"), _seconds(60), _seconds("noon")
    (60.25, 60.0, None)
    """
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            # Python 3.10 wants six digits behind the point.
            value = datetime.fromisoformat(_FRACTION.sub(lambda found: found[0].ljust(7, "0")[:7], value.replace("Z", "+00:00")))
    if isinstance(value, datetime):
        return (value if value.tzinfo is not None else value.replace(tzinfo=timezone.utc)).timestamp()
    return float(value) if isinstance(value, (int, float)) else None


def _text(value: object) -> str:
    return bytes(value).hex() if isinstance(value, (bytes, bytearray)) else str(value)


def _renew_lock() -> None:
    global _memory_lock  # noqa: PLW0603 - the parent's may be held by a thread that the child does not have
    _memory_lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
