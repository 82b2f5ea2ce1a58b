"""What a catalog of a few folders must say, in plain Python: folders, records, and what people added to both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

Item = tuple[str, str]
Added = dict[Item, tuple[int, Any]]
"""What was added, under kind and name, with its time: a mark that was taken away is False, an empty note None."""


def merged(*several: Added) -> Added:
    """Of each item the newest."""
    found: Added = {}
    for added in several:
        found |= {item: value for item, value in added.items() if item not in found or value[0] > found[item][0]}
    return found


def marked(added: Added, kind: str) -> dict[str, int]:
    """The marks of a kind that are there, and since when."""
    return {name: at for (what, name), (at, value) in added.items() if what == kind and value}


@dataclass
class Taken:
    """A snapshot as it was taken."""

    id: str
    number: int
    project: str
    name: str | None
    tags: tuple[str, ...]
    metrics: dict[str, float]


@dataclass
class Folder:
    """A folder with a snapshot in it."""

    taken: Taken
    added: Added = field(default_factory=dict)

    @property
    def is_protected(self) -> bool:
        """Whether its annotations forbid to remove it."""
        return bool(marked(self.added, "pin") or marked(self.added, "alias"))


@dataclass
class Row:
    """A record: what was added as far as the catalog knows, and the places of the snapshot."""

    taken: Taken
    added: Added = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    @property
    def status(self) -> str:
        return next((status for status in ("present", "replaced") if status in self.places.values()), "missing")

    @property
    def tags(self) -> tuple[str, ...]:
        gone = {name for (what, name), (_, value) in self.added.items() if what == "tag" and not value}
        return tuple(sorted({*self.taken.tags, *marked(self.added, "tag")} - gone))

    @property
    def metrics(self) -> dict[str, float]:
        return self.taken.metrics | {name: value for (what, name), (_, value) in self.added.items() if what == "metric"}

    @property
    def note(self) -> str | None:
        return self.added.get(("note", ""), (0, None))[1]

    @property
    def pinned(self) -> bool:
        return bool(marked(self.added, "pin"))


class PlainCatalog:
    """Folders and the records of them."""

    def __init__(self) -> None:
        self.folders: dict[str, Folder] = {}
        self.rows: dict[str, Row] = {}
        self.holders: dict[tuple[str, str], tuple[int, str]] = {}
        """Who has an alias of a project, since when."""
        self._clock = itertools.count(1)

    # What is asked

    def newest_first(self, project: str | None = None, only: Callable[[Row], bool] = lambda row: True) -> list[Row]:
        """The records of a project, or all."""
        found = [row for row in self.rows.values() if project in {None, row.taken.project} and only(row)]
        return sorted(found, key=lambda row: -row.taken.number)

    def aliases(self, row: Row) -> tuple[str, ...]:
        return tuple(sorted(alias for (_, alias), (_, holder) in self.holders.items() if holder == row.taken.id))

    def is_protected(self, row: Row) -> bool:
        """Whether the record, or one of the folders that it names, forbids to remove the snapshot."""
        return row.pinned or bool(self.aliases(row)) or any(folder.is_protected for folder in self.here(row).values())

    def here(self, row: Row) -> dict[str, Folder]:
        """The places of a record where the snapshot lies."""
        return {place: self.folders[place] for place in row.places if self._holds(place, row)}

    def _holds(self, place: str, row: Row) -> bool:
        return place in self.folders and self.folders[place].taken.id == row.taken.id

    @property
    def is_true(self) -> bool:
        """Whether records and folders agree, and no record is without its snapshot."""
        known = all(
            folder.taken.id in self.rows and self.rows[folder.taken.id].places.get(place) == "present"
            for place, folder in self.folders.items()
        )
        rows = self.rows.values()
        places = all((row.places[place] == "present") == self._holds(place, row) for row in rows for place in row.places)
        return known and places and not self._lost_claims() and all(row.status != "missing" for row in rows)

    def _lost_claims(self) -> list[tuple[tuple[str, str], tuple[int, str]]]:
        """Aliases that were claimed later than by whoever has them."""
        claims = [
            ((row.taken.project, alias), (at, row.taken.id))
            for row in self.rows.values()
            for alias, at in marked(row.added, "alias").items()
        ]
        return [(alias, claim) for alias, claim in claims if self.holders.get(alias, (0, ""))[0] < claim[0]]

    # Takes and folders

    def take(self, place: str, taken: Taken, *, is_recorded: bool) -> None:
        self.folders[place] = Folder(taken)
        if is_recorded:
            self._enter(place)

    def copy(self, source: str, place: str) -> None:
        self.folders[place] = Folder(self.folders[source].taken, dict(self.folders[source].added))

    def lose(self) -> None:
        """The catalog is gone."""
        self.rows.clear()
        self.holders.clear()

    def _enter(self, place: str) -> None:
        folder = self.folders[place]
        row = self.rows.setdefault(folder.taken.id, Row(folder.taken))
        self._add(row, folder.added)
        for other in self.rows.values():
            if other is not row and other.places.get(place) == "present":
                other.places[place] = "replaced"
        row.places[place] = "present"

    def scan(self) -> tuple[set[str], set[str], bool]:
        """All folders are entered; the new snapshots, the places that are empty, and whether a record had to be mended."""
        before = set(self.rows)
        for place in sorted(self.folders, key=lambda place: self.folders[place].taken.number):
            self._enter(place)
        missing = set()
        for row in self.rows.values():
            for place in [place for place, status in row.places.items() if status == "present" and place not in self.folders]:
                row.places[place] = "missing"
                missing.add(place)
        lost = self._lost_claims()
        for alias, claim in lost:
            self.holders[alias] = max(claim, self.holders.get(alias, claim))
        return set(self.rows) - before, missing, bool(lost)

    # What people add

    def edit(self, snapshot_id: str, changes: dict[Item, Any]) -> None:
        """Something is added to the folders that a record knows to be there, and to the record."""
        row, now = self.rows[snapshot_id], next(self._clock)
        folders = [folder for place, folder in self.here(row).items() if row.places[place] == "present"]
        after = merged(row.added, *(folder.added for folder in folders), {item: (now, value) for item, value in changes.items()})
        for folder in folders:
            folder.added = dict(after)
        self._add(row, after)

    def _add(self, row: Row, added: Added) -> None:
        row.added = merged(row.added, added)
        claims = marked(row.added, "alias")
        self.holders = {key: held for key, held in self.holders.items() if held[1] != row.taken.id or key[1] in claims}
        for alias, at in claims.items():
            if self.holders.get((row.taken.project, alias), (0, ""))[0] < at:
                self.holders[row.taken.project, alias] = (at, row.taken.id)

    def alias(self, snapshot_id: str, alias: str) -> None:
        """An alias moves from whoever has it."""
        holder = self.holders.get((self.rows[snapshot_id].taken.project, alias))
        if holder is not None and holder[1] != snapshot_id:
            self.edit(holder[1], {("alias", alias): False})
        self.edit(snapshot_id, {("alias", alias): True})

    # What goes

    def remove(self, row: Row) -> None:
        """A snapshot goes from all places that its record names, and the record."""
        for place in self.here(row):
            del self.folders[place]
        self.forget(row)

    def forget(self, row: Row) -> None:
        del self.rows[row.taken.id]
        self.holders = {alias: held for alias, held in self.holders.items() if held[1] != row.taken.id}

    def to_prune(self, project: str, last: int, best: int | None, *, keep_tagged: bool) -> list[Row]:
        """What a plan deletes."""
        candidates = self.newest_first(project, lambda row: row.status != "replaced" and bool(self.here(row)))
        kept = candidates[:last]
        if best is not None:
            valid = [row for row in candidates if not math.isnan(row.metrics.get("loss", math.nan))]
            kept = kept + sorted(valid, key=lambda row: row.metrics["loss"])[:best]
        return [row for row in candidates if row not in kept and not self._stays(row, keep_tagged=keep_tagged)]

    def _stays(self, row: Row, *, keep_tagged: bool) -> bool:
        return row.pinned or bool(self.aliases(row)) or (keep_tagged and bool(row.tags))

    def prune(self, planned: Iterable[Row], *, keep_tagged: bool) -> tuple[list[Row], list[Row]]:
        """What applying a plan deletes, and what it leaves alone."""
        deleted, skipped = [], []
        for row in planned:
            tagged = keep_tagged and any(marked(folder.added, "tag") for folder in self.here(row).values())
            if tagged or self.is_protected(row):
                skipped.append(row)
            else:
                self.remove(row)
                deleted.append(row)
        return deleted, skipped
