"""Requests tried again: with pauses that grow, for as long as a setting allows, and no longer than anybody wants the answer.

Gets an action that makes one request; hands on its result, or the last error in words. ``stoppable`` says when an operation is over: a
thread that waits for its next try then leaves at once.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from typing import TYPE_CHECKING, TypeVar

from expstate import settings
from expstate.errors import StorageError
from expstate.storage.objects.client import TransientError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Result = TypeVar("Result")

_FIRST_SECONDS = 0.1
_THROTTLED_SECONDS = 1.0
_LONGEST_SECONDS = 10.0
_SLICE_SECONDS = 0.1

_here = threading.local()


class GivenUpError(StorageError):
    """Nobody wants the answer any more: the operation was stopped while its request waited for another try."""


@contextlib.contextmanager
def stoppable(is_over: Callable[[], bool]) -> Iterator[None]:
    """Let requests that this thread makes in the block be given up once ``is_over()``."""
    before = getattr(_here, "is_over", None)
    _here.is_over = is_over
    try:
        yield
    finally:
        _here.is_over = before


def check() -> None:
    """Raise ``GivenUpError`` if this thread's operation is over."""
    is_over = getattr(_here, "is_over", None)
    if is_over is not None and is_over():
        msg = "the operation was stopped"
        raise GivenUpError(msg)


def persist(what: str, action: Callable[[], Result]) -> Result:
    """Do something, again and again where that may help.

    Parameters
    ----------
    what : str
        What is being done, for the message.
    action : callable
        Makes one request. A ``TransientError`` is tried again until ``retry_seconds`` have passed.

    Raises
    ------
    StorageError
        If it failed to the end; the message says how often and what the server said last.
    GivenUpError
        If the operation of this thread is over.
    """
    begun = time.monotonic()
    deadline = begun + settings.current().retry_seconds
    tries = 0
    while True:
        check()
        try:
            return action()
        except TransientError as error:
            tries += 1
            # Spread, so that many clients do not come back at the same moment.
            pause = min(_LONGEST_SECONDS, _FIRST_SECONDS * 2 ** min(tries, 10)) * random.uniform(0.5, 1)  # noqa: S311
            if error.throttled:
                pause = max(pause, _THROTTLED_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311 - as above
            if time.monotonic() + pause > deadline:
                times = "once" if tries == 1 else f"{tries} times in {time.monotonic() - begun:.0f} s"
                hint = "; the server asks for fewer requests: try later, or with a lower EXPSTATE_IO_THREADS" if error.throttled else ""
                msg = f"{what} failed {times}: {error}{hint}"
                raise StorageError(msg) from error
            _sleep(pause)


def _sleep(seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check()
        time.sleep(min(left, _SLICE_SECONDS))
