"""Which snapshot a state came from, and where it lies: the last that this process took or restored with one of the same keys.

Takes and restores tell it; a take asks it for the parent that its manifest names, and for those that it can go on from.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from expstate.storage.base import Storage

_lock = threading.Lock()
_last: dict[str, tuple[int, str]] = {}
_places: dict[str, tuple[int, str, Storage]] = {}
_count = itertools.count()
_is_private: ContextVar[bool] = ContextVar("expstate_ancestry_is_private", default=False)


def moment() -> int:
    """A number that is greater than those of all moments before: when a take looked at its state, which is before it is committed."""
    return next(_count)


def note(keys: Iterable[str], snapshot_id: str, at: int | None = None, storage: Storage | None = None) -> None:
    """The state under these keys is, or at that moment was, that of this snapshot, which lies there."""
    if _is_private.get():
        return
    found = (moment() if at is None else at, snapshot_id)
    with _lock:
        for key in keys:
            _last[key] = max(found, _last.get(key, found))
            if storage is not None and (key not in _places or _places[key][0] < found[0]):
                _places[key] = (*found, storage)


def parent_of(keys: Iterable[str]) -> str | None:
    """The id of the last snapshot that was noted with one of these keys.

    >>> note(["model"], "0" * 31 + "1"), note(["optimizer"], "0" * 31 + "2")
    (None, None)
    >>> parent_of(["model", "optimizer"]), parent_of(["a state that was never taken"])
    ('00000000000000000000000000000002', None)
    """
    with _lock:
        found = [_last[key] for key in keys if key in _last]
    return max(found)[1] if found else None


def places_of(keys: Iterable[str]) -> list[tuple[str, Storage]]:
    """The ids of the last snapshots that were noted with these keys, and where they lie; the last noted first."""
    with _lock:
        found = {_places[key][1]: _places[key] for key in keys if key in _places}
    return [(snapshot_id, storage) for _, snapshot_id, storage in sorted(found.values(), key=lambda place: place[0], reverse=True)]


def parents_of(keys: Iterable[str]) -> dict[str, str | None]:
    """For each of these keys the id of the last snapshot that was noted with it."""
    with _lock:
        return {key: _last[key][1] if key in _last else None for key in keys}


def put_back(parents: Mapping[str, str | None]) -> None:
    """The state under these keys is again what it was when ``parents_of`` said this."""
    at = moment()
    with _lock:
        for key, parent in parents.items():
            if parent is None:
                _last.pop(key, None)
            else:
                _last[key] = (at, parent)


@contextlib.contextmanager
def unnoted() -> Iterator[None]:
    """What is taken or restored inside this ``with`` block is nobody's parent.

    >>> with unnoted():
    ...     note(["a key of nobody else"], "0" * 31 + "3")
    >>> parent_of(["a key of nobody else"]) is None
    True
    """
    token = _is_private.set(True)
    try:
        yield
    finally:
        _is_private.reset(token)


def forget() -> None:
    """Begin anew, as in a new process."""
    with _lock:
        _last.clear()
        _places.clear()


def _unlock() -> None:
    global _lock  # noqa: PLW0603 - the parent's may be held by a thread that the child does not have
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)
