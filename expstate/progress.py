"""Progress in bytes: a bar by tqdm at a terminal or in a notebook, or a function of the caller's.

``Progress`` is given numbers of bytes by the engine's threads; what it shows is decided once, when it is made.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from expstate import settings
from expstate.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class ProgressUpdate:
    """How far an operation is.

    Attributes
    ----------
    operation : str
        ``"take"``, ``"restore"``, ``"verify"`` or ``"copy"``.
    done_bytes, total_bytes : int
        Bytes moved and bytes to move.
    """

    operation: str
    done_bytes: int
    total_bytes: int


ProgressOption = bool | Callable[[ProgressUpdate], object] | None


class Progress:
    """Counts bytes and shows them.

    Parameters
    ----------
    operation : str
        What is going on.
    total_bytes : int
        Bytes that will be moved.
    option : None, bool or callable
        None shows a bar at a terminal or in a notebook (or as ``EXPSTATE_PROGRESS`` says), True always, False never; a function
        is called with a ``ProgressUpdate`` after each piece, from the thread that moved it.
    """

    def __init__(self, operation: str, total_bytes: int, option: ProgressOption) -> None:
        self._operation = operation
        self._lock = threading.Lock()
        self._report = option if callable(option) else None
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self._began = time.monotonic()
        self._bar: Any = None
        self._bar_after_seconds = math.inf
        if self._report is None and _is_wanted(option):
            self._bar_after_seconds = settings.current().progress_delay_seconds
            self._show()

    def add(self, nbytes: int) -> None:
        """Count bytes that have been moved."""
        with self._lock:
            self.done_bytes += nbytes
            if self._bar is not None:
                self._bar.update(nbytes)
            self._show()
            if self._report is not None:
                self._report(ProgressUpdate(self._operation, self.done_bytes, self.total_bytes))

    def close(self) -> None:
        """Take the bar away."""
        with self._lock:
            self._bar_after_seconds = math.inf
            bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()

    def _show(self) -> None:
        """Begin the bar when it is time. Not before: an interrupt that comes while a bar is thrown away is lost, as in any ``__del__``."""
        seconds = time.monotonic() - self._began
        if seconds < self._bar_after_seconds:
            return
        self._bar_after_seconds = math.inf
        self._bar = _bar(self._operation, self.total_bytes)
        if self._bar is not None:
            self._bar.start_t -= seconds
            self._bar.update(self.done_bytes)


def check_option(option: object) -> None:
    """Refuse what ``progress=`` cannot be, before anything is done."""
    if option is not None and not isinstance(option, bool) and not callable(option):
        msg = f"progress must be None, True, False or a function, got {option!r}"
        raise InvalidArgumentError(msg)


def _is_wanted(option: ProgressOption) -> bool:
    if option is not None:
        return bool(option)
    set_by_user = settings.current().progress
    if set_by_user is not None:
        return set_by_user
    return in_notebook() or (sys.stderr is not None and sys.stderr.isatty())


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this code."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return shell is not None and hasattr(shell, "kernel")


def _has_widgets() -> bool:
    """Whether ipywidgets is there and can be imported: with another IPython than it expects it cannot, and no take fails for that."""
    try:
        importlib.import_module("ipywidgets")
    except Exception:  # noqa: BLE001 - as said
        return False
    return True


def _bar(operation: str, total_bytes: int) -> Any:
    try:
        # In a notebook a widget, where there are widgets; tqdm.auto warns where there are none.
        name = "tqdm.notebook" if in_notebook() and _has_widgets() else "tqdm"
        tqdm: Any = importlib.import_module(name).tqdm
    except ImportError:
        return None  # a bare GPU machine: no bar
    tqdm.monitor_interval = 0  # its watcher thread is not needed: every piece updates the bar
    return tqdm(
        total=total_bytes,
        desc=operation,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        leave=False,
        dynamic_ncols="COLUMNS" not in os.environ,
    )
