"""What comes out of a comparison: ``SnapshotDiff``, and a row for each entry when it is asked for.

Gets what ``compare``, ``facts`` and ``stream`` have found. Rows are made on the way out: of ten thousand entries that are the same, nobody
needs ten thousand objects.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from expstate.diff import page, show, summary, table
from expstate.errors import EntryNotFoundError, InvalidArgumentError
from expstate.format.manifest import AliasEntry, ContainerEntry, Entry, ObjectEntry, TensorEntry, ValueEntry
from expstate.state import paths

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd

    from expstate.diff.compare import Change, Comparison, Listing, Twins
    from expstate.diff.facts import FactDiff
    from expstate.diff.stats import Statistics

CHANGES = ("added", "removed", "changed", "same")
_TENSORS = {"tensor", "parameter", "numpy"}


class EntryForm(msgspec.Struct, frozen=True):
    """What an entry is on one side.

    Attributes
    ----------
    kind : str
        ``tensor``, ``parameter``, ``numpy``, ``object``, ``value`` or ``container``.
    dtype, shape : str, tuple of int or None
        Of a tensor or array.
    nbytes : int
        Bytes of its own; none for a value, and for a tensor that is tied to another.
    value : Any
        A plain value, or None.
    type : str or None
        Class of an object, codec of a container.
    tied_to : str or None
        The entry whose memory it is, for a tied tensor.
    """

    kind: str
    dtype: str | None
    shape: tuple[int, ...] | None
    nbytes: int
    value: Any = None
    type: str | None = None
    tied_to: str | None = None


class EntryDiff(msgspec.Struct, frozen=True):
    """One entry of a comparison.

    Attributes
    ----------
    entry : str
        Its path.
    change : str
        ``added``, ``removed``, ``changed`` or ``same``.
    old, new : EntryForm or None
        What it is on each side.
    differs : tuple of str
        In what it differs: ``content``, ``dtype``, ``shape``, ``kind``, ``requires_grad``, ``value``, ``class``, ``codec``,
        ``metadata``. ``layout`` says that the tensor is cut into other boxes, so that digests cannot tell whether its content is the
        same; ``content=True`` or ``stats=True`` reads it and finds out.
    renamed_from, renamed_to : str or None
        For an added and a removed entry of the same content: the other's path.
    same_content_as : str or None
        For an added or removed entry: an entry of both sides that holds the same now.
    statistics : Statistics or None
        How far the tensors are apart, with ``stats=True``.
    """

    entry: str
    change: str
    old: EntryForm | None
    new: EntryForm | None
    differs: tuple[str, ...] = ()
    renamed_from: str | None = None
    renamed_to: str | None = None
    same_content_as: str | None = None
    statistics: Statistics | None = None

    @property
    def form(self) -> EntryForm:
        """What it is on the newer side, or was on the older."""
        found = self.new or self.old
        assert found is not None
        return found

    @property
    def kind(self) -> str:
        """What it is."""
        return self.form.kind

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor or an array."""
        return self.form.kind in _TENSORS

    @property
    def dtype(self) -> str | None:
        """Of a tensor or array, on the newer side if it is there."""
        return self.form.dtype

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of a tensor or array, on the newer side if it is there."""
        return self.form.shape

    @property
    def nbytes(self) -> int:
        """Its bytes, on the newer side if it is there."""
        return self.form.nbytes

    @property
    def is_kept_otherwise(self) -> bool:
        """Whether its content is the same, but not what it is tied to, or how it is cut."""
        old, new = self.old, self.new
        return self.change == "same" and (bool(self.differs) or (old is not None and new is not None and old.tied_to != new.tied_to))

    def __str__(self) -> str:
        return f"{paths.printable(self.entry)}: {show.row_text(self)}"


class DiffSide(msgspec.Struct, frozen=True):
    """One side of a comparison.

    Attributes
    ----------
    id, path : str or None
        Of the snapshot; None for live state.
    name : str or None
        As given at the take.
    """

    id: str | None = None
    path: str | None = None
    name: str | None = None

    def __str__(self) -> str:
        return "live state" if self.id is None else paths.printable(self.name or self.id[:8])


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SnapshotDiff:
    """What differs between two snapshots, or a snapshot and live state; made by ``Snapshot.diff``.

    True if any entry differs. Iterating gives every entry as an ``EntryDiff``, those that are the same too; ``diff[path]`` one.

    Attributes
    ----------
    old, new : DiffSide
        The snapshot that was asked, and what it was compared with.
    metadata : tuple of FactDiff
        Metadata, classes of the keys and provenance: only what differs.
    has_statistics : bool
        Whether changed tensors were read.
    top : int or None
        How many entries of each kind it lists when it is shown; None for a few. ``showing`` changes it.
    """

    old: DiffSide
    new: DiffSide
    metadata: tuple[FactDiff, ...]
    has_statistics: bool
    _listings: tuple[Listing, Listing] = field(repr=False)
    _comparison: Comparison = field(repr=False)
    _twins: Twins = field(repr=False)
    _found: dict[str, Statistics] = field(repr=False)
    _changes: dict[str, Change] = field(repr=False)
    _generators: frozenset[str] = field(repr=False)
    top: int | None = None

    # What differs

    @property
    def added(self) -> tuple[str, ...]:
        """Paths of entries that only the newer side has."""
        return tuple(entry.path for entry in self._comparison.added)

    @property
    def removed(self) -> tuple[str, ...]:
        """Paths of entries that only the older side has."""
        return tuple(entry.path for entry in self._comparison.removed)

    @property
    def changed(self) -> tuple[str, ...]:
        """Paths of entries that both have and that differ."""
        return tuple(change.path for change in self._comparison.changed)

    @property
    def drawn(self) -> tuple[str, ...]:
        """Of ``changed``, what belongs to random generators (``RNGState``): random numbers were drawn in between."""
        return tuple(path for path in self.changed if paths.key_of(path) in self._generators) if self._generators else ()

    @property
    def same(self) -> tuple[str, ...]:
        """Paths of entries that both have and that are the same; containers are not counted, what is in them is."""
        return tuple(entry.path for entry in self._comparison.same)

    @property
    def renamed(self) -> tuple[tuple[str, str], ...]:
        """Paths of removed and added entries of the same content: ``(old, new)``. Both are among ``removed`` and ``added`` too."""
        return tuple((old, new) for new, old in self._twins.renamed.items())

    @property
    def counts(self) -> dict[str, int]:
        """How many entries were added, removed and changed, and how many are the same."""
        found = self._comparison
        return {"added": len(found.added), "removed": len(found.removed), "changed": len(found.changed), "same": len(found.same)}

    @property
    def is_same(self) -> bool:
        """Whether no entry differs; metadata and provenance may."""
        found = self._comparison
        return not (found.added or found.removed or found.changed)

    def __bool__(self) -> bool:
        return not self.is_same

    # Entry by entry

    def __iter__(self) -> Iterator[EntryDiff]:
        """Every entry: those of the newer side in its order, then those that were removed."""
        changed = self._changes
        listed = {entry.path for entry in (*self._comparison.added, *self._comparison.same)}
        for entry in self._listings[1].entries:
            if entry.path in changed or entry.path in listed:
                yield self._row(entry.path, changed.get(entry.path))
        for entry in self._comparison.removed:
            yield self._row(entry.path, None)

    def entries(self, change: str | None = None) -> tuple[EntryDiff, ...]:
        """The entries, or those of one kind of change.

        Parameters
        ----------
        change : str, optional
            ``added``, ``removed``, ``changed`` or ``same``.

        Raises
        ------
        InvalidArgumentError
            If there is no such change.
        """
        if change is None:
            return tuple(self)
        if change == "changed":
            return tuple(self._row(found.path, found) for found in self._comparison.changed)
        if change not in CHANGES:
            msg = f"change must be one of {', '.join(CHANGES)}, got {change!r}"
            raise InvalidArgumentError(msg)
        return tuple(self._row(entry.path, None) for entry in getattr(self._comparison, change))

    def only(self, globs: Sequence[str]) -> SnapshotDiff:
        """The same comparison, of the entries whose paths match one of these globs alone; ``*`` crosses ``/``."""
        matches = paths.matcher(globs)
        found = self._comparison
        comparison = msgspec.structs.replace(
            found,
            added=[entry for entry in found.added if matches(entry.path)],
            removed=[entry for entry in found.removed if matches(entry.path)],
            changed=[change for change in found.changed if matches(change.path)],
            same=[entry for entry in found.same if matches(entry.path)],
        )
        return replace(self, _comparison=comparison, _changes={path: change for path, change in self._changes.items() if matches(path)})

    def kept_otherwise(self) -> tuple[EntryDiff, ...]:
        """Entries that are the same, but tied to another tensor now or no longer, or cut into other boxes."""
        found = self._comparison
        names = [entry.path for listing in self._listings for entry in listing.entries if type(entry) is AliasEntry]
        rows = [
            self._row(path, None)
            for path in dict.fromkeys([*names, *(entry.path for entry in found.same if entry.path in found.otherwise_cut)])
            if path not in self._changes and all(path in listing.by_path for listing in self._listings)
        ]
        return tuple(row for row in rows if row.is_kept_otherwise)

    def __getitem__(self, path: str) -> EntryDiff:
        """One entry; ``EntryNotFoundError`` if neither side has it, or it is a container that does not differ."""
        entry = next((listing.by_path[path] for listing in self._listings if path in listing.by_path), None)
        change = self._changes.get(path)
        if entry is not None and (change is not None or type(entry) is not ContainerEntry or path in {*self.added, *self.removed}):
            return self._row(path, change)
        msg = f"no entry {path!r} in the comparison"
        raise EntryNotFoundError(msg)

    def _row(self, path: str, change: Change | None) -> EntryDiff:
        old, new = (_form(listing, path) for listing in self._listings)
        twins = self._twins
        if change is not None:
            return EntryDiff(path, "changed", old, new, change.differs, statistics=self._found.get(path))
        if old is None or new is None:
            return EntryDiff(
                path,
                "added" if old is None else "removed",
                old,
                new,
                renamed_from=twins.renamed.get(path) if old is None else None,
                renamed_to=twins.renamed_to.get(path) if new is None else None,
                same_content_as=twins.elsewhere.get(path),
            )
        return EntryDiff(path, "same", old, new, ("layout",) if path in self._comparison.otherwise_cut else ())

    # For people and programs

    def showing(self, top: int) -> SnapshotDiff:
        """The same comparison, which lists up to so many entries of each kind when it is shown, those that changed most first.

        Raises
        ------
        InvalidArgumentError
            If ``top`` is less than 1.
        """
        if top < 1:
            msg = f"top must be at least 1, got {top}"
            raise InvalidArgumentError(msg)
        return replace(self, top=top)

    def summary(self) -> str:
        """A few lines: how much differs, which values, what most, and what else is known to differ."""
        return summary.as_text(self)

    def to_pandas(self) -> pd.DataFrame:
        """A table of all entries.

        Returns
        -------
        pandas.DataFrame
            Columns ``entry``, ``change``, ``kind``, ``shape``, ``dtype`` (texts) and ``nbytes`` (int64); with ``stats=True`` also ``l2``,
            ``relative``, ``max_abs``, ``cosine``, ``changed`` (float64), ``nan_old``, ``nan_new``, ``inf_old`` and ``inf_new`` (Int64).
            Where shape or dtype changed, both are given: ``float32 -> float16``.
        """
        return table.as_frame(self)

    def to_dict(self) -> dict[str, Any]:
        """All that differs, as JSON can hold it; entries that are the same are only counted."""
        return table.as_dict(self)

    def __repr__(self) -> str:
        return f"SnapshotDiff({summary.heading(self)})"

    def __str__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        return page.as_html(self)


def _form(listing: Listing, path: str) -> EntryForm | None:
    entry = listing.by_path.get(path)
    return None if entry is None else _form_of(entry, listing.resolve(entry))


def _form_of(entry: Entry, resolved: Entry) -> EntryForm:
    if isinstance(resolved, TensorEntry):
        tied_to = entry.target if isinstance(entry, AliasEntry) else None
        return EntryForm(resolved.kind, resolved.dtype, resolved.shape, entry.nbytes, tied_to=tied_to)
    if isinstance(resolved, ValueEntry):
        return EntryForm("value", None, None, 0, show.decoded(resolved.value))
    if isinstance(resolved, ObjectEntry):
        return EntryForm("object", None, None, resolved.nbytes, type=resolved.type)
    assert isinstance(resolved, ContainerEntry)
    return EntryForm("container", None, None, 0, type=resolved.type)
