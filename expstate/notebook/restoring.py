"""Restores, their undo and redo, and guarded cells: what is overwritten is kept before, and put back when that is asked for.

Gets names and a snapshot from the kernel; hands on what was done. One undo and one redo are kept.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expstate.engine.report import counted
from expstate.errors import AppStateError, EntryNotFoundError, NameNotFoundError, RestoreInterruptedError, UndoError
from expstate.notebook import names
from expstate.notebook.results import Restored
from expstate.notebook.undo import keep

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from expstate.engine.report import RestoreReport
    from expstate.notebook.kernel import Kernel
    from expstate.notebook.undo import Kept
    from expstate.progress import ProgressOption
    from expstate.snapshot import Snapshot
    from expstate.state.stateful import Stateful


@dataclass(frozen=True, slots=True)
class _Change:
    """What a restore changed: enough to take it back, and to see whether the state was changed since.

    ``names`` are those whose state it changed, ``created`` those that it bound for the first time; ``after`` is a snapshot of how it left
    them, and ``paths`` are the entries that it put back.
    """

    kept: Kept
    names: tuple[str, ...]
    created: tuple[str, ...]
    after: Snapshot
    paths: tuple[str, ...]


class Restorer:
    """What puts live state back, and remembers how it was.

    Parameters
    ----------
    kernel : Kernel
        Whose state it is.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._undo: _Change | None = None
        self._redo: _Change | None = None

    # Restores

    def restore(
        self,
        ref: str | Snapshot,
        given: Sequence[str] = (),
        *,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        strict: bool = True,
        cast: bool = False,
        atomic: bool = False,
        trust: bool = False,
        rng: bool | None = None,
        dry_run: bool = False,
        undo: bool = True,
        progress: ProgressOption = None,
    ) -> Restored:
        """Put back what a snapshot holds into what the names stand for now.

        Parameters
        ----------
        ref : str or Snapshot
            The snapshot.
        given : sequence of str
            Names; none means all that are in the snapshot.
        rng : bool, optional
            Whether random generators come back; default only if no names are given.
        undo : bool, default True
            Whether what is overwritten is kept, so that ``undo`` brings it back.

        Returns
        -------
        Restored
            What was done, or with ``dry_run`` would be.

        Raises
        ------
        NameNotFoundError
            If an object that has a state of its own is not there: it has to be created first.
        NoUndoRoomError
            If there is no room for what is overwritten; nothing was changed.
        RestoreInterruptedError
            If it failed or was interrupted on the way. With ``undo`` everything is as it was before.
        RestoreMismatchError
            If snapshot and live state do not fit; nothing was changed.
        """
        snapshot = self._kernel.find(ref)
        options: dict[str, Any] = {
            "include": list(include) if include else None,
            "exclude": list(exclude) if exclude else None,
            "strict": strict,
            "cast": cast,
            "trust": trust,
        }
        with self._kernel.lock:
            app_state, created = self._targets(snapshot, given, rng=rng)
            plan = snapshot.restore(app_state, **options, dry_run=True)
            # What nothing comes back for is left alone.
            app_state = {key: stateful for key, stateful in app_state.items() if key in plan.keys}
            created = tuple(name for name in created if name in plan.keys)
            there = {key: stateful for key, stateful in app_state.items() if key not in created}
            if dry_run:
                return self._restored(snapshot, plan, app_state, created, None)
            kept = keep(there, plan.restored) if undo else None
            with self._as_it_was(kept):
                report = snapshot.restore(app_state, **options, atomic=atomic, progress=progress)
            bound = self._bind(app_state)
            self._remember(None if kept is None else _Change(kept, tuple(app_state), created, snapshot, report.restored))
        self._kernel.changed()
        return self._restored(snapshot, report, app_state, created, kept, tuple(bound))

    def _targets(self, snapshot: Snapshot, given: Sequence[str], *, rng: bool | None) -> tuple[dict[str, Stateful], tuple[str, ...]]:
        """Where a snapshot's keys go: an app state, and the names in it that stand for nothing yet."""
        kinds = snapshot.metadata.keys
        chosen = tuple(dict.fromkeys(map(names.check_name, given))) or tuple(key for key in kinds if key != names.RNG_KEY)
        app_state: dict[str, Stateful] = {}
        created: list[str] = []
        for name in chosen:
            if name not in kinds:
                msg = f"the snapshot has no {name!r}; it has {', '.join(map(repr, kinds))}"
                raise EntryNotFoundError(msg)
            value = self._kernel.look_up(name) if names.is_name(name) else names.MISSING
            app_state[name] = self._target(name, kinds[name], value)
            if value is names.MISSING:
                created.append(name)
        if names.RNG_KEY in kinds and (not given if rng is None else rng):
            app_state[names.RNG_KEY] = names.generators()
        elif rng:
            msg = "the snapshot has no random generators"
            raise EntryNotFoundError(msg)
        return app_state, tuple(created)

    @staticmethod
    def _target(name: str, kind: str, value: Any) -> Stateful:
        was_plain = kind == names.PLAIN_TYPE
        if value is names.MISSING and not was_plain:
            msg = f"{name!r} has a state of its own ({kind.rpartition('.')[2]}) and stands for nothing here: create it first, then restore"
            raise NameNotFoundError(msg)
        if value is not names.MISSING and was_plain == names.is_stateful(value):
            now = type(value).__name__
            msg = f"{name!r} is a {now} here, and was {'a plain value' if was_plain else kind.rpartition('.')[2]} when it was taken"
            raise AppStateError(msg)
        found: Stateful = names.stateful_of(value)
        return found

    @contextlib.contextmanager
    def _as_it_was(self, kept: Kept | None) -> Iterator[None]:
        """Put back what was kept if the block is interrupted after it has begun to change it; let go of the copy if the block fails."""
        try:
            yield
        except BaseException as error:
            if kept is not None:
                if isinstance(error, RestoreInterruptedError):
                    self._put_back(kept)
                kept.drop()
            raise

    def _put_back(self, kept: Kept) -> None:
        state: dict[str, Stateful] = {
            name: names.generators() if name == names.RNG_KEY else names.stateful_of(self._kernel.look_up(name)) for name in kept.keys
        }
        kept.put_back(state, progress=False)
        self._bind(state)

    def _bind(self, app_state: Mapping[str, Stateful]) -> dict[str, Any]:
        """Bind names to values that could not be refilled; gives what these names stood for."""
        before: dict[str, Any] = {}
        for name, stateful in app_state.items():
            if isinstance(stateful, names.Plain):
                there = names.look_up(self._kernel.namespace, name)
                if stateful.value is not there:
                    before[name] = there
                    names.bind(self._kernel.namespace, name, stateful.value)
        return before

    @staticmethod
    def _restored(
        snapshot: Snapshot,
        report: RestoreReport,
        app_state: Mapping[str, Stateful],
        created: tuple[str, ...],
        kept: Kept | None,
        bound: tuple[str, ...] = (),
    ) -> Restored:
        size = kept.nbytes if kept is not None else report.nbytes
        place = kept.place if kept is not None else "none"
        title = snapshot.metadata.name or snapshot.id[:8]
        changed = tuple(name for name in bound if name not in created)
        return Restored(report, changed, created, size, place, snapshot.id, title, tuple(app_state), report.dry_run)

    # Undo

    def _remember(self, change: _Change | None) -> None:
        for old in (self._undo, self._redo):
            if old is not None:
                old.kept.drop()
        self._undo, self._redo = change, None

    @property
    def can_undo(self) -> bool:
        """Whether there is a restore to take back."""
        return self._undo is not None

    @property
    def can_redo(self) -> bool:
        """Whether there is an undo to take back."""
        return self._redo is not None

    def undo(self, *, force: bool = False, progress: ProgressOption = None) -> Restored:
        """Take the last restore back.

        Parameters
        ----------
        force : bool, default False
            Though the state was changed since.

        Raises
        ------
        UndoError
            If there is none, or the state was changed since.
        """
        change, self._redo = self._back(self._undo, "undo", force=force, progress=progress)
        self._undo = None
        self._kernel.changed()
        return change

    def redo(self, *, force: bool = False, progress: ProgressOption = None) -> Restored:
        """Take the last undo back; as ``undo``."""
        change, self._undo = self._back(self._redo, "redo", force=force, progress=progress)
        self._redo = None
        self._kernel.changed()
        return change

    def _back(self, change: _Change | None, what: str, *, force: bool, progress: ProgressOption) -> tuple[Restored, _Change]:
        if change is None:
            msg = f"there is nothing to {what}"
            raise UndoError(msg)
        with self._kernel.lock:
            there = {name: self._kernel.look_up(name) for name in change.names if name != names.RNG_KEY}
            kinds = change.kept.snapshot.metadata.keys
            missing = tuple(name for name, value in there.items() if value is names.MISSING)
            for name in missing:
                if kinds.get(name) != names.PLAIN_TYPE:
                    msg = f"{name!r} stands for nothing any more, so the {what} has nowhere to go"
                    raise UndoError(msg)
            app_state = {name: names.stateful_of(value) for name, value in there.items()}
            if names.RNG_KEY in change.names:
                app_state[names.RNG_KEY] = names.generators()
            if not force:
                self._check_unchanged(change, app_state, what)
            present = {name: stateful for name, stateful in app_state.items() if name not in missing}
            counter = keep(present, None if change.created else change.paths)
            mine = {name: stateful for name, stateful in app_state.items() if name in change.kept.keys}
            with self._as_it_was(counter):
                report = change.kept.put_back(mine, progress)
            bound = self._bind(mine)
            for name in change.created:
                names.bind(self._kernel.namespace, name, names.MISSING)
        reverse = _Change(counter, change.names, missing, change.kept.snapshot, report.restored)
        change.kept.drop()  # what it says of itself is enough to compare with
        title = f"before the {'restore' if what == 'undo' else 'undo'}"
        changed = tuple(name for name in bound if name not in missing)
        back = "redo" if what == "undo" else "undo"
        snapshot_id = change.kept.snapshot.id
        return Restored(
            report, changed, missing, counter.nbytes, counter.place, snapshot_id, title, tuple(mine), dry_run=False, back=back
        ), reverse

    @staticmethod
    def _check_unchanged(change: _Change, app_state: Mapping[str, Stateful], what: str) -> None:
        compared = {name: stateful for name, stateful in app_state.items() if name in change.after.metadata.keys and name != names.RNG_KEY}
        if not compared:
            return
        diff = change.after.diff(dict(compared))
        changed = sorted(set(diff.changed) & set(change.paths))
        if changed:
            some = f"{counted(len(changed), 'entry')} changed since ({changed[0]!r} is one)"
            msg = f"{some}, and the {what} would throw that away: say so by -y"
            raise UndoError(msg)

    @contextlib.contextmanager
    def guarded(self, given: Sequence[str] = ()) -> Iterator[None]:
        """Put everything named back as it was if the block raises or is interrupted: bindings, states, and the random generators."""
        chosen = self._kernel.names_of(given)
        with self._kernel.lock:
            before = {name: self._kernel.look_up(name) for name in chosen}
            app_state = self._kernel.app_state(chosen)
            kept = keep(app_state, None)
        try:
            yield
        except BaseException:
            with self._kernel.lock:
                for name, value in before.items():
                    if names.look_up(self._kernel.namespace, name) is not value and name not in self._kernel.registry.unnamed:
                        names.bind(self._kernel.namespace, name, value)
                self._put_back(kept)
            self._kernel.changed()
            raise
        finally:
            kept.drop()
