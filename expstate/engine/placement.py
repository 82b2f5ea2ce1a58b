"""Where each box of a take will be: in a data file to write, in one of an earlier snapshot, or where an equal one is.

Gets the arrays of one rank and what to compare them with; hands on a ``Placement``. Nothing is written here, but files are linked: what
cannot be linked is laid out to be written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from expstate.engine import link, unchanged
from expstate.engine.unchanged import Compared
from expstate.format.layout import cut, lay_out

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from expstate.engine import crew
    from expstate.engine.arrays import Arrays, Group
    from expstate.engine.base import Bases, Held
    from expstate.engine.link import Linker
    from expstate.format.layout import DataFile, PlacedBox
    from expstate.format.manifest import FileRecord
    from expstate.format.names import FileNamer

Place = tuple[int, int]
"""What tells one box from others: the number of its array, and its first byte there."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a take compares its state with, so as not to write it again.

    Attributes
    ----------
    bases : Bases
        Earlier snapshots.
    dedup : bool
        Whether what is there twice is stored once.
    fingerprint_key : bytes or None
        Of the fingerprints of what lies on accelerators; None for none.
    """

    bases: Bases
    dedup: bool
    fingerprint_key: bytes | None

    @property
    def finds_something(self) -> bool:
        """Whether there is anything to look for, besides fingerprints to note."""
        return self.dedup or bool(self.bases.sources)


class HeldBox(NamedTuple):
    """A box that lies in a file of an earlier snapshot: the file's number among those linked, what is there, and the blocks' digests."""

    box: PlacedBox
    file: int
    held: Held
    blocks: bytes


class EqualBox(NamedTuple):
    """A box that is equal to another, and that."""

    box: PlacedBox
    other: Place


@dataclass(slots=True)
class Placement:
    """Where the boxes of a take will be.

    Attributes
    ----------
    files : list of DataFile
        To be written, laid out.
    links : list of FileRecord
        Files of earlier snapshots, which are in the new one's folder already.
    held : list of HeldBox
        Boxes that lie in one of ``links``.
    equal : list of EqualBox
        Boxes that are stored with another.
    fingerprints : dict of Place to bytes
        Of the boxes that lie on accelerators.
    """

    files: list[DataFile] = field(default_factory=list)
    links: list[FileRecord] = field(default_factory=list)
    held: list[HeldBox] = field(default_factory=list)
    equal: list[EqualBox] = field(default_factory=list)
    fingerprints: dict[Place, bytes] = field(default_factory=dict)


def place(
    arrays: Arrays,
    comparison: Comparison | None,
    namer: FileNamer,
    target_bytes: int,
    linker: Linker,
    *,
    budget: int,
    stop: crew.Stop,
    done: Callable[[int], object],
) -> Placement:
    """Find a place for every box.

    Parameters
    ----------
    arrays : Arrays
        As they are in memory now.
    comparison : Comparison or None
        What to compare them with.
    namer : FileNamer
        Gives names to files.
    target_bytes : int
        Size at which a new file is begun.
    linker : Linker
        Puts files of earlier snapshots into the folder.
    budget, stop, done
        As ``inplace.digest`` has them.
    """
    placement = Placement()
    if comparison is None:
        for group in arrays.groups:
            placement.files += lay_out(group.stem, group.sources, group.aliases, namer, target_bytes, first=group.first)
        return placement
    boxes = [(group, box) for group in arrays.groups for box in cut(group.sources, target_bytes)]
    live = [arrays.live_box(group, box) for group, box in boxes]
    key = comparison.fingerprint_key
    compared = Compared({} if key is None else unchanged.fingerprints(live, key))
    bases = comparison.bases
    if comparison.finds_something:
        bases.prepare({box.nbytes for box in live}, key)
        unchanged.compare(live, bases, compared, dedup=comparison.dedup, budget=budget, stop=stop, done=done)
    places = [(group.first + box.source, box.first_byte) for group, box in boxes]
    placement.fingerprints = {places[number]: found for number, found in compared.fingerprints.items()}
    linked = linker.link(bases, link.worth_linking(bases, (held for held, _ in compared.held.values())), stop)
    numbers = {file: number for number, file in enumerate(linked)}
    placement.links = list(linked.values())
    to_write: dict[tuple[int, bool], list[PlacedBox]] = {}
    for number, (group, box) in enumerate(boxes):
        held = compared.held.get(number)
        if number in compared.equal:
            box.source += group.first
            placement.equal.append(EqualBox(box, places[compared.equal[number]]))
        elif held is not None and held[0].file in numbers:
            box.source += group.first
            placement.held.append(HeldBox(box, numbers[held[0].file], *held))
        else:
            # What has not changed is written again in files of its own, so that next time these can be linked.
            to_write.setdefault((group.first, held is not None), []).append(box)
    _lay_out(arrays.groups, to_write, namer, target_bytes, placement)
    return placement


def _lay_out(
    groups: Sequence[Group], to_write: dict[tuple[int, bool], list[PlacedBox]], namer: FileNamer, target_bytes: int, placement: Placement
) -> None:
    for group in groups:
        for is_unchanged in (False, True):
            boxes = to_write.get((group.first, is_unchanged))
            if boxes:
                placement.files += lay_out(group.stem, group.sources, group.aliases, namer, target_bytes, first=group.first, boxes=boxes)
