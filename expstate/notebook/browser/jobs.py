"""What takes long: one thread a job, with progress that is told now and then, and a way to stop it.

Gets functions that are given a ``Job``; hands on what they give, or what they raise, to who listens.
"""

from __future__ import annotations

import contextvars
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from expstate.notebook.turns import Turn
    from expstate.progress import ProgressUpdate

_PAUSE_SECONDS = 0.1


class StoppedByUserError(Exception):
    """The job was cancelled."""


class Job:
    """Something that goes on.

    Parameters
    ----------
    number : str
        What the page calls it.
    tell : callable
        Given a dict now and then: how far it is.
    """

    def __init__(self, number: str, tell: Callable[[dict[str, Any]], None]) -> None:
        self.number = number
        self._tell = tell
        self._cancelled = threading.Event()
        self._told_at = 0.0
        self._turn: Turn | None = None

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody wants it to end."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Stop it at the next occasion; if it waits for a cell, at once."""
        self._cancelled.set()
        if self._turn is not None:
            self._turn.cancel()

    def check(self) -> None:
        """Raise if it was cancelled."""
        if self.is_cancelled:
            raise StoppedByUserError

    def progress(self, update: ProgressUpdate) -> None:
        """What operations of the library are given to tell how far they are."""
        self.told(update.done_bytes, update.total_bytes)

    def told(self, done: int, total: int) -> None:
        """Tell how far it is, but not too often; raise if it was cancelled."""
        self.check()
        now = time.monotonic()
        if now - self._told_at >= _PAUSE_SECONDS or done >= total:
            self._told_at = now
            self._tell({"done": done, "total": total})

    def says(self, text: str) -> None:
        """Tell what it does, in words."""
        self._tell({"text": text})

    def between_cells(self, between: Callable[[Callable[[], None]], Turn], action: Callable[[], Any]) -> Any:
        """Do something that must not run into the middle of a cell, and give what it gives.

        Parameters
        ----------
        between : callable
            ``Kernel.between_cells``.
        action : callable
            What is to be done; in this thread, or after the cell in the kernel's.
        """
        result: list[Any] = []
        failure: list[BaseException] = []

        def act() -> None:
            try:
                self.check()
                self._tell({"text": ""})
                result.append(action())
            except BaseException as error:  # noqa: BLE001 - handed on to the thread that waits
                failure.append(error)

        self._turn = turn = between(act)
        if self.is_cancelled:
            turn.cancel()
        if not turn.done:
            self.says("waits for the running cell")
            turn.wait()
        if failure:
            raise failure[0]
        if not result:
            raise StoppedByUserError
        return result[0]


class Jobs:
    """The jobs that go on.

    Parameters
    ----------
    tell : callable
        Given a job's number and a dict: ``done`` and ``total`` bytes or ``text``, at last ``result``, ``error`` or ``cancelled``.
    failed : callable
        Makes a dict of an error.
    """

    def __init__(self, tell: Callable[[str, dict[str, Any]], None], failed: Callable[[BaseException], dict[str, Any]]) -> None:
        self._tell = tell
        self._failed = failed
        self._running: dict[str, Job] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._lock = threading.Lock()

    def start(self, number: str, work: Callable[[Job], Any]) -> Job:
        """Begin something in a thread of its own; settings are those in force here."""
        job = Job(number, lambda message: self._tell(number, message))
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(self._run, job, work), name=f"expstate-browser-{number}", daemon=True)
        with self._lock:
            self._running[number] = job
            self._threads[number] = thread
        thread.start()
        return job

    def _run(self, job: Job, work: Callable[[Job], Any]) -> None:
        try:
            message = {"result": work(job)}
        except StoppedByUserError:
            message = {"cancelled": ""}
        except BaseException as error:  # noqa: BLE001 - told where it belongs
            # What was interrupted in the middle says more than that it was.
            message = {"cancelled": self._failed(error)["message"]} if job.is_cancelled else {"error": self._failed(error)}
        with self._lock:
            self._running.pop(job.number, None)
            self._threads.pop(job.number, None)
        self._tell(job.number, message)

    def cancel(self, number: str) -> None:
        """Stop one, if it goes on."""
        with self._lock:
            job = self._running.get(number)
        if job is not None:
            job.cancel()

    def cancel_all(self) -> None:
        """Stop all."""
        with self._lock:
            found = list(self._running.values())
        for job in found:
            job.cancel()

    def wait(self, timeout: float | None = None) -> None:
        """Wait for those that go on now."""
        with self._lock:
            threads = list(self._threads.values())
        for thread in threads:
            thread.join(timeout)
