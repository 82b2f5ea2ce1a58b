"""No process is forked in the midst of a transaction: SQLite takes the locks of its parent for its own, and two write at once.

``in_use`` marks the time that a connection is open. A fork waits until nobody has one, and what it could not wait for is refused to
the child.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_WAIT_SECONDS = 5.0
_free = threading.Condition(threading.RLock())
_open: Counter[tuple[str, int]] = Counter()  # by path and thread
_hanging: set[tuple[str, int]] = set()
_inherited: set[str] = set()
_forking: list[int] = []  # the threads that do so


@contextlib.contextmanager
def in_use(path: Path | None) -> Iterator[None]:
    """Mark that this thread has a connection to this file, or to a server; none is opened while a process is being forked."""
    mine = threading.get_ident()
    key = (str(path or ""), mine)
    with _free:
        # Who has one may open another: the fork waits for the end of both.
        _free.wait_for(lambda: not _forking or mine in _forking or any(thread == mine for _, thread in _open), _WAIT_SECONDS)
        _open[key] += 1
    try:
        yield
    finally:
        with _free:
            _open[key] -= 1
            if _open[key] <= 0:  # below, where this is the child of a fork
                del _open[key]
                _hanging.discard(key)
            _free.notify_all()


def is_inherited(path: Path) -> bool:
    """Whether the parent process had this file open when it was forked, so that this one must not open it."""
    return str(path) in _inherited


def _before() -> None:
    mine = threading.get_ident()
    _free.acquire()
    _forking.append(mine)
    # Transactions take milliseconds. One of this very thread will not end, and one that hangs is not waited for.
    _free.wait_for(lambda: all(key[1] == mine or key in _hanging for key in _open), _WAIT_SECONDS)
    _hanging.update(key for key in _open if key[1] != mine)  # no fork waits for them again


def _after_in_parent() -> None:
    _forking.remove(threading.get_ident())
    _free.notify_all()
    _free.release()


def _after_in_child() -> None:
    _inherited.update(path for path, _ in _open if path)
    _open.clear()
    _hanging.clear()
    _forking.clear()
    _free.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
