"""Cells and what must not run in the middle of one: actions wait for the cell that runs, and are done right after it.

A click in a widget may reach the kernel while a cell runs, in another thread on some front ends. Hands out a ``Turn`` for each action.
"""

from __future__ import annotations

import threading
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class Turn:
    """An action that waits, runs, or is done.

    Parameters
    ----------
    action : callable
        What to do.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self._lock = threading.Lock()
        self._is_cancelled = False
        self._is_begun = False
        self._done = threading.Event()

    @property
    def done(self) -> bool:
        """Whether it has ended, or was cancelled before it began."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended; whether it has."""
        return self._done.wait(timeout)

    def cancel(self) -> bool:
        """Drop it if it has not begun; whether it was dropped."""
        with self._lock:
            if self._is_begun:
                return False
            self._is_cancelled = True
        self._done.set()
        return True

    def run(self) -> None:
        """Do it, unless it was cancelled."""
        with self._lock:
            if self._is_cancelled or self._is_begun:
                return
            self._is_begun = True
        try:
            self._action()
        finally:
            self._done.set()


class Turns:
    """The actions that wait for the cell that runs.

    Parameters
    ----------
    shell : object
        IPython's shell; its ``events`` tell when cells begin and end.
    """

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._lock = threading.Lock()
        self._waiting: list[Turn] = []
        self._depth = 0

    @property
    def is_busy(self) -> bool:
        """Whether a cell is running."""
        return self._depth > 0

    def add(self, action: Callable[[], None]) -> Turn:
        """Run an action at once if no cell runs, in this thread; else after it, in the thread of the cells."""
        turn = Turn(action)
        with self._lock:
            if self.is_busy:
                self._waiting.append(turn)
                return turn
        turn.run()
        return turn

    def begin(self, *_: object) -> None:
        """A cell begins."""
        with self._lock:
            self._depth += 1

    def end(self, *_: object) -> None:
        """A cell has ended: do what has waited for that, unless it was one in another."""
        with self._lock:
            if self._depth > 1:
                self._depth -= 1
                return
        while True:
            with self._lock:
                if not self._waiting:
                    self._depth = 0
                    return
                turn = self._waiting.pop(0)
            try:
                turn.run()
            except Exception:  # noqa: BLE001 - of somebody's action; the others have their turn all the same
                traceback.print_exc()

    def watch(self) -> None:
        """Begin to listen to the shell."""
        self._shell.events.register("pre_run_cell", self.begin)
        self._shell.events.register("post_run_cell", self.end)

    def leave(self) -> None:
        """Listen no more."""
        self._shell.events.unregister("pre_run_cell", self.begin)
        self._shell.events.unregister("post_run_cell", self.end)
