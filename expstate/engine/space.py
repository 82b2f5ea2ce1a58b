"""The room that snapshots take up on storage, and how much of it gets free when they go.

Gets folders and the ids of the snapshots in them. A file that several snapshots share is freed by the last one that goes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from expstate.engine import annotate
from expstate.errors import ExpstateError
from expstate.format import names

if TYPE_CHECKING:
    from collections.abc import Hashable

    from expstate.storage.base import Storage


class Space:
    """The room that some snapshots take up together."""

    def __init__(self) -> None:
        self._folders: set[str] = set()
        self._alone = 0
        self._sizes: dict[Hashable, int] = {}
        self._elsewhere: dict[Hashable, int] = {}

    def add(self, storage: Storage, snapshot_id: str) -> bool:
        """Count the files of a snapshot in its folder; False if it is not there, or the folder cannot be read."""
        if storage.url in self._folders:
            return True
        attempt = names.attempt_of(snapshot_id)
        own = {names.MANIFEST, names.ANNOTATIONS}
        try:
            if annotate.committed_id(storage) != snapshot_id:
                return False
            sizes = {info.name: info.size for info in storage.list() if info.name in own or names.is_of_attempt(info.name, attempt)}
            links = storage.links(list(sizes))
        except (ExpstateError, OSError):
            return False
        self._folders.add(storage.url)
        for name, size in sizes.items():
            if name not in links:
                self._alone += size
                continue
            file, places = links[name]
            self._sizes[file] = size
            self._elsewhere[file] = self._elsewhere.get(file, places) - 1
        return True

    @property
    def nbytes_unique(self) -> int:
        """Bytes in files that are in no other place: what gets free when all of these snapshots go."""
        return self._alone + sum(size for file, size in self._sizes.items() if self._elsewhere[file] <= 0)


def nbytes_unique(storage: Storage, snapshot_id: str) -> int | None:
    """Bytes of a snapshot's files that are nowhere else; None if it is not there, or the folder cannot be read."""
    space = Space()
    return space.nbytes_unique if space.add(storage, snapshot_id) else None
