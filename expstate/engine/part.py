"""What one rank writes of a snapshot: leaves laid out in data files, moved, and described as the entries of a manifest.

``PartWriter`` is given the leaves of each key; ``write`` (or ``stage`` and later ``write_staged``) finds out what earlier snapshots hold
and moves the rest, and ``record`` gives the ``RankPart`` that is merged with those of the other ranks.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from expstate import collector
from expstate.engine import arrays, memory
from expstate.engine.arrays import Arrays
from expstate.engine.capture import Copies, capture
from expstate.engine.digest import box_digest
from expstate.engine.link import Linker
from expstate.engine.merge import RankPart
from expstate.engine.placement import Place, Placement, place
from expstate.engine.write import FilesWriter
from expstate.errors import NeedsTrustWarning, UnsupportedValueError
from expstate.format.layout import DataFile, PlacedBox, Source, lay_out
from expstate.format.manifest import (
    DIGEST_BYTES,
    INLINE_BLOCKS,
    AliasEntry,
    Box,
    ContainerEntry,
    Entry,
    FileRecord,
    ObjectEntry,
    TensorEntry,
    ValueEntry,
)
from expstate.state import tree
from expstate.state.objects import PickledObject, pickle_object

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from expstate.engine import crew, share
    from expstate.engine.placement import Comparison
    from expstate.format.names import FileNamer
    from expstate.storage.base import Storage


_NAMED = 5


class PartWriter:
    """Writes the data files of one rank.

    Parameters
    ----------
    storage : Storage
        The snapshot's folder.
    namer : FileNamer
        Gives names to files.
    budget : int or None
        Most host memory for staging, in bytes; None for the default.
    local_ranks : int
        Ranks of this machine, which share its threads.
    stop : crew.Stop
        Ends the work.
    written : callable
        Is given the number of bytes of the state that were written, or need not be.
    went_on : callable
        Is called when something else was done: digests.
    comparison : Comparison, optional
        What need not be written.
    device_staging_bytes : int, optional
        Most memory of each accelerator for copies of what lies there; None for what is free but for a reserve.

    Attributes
    ----------
    total_bytes : int
        Bytes of the tensors and objects that are this rank's to write.
    needing_trust : list of (str, str)
        Paths of objects that only ``trust=True`` will bring back, and why.
    """

    def __init__(
        self,
        storage: Storage,
        namer: FileNamer,
        budget: int | None,
        local_ranks: int,
        stop: crew.Stop,
        written: Callable[[int], None],
        went_on: Callable[[], None],
        comparison: Comparison | None = None,
        device_staging_bytes: int | None = None,
    ) -> None:
        self._storage = storage
        self._namer = namer
        self._budget = budget
        self._local_ranks = local_ranks
        self._stop = stop
        self._written = written
        self._went_on = went_on
        self._comparison = comparison
        self._device_staging_bytes = device_staging_bytes
        self._leaves: list[tree.Leaf] = []
        self._arrays = Arrays()
        self._objects: dict[str, PickledObject] = {}
        self._types: dict[str, str] = {}
        self._of_all: dict[str, str] = {}
        self._linker = Linker(storage, namer, went_on)
        self._placement = Placement()
        self._tables: list[FileRecord] = []
        self._copies: Copies | None = None
        self._writers: list[FilesWriter] = []
        self._staging: memory.Staging | None = None
        self.total_bytes = 0
        self.needing_trust: list[tuple[str, str]] = []

    @property
    def created(self) -> list[str]:
        """Names of the files that were begun."""
        return [*self._linker.created, *(name for writer in self._writers for name in writer.created)]

    # What to write

    def add_key(
        self,
        key: str,
        leaves: Sequence[tree.Leaf],
        pieces: Mapping[str, Sequence[share.Piece]],
        of_all: Mapping[str, str],
        *,
        is_first: bool = True,
    ) -> None:
        """Lay out what this rank writes of a key.

        Parameters
        ----------
        key : str
            The key.
        leaves : sequence of tree.Leaf
            Its state, flattened.
        pieces : mapping of str to sequence of share.Piece
            What this rank writes of the arrays in ``of_all``.
        of_all : mapping of str to str
            Paths of arrays and objects that belong to all ranks, and their devices.
        is_first : bool, default True
            Whether this is the rank that writes the objects among these.
        """
        self._leaves += leaves
        self._of_all.update(of_all)
        sources: list[Source] = []
        tensors: list[torch.Tensor] = []
        addresses: list[int | None] = []
        for leaf in leaves:
            if isinstance(leaf, tree.Array) and leaf.path not in of_all:
                sources.append(arrays.source(leaf))
                tensors.append(leaf.tensor)
                addresses.append(leaf.address)
            elif isinstance(leaf, (tree.Array, tree.Sharded)):
                for piece in pieces.get(leaf.path, ()):
                    sources.append(arrays.piece_source(leaf, piece))
                    tensors.append(piece.tensor)
                    addresses.append(piece.address)
        aliases = [(leaf.path, leaf.target) for leaf in leaves if isinstance(leaf, tree.Alias)]
        if sources:
            self.total_bytes += self._arrays.add(key, sources, tensors, addresses, aliases)
        self._add_objects(key, [leaf for leaf in leaves if isinstance(leaf, tree.Object)], is_first=is_first)

    def _add_objects(self, key: str, objects: Sequence[tree.Object], *, is_first: bool) -> None:
        for leaf in objects:
            try:
                pickled = pickle_object(leaf.value)
            except UnsupportedValueError as error:
                msg = f"entry {leaf.path!r} cannot be stored: {error}"
                raise UnsupportedValueError(msg) from error
            self._objects[leaf.path] = pickled
            self._types[leaf.path] = f"{type(leaf.value).__module__}.{type(leaf.value).__qualname__}"
            if pickled.needs_trust:
                self.needing_trust.append((leaf.path, pickled.reason))
        objects = [leaf for leaf in objects if is_first or leaf.path not in self._of_all]
        if objects:
            # In a file of their own: the key's file holds its tensors and nothing else.
            stored = [self._objects[leaf.path].data for leaf in objects]
            sources = [Source(leaf.path, "uint8", (len(data),), 1) for leaf, data in zip(objects, stored, strict=True)]
            held = [arrays.bytes_tensor(data) for data in stored]
            self.total_bytes += self._arrays.add(f"{key}.objects", sources, held, [tensor.data_ptr() for tensor in held])

    # Moving

    def _means(self) -> tuple[int, int]:
        """Threads to work with, and the bytes that buffers may have."""
        ranks = self._local_ranks
        threads, budget = memory.means(self._storage, memory.budget_bytes(self._budget, ranks), ranks)
        return threads, budget - (0 if self._copies is None else self._copies.host_bytes)

    def _writer(self, files: Sequence[DataFile], sources: Sequence[torch.Tensor], addresses: Sequence[int | None]) -> FilesWriter:
        threads, budget = self._means()
        if self._staging is None:
            pinned_for = next((tensor.device.type for tensor in sources if not tensor.is_cpu), None)
            self._staging = memory.Staging(budget, threads, pinned_for)
        with collector.paused():
            # Progress counts the state; what is written after it, digests, is not part of what was promised.
            written = (lambda _: self._went_on()) if self._writers else self._written
            writer = FilesWriter(self._storage, files, sources, addresses, self._staging, threads, written, self._stop)
        self._writers.append(writer)
        return writer

    def _place(self) -> FilesWriter:
        """Find a place for everything; what writes that which is nowhere yet."""
        with collector.paused():
            self._placement = place(
                self._arrays,
                self._comparison,
                self._namer,
                self._storage.data_file_bytes,
                self._linker,
                budget=self._means()[1],
                stop=self._stop,
                done=lambda _: self._went_on(),
            )
        placement = self._placement
        found = sum(item.box.nbytes for item in placement.held) + sum(item.box.nbytes for item in placement.equal)
        if found:
            self._written(found)
        return self._writer(self._placement.files, self._arrays.tensors, self._arrays.addresses)

    def write(self) -> None:
        """Stage, digest and write what has changed; the state must not change meanwhile."""
        self._place().write_now()

    def stage(self) -> None:
        """Copy what is to be written, so that the state may change; what the budget does not hold at once is written meanwhile."""
        self._copies = self._capture()
        if self._copies is None:
            self._place().stage_all()
            # And now the copies are.
            self._arrays.forget()
        else:
            self._arrays.tensors, self._arrays.addresses = self._copies.tensors, self._copies.addresses
        self._leaves = [arrays.without_values(leaf) for leaf in self._leaves]

    def _capture(self) -> Copies | None:
        """Copies of everything: then what has changed is found out later. Without them it is found out first, and that alone is staged."""
        finds_something = self._comparison is not None and self._comparison.finds_something
        if not finds_something and all(tensor.is_cpu for tensor in self._arrays.tensors):
            return None  # all of it will be written: it is staged as it is written
        budget = self._means()[1]
        return capture(self._arrays.tensors, self._arrays.addresses, budget, self._device_staging_bytes, self._stop)

    def write_staged(self) -> None:
        """Digest and write what ``stage`` has copied."""
        if self._copies is None:
            self._writers[0].finish_staged()
            return
        self._copies.wait()
        self.write()
        self._arrays.forget()
        self._copies.close()

    # What was written

    def record(self, rank: int | None) -> RankPart:
        """The files and entries, after the digests that the manifest does not hold itself have been written.

        Parameters
        ----------
        rank : int or None
            That of the entries which do not belong to all ranks.
        """
        with collector.paused():
            boxes = self._boxes()
            files = tuple(file.record for file in self._placement.files)
            entries = tuple(self._entry(leaf, boxes, rank) for leaf in self._leaves)
            return RankPart((*files, *self._placement.links, *self._tables), entries)

    def _boxes(self) -> dict[int, list[Box]]:
        """The boxes of each array as the manifest records them, in order."""
        placement = self._placement
        placed: list[tuple[PlacedBox, int, int, bytes | bytearray]] = [
            (box, number, box.offset, digests)
            for number, (file, per_box) in enumerate(zip(placement.files, self._writers[0].digests, strict=True))
            for box, digests in zip(file.boxes, per_box, strict=True)
        ]
        first = len(placement.files)
        placed += [(box, first + number, held.box.offset, blocks) for box, number, held, blocks in placement.held]
        tables = self._write_tables([digests for *_, digests in placed if len(digests) > INLINE_BLOCKS * DIGEST_BYTES])
        boxes: dict[int, list[Box]] = {}
        at: dict[Place, Box] = {}
        for box, number, offset, digests in placed:
            blocks: bytes | tuple[int, int] | None = None
            if len(digests) > INLINE_BLOCKS * DIGEST_BYTES:
                blocks = tables.pop(0)
            elif len(digests) > DIGEST_BYTES:
                blocks = bytes(digests)
            record = Box(number, offset, box_digest(digests), blocks, *self._box_place(box), self._fingerprint(box))
            boxes.setdefault(box.source, []).append(record)
            if placement.equal:
                at[box.source, box.first_byte] = record
        for box, other in placement.equal:
            same = at[other]
            record = Box(same.file, same.offset, same.digest, same.blocks, *self._box_place(box), self._fingerprint(box))
            boxes.setdefault(box.source, []).append(record)
        if placement.held or placement.equal:
            for found in boxes.values():
                found.sort(key=lambda box: box.starts or ())
        return boxes

    def _fingerprint(self, box: PlacedBox) -> bytes | None:
        return self._placement.fingerprints.get((box.source, box.first_byte))

    def _box_place(self, box: PlacedBox) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Where a box begins in the whole, and its sizes; nothing if it is the whole."""
        form = self._arrays.sources[box.source]
        if box.rows is None:
            return (None, None) if form.starts is None else (form.starts, form.shape)
        first = 0 if form.starts is None else form.starts[0]
        starts = (first + box.rows[0], *((0,) * (len(form.shape) - 1) if form.starts is None else form.starts[1:]))
        return starts, (box.rows[1] - box.rows[0], *form.shape[1:])

    def _write_tables(self, tables: Sequence[bytes | bytearray]) -> list[tuple[int, int]]:
        """Write long lists of block digests to files of their own; where each lies."""
        if not tables:
            return []
        sources = [Source(f"digests/{index}", "uint8", (len(table),), 1) for index, table in enumerate(tables)]
        files = lay_out("digests", sources, (), self._namer, self._storage.data_file_bytes)
        held = [torch.frombuffer(bytearray(table), dtype=torch.uint8) for table in tables]
        writer = self._writer(files, held, [tensor.data_ptr() for tensor in held])
        writer.write_now()
        first = len(self._placement.files) + len(self._placement.links)
        places = {box.source: (first + number, box.offset) for number, file in enumerate(files) for box in file.boxes}
        self._tables = [file.record for file in files]
        return [places[index] for index in range(len(tables))]

    def _entry(self, leaf: tree.Leaf, boxes: Mapping[int, list[Box]], rank: int | None) -> Entry:
        kind = type(leaf)
        path = leaf.path
        rank = None if path in self._of_all else rank
        if kind is tree.Array or kind is tree.Sharded:
            numbers = self._arrays.numbers_of.get(path, range(0))
            placed = tuple(boxes[numbers.start]) if len(numbers) == 1 else tuple(box for number in numbers for box in boxes[number])
            device = self._arrays.devices[numbers.start] if numbers else self._of_all[path]
            return TensorEntry(path, leaf.dtype, leaf.shape, placed, leaf.kind, leaf.requires_grad, device, rank)  # type: ignore[union-attr]
        if kind is tree.Value:
            return ValueEntry(path, leaf.encoded, rank)  # type: ignore[union-attr]
        if kind is tree.Container:
            return ContainerEntry(path, leaf.type, leaf.meta, rank)  # type: ignore[union-attr]
        if kind is tree.Alias:
            return AliasEntry(path, leaf.target, rank)  # type: ignore[union-attr]
        pickled = self._objects[path]
        written = tuple(boxes[self._arrays.numbers_of[path].start]) if path in self._arrays.numbers_of else ()
        return ObjectEntry(path, self._types[path], len(pickled.data), pickled.needs_trust, written, rank)

    # Ending

    def abort(self) -> None:
        """Stop writing."""
        for writer in self._writers:
            writer.abort()

    def close(self) -> None:
        """Let go of the staging memory, of the state, and of what it was compared with."""
        if self._copies is not None:
            self._copies.close()
        if self._staging is not None:
            self._staging.close()
        self._arrays.forget()
        self._comparison, self._placement = None, Placement()


def warn_of_trust(needing_trust: Sequence[tuple[str, str]], stacklevel: int = 3) -> None:
    """Tell who takes of objects that only ``trust=True`` will bring back, given by path and reason."""
    if needing_trust:
        listed = "; ".join(f"{path!r} ({reason})" for path, reason in needing_trust[:_NAMED])
        more = f" and {len(needing_trust) - _NAMED} more" if len(needing_trust) > _NAMED else ""
        warnings.warn(
            f"these entries will come back only with trust=True: {listed}{more}; store plain values or tensors instead where you can",
            NeedsTrustWarning,
            stacklevel=stacklevel,
        )
