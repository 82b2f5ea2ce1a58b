"""An event loop on a thread of its own, for clients whose library is asynchronous: a call ends when its coroutine has ended.

Gets functions that give coroutines, from any thread; hands on what these return or raise. Nothing goes on after a call was interrupted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from expstate.errors import StorageError
from expstate.storage.objects import retry

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

Result = TypeVar("Result")

_WAKE_SECONDS = 0.5
"""A thread that waits looks up so often: whether its operation was stopped, and where an interrupt is no signal of the system, for that."""
_END_SECONDS = 10.0
"""So long a coroutine that was cancelled is waited for: one that does not end by then waits for something that cannot be cancelled."""


class _Call(Generic[Result]):
    """One coroutine, from its making on the loop's thread to its end."""

    def __init__(self, function: Callable[[], Coroutine[Any, Any, Result]]) -> None:
        self._function = function
        self._task: asyncio.Task[Result] | None = None
        self._value: list[Result] = []
        self._error: BaseException | None = None
        self._has_ended = False
        # Not an event: an interrupt inside of its methods can leave it locked, and the loop would wait for it.
        self._gate = threading.Lock()
        self._gate.acquire()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        # Made here and not by the caller, so that an interrupt cannot leave a coroutine that nobody has awaited.
        self._task = loop.create_task(self._run())
        self._task.add_done_callback(self._note)

    async def _run(self) -> Result:
        return await self._function()

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        elif not self._has_ended:  # the interrupt came before it was handed over
            self._end()

    def _note(self, task: asyncio.Task[Result]) -> None:
        # The caller never has the task: what asyncio does when it is gone, in the caller's thread, would swallow an interrupt.
        self._task = None
        if not task.cancelled():
            self._error = task.exception()
            if self._error is None:
                self._value.append(task.result())
            else:
                _keep_contexts(self._error)
        self._end()

    def _end(self) -> None:
        self._has_ended = True
        self._gate.release()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended by then. Only by the thread that has made the call."""
        return self._has_ended or self._gate.acquire(timeout=seconds)

    def result(self) -> Result:
        if self._value:
            return self._value.pop()
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # which has this frame in its traceback
        # Never a result: what was cancelled has not been done, or not been seen to be.
        msg = "the request was cancelled: its client was closed meanwhile"
        raise StorageError(msg)


def _keep_contexts(error: BaseException) -> None:
    """Make what exceptions came from their causes: raised again in another thread, they get what is being handled there as context."""
    link: BaseException | None = error
    while link is not None and link.__cause__ is None and not link.__suppress_context__:
        context = link.__context__
        link.__cause__ = context
        link = context


class Loop:
    """Runs coroutines for any number of threads. Its own thread starts with the first, and does not keep the interpreter from exiting.

    Parameters
    ----------
    name : str
        Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def run(self, function: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """What the coroutine that ``function`` gives returns.

        An exception in this thread meanwhile, such as ``KeyboardInterrupt``, cancels the coroutine and is raised when that has ended.

        Raises
        ------
        StorageError
            If the loop is closed or belongs to another process, or the coroutine was cancelled.
        """
        call = _Call(function)
        loop = self.running()
        try:
            loop.call_soon_threadsafe(call.start, loop)
            while not call.wait(_WAKE_SECONDS):
                retry.check()
        except BaseException:
            self._end(call, loop)
            raise
        return call.result()

    def running(self) -> asyncio.AbstractEventLoop:
        """The loop itself, started if need be."""
        if self._pid != os.getpid():
            msg = "a client cannot be used in a process that was forked from the one that has made it"
            raise StorageError(msg)
        with self._lock:
            if self._is_closed:
                msg = "the client is closed"
                raise StorageError(msg)
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_serve, args=(self._loop,), name=self._name, daemon=True)
                self._thread.start()
            return self._loop

    @staticmethod
    def _end(call: _Call[Any], loop: asyncio.AbstractEventLoop) -> None:
        """Cancel a coroutine and wait for its end, whatever else interrupts this thread."""
        with contextlib.suppress(RuntimeError):  # the loop was closed at this moment, and has ended the coroutine
            loop.call_soon_threadsafe(call.cancel)
        deadline = time.monotonic() + _END_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(KeyboardInterrupt):
                if call.wait(left):
                    return

    def cancel(self) -> None:
        """Cancel what runs, and wait for its end."""
        if self._loop is not None and self._pid == os.getpid() and not self._is_closed:
            self.run(_cancel_others)

    def close(self, finish: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Cancel what runs, run ``finish`` to let go of connections, and end the thread."""
        with self._lock:
            if self._is_closed or self._pid != os.getpid():
                return
            self._is_closed = True
            loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        asyncio.run_coroutine_threadsafe(_finish(finish), loop)
        if thread is not threading.current_thread():  # as it is where the last reference was dropped by the loop itself
            thread.join(_END_SECONDS)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=_END_SECONDS / 2)


async def _finish(finish: Callable[[], Coroutine[Any, Any, None]] | None) -> None:
    loop = asyncio.get_running_loop()
    try:
        await _cancel_others()
        if finish is not None:
            with contextlib.suppress(Exception):  # what cannot be closed properly goes with the loop
                await asyncio.wait_for(finish(), _END_SECONDS / 4)
        await asyncio.sleep(0)  # transports that were closed tell so in the next round
        await loop.shutdown_asyncgens()
        await loop.shutdown_default_executor()
    finally:
        loop.call_soon(loop.stop)
