"""Clients by URL: one for each bucket, set of options and process, kept as long as the process lives.

Gets the scheme, the rest of a URL and storage options; hands on an ``ObjectStorage``. Which client serves ``s3://`` and ``gs://`` is
decided here: obstore where it is installed and can do what the options ask for, else s3fs and gcsfs.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from expstate import settings
from expstate.errors import InvalidArgumentError, UnsupportedSchemeError
from expstate.storage.objects.storage import ObjectStorage

if TYPE_CHECKING:
    from collections.abc import Hashable

    from expstate.storage.objects.client import ObjectClient

_log = logging.getLogger("expstate")
_BUCKETS = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}
"""Schemes of buckets: the package that fsspec uses, and our extra that brings it."""

_REFUSED = {
    *("http", "https", "data", "generic", "local", "file", "dir", "asyncwrapper"),
    *("reference", "simplecache", "filecache", "blockcache", "cached"),
}
"""What fsspec knows and what is no place for snapshots: it cannot be listed, or leads to other URLs."""

_READ_BY_CLIENTS = ("AWS_", "BOTO", "FSSPEC_", "GCLOUD_", "GCSFS_", "GOOGLE_", "STORAGE_EMULATOR_")

_clients: dict[tuple[Hashable, ...], ObjectClient] = {}
_lock = threading.Lock()
_said: set[str] = set()


def open_objects(scheme: str, rest: str, storage_options: Mapping[str, Any]) -> ObjectStorage:
    """The storage of a snapshot's folder in an object store, or wherever fsspec reaches. Nothing is read or made yet.

    Parameters
    ----------
    scheme : str
        Of the URL.
    rest : str
        The URL after ``://``: the bucket, then the folder.
    storage_options : mapping
        As fsspec's file systems know them.

    Raises
    ------
    InvalidArgumentError
        If the URL has credentials in it, or parts that lead elsewhere.
    UnsupportedSchemeError
        If a package that it needs is not installed, or nobody knows the scheme.
    """
    bucket, _, folder = rest.partition("/")
    if scheme in _BUCKETS and ("@" in bucket or "?" in rest):
        msg = f"credentials do not belong in a URL ({scheme}://...): pass storage_options, or use a profile or the environment"
        raise InvalidArgumentError(msg)
    parts = folder.rstrip("/").split("/") if folder.rstrip("/") else []
    if not bucket or any(part in {"", ".", ".."} for part in parts) or "::" in rest:
        msg = f"a {scheme}:// URL is a bucket and folders joined by single slashes, such as {scheme}://bucket/runs/step-1"
        raise InvalidArgumentError(msg)
    if scheme not in _BUCKETS:
        _check_known(scheme)
    options = dict(storage_options)
    connect = functools.partial(_connect, scheme, bucket, options, settings.current().transport, _environment())
    return ObjectStorage(connect, "/".join(parts))


def _check_known(scheme: str) -> None:
    from fsspec import available_protocols  # noqa: PLC0415 - only here

    if scheme in _REFUSED or scheme not in available_protocols():
        msg = f"no storage is known for {scheme}:// (there are: plain paths, s3://, gs://, and what fsspec can list and write, as sftp://)"
        raise UnsupportedSchemeError(msg)


def _environment() -> tuple[tuple[str, str], ...]:
    """What clients read of the environment when they are made: whoever changes it expects that the next path sees that."""
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith(_READ_BY_CLIENTS)))


def _connect(scheme: str, bucket: str, options: dict[str, Any], transport: str, environment: Hashable) -> ObjectClient:
    identity = (os.getpid(), scheme, bucket, transport, environment, _frozen(options))
    with _lock:
        found = _clients.get(identity)
        if found is None:
            found = _clients[identity] = _made(scheme, bucket, options, transport)
    return found


def _frozen(value: Any) -> Hashable:
    """Something that is equal for equal options."""
    if isinstance(value, Mapping):
        return tuple(sorted((str(name), _frozen(item)) for name, item in value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value).__name__, value if isinstance(value, (str, bytes, int, float, bool, type(None))) else id(value)


def _made(scheme: str, bucket: str, options: dict[str, Any], transport: str) -> ObjectClient:
    if scheme not in _BUCKETS:
        return _by_fsspec("expstate.storage.objects.fsspec", scheme, bucket, options)
    package, extra = _BUCKETS[scheme]
    if transport != "fsspec" and importlib.util.find_spec("obstore") is not None:
        from expstate.storage.objects import obstore_options  # noqa: PLC0415 - only where it is installed

        try:
            return _by_obstore(scheme, bucket, options)
        except obstore_options.CannotTranslateError as error:
            if transport == "obstore":
                msg = f"obstore cannot do what {error.option} asks for: unset EXPSTATE_TRANSPORT to use {package}"
                raise InvalidArgumentError(msg) from None
            _say(f"{scheme}:// is reached by {package}, because obstore cannot do what {error.option} asks for")
    elif transport == "obstore":
        msg = "EXPSTATE_TRANSPORT is obstore, which is not installed: pip install 'expstate[obstore]'"
        raise UnsupportedSchemeError(msg)
    if importlib.util.find_spec(package) is None:
        msg = f"{scheme}:// needs the package {package}: pip install 'expstate[{extra}]'"
        raise UnsupportedSchemeError(msg)
    return _by_fsspec(f"expstate.storage.objects.{package}", scheme, bucket, options)


def _by_obstore(scheme: str, bucket: str, options: dict[str, Any]) -> ObjectClient:
    from expstate.storage.objects import obstore  # noqa: PLC0415 - only where it is installed

    return obstore.client(scheme, bucket, options)


def _by_fsspec(module: str, scheme: str, bucket: str, options: dict[str, Any]) -> ObjectClient:
    try:
        found: ObjectClient = importlib.import_module(module).client(scheme, bucket, options)
    except ImportError as error:
        msg = f"{scheme}:// needs a package that is not installed: {error}"
        raise UnsupportedSchemeError(msg) from error
    return found


def _say(text: str) -> None:
    """Say something once in the life of a process."""
    if text not in _said:
        _said.add(text)
        _log.info("%s", text)


def close_all() -> None:
    """Let go of all connections; whatever is asked for next makes new ones."""
    with _lock:
        clients = list(_clients.items())
        _clients.clear()
    for identity, client in clients:
        if identity[0] == os.getpid():  # those of the parent are the parent's to close
            with contextlib.suppress(Exception):
                client.close()


def _forget() -> None:
    global _lock  # noqa: PLW0603 - the parent's may be held by a thread that the child does not have
    _lock = threading.Lock()
    _kept.append(dict(_clients))  # not closed when they are garbage: their connections are the parent's
    _clients.clear()


_kept: list[dict[tuple[Hashable, ...], ObjectClient]] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
atexit.register(close_all)
