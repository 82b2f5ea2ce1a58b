"""The restore panel: what the ticks on the tree mean, what a restore would do, and restore, undo and redo between cells.

Gets a snapshot, its tree and the page's ticks; hands on plain JSON of texts. All that looks at live state goes through the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expstate.engine.report import bytes_text, counted
from expstate.errors import InvalidArgumentError, NoUndoRoomError, RestoreMismatchError
from expstate.notebook.browser import texts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from expstate.notebook.browser.entries import Tree
    from expstate.notebook.browser.jobs import Job
    from expstate.notebook.kernel import Kernel
    from expstate.notebook.results import Restored
    from expstate.snapshot import Snapshot

RNG_KEY = "rng_state"
_MOST_PROBLEMS = 12
_MOST_NAMES = 6


@dataclass(frozen=True, slots=True)
class Choice:
    """What is to be put back, as ``Kernel.restore`` takes it."""

    names: tuple[str, ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    rng: bool

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of ``Kernel.restore``."""
        return {"include": list(self.include) or None, "exclude": list(self.exclude) or None, "rng": self.rng}


def choose(kernel: Kernel, snapshot: Snapshot, tree: Tree, ticks: Mapping[Any, Any]) -> Choice:
    """What the ticks mean.

    Parameters
    ----------
    ticks : mapping
        True and False by the numbers of nodes, which JSON has as texts.

    Raises
    ------
    InvalidArgumentError
        If nothing is ticked.
    """
    keys, include, exclude = tree.choose({int(number): bool(tick) for number, tick in ticks.items()})
    if not keys:
        msg = "nothing is ticked, so nothing would come back"
        raise InvalidArgumentError(msg)
    names = tuple(key for key in keys if key != RNG_KEY)
    if not names:  # without names all keys would be meant
        here = [name for name in kernel.app_names(snapshot) if name != RNG_KEY]
        names, include, exclude = tuple(here[:1]), include or [RNG_KEY], []
    return Choice(names, tuple(include), tuple(exclude), rng=RNG_KEY in keys)


def targets(kernel: Kernel, snapshot: Snapshot) -> list[str]:
    """The keys that can be put back here, as the page has them."""
    with kernel.lock:
        return [texts.clean(name) for name in kernel.app_names(snapshot)]


def preview(job: Job, kernel: Kernel, snapshot: Snapshot, choice: Choice) -> dict[str, Any]:
    """What a restore would do; ``problems`` says why it cannot be done."""
    try:
        found: Restored = job.between_cells(
            kernel.between_cells, lambda: kernel.restore(snapshot, choice.names, **choice.options, dry_run=True, progress=False)
        )
    except RestoreMismatchError as error:
        problems = error.problems or (str(error),)
        more = [f"and {len(problems) - _MOST_PROBLEMS:,} more"] if len(problems) > _MOST_PROBLEMS else []
        return {"problems": [texts.clean(problem, 400) for problem in problems[:_MOST_PROBLEMS]] + more}
    report = found.report
    stay = [key for key in snapshot.keys() if key not in report.keys]
    return {
        "problems": [],
        "what": f"{counted(len(report.restored), 'entry')}, {bytes_text(report.nbytes)}",
        "keys": _some(report.keys),
        "stay": _some(stay),
        "notes": [
            *_note("left out, as they are not live here", report.unexpected),
            *_note("live, but not in the snapshot", report.missing),
            *_note("converted to another dtype", report.cast),
            *_note("not there: random generators of", report.skipped),
            *_note("created", found.created),
            *([] if report.cast else ["No shape or dtype differs."]),
            f"Undo needs {bytes_text(found.undo_bytes)}.",
        ],
        "bytes": report.nbytes,
    }


def restore(job: Job, kernel: Kernel, snapshot: Snapshot, choice: Choice, *, undo: bool) -> dict[str, Any]:
    """Put it back. Cancel leaves all as it was: by what an undo keeps, else because all is read and verified before a live byte changes."""
    try:
        found = job.between_cells(
            kernel.between_cells,
            lambda: kernel.restore(snapshot, choice.names, **choice.options, atomic=not undo, undo=undo, progress=job.progress),
        )
    except NoUndoRoomError as error:
        return {"no_room": texts.clean(str(error), 400)}
    return _done(found, "Restored")


def back(job: Job, kernel: Kernel, what: str, *, force: bool) -> dict[str, Any]:
    """Undo or redo."""
    action = kernel.undo if what == "undo" else kernel.redo
    found = job.between_cells(kernel.between_cells, lambda: action(force=force, progress=job.progress))
    return _done(found, "Undone" if what == "undo" else "Redone")


def _done(found: Restored, verb: str) -> dict[str, Any]:
    report = found.report
    lines = [f"{verb}: {counted(len(report.restored), 'entry')}, {bytes_text(report.nbytes)} in {report.seconds:.2g} s."]
    if found.created:
        lines.append(f"Created: {', '.join(_some(found.created))}.")
    if found.bound:
        lines.append(f"Bound anew: {', '.join(_some(found.bound))}; other references have the old value.")
    return {"lines": lines, "keys": _some(report.keys), "undo": bytes_text(found.undo_bytes) if found.undo_place != "none" else ""}


def _note(what: str, names: Sequence[str]) -> list[str]:
    return [f"{counted(len(names), 'entry')} {what}: {', '.join(_some(names))}."] if names else []


def _some(names: Sequence[str]) -> list[str]:
    more = [f"{len(names) - _MOST_NAMES:,} more"] if len(names) > _MOST_NAMES else []
    return [*(texts.clean(name) for name in names[:_MOST_NAMES]), *more]
