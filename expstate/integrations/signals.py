"""Signals that end a process, put off until the training is between two steps; what handled them before does so then.

A handler runs in the midst of whatever the main thread does, an optimizer's step perhaps. So it only notes the signal. The training asks
for it at its next step, and passes it on when it has taken its snapshot. If no step comes in time, it is passed on without.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

from expstate.errors import ExpstateWarning

if TYPE_CHECKING:
    from types import FrameType

_log = logging.getLogger("expstate")
_INTERRUPT_SECONDS = 5.0
"""So long a person who presses Ctrl-C waits for the end of a step."""
_LOOK_SECONDS = 0.02


class Signals:
    """SIGTERM and SIGINT while a training runs.

    Parameters
    ----------
    deadline_seconds : float
        How long after SIGTERM the process lives; half of it may pass until the next step.
    """

    def __init__(self, deadline_seconds: float) -> None:
        self._deadline = deadline_seconds
        self._previous: dict[int, Any] = {}
        self._pid = 0
        self._came: int | None = None
        self._came_at = 0.0
        self._is_given_up = False
        self._is_seen = False
        # Of all that wakes a thread this alone may be called by a handler, which may have interrupted itself.
        self._news: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._watcher: threading.Thread | None = None

    # The handlers

    def install(self) -> None:
        """Handle the signals from now on; only warns in another thread than the main one, where that cannot be done.

        Warns
        -----
        ExpstateWarning
            If they cannot be handled here.
        """
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                "signals reach the main thread alone, and this is another: nothing is taken when the process is told to end; begin the "
                "training in the main thread, or pass signal=False",
                ExpstateWarning,
                stacklevel=4,
            )
            return
        self._pid = os.getpid()
        for number in (signal.SIGTERM, signal.SIGINT):
            previous = signal.getsignal(number)
            # None is a handler that is not written in Python, and cannot be called.
            if previous is not None and previous != signal.SIG_IGN:
                self._previous[number] = previous
                signal.signal(number, self._handle)
        self._watcher = threading.Thread(target=self._watch, name="expstate-signals", daemon=True)
        self._watcher.start()

    def restore(self) -> None:
        """Leave the signals to what handled them before, and pass on one that has come."""
        if self._watcher is None:
            return
        self._news.put(None)
        self._is_seen = True
        if threading.current_thread() is threading.main_thread():
            for number, previous in self._previous.items():
                if signal.getsignal(number) == self._handle:  # else somebody has come after us, and may call us yet
                    signal.signal(number, previous)
        self._watcher = None
        if self._came is not None:
            self.pass_on()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_second_interrupt = number == self._came == signal.SIGINT
        if self._watcher is None or os.getpid() != self._pid or self._is_given_up or is_second_interrupt:
            self._pass_on(number, frame)
            return
        if self._came is None:
            self._came_at, self._is_seen = time.monotonic(), False
            self._news.put(number)
        if self._came != signal.SIGTERM:
            self._came = number

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._came, self._is_given_up, self._is_seen = None, False, True
        previous = self._previous[number]
        if callable(previous):
            previous(number, frame)
        elif previous == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _watch(self) -> None:
        """Pass on a signal that no step comes for."""
        while (number := self._news.get()) is not None:
            patience = _INTERRUPT_SECONDS if number == signal.SIGINT else self._deadline / 2
            until = time.monotonic() + patience
            while not self._is_seen and time.monotonic() < until:
                time.sleep(_LOOK_SECONDS)
            if self._is_seen:
                continue
            _log.error("%s came, and no step within %g s after it, so no last snapshot is taken", signal.Signals(number).name, patience)
            self._is_given_up = True
            os.kill(self._pid, self._came or number)

    # What the training asks

    @property
    def came(self) -> bool:
        """Whether the process is to end."""
        return self._came is not None

    def seen(self) -> float:
        """The training is between two steps and deals with it; the seconds that are left for that."""
        self._is_seen = True
        return max(0.0, self._deadline - (time.monotonic() - self._came_at if self._came is not None else 0.0))

    def pass_on(self) -> None:
        """Do now what would have been done when the signal came; returns if the process is not ended by that."""
        number = self._came
        if number is None:
            return
        if threading.current_thread() is threading.main_thread():
            self._pass_on(number, None)
        else:
            self._is_given_up = True
            os.kill(os.getpid(), number)
