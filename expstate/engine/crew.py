"""Threads that work through jobs: the first error stops all, and so does an interrupt of the thread that waits."""

from __future__ import annotations

import contextlib
import contextvars
import queue
import threading
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from expstate.storage.objects.retry import GivenUpError, stoppable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Job = TypeVar("Job")


class _End:
    """Comes after the last job."""


_END = _End()


class StoppedError(Exception):
    """Raised inside a job to leave it because the crew was told to stop; never seen outside the engine."""


class Stop:
    """Says to all threads of an operation that it is over, and why."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self.error: BaseException | None = None

    def set(self, error: BaseException | None = None) -> None:
        """Stop; the first error is kept."""
        with self._lock:
            if self.error is None and not isinstance(error, (StoppedError, GivenUpError)):
                self.error = error
        self._event.set()

    def is_set(self) -> bool:
        """Whether to stop."""
        return self._event.is_set()

    def check(self) -> None:
        """Leave the job if the operation is over."""
        if self._event.is_set():
            raise StoppedError


class Crew(Generic[Job]):
    """Threads that take jobs from an iterable, one at a time each.

    Parameters
    ----------
    jobs : iterable
        Asked for the next job under a lock, by the threads.
    work : callable
        Does one job.
    threads : int
        How many.
    stop : Stop
        Shared by all that belongs to the operation.
    around : callable
        Gives a context that each thread works in.
    """

    def __init__(
        self,
        jobs: Iterable[Job],
        work: Callable[[Job], None],
        threads: int,
        stop: Stop,
        around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self._jobs = iter(jobs)
        self._work = work
        self._around = around
        self._lock = threading.Lock()
        self._stop = stop
        self._begun = 0
        self._ended = 0
        self._counting = threading.Lock()  # taken by the threads alone, which no interrupt reaches
        self._ends: queue.SimpleQueue[None] = queue.SimpleQueue()
        # Not daemons: an interpreter that exits waits until what was promised is written.
        # Settings are those in force here.
        contexts = [contextvars.copy_context() for _ in range(threads)]
        self._threads = [
            threading.Thread(target=context.run, args=(self._run,), name=f"expstate-{index}") for index, context in enumerate(contexts)
        ]

    def start(self, *, or_work_here: bool = False) -> None:
        """Start the threads; where none can be started any more, because the interpreter ends, the caller's may do the work."""
        for thread in self._threads:
            try:
                thread.start()
            except RuntimeError:
                if not or_work_here:
                    raise
                self._run()

    def _run(self) -> None:
        with self._counting:
            self._begun += 1
        try:
            with self._around(), stoppable(self._stop.is_set):
                while not self._stop.is_set():
                    with self._lock:
                        job = next(self._jobs, _END)
                    if isinstance(job, _End):
                        break
                    self._work(job)
        except BaseException as error:  # noqa: BLE001 - raised again by wait()
            self._stop.set(error)
        finally:
            with self._counting:
                self._ended += 1
            self._ends.put(None)

    def wait(self) -> None:
        """Wait for the last job; raise the first error. An interrupt stops the threads before it goes on."""
        try:
            self._sleep_until(lambda: self._ended == len(self._threads))
            for thread in self._threads:
                if thread.ident is not None:
                    thread.join()
        except BaseException as error:
            self._stop.set(error)
            self.join()
            raise
        if self._stop.error is not None:
            raise self._stop.error
        self._stop.check()

    def _sleep_until(self, reached: Callable[[], bool]) -> None:
        # No condition or event of threading: an interrupt inside one leaves its lock as it should not be. One that comes between a
        # thread's sign and the look at the count costs a moment.
        while not reached():
            with contextlib.suppress(queue.Empty):
                self._ends.get(timeout=0.05)

    def join(self) -> None:
        """Wait until no thread is at work, whatever came of it; what they hold may then be let go.

        An interrupt is put off until then: a thread that goes on behind its caller's back would write to files, or to live state,
        that are someone else's by now.
        """
        interrupt: BaseException | None = None
        while True:
            # Not by Thread.join alone, which takes a thread for dead when it is interrupted.
            try:
                self._sleep_until(lambda: self._ended == self._begun)
                for thread in self._threads:
                    if thread.ident is not None:
                        thread.join()
            except KeyboardInterrupt as error:
                interrupt = error
                continue
            break
        if interrupt is not None:
            raise interrupt


def run(
    jobs: Iterable[Job],
    work: Callable[[Job], None],
    threads: int,
    stop: Stop,
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> None:
    """Work through ``jobs`` and wait."""
    crew = Crew(jobs, work, threads, stop, around)
    try:
        crew.start(or_work_here=True)
        crew.wait()
    except BaseException as error:
        stop.set(error)
        crew.join()
        raise
