"""Python's garbage collector, held back while hundreds of thousands of records are made that are no garbage."""

from __future__ import annotations

import contextlib
import gc
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_lock = threading.Lock()
_depth = 0
_was_on = False


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """No collections inside this ``with`` block, in any thread: each would look at all records again.

    Examples
    --------
    >>> import gc
    >>> with paused():
    ...     gc.isenabled()
    False
    """
    global _depth, _was_on  # noqa: PLW0603 - the collector is one for the process, and so is this
    with _lock:
        if _depth == 0:
            _was_on = gc.isenabled()
            gc.disable()
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0 and _was_on:
                gc.enable()
