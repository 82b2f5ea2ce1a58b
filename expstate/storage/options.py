"""Storage options that were said once: which to use below which URL, in the memory of this process alone.

Gets options by the beginning of URLs; hands on those of a URL. Nothing writes them down: they hold secrets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expstate.errors import InvalidArgumentError

# Copied, and changed key by key, in one step each: a lock could be left behind, held, in a child that is forked meanwhile.
_configured: dict[str, dict[str, Any]] = {}


def configure(*, storage_options: Mapping[str, Mapping[str, Any]]) -> None:
    """Say how URLs are to be opened: by ``Snapshot``, the catalog, the command line in this process, the magic and the browser.

    Parameters
    ----------
    storage_options : mapping of str to mapping
        By the beginning of URLs, such as ``"s3://bucket"`` or ``"s3://bucket/runs"``: what fsspec's file system needs to connect. Of those
        that fit a URL the longest counts; options that are passed with a path come on top. An empty mapping forgets what was said.

    Raises
    ------
    InvalidArgumentError
        If it is no mapping of URLs to mappings.

    Examples
    --------
    >>> import expstate
    >>> expstate.configure(storage_options={"s3://my-bucket": {"endpoint_url": "http://127.0.0.1:8333", "profile": "lab"}})
    >>> expstate.configure(storage_options={"s3://my-bucket": {}})
    """
    given: object = storage_options
    if not isinstance(given, Mapping):
        msg = f"storage_options must be a mapping of URLs to options, got {type(given).__name__}"
        raise InvalidArgumentError(msg)
    checked = {}
    for url, options in given.items():
        if not isinstance(url, str) or "://" not in url or not isinstance(options, Mapping):
            msg = "storage_options must be a mapping of URLs such as 's3://bucket' to mappings of options"
            raise InvalidArgumentError(msg)
        checked[url.rstrip("/")] = dict(options)
    for url, options in checked.items():
        if options:
            _configured[url] = options
        else:
            _configured.pop(url, None)


def options_of(url: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of a URL: those that were configured for the longest beginning of it, then those that are given."""
    configured = _configured.copy()
    fitting = [start for start in configured if url == start or url.startswith(f"{start}/") or start.endswith(":/")]
    found = configured[max(fitting, key=len)] if fitting else {}
    return {**found, **(given or {})}
