"""What gets free when recorded snapshots are deleted: looked up on storage, wherever they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expstate.catalog import folders
from expstate.engine.space import Space
from expstate.errors import ExpstateError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from expstate.catalog.model import Location, Record


def nbytes_unique(records: Iterable[Record]) -> int | None:
    """Bytes that nothing but these snapshots has, at all their places that can be read from here; None if that is none."""
    space = Space()
    found = [_is_added(space, location, record.id) for record in records for location in record.locations]
    return space.nbytes_unique if any(found) else None


def _is_added(space: Space, location: Location, snapshot_id: str) -> bool:
    try:
        return folders.is_reachable(location, snapshot_id) and space.add(folders.open_location(location.url), snapshot_id)
    except ExpstateError:  # of a kind that cannot be opened here
        return False
