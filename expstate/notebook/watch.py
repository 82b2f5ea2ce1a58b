"""Takes that come by themselves: every few minutes or optimizer steps, or after every cell that succeeds.

Gets names and a rhythm; what is due is taken by the kernel at the end of the next step of the named optimizer, or at the end of the cell,
so that no take sees half a step.
"""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from expstate.engine.report import counted
from expstate.errors import CatalogUnavailableError, ExpstateError, InvalidArgumentError, SnapshotPinnedError
from expstate.integrations.keeping import Keeper
from expstate.pending import PendingSnapshot
from expstate.storage import registry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.utils.hooks import RemovableHandle

    from expstate.catalog.origin import CatalogOption
    from expstate.notebook.kernel import Kernel
    from expstate.snapshot import Snapshot

_RHYTHM = re.compile(r"(?P<count>\d+(?:\.\d+)?) ?(?P<unit>s|m|min|h|steps?)")
_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Rhythm:
    """When a take is due: after so many steps, or seconds; without either, after every cell that succeeds."""

    steps: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        if self.steps is not None:
            return counted(self.steps, "step")
        return "cell" if self.seconds is None else f"{self.seconds:g} s" if self.seconds % 60 else f"{self.seconds / 60:g} min"


def parse_rhythm(text: str) -> Rhythm:
    """What ``--every`` says.

    Raises
    ------
    InvalidArgumentError
        If it says nothing that can be understood.

    Examples
    --------
    >>> parse_rhythm("50steps").steps, parse_rhythm("10m").seconds, str(parse_rhythm("cell"))
    (50, 600.0, 'cell')
    """
    found = _RHYTHM.fullmatch(text.strip().lower())
    if text.strip().lower() == "cell":
        return Rhythm()
    if found is not None and float(found["count"]) > 0:
        if found["unit"] in _SECONDS:
            return Rhythm(seconds=float(found["count"]) * _SECONDS[found["unit"]])
        if found["count"].isdecimal():
            return Rhythm(steps=int(found["count"]))
    msg = f"--every takes a time such as 30s, 10m or 1h, a number of steps such as 50steps, or cell; got {text!r}"
    raise InvalidArgumentError(msg)


@dataclass(slots=True)
class _Watch:
    """What is watched, how far it has come, and the ids and places of its committed takes that are still there, the oldest first."""

    names: tuple[str, ...]
    rhythm: Rhythm
    keep_last: int | None
    optimizer: str | None
    taken_at: float
    taken_at_step: int = 0
    steps: int = 0
    count: int = 0
    pending: PendingSnapshot | None = None
    own: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        kept = "" if self.keep_last is None else f", of which the last {self.keep_last} {'is' if self.keep_last == 1 else 'are'} kept"
        return f"{', '.join(self.names)} every {self.rhythm}{kept}"

    @property
    def is_due(self) -> bool:
        """Whether it is time for a take, and the one before is done."""
        if self.pending is not None and not self.pending.done():
            return False
        if self.rhythm.steps is not None:
            return self.steps - self.taken_at_step >= self.rhythm.steps
        return self.rhythm.seconds is not None and time.monotonic() - self.taken_at >= self.rhythm.seconds


