"""The takes of a kernel: they go on in the background, and what became of them is kept until it is told.

Gets names from the kernel; hands on pending snapshots, or snapshots where nobody would see the end of a background take.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from expstate.errors import ExpstateError
from expstate.format.names import check_label
from expstate.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from expstate.notebook.kernel import Kernel
    from expstate.pending import PendingSnapshot


class Taker:
    """What takes, and knows of the takes.

    Parameters
    ----------
    kernel : Kernel
        Whose state it is.

    Attributes
    ----------
    names : tuple of str
        Those of the last take.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.names: tuple[str, ...] = ()
        self._lock = threading.Lock()
        # The last that was committed and those that were begun since, with their names.
        self._taken: list[tuple[tuple[str, ...], PendingSnapshot]] = []
        self._pending: list[PendingSnapshot] = []
        self._promised: dict[str, threading.Event] = {}
        self._failures: list[str] = []

    def take(
        self,
        given: Sequence[str] = (),
        *,
        note: str | None = None,
        tags: Sequence[str] = (),
        metrics: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        step: int | None = None,
        name: str | None = None,
        alias: str | None = None,
        to: str | None = None,
        base: str | None = "auto",
        on_busy: str = "wait",
        wait: bool | None = None,
    ) -> PendingSnapshot | Snapshot:
        """Take what names stand for, and the random generators.

        Parameters
        ----------
        given : sequence of str
            Names and dotted paths; none means those of the last take here.
        alias : str, optional
            Given to the snapshot when it is committed.
        to : str, optional
            Path or URL of the snapshot; default a new folder in the kernel's place.
        base : str, optional
            A ref to a snapshot to go on from; default the last of the same names, None for a full take.
        on_busy : str, default "wait"
            What to do if a take of one of these names goes on; as ``Snapshot.async_take`` has it.
        wait : bool, optional
            Whether to wait for the commit; default only where no person drives the kernel.

        Returns
        -------
        PendingSnapshot or Snapshot
            The latter if it was waited for.
        """
        kernel, place = self._kernel, self._kernel.place
        chosen = kernel.names_of(given)
        if alias is not None:
            check_label(alias, "alias")
            kernel.catalog  # noqa: B018 - an alias lives in a catalog: that there is one is better known before
        path = to if to is not None else place.new()
        with kernel.lock:
            pending = Snapshot.async_take(
                path,
                kernel.app_state(chosen),
                note=note,
                tags=tags,
                metrics=metrics,
                params=params,
                step=step,
                name=name,
                base=base,
                on_busy=on_busy,
            )
        if pending.skipped:
            return pending
        is_waited_for = not kernel.is_driven if wait is None else wait
        ended = threading.Event()
        self.names = chosen
        with self._lock:
            self._pending = [*self.pending, pending]
            self._taken.append((chosen, pending))
            if alias is not None:
                self._promised[alias] = ended
        pending.add_done_callback(lambda taken: self._ended(taken, alias, ended, is_told=is_waited_for))
        kernel.changed()
        if not is_waited_for:
            return pending
        try:
            snapshot = pending.wait()
            ended.wait()  # the kernel may be ended right after
        except KeyboardInterrupt:
            pending.cancel()
            raise
        return snapshot

    def _ended(self, pending: PendingSnapshot, alias: str | None, ended: threading.Event, *, is_told: bool) -> None:
        """What there is to do when a take has ended, in its own thread; ``is_told`` if an error reaches the user anyway."""
        error = pending._error  # noqa: SLF001 - ``exception`` would count it as told
        try:
            self._note_end(pending, is_committed=error is None)
            if error is not None:
                if not is_told:
                    self._failures.append(f"the take to {pending.path!r} failed: {error}")
            elif alias is not None:
                self._kernel.catalog.alias(pending.id, alias)
        except ExpstateError as failure:
            self._failures.append(f"the alias {alias!r} was not given to {pending.id[:8]}: {failure}")
        finally:
            ended.set()
        self._kernel.changed()

    def _note_end(self, pending: PendingSnapshot, *, is_committed: bool) -> None:
        """Forget a take that failed, or those before one that was committed."""
        with self._lock:
            place = next(number for number, (_, one) in enumerate(self._taken) if one is pending)
            self._taken[: place if is_committed else 0] = []
            if not is_committed:
                self._taken.pop(place)

    # What is known of them

    @property
    def pending(self) -> tuple[PendingSnapshot, ...]:
        """Those that go on."""
        return tuple(pending for pending in self._pending if not pending.done())

    def last(self) -> tuple[tuple[str, ...], Snapshot | None]:
        """The last that was committed, with its names; those that go on are waited for."""
        for names, pending in reversed(tuple(self._taken)):
            if pending.exception() is None:
                return names, pending.wait()
        return (), None

    def wait_for_alias(self, ref: str) -> None:
        """If a take that goes on will have this alias, wait until it has it."""
        if ref in self._promised:
            self._promised[ref].wait()

    @property
    def failures(self) -> tuple[str, ...]:
        """What went wrong in the background, and was not told yet."""
        return tuple(self._failures)

    def take_failures(self) -> tuple[str, ...]:
        """The same, which counts as told then."""
        found, self._failures = tuple(self._failures), []
        return found
