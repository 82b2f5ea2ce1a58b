"""What the notebook's verbs give: small records that show themselves as text and as HTML, with nothing in it that acts."""

from __future__ import annotations

import html
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expstate.commands.view import View
from expstate.engine.report import bytes_text, counted
from expstate.state.paths import printable

if TYPE_CHECKING:
    import argparse

    from expstate.commands.verb import Verb
    from expstate.diff.report import SnapshotDiff
    from expstate.engine.report import RestoreReport
    from expstate.pending import PendingSnapshot
    from expstate.snapshot import Snapshot


class _Text:
    """Something that shows itself as lines of text."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


@dataclass(frozen=True, repr=False)
class Restored(_Text):
    """What a restore, an undo or a redo did, or would do.

    Attributes
    ----------
    report : RestoreReport
        Of the entries.
    bound : tuple of str
        Names that stand for another object now: numbers, strings, tuples and data frames cannot be changed in place.
    created : tuple of str
        Names that stood for nothing before.
    undo_bytes : int
        What is kept so that it can be taken back; of a dry run what would be.
    undo_place : str
        ``memory``, ``disk``, or ``none``.
    snapshot_id, title : str
        What was restored.
    names : tuple of str
        The names whose state it changed.
    dry_run : bool
        Whether nothing was changed.
    back : str
        The verb that takes it back.
    """

    report: RestoreReport
    bound: tuple[str, ...]
    created: tuple[str, ...]
    undo_bytes: int
    undo_place: str
    snapshot_id: str
    title: str
    names: tuple[str, ...]
    dry_run: bool
    back: str = "undo"

    def __str__(self) -> str:
        lines = [f"{printable(self.title)}: {self.report}"]
        if self.created:
            lines.append(f"  {'would create' if self.dry_run else 'created'}: {', '.join(self.created)}")
        if self.bound:
            lines.append(f"  bound anew: {', '.join(self.bound)}")
        if self.dry_run:
            lines.append(f"  an undo would keep up to {bytes_text(self.undo_bytes)}")
        elif self.undo_place != "none":
            where = "in memory" if self.undo_place == "memory" else "on disk"
            lines.append(f"  `%snapshot {self.back}` takes it back ({bytes_text(self.undo_bytes)} kept {where})")
        return "\n".join(lines)


@dataclass(frozen=True, repr=False)
class LiveStatus(_Text):
    """What has changed since the last take here, and what goes on.

    Attributes
    ----------
    base : Snapshot or None
        The last take.
    names : tuple of str
        What it took.
    diff : SnapshotDiff or None
        Live state against it.
    pending : tuple of PendingSnapshot
        Takes that go on.
    failures : tuple of str
        What went wrong in the background.
    can_undo, can_redo : bool
        Whether there is something to take back.
    root : str
        Where new snapshots go.
    watched : str or None
        What is taken by itself, in words.
    """

    base: Snapshot | None
    names: tuple[str, ...]
    diff: SnapshotDiff | None
    pending: tuple[PendingSnapshot, ...]
    failures: tuple[str, ...]
    can_undo: bool
    can_redo: bool
    root: str
    watched: str | None = None

    @property
    def changed(self) -> tuple[str, ...]:
        """Names whose live state is another than was taken."""
        if self.diff is None:
            return ()
        differing = {path.partition("/")[0] for path in (*self.diff.changed, *self.diff.added, *self.diff.removed)}
        return tuple(name for name in (*self.names, "rng_state") if name in differing)

    def __str__(self) -> str:
        lines = []
        if self.base is None:
            lines.append("nothing was taken here yet")
        else:
            title = printable(self.base.metadata.name or self.base.id[:8])
            names = [name for name in self.changed if name != "rng_state"]
            what = f"changed since: {', '.join(names)}" if names else "nothing has changed since"
            lines.append(f"last take {title} of {', '.join(self.names)}; {what}")
            if "rng_state" in self.changed:
                lines.append("random numbers were drawn since")
        lines += [str(pending) for pending in self.pending]
        lines += [f"failed: {printable(failure)}" for failure in self.failures]
        if self.can_undo or self.can_redo:
            lines.append(
                f"can be taken back: {' and '.join([*(['the last restore'] * self.can_undo), *(['the last undo'] * self.can_redo)])}"
            )
        if self.watched is not None:
            lines.append(self.watched)
        lines.append(f"new snapshots go to {printable(self.root)}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        table = "" if self.diff is None or not self.changed else self.diff._repr_html_()
        return f"{super()._repr_html_()}{table}"


class Answer(_Text):
    """The result of a verb that has no form of its own for notebooks, shown as the command line shows it.

    Parameters
    ----------
    verb : Verb
        The verb.
    result : object
        What the library gave.
    arguments : argparse.Namespace
        As parsed.
    """

    def __init__(self, verb: Verb, result: Any, arguments: argparse.Namespace) -> None:
        self.result = result
        self._verb = verb
        self._arguments = arguments

    def __str__(self) -> str:
        stream = io.StringIO()
        self._verb.show(self.result, View(stream), self._arguments)
        return stream.getvalue().rstrip("\n")


class Place(_Text):
    """Where new snapshots go from now on."""

    def __init__(self, root: str) -> None:
        self.root = root

    def __str__(self) -> str:
        return f"new snapshots go to {printable(self.root)}"


class Help(_Text):
    """A text of help."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text


def several(found: tuple[Snapshot, ...]) -> str:
    """Takes that were waited for, in words."""
    return counted(len(found), "take")
