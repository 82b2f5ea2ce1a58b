"""What the page may ask, by name: quick questions, which are answered at once, and work, which gets a ``Job``.

Gets the arguments of a message; hands on plain JSON. ``Asks`` keeps the few snapshots open that were looked at last, with their trees.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

from expstate.errors import InvalidArgumentError, SnapshotChangedError
from expstate.notebook.browser import card, difference, edits, overview, putting, texts
from expstate.notebook.browser.data import Table
from expstate.notebook.browser.entries import Tree
from expstate.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from expstate.notebook.browser.jobs import Job
    from expstate.notebook.kernel import Kernel

_OPEN = 4


class Asks:
    """The questions and the work of one browser.

    Parameters
    ----------
    kernel : Kernel
        Whose live state and catalog it is.
    project : str, optional
        Another project than the current one; ``"*"`` for all.

    Attributes
    ----------
    quick, work : dict
        By name: functions of the message's arguments, and functions of a job and those.
    """

    def __init__(self, kernel: Kernel, project: str | None) -> None:
        self._kernel = kernel
        self._catalog = kernel.catalog
        self.table = Table(kernel.catalog, project)
        self._open: dict[str, tuple[Snapshot, Tree]] = {}
        self._lock = threading.Lock()
        self.quick: Mapping[str, Callable[..., Any]] = {
            "search": self.table.search,
            "window": self.table.window,
            "series": self.table.series,
            "columns": self.table.columns,
            "metrics": self.table.metrics,
            "overview": functools.partial(overview.overview, self._catalog),
            "packages": functools.partial(overview.packages, self._catalog),
            "lineage": functools.partial(overview.lineage, self._catalog),
            "python": self._python,
            "ask_delete": functools.partial(edits.ask_delete, self._catalog),
        }
        self.work: Mapping[str, Callable[..., Any]] = {
            "level": self._level,
            "card": self._card,
            "targets": lambda _, snapshot_id: putting.targets(self._kernel, self.snapshot(snapshot_id)[0]),
            "diff": self._diff,
            "preview": self._preview,
            "restore": self._restore,
            "back": lambda job, what, force=False: putting.back(job, self._kernel, what, force=force),
            "verify": self._verify,
            "edit": self._edit,
            "delete": self._delete,
        }

    def snapshot(self, snapshot_id: str) -> tuple[Snapshot, Tree]:
        """A snapshot and the tree of its entries.

        Raises
        ------
        SnapshotChangedError
            If another is found by its id.
        """
        with self._lock:
            found = self._open.pop(snapshot_id, None)
        if found is None:
            snapshot = Snapshot.find(snapshot_id, catalog=self._catalog)
            if snapshot.id != snapshot_id:
                msg = f"a snapshot has the name or alias {snapshot_id!r}, which is another's id; unalias it to get at the other"
                raise SnapshotChangedError(msg)
            found = snapshot, Tree(snapshot.manifest)
        with self._lock:
            self._open[snapshot_id] = found
            while len(self._open) > _OPEN:
                self._open.pop(next(iter(self._open)))
        return found

    # Looking

    def _level(self, _: Job, snapshot_id: str, node: int | None = None) -> dict[str, Any]:
        snapshot, tree = self.snapshot(snapshot_id)
        rows = tree.level(node)
        return {"rows": rows} if node is not None else {"rows": rows, "bytes": tree.nbytes, "path": texts.clean(snapshot.path, 1000)}

    def _card(self, job: Job, snapshot_id: str, node: int) -> dict[str, Any]:
        snapshot, tree = self.snapshot(snapshot_id)
        entry = tree.tensor_of(tree.node(node))
        if entry is None:
            msg = "only tensors have a card"
            raise InvalidArgumentError(msg)
        return card.card(snapshot, entry, job.told)

    def _diff(self, job: Job, ids: Sequence[str], stats: bool = False) -> dict[str, Any]:
        opened = sorted((self.snapshot(one)[0] for one in ids), key=lambda snapshot: snapshot.created_at)
        if len(opened) == 1:
            found = job.between_cells(
                self._kernel.between_cells, lambda: self._kernel.diff(opened[0], "live", stats=stats, progress=job.progress)
            )
        elif len(opened) == 2:  # noqa: PLR2004 - a pair
            found = opened[0].diff(opened[1], stats=stats, progress=job.progress)
        else:
            msg = f"two snapshots are compared, or one and live state; {len(opened)} are selected"
            raise InvalidArgumentError(msg)
        return difference.as_json(found)

    def _python(self, ids: Sequence[str] = (), query: str = "", sort: str | None = None) -> str:
        records = sorted((overview.record_of(self._catalog, one) for one in ids), key=lambda record: record.created_at)
        return overview.as_python(records, query, sort)

    def _verify(self, job: Job, snapshot_id: str) -> dict[str, Any]:
        report = self.snapshot(snapshot_id)[0].verify(progress=job.progress)
        return {"ok": report.ok, "lines": [texts.clean(line, 400) for line in str(report).split("\n")]}

    # Putting back

    def _preview(self, job: Job, snapshot_id: str, ticks: Mapping[str, bool]) -> dict[str, Any]:
        snapshot, tree = self.snapshot(snapshot_id)
        return putting.preview(job, self._kernel, snapshot, putting.choose(self._kernel, snapshot, tree, ticks))

    def _restore(self, job: Job, snapshot_id: str, ticks: Mapping[str, bool], undo: bool = True) -> dict[str, Any]:
        snapshot, tree = self.snapshot(snapshot_id)
        return putting.restore(job, self._kernel, snapshot, putting.choose(self._kernel, snapshot, tree, ticks), undo=undo)

    # Changing

    def _edit(self, _: Job, action: str, ids: Sequence[str], text: str = "") -> dict[str, Any]:
        try:
            return edits.edit(self._catalog, action, ids, text)
        finally:
            self._kernel.changed()

    def _delete(self, job: Job, ids: Sequence[str]) -> dict[str, Any]:
        try:
            return edits.delete(job, self._catalog, ids)
        finally:
            with self._lock:
                for one in ids:
                    self._open.pop(one, None)
            self._kernel.changed()
