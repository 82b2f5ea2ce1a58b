"""What people add and take away in the browser: pins, tags, aliases, notes, and snapshots themselves.

Gets the catalog, whole ids and texts. Each id is looked up anew, and nothing that is merely called like it is touched. An edit of several
stops at the first that fails, and says how many were done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from expstate.catalog.provenance import current_project
from expstate.catalog.space import nbytes_unique
from expstate.engine.report import counted, freed_text
from expstate.errors import ExpstateError, InvalidArgumentError
from expstate.notebook.browser.overview import record_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from expstate.catalog.catalog import Catalog
    from expstate.notebook.browser.jobs import Job


def _unalias(catalog: Catalog, snapshot_id: str, alias: str) -> None:
    record = record_of(catalog, snapshot_id)
    if alias not in record.aliases or record.project != current_project():
        msg = f"{record.id[:8]} does not have the alias {alias!r} in the current project"
        raise InvalidArgumentError(msg)
    catalog.unalias(alias)


_CHANGES: dict[str, Callable[[Catalog, str, str], object]] = {
    "pin": lambda catalog, one, _: catalog.pin(one),
    "unpin": lambda catalog, one, _: catalog.unpin(one),
    "tag": lambda catalog, one, text: catalog.tag(one, text),
    "untag": lambda catalog, one, text: catalog.untag(one, text),
    "alias": lambda catalog, one, text: catalog.alias(one, text),
    "unalias": _unalias,
    "note": lambda catalog, one, text: catalog.note(one, text),
}


def edit(catalog: Catalog, action: str, ids: Sequence[str], text: str = "") -> dict[str, Any]:
    """Change what is known of snapshots.

    Parameters
    ----------
    action : str
        ``pin``, ``unpin``, ``tag``, ``untag``, ``alias``, ``unalias`` or ``note``.
    ids : sequence of str
        Whole ids.
    text : str
        The tag, alias or note.
    """
    change = _CHANGES.get(action)
    if change is None:
        msg = f"there is no edit {action!r}"
        raise InvalidArgumentError(msg)
    _each(ids, lambda one: change(catalog, record_of(catalog, one).id, text))
    return {"done": len(ids)}


def ask_delete(catalog: Catalog, ids: Sequence[str]) -> dict[str, Any]:
    """What deleting would take away: the first click.

    Raises
    ------
    SnapshotPinnedError
        If one of them is pinned or has an alias.
    """
    records = [record_of(catalog, one) for one in ids]
    for record in records:
        catalog.delete(record.id, project=record.project, dry_run=True)
    size = freed_text(sum(record.nbytes for record in records), nbytes_unique(records))
    return {"what": f"{counted(len(records), 'snapshot')}, {size}"}


def delete(job: Job, catalog: Catalog, ids: Sequence[str]) -> dict[str, Any]:
    """Delete them: the second click."""

    def one(snapshot_id: str) -> None:
        job.check()
        record = record_of(catalog, snapshot_id)
        job.says(f"deletes {record.id[:8]}")
        catalog.delete(record.id, project=record.project)

    _each(ids, one)
    return {"done": len(ids)}


def _each(ids: Sequence[str], change: Callable[[str], object]) -> None:
    for done, one in enumerate(ids):
        try:
            change(one)
        except ExpstateError as error:
            if done:
                error.args = (f"{done:,} of {len(ids):,} were done, then: {error}", *error.args[1:])
            raise
