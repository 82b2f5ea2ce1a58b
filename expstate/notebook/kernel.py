"""``Kernel``: what of expstate lives in one IPython kernel, and every action of its notebook.

Gets names and refs from the magic and the browser widget; hands on snapshots, reports and comparisons. Whatever looks at or changes live
state holds ``lock``; what should not run into the middle of a cell goes through ``between_cells``.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

from expstate.catalog.catalog import Catalog
from expstate.errors import (
    CatalogUnavailableError,
    InvalidArgumentError,
    NameNotFoundError,
    NotInNotebookError,
)
from expstate.notebook import names
from expstate.notebook.place import Place
from expstate.notebook.restoring import Restorer
from expstate.notebook.results import LiveStatus
from expstate.notebook.taking import Taker
from expstate.notebook.turns import Turn, Turns
from expstate.notebook.watch import Watcher
from expstate.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from expstate.diff.report import SnapshotDiff
    from expstate.notebook.results import Restored
    from expstate.pending import PendingSnapshot
    from expstate.progress import ProgressOption
    from expstate.state.stateful import Stateful

LIVE = "live"
"""The ref of what is in memory."""


class Kernel:
    """What of expstate lives in one kernel.

    Parameters
    ----------
    shell : object
        IPython's shell: its ``user_ns`` is the namespace, its ``events`` tell of cells.

    Attributes
    ----------
    lock : threading.RLock
        Held by whatever looks at or changes live state.
    """

    def __init__(self, shell: Any) -> None:
        self.shell = shell
        self.lock = threading.RLock()
        self.place = Place(shell)
        self.turns = Turns(shell)
        self.registry = names.Registry()
        self._catalog: Catalog | None = None
        self.taker = Taker(self)
        self.restorer = Restorer(self)
        self.watcher = Watcher(self)
        self._listeners: list[Callable[[], None]] = []

    # What is here

    @property
    def namespace(self) -> dict[str, Any]:
        """The user's names."""
        found: dict[str, Any] = self.shell.user_ns
        return found

    @property
    def hidden(self) -> Mapping[str, Any]:
        """Names in the namespace that are not the user's own."""
        found: Mapping[str, Any] = getattr(self.shell, "user_ns_hidden", {})
        return found

    @property
    def catalog(self) -> Catalog:
        """The catalog of takes here.

        Raises
        ------
        CatalogUnavailableError
            If it is switched off.
        """
        if self._catalog is None:
            self._catalog = Catalog()
        return self._catalog

    @property
    def is_busy(self) -> bool:
        """Whether a cell is running."""
        return self.turns.is_busy

    @property
    def is_driven(self) -> bool:
        """Whether a person drives the kernel, who runs more cells; not where a program runs a notebook to its end."""
        kernel = getattr(self.shell, "kernel", None)
        return kernel is None or bool(getattr(kernel, "_allow_stdin", True))

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call a function, from any thread, whenever snapshots or live state were changed from here; gives what ends that."""
        self._listeners.append(callback)
        return lambda: self._listeners.remove(callback) if callback in self._listeners else None

    def changed(self) -> None:
        """Tell those who listen."""
        for callback in tuple(self._listeners):
            callback()

    def between_cells(self, action: Callable[[], None]) -> Turn:
        """Run something now if no cell runs, else right after it, in the main thread."""
        return self.turns.add(action)

    # Names

    def names_of(self, given: Sequence[str]) -> tuple[str, ...]:
        """The names that are meant: those given, else those of the last take here, else those that were registered.

        Raises
        ------
        InvalidArgumentError
            If none were given yet; the message lists candidates.
        """
        if given:
            return tuple(dict.fromkeys(map(names.check_name, given)))
        found = self.taker.names or self.registry.names
        if not found:
            near = ", ".join(names.candidates(self.namespace, self.hidden)[:10]) or "nothing with a state yet"
            msg = f"say what to take: the names of objects, such as `%snapshot take model optimizer` (here are: {near})"
            raise InvalidArgumentError(msg)
        return found

    def look_up(self, name: str) -> Any:
        """What a name stands for now, or ``names.MISSING``; says so if it is another object than the one that was registered."""
        value, notice = self.registry.look_up(self.namespace, name)
        if notice is not None:
            self.say(notice)
        return value

    def app_state(self, given: Sequence[str], *, rng: bool = True) -> dict[str, Stateful]:
        """An app state of names, with the random generators if they are wanted.

        Raises
        ------
        NameNotFoundError
            If a name stands for nothing.
        """
        found: dict[str, Stateful] = {}
        for name in given:
            value = self.look_up(name)
            if value is names.MISSING:
                raise names.not_found(name, self.namespace, self.hidden)
            found[name] = names.stateful_of(value)
        if rng:
            found[names.RNG_KEY] = names.generators()
        return found

    def app_names(self, snapshot: Snapshot) -> tuple[str, ...]:
        """The keys of a snapshot that can be put back here."""
        found = []
        for key, kind in snapshot.metadata.keys.items():
            is_here = names.is_name(key) and (names.look_up(self.namespace, key) is not names.MISSING or kind == names.PLAIN_TYPE)
            if is_here or key == names.RNG_KEY:
                found.append(key)
        return tuple(found)

    @staticmethod
    def say(text: str) -> None:
        """Tell the person at the notebook."""
        sys.stderr.write(f"expstate: {text}\n")

    # Taking

    def take(self, given: Sequence[str] = (), **options: Any) -> PendingSnapshot | Snapshot:
        """Take what names stand for; as ``Taker.take`` documents it."""
        return self.taker.take(given, **options)

    @property
    def pending(self) -> tuple[PendingSnapshot, ...]:
        """Takes of this kernel that go on."""
        return self.taker.pending

    @property
    def failures(self) -> tuple[str, ...]:
        """What went wrong in the background, and was not told yet."""
        return self.taker.failures

    def take_failures(self) -> tuple[str, ...]:
        """The same, which counts as told then."""
        return self.taker.take_failures()

    def wait(self) -> tuple[Snapshot, ...]:
        """Wait for all takes that go on; raises what went wrong with the first that failed."""
        return tuple(pending.wait() for pending in self.pending)

    # Finding

    def find(self, ref: str | Snapshot) -> Snapshot:
        """The snapshot that a ref names; a take that goes on is waited for."""
        if isinstance(ref, Snapshot):
            return ref
        self.taker.wait_for_alias(ref)
        try:
            return Snapshot.find(ref, catalog=self.catalog)
        except CatalogUnavailableError:
            return Snapshot.find(ref)

    # Putting back

    def restore(self, ref: str | Snapshot, given: Sequence[str] = (), **options: Any) -> Restored:
        """Put back what a snapshot holds; as ``Restorer.restore`` documents it."""
        return self.restorer.restore(ref, given, **options)

    def undo(self, *, force: bool = False, progress: ProgressOption = None) -> Restored:
        """Take the last restore back; as ``Restorer.undo`` documents it."""
        return self.restorer.undo(force=force, progress=progress)

    def redo(self, *, force: bool = False, progress: ProgressOption = None) -> Restored:
        """Take the last undo back."""
        return self.restorer.redo(force=force, progress=progress)

    def guarded(self, given: Sequence[str] = ()) -> AbstractContextManager[None]:
        """Put everything named back if the block fails; as ``Restorer.guarded`` documents it."""
        return self.restorer.guarded(given)

    @property
    def can_undo(self) -> bool:
        """Whether there is a restore to take back."""
        return self.restorer.can_undo

    @property
    def can_redo(self) -> bool:
        """Whether there is an undo to take back."""
        return self.restorer.can_redo

    # Comparing

    def diff(
        self,
        old: str | Snapshot,
        new: str | Snapshot = LIVE,
        given: Sequence[str] = (),
        *,
        stats: bool = False,
        content: bool = False,
        progress: ProgressOption = None,
    ) -> SnapshotDiff:
        """Compare two snapshots, or a snapshot with what is live.

        Parameters
        ----------
        old, new : str or Snapshot
            Refs; ``"live"`` for what the names stand for now.
        given : sequence of str
            Names to compare; none means all that both sides have.
        """
        if old == LIVE:
            msg = "the live state is always the newer side: put the snapshot first"
            raise InvalidArgumentError(msg)
        before = self.find(old)
        options: dict[str, Any] = {"stats": stats, "content": content, "progress": progress}
        if new != LIVE:
            found = before.diff(self.find(new), **options)
            return found.only([pattern for name in given for pattern in (name, f"{name}/*")]) if given else found
        with self.lock:
            chosen = tuple(map(names.check_name, given)) or tuple(name for name in self.app_names(before) if name != names.RNG_KEY)
            live = {name: self.look_up(name) for name in chosen}
            here = tuple(name for name, value in live.items() if value is not names.MISSING)
            if not here:
                msg = f"nothing of {', '.join(map(repr, before.metadata.keys))} is live here"
                raise NameNotFoundError(msg)
            with_generators = not given and names.RNG_KEY in before.metadata.keys
            return before.diff(self.app_state(here, rng=with_generators), **options)

    def status(self) -> LiveStatus:
        """What has changed in live state since the last take here, and what goes on."""
        taken, base = self.taker.last()
        diff = None
        if base is not None:
            here = tuple(name for name in taken if self.look_up(name) is not names.MISSING)
            with self.lock:
                diff = base.diff(self.app_state(here), progress=False)
        return LiveStatus(
            base=base,
            names=taken,
            diff=diff,
            pending=self.pending,
            failures=self.failures,
            can_undo=self.can_undo,
            can_redo=self.can_redo,
            root=self.place.root,
            watched=self.watcher.text,
        )


_kernel: Kernel | None = None


def current() -> Kernel:
    """The kernel of this process.

    Raises
    ------
    NotInNotebookError
        If ``%load_ext expstate`` was not run in it.
    """
    if _kernel is None:
        msg = "this needs a notebook: run `%load_ext expstate` in it first"
        raise NotInNotebookError(msg)
    return _kernel


def set_current(kernel: Kernel | None) -> None:
    """Make a kernel that of this process, or none."""
    global _kernel  # noqa: PLW0603 - there is one shell in a process
    _kernel = kernel
