"""What a person gives as a ref, before a catalog is asked: as text, and as a place. Needs no database."""

from __future__ import annotations

import os

from expstate.catalog.model import LOCAL_SCHEMES, this_host
from expstate.catalog.provenance import redact
from expstate.errors import ExpstateError, InvalidArgumentError
from expstate.storage import registry


def text_of(ref: str | os.PathLike[str]) -> str:
    """A ref as text; ``InvalidArgumentError`` if it is none."""
    text: object = os.fspath(ref) if isinstance(ref, os.PathLike) else ref
    if not isinstance(text, str) or not text:
        msg = f"a ref must be a text that is not empty (an id, name, alias, latest, path or URL), got {text!r}"
        raise InvalidArgumentError(msg)
    return text


def place_of(ref: str) -> tuple[str, str] | None:
    """The URL, without secrets, and the host of the place that a path or URL names; None if it can be none."""
    try:
        scheme, _ = registry.parse(ref)
        try:
            return redact.url(registry.open_storage(ref).url), this_host() if scheme in LOCAL_SCHEMES else ""
        except (ExpstateError, ImportError):
            return redact.url(ref), ""
    except (ExpstateError, OSError, ValueError):
        return None
