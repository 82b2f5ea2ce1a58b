"""Python's garbage collector, held back while hundreds of thousands of records are made that are no garbage."""

from __future__ import annotations

import contextlib
import gc
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG_BYTES = 1024**3
"""Moving this much takes about a second: long enough for garbage of other threads to matter."""

_lock = threading.Lock()
_depth = 0
_was_on = False


class Pause:
    """One reason for the collector to wait; ``end`` takes it back."""

    def __init__(self) -> None:
        global _depth, _was_on  # noqa: PLW0603 - the collector is one for the process, and so is this
        self._ended = False
        with _lock:
            if _depth == 0:
                _was_on = gc.isenabled()
                gc.disable()
            _depth += 1

    def end(self) -> None:
        """Let the collector run again, unless there are other reasons for it to wait."""
        global _depth  # noqa: PLW0603 - see above
        with _lock:
            if self._ended:
                return
            self._ended = True
            _depth -= 1
            if _depth == 0 and _was_on:
                gc.enable()


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
