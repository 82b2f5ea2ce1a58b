"""Python's garbage collector, held back while hundreds of thousands of records are made that are no garbage."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG_BYTES = 1024**3
"""Moving this much takes about a second: long enough for garbage of other threads to matter."""

_lock = threading.Lock()
_pauses: set[Pause] = set()
_was_on = False


class Pause:
    """One reason for the collector to wait; ``end`` takes it back."""

    def __init__(self) -> None:
        global _was_on  # noqa: PLW0603 - the collector is one for the process, and so is this
        with _lock:
            if not _pauses:
                _was_on = gc.isenabled()
                gc.disable()
            _pauses.add(self)

    def end(self) -> None:
        """Let the collector run again, unless there are other reasons for it to wait."""
        with _lock:
            if self not in _pauses:
                return
            _pauses.remove(self)
            if not _pauses and _was_on:
                gc.enable()


def _forget_pauses() -> None:
    # In a forked child the parent's threads will not end their pauses, and one of them may hold the lock.
    global _lock  # noqa: PLW0603 - see above
    _lock = threading.Lock()
    if _pauses and _was_on:
        gc.enable()
    _pauses.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pauses)


@contextlib.contextmanager
def paused() -> Iterator[Pause]:
    """No collections inside this ``with`` block, in any thread: each would look at all records again.

    Examples
    --------
    >>> import gc
    >>> with paused():
    ...     gc.isenabled()
    False
    """
    pause = Pause()
    try:
        yield pause
    finally:
        pause.end()