class Watcher:
    """The takes of a kernel that come by themselves; at most one rhythm at a time.

    Parameters
    ----------
    kernel : Kernel
        Whose names are watched.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._watch: _Watch | None = None
        self._hook: RemovableHandle | None = None
        self._taking = threading.Lock()
        self._removing = threading.Lock()

    def start(self, given: Sequence[str], every: str, keep_last: int | None = None) -> str:
        """Begin to watch, in the place of what was watched before.

        Parameters
        ----------
        given : sequence of str
            Names; none means those of the last take here. The first that stands for an optimizer is the one whose steps count.
        every : str
            The rhythm: ``"10m"``, ``"50steps"``, or ``"cell"``.
        keep_last : int, optional
            Remove takes of this watch that are older than the last so many, unless they have a tag, an alias or a pin.

        Returns
        -------
        str
            What is watched, in words.

        Raises
        ------
        InvalidArgumentError
            If the rhythm cannot be understood, or counts steps and no optimizer is named.
        NameNotFoundError
            If a name stands for nothing.
        """
        rhythm = parse_rhythm(every)
        if keep_last is not None and keep_last < 1:
            msg = f"--keep-last takes a number of snapshots, at least 1; got {keep_last}"
            raise InvalidArgumentError(msg)
        chosen = self._kernel.names_of(given)
        app_state = self._kernel.app_state(chosen, rng=False)
        optimizer = next((name for name, stateful in app_state.items() if isinstance(stateful, torch.optim.Optimizer)), None)
        if rhythm.steps is not None and optimizer is None:
            msg = f"the steps are those of an optimizer, and none of {', '.join(map(repr, chosen))} is one: name it too"
            raise InvalidArgumentError(msg)
        self.stop()
        self._watch = _Watch(chosen, rhythm, keep_last, optimizer, time.monotonic())
        self._kernel.shell.events.register("post_run_cell", self._cell_ended)
        if optimizer is not None:
            # A hook of all optimizers: the name may stand for another one soon.
            self._hook = register_optimizer_step_post_hook(self._stepped)
        return f"watching {self._watch}"

    def stop(self) -> str:
        """Watch no more; what was taken stays. Gives what was watched, in words."""
        watch, self._watch = self._watch, None
        if watch is None:
            return "nothing was watched"
        self._kernel.shell.events.unregister("post_run_cell", self._cell_ended)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        return f"no longer watching {watch}; {counted(watch.count, 'snapshot')} taken"

    @property
    def text(self) -> str | None:
        """What is watched, in words; None if nothing is."""
        return None if self._watch is None else f"watching {self._watch}"

    # When

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """An optimizer has done a step, in whichever thread."""
        watch = self._watch
        if watch is None or watch.optimizer is None or self._kernel.look_up(watch.optimizer) is not optimizer:
            return
        watch.steps += 1
        if watch.is_due:
            self._take(watch)

    def _cell_ended(self, result: Any) -> None:
        watch = self._watch
        if watch is None or self._kernel.is_busy:  # a cell in a cell
            return
        is_cells = watch.rhythm == Rhythm()
        if watch.is_due or (is_cells and getattr(result, "success", True)):
            self._take(watch)

    # Takes

    def _take(self, watch: _Watch) -> None:
        """Take, and never raise: the training goes on."""
        if not self._taking.acquire(blocking=False):
            return
        try:
            # Also if it fails: it is tried again when the next is due.
            watch.taken_at_step, watch.taken_at = watch.steps, time.monotonic()
            note = "watch" if watch.optimizer is None else f"watch, after {counted(watch.steps, 'step')}"
            taken = self._kernel.take(watch.names, note=note, on_busy="skip")
            if isinstance(taken, PendingSnapshot) and taken.skipped:
                return  # storage is slower than the takes come: the training does not wait for it
            watch.count += 1
            if isinstance(taken, PendingSnapshot):
                watch.pending = taken
                taken.add_done_callback(lambda ended: self._committed(watch, ended))
            else:
                self._committed(watch, taken)
        except Exception as error:  # noqa: BLE001 - whatever a state raises
            self._kernel.say(f"watch could not take {', '.join(watch.names)}: {error}")
        finally:
            self._taking.release()

    def _committed(self, watch: _Watch, ended: PendingSnapshot | Snapshot) -> None:
        """A take of a watch has ended, in whichever thread: older ones may go."""
        if isinstance(ended, PendingSnapshot) and ended._error is not None:  # noqa: SLF001 - ``exception`` would count it as told
            return
        with self._removing:
            watch.own.append((ended.id, ended.path))
            if watch.keep_last is not None:
                old, last = watch.own[: -watch.keep_last], watch.own[-watch.keep_last :]
                watch.own = [one for one in old if not self._let_go(*one)] + last
        self._kernel.changed()

    def _let_go(self, snapshot_id: str, path: str) -> bool:
        """Remove a take unless someone has marked it; whether it is none of the watch's business any more."""
        try:
            catalog: CatalogOption = self._kernel.catalog
        except CatalogUnavailableError:
            catalog = False
        try:
            with self._kernel.lock:  # no restore reads it
                Keeper(catalog).remove(registry.open_storage(path), only=lambda manifest: manifest.id == snapshot_id)
        except (FileNotFoundError, SnapshotPinnedError):
            return True
        except (ExpstateError, OSError):
            return False  # tried again after the next take
        return True
