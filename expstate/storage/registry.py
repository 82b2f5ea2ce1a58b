"""Paths and URLs: which storage a place names. ``parse`` splits it, ``open_storage`` opens it.

A path is plain or ``os.PathLike``, or has a scheme: ``fs://`` and ``file://`` name the local disk, ``s3://`` and ``gs://`` buckets; what
else fsspec knows is reached by it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from expstate.errors import InvalidArgumentError
from expstate.storage.local import LocalStorage
from expstate.storage.options import options_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from expstate.storage.base import Storage

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_CHAIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*::.*://", re.DOTALL)
_factories: dict[str, Callable[[str, Mapping[str, Any]], Storage]] = {}


def parse(path: str | os.PathLike[str]) -> tuple[str, str]:
    """The scheme of a path (``"fs"`` for a plain one) and the rest of it.

    Raises
    ------
    InvalidArgumentError
        If it is empty, not text, holds a NUL, or chains URLs as fsspec does (``simplecache::s3://bucket/run``).

    Examples
    --------
    >>> parse("runs/step-1"), parse("s3://bucket/run")
    (('fs', 'runs/step-1'), ('s3', 'bucket/run'))
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str) or not text or "\0" in text:
        # Not shown: a URL may hold a password.
        found = type(text).__name__ if not isinstance(text, str) else "one with a NUL" if text else "an empty one"
        msg = f"a snapshot's path must be a text that is not empty, or os.PathLike, got {found}"
        raise InvalidArgumentError(msg)
    match = _SCHEME.match(text)
    if match is None:
        if _CHAIN.match(text):
            msg = "URLs chained by '::' are no place for snapshots: give the last one alone"
            raise InvalidArgumentError(msg)
        return "fs", text
    scheme, rest = match.group(1).lower(), text[match.end() :]
    if scheme == "file":
        rest = rest.removeprefix("localhost")
        if not rest.startswith("/"):
            msg = "a file:// URL needs an absolute path and no host, as in file:///data/run"
            raise InvalidArgumentError(msg)
    if not rest:
        msg = f"no path after the scheme in {text!r}"
        raise InvalidArgumentError(msg)
    return scheme, rest


def open_storage(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Storage:
    """The storage of a snapshot's folder. Nothing is read or made yet.

    Parameters
    ----------
    path : str or os.PathLike
        A path or URL.
    storage_options : mapping, optional
        What the backend needs to connect; the local disk takes none.

    Raises
    ------
    UnsupportedSchemeError
        If no storage is known for the scheme.
    InvalidArgumentError
        If the path is empty, or options are given that would be ignored.

    Examples
    --------
    >>> open_storage("fs:///tmp/run").url
    '/tmp/run'
    """
    scheme, rest = parse(path)
    options: object = storage_options
    if options is not None and not isinstance(options, Mapping):
        msg = f"storage_options must be a dict, got {type(options).__name__}"
        raise InvalidArgumentError(msg)
    factory = _factories.get(scheme)
    if factory is not None:
        return factory(rest, storage_options or {})
    from expstate.storage.objects.connections import open_objects  # noqa: PLC0415 - fsspec is not needed for a disk

    return open_objects(scheme, rest, options_of(f"{scheme}://{rest}", storage_options))


def _open_local(path: str, storage_options: Mapping[str, Any]) -> Storage:
    if storage_options:
        msg = f"the local disk takes no storage options, got {', '.join(map(str, storage_options))}"
        raise InvalidArgumentError(msg)
    return LocalStorage(path)


def register(scheme: str, factory: Callable[[str, Mapping[str, Any]], Storage]) -> None:
    """Make ``scheme://`` URLs open by ``factory(rest of the URL, storage options)``."""
    _factories[scheme] = factory


for _scheme in ("fs", "file"):
    register(_scheme, _open_local)
