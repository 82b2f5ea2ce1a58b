"""When the next take is due: after so many steps, or so much time, the same for all ranks.

Gets the steps of a training one by one and says for each what is to be done. Several ranks count steps alike; what only one of them can
know, the time and the signals, they tell each other at steps that they have agreed on, about once a second, through the store of their
process group.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expstate.engine import ranks
from expstate.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

_CHECK_SECONDS = 1.0
_LEAST_CHECKS = 10
"""So often is a rhythm of time looked at within one turn, at least."""
_MOST_COST = 0.01
"""The part of the time that ranks may spend on telling each other."""


def seconds_of(every: str | float | dt.timedelta) -> float:
    """A duration in seconds.

    Raises
    ------
    InvalidArgumentError
        If it is none, or not positive.

    Examples
    --------
    >>> seconds_of("10m"), seconds_of("1.5 h"), seconds_of(90)
    (600.0, 5400.0, 90.0)
    """
    found: float | None = None
    if isinstance(every, dt.timedelta):
        found = every.total_seconds()
    elif isinstance(every, (int, float)) and not isinstance(every, bool):
        found = float(every)
    elif isinstance(every, str):
        from expstate.catalog.query import literal  # noqa: PLC0415 - with it comes SQLAlchemy, which takes 0.3 s to import

        found = literal.duration(every.strip())
    if found is None or not 0 < found < math.inf:
        msg = f"every must be a time such as '90s', '10m' or '1h', seconds, or a timedelta, and more than nothing; got {every!r}"
        raise InvalidArgumentError(msg)
    return float(found)


@dataclass(frozen=True, slots=True)
class Due:
    """What is to be done at a step: take, or take at once because the process is to end."""

    take: bool
    last: bool


class Rhythm:
    """Says when a take is due.

    Parameters
    ----------
    every_seconds : float or None
        After so much time.
    steps : int or None
        At each multiple of so many steps.
    signalled : callable or None
        Whether this process is to end; None if nobody asks.
    patience_seconds : float
        How soon all ranks should know of that.
    pg : torch.distributed.ProcessGroup or None
        The ranks that train together.
    timeout : float or None
        Seconds that one of them may stand still.
    """

    def __init__(
        self,
        every_seconds: float | None,
        steps: int | None,
        signalled: Callable[[], bool] | None,
        patience_seconds: float,
        pg: Any,
        timeout: float | None,
    ) -> None:
        self._every = every_seconds
        self._steps = steps
        self._signalled = signalled
        self._patience = patience_seconds
        self._pg = pg
        self._timeout = timeout
        self._taken_at = self._checked_at = time.monotonic()
        self._step = 0
        self._calls = self._checked_call = 0
        self._next_check = self._between = 1

    def begin(self, step: int) -> None:
        """The training begins, or goes on, at this step: time counts from now."""
        self._step = step
        self._taken_at = self._checked_at = time.monotonic()

    def due(self, step: int) -> Due:
        """What is to be done now that this step is done.

        Raises
        ------
        RankFailedError
            If other ranks have failed, or do not come to the step.
        """
        take = self._steps is not None and step // self._steps > self._step // self._steps
        self._step = step
        self._calls += 1
        last = False
        if ranks.position(self._pg)[1] == 1:
            last = self._signalled is not None and self._signalled()
            take = take or self._is_time()
        elif (self._signalled is not None or self._every is not None) and self._calls >= self._next_check:
            is_time, last = self._tell_each_other()
            take = take or is_time
        if take or last:
            self._taken_at = time.monotonic()
        return Due(take, last)

    def _is_time(self) -> bool:
        return self._every is not None and time.monotonic() - self._taken_at >= self._every

    def _tell_each_other(self) -> tuple[bool, bool]:
        """Whether it is time by the first rank's clock, and whether any rank is to end."""
        began = time.monotonic()
        with ranks.join(self._pg, self._timeout).failing() as joined:
            is_signalled = self._signalled is not None and self._signalled()
            told = joined.gather("signalled", b"1" if is_signalled else b"")
            decision = None
            if joined.is_first:
                decision = json.dumps([self._is_time(), any(told), self._steps_to_next_check(began)]).encode()
            is_time, last, self._between = json.loads(joined.spread("due", decision))
            joined.close()
        self._next_check = self._calls + self._between
        return is_time, last

    def _steps_to_next_check(self, began: float) -> int:
        """On the first rank: after how many steps to look again; grows slowly, since the first steps tell little of those to come."""
        now = time.monotonic()
        seconds_per_step = (began - self._checked_at) / max(1, self._calls - self._checked_call)
        self._checked_at, self._checked_call = now, self._calls
        pause = _CHECK_SECONDS if self._every is None else min(_CHECK_SECONDS, self._every / _LEAST_CHECKS)
        pause = min(max(pause, (now - began) / _MOST_COST), max(_CHECK_SECONDS, self._patience))
        return max(1, min(2 * self._between, int(pause / max(seconds_per_step, 1e-9))))
