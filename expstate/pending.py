"""Takes in the background: ``PendingSnapshot`` is waited for, watched, cancelled or awaited.

The thread behind it is not a daemon: an interpreter that exits finishes what it was promised to write. A failure that nobody
asked for is logged, and warned of at exit.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import logging
import threading
import warnings
from typing import TYPE_CHECKING, Any

from expstate.catalog import running
from expstate.engine.crew import StoppedError
from expstate.engine.report import bytes_text
from expstate.errors import TakeCancelledError, TakeFailedWarning, TakePendingError, TakeSkippedError
from expstate.progress import in_notebook
from expstate.state import paths

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from expstate.engine.busy import Turn
    from expstate.engine.take import Take
    from expstate.format.manifest import Manifest
    from expstate.snapshot import Snapshot

_MOST_KEYS = 12
_log = logging.getLogger("expstate")
_unreported: dict[str, str] = {}


class PendingSnapshot:
    """A take that goes on in the background, made by ``Snapshot.async_take``.

    The state is the one of the moment when ``async_take`` returned, whatever the training does next.

    Attributes
    ----------
    path : str
        Where the snapshot will be, without secrets.
    id : str
        Of the snapshot to be; empty if the take was skipped.
    skipped : bool
        Whether nothing is taken, because an earlier take had not ended and ``on_busy="skip"`` was given.

    Examples
    --------
    >>> import tempfile
    >>> from expstate import Snapshot, StateDict
    >>> folder = tempfile.TemporaryDirectory()
    >>> pending = Snapshot.async_take(f"{folder.name}/step-1", {"progress": StateDict(step=1)})
    >>> pending.wait().read_object("progress/step")
    1
    >>> folder.cleanup()
    """

    skipped = False

    def __init__(self, path: str, take: Take, turn: Turn, opened: Callable[[tuple[Manifest, bytes] | None], Snapshot]) -> None:
        self._take = take
        self._turn = turn
        self._opened = opened
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        self._snapshot: Snapshot | None = None
        self._error: BaseException | None = None
        self.path = path
        self.id = take.id
        # Settings are those in force here.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name=f"expstate-take-{self.id[:8]}")

    def _begin(self) -> None:
        """Start the thread, while threads can still be started: the interpreter may be ending when the work is done."""
        self._turn.goes_on()
        self._thread.start()

    def _give_up(self, error: BaseException) -> None:
        """End what was begun and nobody has in hand: nothing may appear."""
        running.leave(self.id)
        if self._thread.is_alive():
            self._take.cancel()
            self._done.wait()  # it removes what it has written
        else:
            self._take.abort(error)

    def _run(self) -> None:
        try:
            self._take.write_staged()
            self._snapshot = self._opened(self._take.commit())
        except BaseException as error:  # noqa: BLE001 - kept for wait()
            self._fail(error)
        finally:
            running.leave(self.id)
            self._turn.end(self._error)
            with self._lock:
                self._done.set()
                callbacks, self._callbacks = self._callbacks, []
            for callback in callbacks:
                callback()

    def _fail(self, error: BaseException) -> None:
        self._take.abort(error)
        if isinstance(error, (StoppedError, TakeCancelledError)):
            self._error = TakeCancelledError(f"the take to {self.path!r} was cancelled, and nothing of it remains")
            return
        self._error = error
        _unreported[self.id] = f"the take to {self.path!r} failed: {type(error).__name__}: {error}"
        _log.error("%s", _unreported[self.id])

    @property
    def total_bytes(self) -> int:
        """Bytes of tensors and objects to write."""
        return self._take.total_bytes

    @property
    def done_bytes(self) -> int:
        """Bytes written so far."""
        return self._take.done_bytes

    def done(self) -> bool:
        """Whether the take has ended: committed, failed or cancelled."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> Snapshot:
        """Wait for the commit.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait at most.

        Returns
        -------
        Snapshot
            The committed snapshot.

        Raises
        ------
        TakePendingError
            If it is not done in time; the take goes on.
        TakeCancelledError
            If it was cancelled.
        TakeSkippedError
            If it was skipped.
        ExpstateError
            What went wrong with it.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        assert self._snapshot is not None
        return self._snapshot

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait like ``wait``, and return the error instead of raising it; None if the snapshot is committed."""
        if not self._done.wait(timeout):
            msg = f"the take to {self.path!r} is not done after {timeout} s ({self.done_bytes:,} of {self.total_bytes:,} bytes written)"
            raise TakePendingError(msg)
        _unreported.pop(self.id, None)
        return self._error

    def cancel(self) -> bool:
        """Stop the take and remove what it has written.

        Returns
        -------
        bool
            True if nothing of it remains, False if it was committed, or had failed, before.
        """
        self._take.cancel()
        self._done.wait()
        return isinstance(self._error, TakeCancelledError)

    def add_done_callback(self, callback: Callable[[PendingSnapshot], object]) -> None:
        """Have a function called when the take has ended: at once if it has, else from the take's own thread.

        Parameters
        ----------
        callback : callable
            Called with this object; what it raises is logged.
        """

        def tell() -> None:
            try:
                callback(self)
            except Exception:  # noqa: BLE001 - of somebody's function
                _log.exception("a callback of the take to %r failed", self.path)

        with self._lock:
            if not self._done.is_set():
                self._callbacks.append(tell)
                return
        tell()

    def __await__(self) -> Generator[Any, None, Snapshot]:
        return self._wait_async().__await__()

    async def _wait_async(self) -> Snapshot:
        loop = asyncio.get_running_loop()
        reached: asyncio.Future[None] = loop.create_future()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody awaits any more
                loop.call_soon_threadsafe(lambda: None if reached.done() else reached.set_result(None))

        with self._lock:
            if self._done.is_set():
                reached.set_result(None)
            else:
                self._callbacks.append(tell)
        await reached
        return self.wait()

    def __repr__(self) -> str:
        if not self.done():
            state = f"{self.done_bytes:,} of {self.total_bytes:,} bytes written"
        elif self._error is None:
            state = "committed"
        else:
            state = f"failed: {type(self._error).__name__}: {self._error}"
        return f"PendingSnapshot({self.path!r}, id={self.id[:8]}, {state})"

    def __str__(self) -> str:
        title, keys = self.id[:8], self._take.keys
        if self._take.name is not None:
            title = f"{paths.printable(self._take.name)} ({title})"
        more = [f"{len(keys) - _MOST_KEYS:,} more"] if len(keys) > _MOST_KEYS else []
        what = f"{title} of {', '.join([*map(paths.printable, keys[:_MOST_KEYS]), *more])}"
        if not self.done():
            return f"taking {what}: {bytes_text(self.done_bytes)} of {bytes_text(self.total_bytes)} written"
        if self._snapshot is not None:
            return f"took {what}: {bytes_text(self.total_bytes)} in {self._snapshot.manifest.duration_seconds or 0:.2g} s"
        if isinstance(self._error, TakeCancelledError):
            return f"cancelled the take {what}; nothing of it remains"
        return f"FAILED: the take {what}: {type(self._error).__name__}: {paths.printable(str(self._error))}"

    def _ipython_display_(self) -> None:
        """A line that changes when the take has ended; at a terminal, where lines stay, it is printed once."""
        from IPython.display import display  # noqa: PLC0415 - only IPython calls this

        show: Any = display
        handle = show(self._as_data(), raw=True, display_id=True)
        if in_notebook() and handle is not None and not self.done():
            self.add_done_callback(lambda _: handle.update(self._as_data(), raw=True))

    def _as_data(self) -> dict[str, str]:
        return {"text/plain": str(self)}


class SkippedTake(PendingSnapshot):
    """A take that there is none of: what ``async_take`` returns when it has skipped it. Nothing was written."""

    skipped = True
    total_bytes = 0  # of nothing
    done_bytes = 0

    def __init__(self, path: str, keys: Iterable[str]) -> None:
        self._keys = ", ".join(map(paths.printable, keys))
        self._done = threading.Event()
        self._done.set()
        self._lock = threading.Lock()
        self._callbacks = []
        self._snapshot = None
        self._error = TakeSkippedError(f"nothing was taken to {path!r}: an earlier take of {self._keys} had not ended")
        self.path = path
        self.id = ""

    def cancel(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"PendingSnapshot({self.path!r}, skipped)"

    def __str__(self) -> str:
        return f"skipped the take of {self._keys}: an earlier one had not ended"


def _warn_at_exit() -> None:
    for message in _unreported.values():
        warnings.warn(message, TakeFailedWarning, stacklevel=1)


atexit.register(_warn_at_exit)
