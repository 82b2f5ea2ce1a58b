"""``Autosave``: the takes of a training loop, each at the end of a step, and the restore of the last one.

Gets a series, which knows the places, a rhythm, which says when, and the signals; hands on pending snapshots, and warns of
those that failed.
"""

from __future__ import annotations

import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

from expstate.engine import ranks
from expstate.errors import (
    ExpstateError,
    InvalidArgumentError,
    TakeCancelledError,
    TakeFailedWarning,
    TakePendingError,
)
from expstate.integrations.series import PARAM
from expstate.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from typing_extensions import Self

    from expstate.integrations.rhythm import Rhythm
    from expstate.integrations.series import Series
    from expstate.integrations.signals import Signals
    from expstate.pending import PendingSnapshot
    from expstate.state.stateful import Stateful


class Autosave:
    """The takes of a training loop, made by ``autosave``. Use it in a ``with`` block, and call ``step()`` between two steps.

    Attributes
    ----------
    taken, skipped, failed : int
        How many takes were committed, left out because the one before had not ended, and failed.
    last : PendingSnapshot or None
        The take that was begun last.
    app_state : dict of str to Stateful
        What is taken.
    series : Series
        Where the takes are.
    """

    def __init__(
        self,
        app_state: dict[str, Stateful],
        series: Series,
        rhythm: Rhythm,
        signals: Signals | None,
        deadline_seconds: float,
        on_busy: str,
        params: Mapping[str, Any] | None,
        options: Mapping[str, Any],
    ) -> None:
        self.app_state = app_state
        self.series = series
        self._rhythm = rhythm
        self._signals = signals
        self._deadline = deadline_seconds
        self._on_busy = on_busy
        self._params = {**(params or {}), PARAM: series.name}
        self._options = options
        self._pg = options["pg"]
        self._timeout = options["timeout"]
        self._is_open = False
        self._world_size = 1
        self._next: tuple[int, str] | None = None
        self._step = 0
        self._saved_step = 0
        self._metrics: Mapping[str, Any] | None = None
        self._failures: list[str] = []
        self._is_settled = threading.Event()
        self._is_settled.set()
        self.taken = self.skipped = self.failed = 0
        self.last: PendingSnapshot | None = None

    # Going on from an earlier run

    def resume(self, **options: Any) -> int | None:
        """Restore the newest take of the series that is whole, of this process or an earlier one.

        One that is damaged is warned of, and the one before is restored instead. All ranks restore the same.

        Parameters
        ----------
        **options
            As for ``Snapshot.restore``: ``strict``, ``cast``, ``trust`` and others.

        Returns
        -------
        int or None
            The step that it was taken after; ``step()`` counts on from there. None if there is none, and nothing was changed.

        Raises
        ------
        RestoreMismatchError
            If it does not fit the app state; nothing was changed.
        SnapshotCorruptError
            If all of them are damaged; the app state may hold parts of them.

        Warns
        -----
        ExpstateWarning
            For each that is damaged.
        """
        with ranks.join(self._pg, self._timeout).failing() as joined:
            if joined.size > 1:  # a rank that reads for long is not one that hangs
                options = {"progress": lambda _: joined.went_on(), **options}
            snapshot = self.series.newest(joined, lambda found: found.restore(self.app_state, **options))
            joined.close()
        if snapshot is None:
            return None
        self.go_on_from(snapshot.metadata.step or 0)
        return self._step

    def go_on_from(self, step: int) -> None:
        """The training goes on from a step, whose state was restored by something else."""
        self._step = self._saved_step = step
        self._rhythm.begin(step)

    # The training

    def __enter__(self) -> Self:
        if self._is_open:
            msg = "this autosave is in a with block already"
            raise InvalidArgumentError(msg)
        self._world_size = ranks.position(self._pg)[1]
        self._is_open = True
        self._rhythm.begin(self._step)
        if self._signals is not None:
            self._signals.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            # Whoever exits does so between steps; any other error, or an interrupt that was not put off, may come from within one.
            if self._may_end_with_a_take(kind):
                self._take_last(None)
            elif self.last is not None:
                self.last.exception()
            self._is_settled.wait()
        finally:
            self._is_open = False
            self._tell_failures(stacklevel=3)
            if self._signals is not None:
                self._signals.restore()

    def _may_end_with_a_take(self, kind: type[BaseException] | None) -> bool:
        if ranks.position(self._pg)[1] != self._world_size:
            return False  # the process group is gone, and nobody knows what the others do
        # One rank may leave alone, and would wait for the others for long.
        return kind is None or (issubclass(kind, SystemExit) and self._world_size == 1)

    def step(self, step: int | None = None, *, metrics: Mapping[str, Any] | None = None) -> PendingSnapshot | None:
        """A step of the training is done, and the state is whole. Takes a snapshot if one is due; on several ranks all call it.

        Parameters
        ----------
        step : int, optional
            Its number; default one more than before.
        metrics : dict, optional
            Measured values, recorded if a snapshot is taken.

        Returns
        -------
        PendingSnapshot or None
            The take that was begun now, if any.

        Raises
        ------
        InvalidArgumentError
            If it is called outside of the ``with`` block, or the step is no number from 0 on.
        KeyboardInterrupt
            If Ctrl-C was pressed since the last step; a snapshot was taken.

        Warns
        -----
        TakeFailedWarning
            If a take has failed since the last step.
        """
        if not self._is_open:
            msg = "step() counts inside of the with block: `with expstate.autosave(...) as saver:`"
            raise InvalidArgumentError(msg)
        if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
            msg = f"step must be a whole number from 0 on, got {step!r}"
            raise InvalidArgumentError(msg)
        self._step = self._step + 1 if step is None else step
        self._metrics = metrics
        due = self._rhythm.due(self._step)
        self._tell_failures(stacklevel=3)
        if due.last:
            self._take_last(self._deadline if self._signals is None else self._signals.seen())
            self._tell_failures(stacklevel=3)
            if self._signals is not None:
                self._signals.pass_on()
            return self.last
        return self.take() if due.take else None

    def take(self) -> PendingSnapshot | None:
        """Take a snapshot now, whether one is due or not; on several ranks all call it. Call it between two steps.

        Returns
        -------
        PendingSnapshot or None
            The take that was begun; None if it failed at once or was left out.
        """
        return self._begin(self._on_busy)

    # Takes

    def _begin(self, on_busy: str) -> PendingSnapshot | None:
        step, is_first = self._step, ranks.position(self._pg)[0] == 0
        try:
            number, mark = self._number()
            path = self.series.place(number, step, mark)
            pending = Snapshot.async_take(
                path, self.app_state, params=self._params, metrics=self._metrics, step=step, on_busy=on_busy, **self._options
            )
        except (ExpstateError, OSError) as error:
            self._note_failure(step, error)
            return None
        if pending.skipped:
            self.skipped += 1
            return None
        self._next = number + 1, mark
        self.last = pending
        self._is_settled = settled = threading.Event()
        pending.add_done_callback(lambda ended: self._ended(ended, path if is_first else None, step, settled))
        return pending

    def _number(self) -> tuple[int, str]:
        """The number of the next take, and the mark of this process's; the first rank looks them up, once."""
        if self._next is None:
            with ranks.join(self._pg, self._timeout).failing() as joined:
                told = None
                if joined.is_first:
                    self.series.prepare()
                    told = "{} {}".format(*self.series.begin()).encode()
                number, _, mark = joined.spread("number", told).decode().partition(" ")
                joined.close()
            self._next = int(number), mark
        return self._next

    def _ended(self, pending: PendingSnapshot, path: str | None, step: int, settled: threading.Event) -> None:
        """A take has ended; in its own thread."""
        try:
            error = pending.exception()
            if error is None:
                self.taken += 1
                self._saved_step = step
                if path is not None:
                    self.series.committed(path)
            elif not isinstance(error, TakeCancelledError):
                self._note_failure(step, error)
        finally:
            settled.set()

    def _note_failure(self, step: int, error: BaseException) -> None:
        self.failed += 1
        self._failures.append(f"the snapshot of step {step} was not taken: {type(error).__name__}: {error}")

    def _tell_failures(self, stacklevel: int) -> None:
        while self._failures:
            warnings.warn(self._failures.pop(0), TakeFailedWarning, stacklevel=stacklevel + 1)

    def _take_last(self, seconds: float | None) -> None:
        """Have a snapshot of this step, committed within so many seconds. One that goes on is waited for, not thrown away."""
        until = None if seconds is None else time.monotonic() + seconds
        try:
            if self.last is not None:
                self.last.exception(_left(until))
            pending = self._begin("wait") if self._is_one_missing() else None
            if pending is not None:
                pending.exception(_left(until))
        except TakePendingError as error:
            if self.last is None or self.last.cancel():  # else it was committed after all
                self._failures.append(f"the last snapshot, of step {self._step}, was not taken within {seconds:.3g} s: {error}")

    def _is_one_missing(self) -> bool:
        """Whether steps went by since the last snapshot, for the first rank and so for all."""
        try:
            with ranks.join(self._pg, self._timeout).failing() as joined:
                told = joined.spread("missing", b"1" if self._step != self._saved_step else b"")
                joined.close()
        except ExpstateError as error:
            self._note_failure(self._step, error)
            return False
        return bool(told)

    def __repr__(self) -> str:
        counts = [
            f"{self.taken} taken",
            *(f"{count} {what}" for count, what in ((self.skipped, "skipped"), (self.failed, "failed")) if count),
        ]
        return f"Autosave({self.series.url!r}, step {self._step}, {', '.join(counts)})"


def _left(until: float | None) -> float | None:
    return None if until is None else max(0.0, until - time.monotonic())
