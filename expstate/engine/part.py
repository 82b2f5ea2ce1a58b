"""What one rank writes of a snapshot: leaves laid out in data files, moved, and described as the entries of a manifest.

``PartWriter`` is given the leaves of each key; ``write`` (or ``stage`` and later ``write_staged``) moves them, and ``record`` gives the
``RankPart`` that is merged with those of the other ranks.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from expstate import collector
from expstate.engine import memory
from expstate.engine.digest import box_digest
from expstate.engine.merge import RankPart
from expstate.engine.write import FilesWriter
from expstate.errors import NeedsTrustWarning, UnsupportedValueError
from expstate.format.layout import BYTES, DataFile, Source, lay_out
from expstate.format.manifest import (
    DIGEST_BYTES,
    INLINE_BLOCKS,
    AliasEntry,
    Box,
    ContainerEntry,
    Entry,
    ObjectEntry,
    TensorEntry,
    ValueEntry,
)
from expstate.state import tree
from expstate.state.objects import PickledObject, pickle_object
from expstate.state.tensors import ITEM_SIZES, NAMES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from expstate.engine import crew, share
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
        Is given the number of bytes of the state that were written.
    went_on : callable
        Is called when something else was written: digests.

    Attributes
    ----------
    total_bytes : int
        Bytes of the tensors and objects that this rank writes.
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
    ) -> None:
        self._storage = storage
        self._namer = namer
        self._budget = budget
        self._local_ranks = local_ranks
        self._stop = stop
        self._written = written
        self._went_on = went_on
        self._leaves: list[tree.Leaf] = []
        self._sources: list[torch.Tensor] = []
        self._addresses: list[int | None] = []
        self._placed: list[Source] = []
        self._devices: list[str] = []
        self._numbers_of: dict[str, range] = {}
        self._objects: dict[str, PickledObject] = {}
        self._types: dict[str, str] = {}
        self._of_all: dict[str, str] = {}
        self._files: list[DataFile] = []
        self._writers: list[FilesWriter] = []
        self._staging: memory.Staging | None = None
        self.needing_trust: list[tuple[str, str]] = []

    @property
    def total_bytes(self) -> int:
        """Bytes of what is laid out so far."""
        return sum(box.nbytes for file in self._files for box in file.boxes)

    @property
    def created(self) -> list[str]:
        """Names of the files that were begun."""
        return [name for writer in self._writers for name in writer.created]

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
                sources.append(_source(leaf))
                tensors.append(leaf.tensor)
                addresses.append(leaf.address)
            elif isinstance(leaf, (tree.Array, tree.Sharded)):
                for piece in pieces.get(leaf.path, ()):
                    sources.append(_piece_source(leaf, piece))
                    tensors.append(piece.tensor)
                    addresses.append(piece.address)
        aliases = [(leaf.path, leaf.target) for leaf in leaves if isinstance(leaf, tree.Alias)]
        if sources:
            self._add_files(key, sources, tensors, addresses, aliases)
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
            held = [_bytes_tensor(data) for data in stored]
            self._add_files(f"{key}.objects", sources, held, [tensor.data_ptr() for tensor in held])

    def _add_files(
        self,
        stem: str,
        sources: Sequence[Source],
        tensors: Sequence[torch.Tensor],
        addresses: Sequence[int | None],
        aliases: Sequence[tuple[str, str]] = (),
    ) -> None:
        first = len(self._sources)
        self._sources += tensors
        self._addresses += addresses
        self._placed += sources
        self._devices += map(device_name, tensors)
        for number, source in enumerate(sources, first):
            before = self._numbers_of.get(source.path)
            self._numbers_of[source.path] = range(number, number + 1) if before is None else range(before.start, number + 1)
        self._files += lay_out(stem, sources, aliases, self._namer, self._storage.data_file_bytes, first=first)

    # Moving

    def _writer(self, files: Sequence[DataFile], sources: Sequence[torch.Tensor], addresses: Sequence[int | None]) -> FilesWriter:
        ranks = self._local_ranks
        threads, budget = memory.means(self._storage, memory.budget_bytes(self._budget, ranks), ranks)
        if self._staging is None:
            pinned_for = next((tensor.device.type for tensor in sources if not tensor.is_cpu), None)
            self._staging = memory.Staging(budget, threads, pinned_for)
        with collector.paused():
            # Progress counts the state; what is written after it, digests, is not part of what was promised.
            written = (lambda _: self._went_on()) if self._writers else self._written
            writer = FilesWriter(self._storage, files, sources, addresses, self._staging, threads, written, self._stop)
        self._writers.append(writer)
        return writer

    def write(self) -> None:
        """Stage, digest and write everything; the state must not change meanwhile."""
        self._writer(self._files, self._sources, self._addresses).write_now()

    def stage(self) -> None:
        """Copy everything, so that the state may change; what the budget does not hold at once is written meanwhile."""
        self._writer(self._files, self._sources, self._addresses).stage_all()
        # And now the copies are.
        self._sources = []
        self._leaves = [_without_values(leaf) for leaf in self._leaves]

    def write_staged(self) -> None:
        """Digest and write what ``stage`` has copied."""
        self._writers[0].finish_staged()

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
            files = tuple(file.record for file in self._files)
            return RankPart(files, tuple(self._entry(leaf, boxes, rank) for leaf in self._leaves))

    def _boxes(self) -> dict[int, list[Box]]:
        """The boxes of each source as the manifest records them."""
        placed = [
            (number, box, digests)
            for number, (file, per_box) in enumerate(zip(self._files, self._writers[0].digests, strict=True))
            for box, digests in zip(file.boxes, per_box, strict=True)
        ]
        tables = self._write_tables([digests for _, _, digests in placed if len(digests) > INLINE_BLOCKS * DIGEST_BYTES])
        boxes: dict[int, list[Box]] = {}
        for number, box, digests in placed:
            blocks: bytes | tuple[int, int] | None = None
            if len(digests) > INLINE_BLOCKS * DIGEST_BYTES:
                blocks = tables.pop(0)
            elif len(digests) > DIGEST_BYTES:
                blocks = bytes(digests)
            starts = sizes = None
            placed_at, shape = self._placed[box.source].starts, self._placed[box.source].shape
            if box.rows is not None:
                first = 0 if placed_at is None else placed_at[0]
                starts = (first + box.rows[0], *((0,) * (len(shape) - 1) if placed_at is None else placed_at[1:]))
                sizes = (box.rows[1] - box.rows[0], *shape[1:])
            elif placed_at is not None:
                starts, sizes = placed_at, shape
            boxes.setdefault(box.source, []).append(Box(number, box.offset, box_digest(digests), blocks, starts, sizes))
        return boxes

    def _write_tables(self, tables: Sequence[bytearray]) -> list[tuple[int, int]]:
        """Write long lists of block digests to files of their own; where each lies."""
        if not tables:
            return []
        sources = [Source(f"digests/{index}", "uint8", (len(table),), 1) for index, table in enumerate(tables)]
        files = lay_out("digests", sources, (), self._namer, self._storage.data_file_bytes)
        held = [torch.frombuffer(table, dtype=torch.uint8) for table in tables]
        writer = self._writer(files, held, [tensor.data_ptr() for tensor in held])
        writer.write_now()
        places = {box.source: (len(self._files) + number, box.offset) for number, file in enumerate(files) for box in file.boxes}
        self._files += files
        return [places[index] for index in range(len(tables))]

    def _entry(self, leaf: tree.Leaf, boxes: Mapping[int, list[Box]], rank: int | None) -> Entry:
        kind = type(leaf)
        path = leaf.path
        rank = None if path in self._of_all else rank
        if kind is tree.Array or kind is tree.Sharded:
            numbers = self._numbers_of.get(path, range(0))
            placed = tuple(boxes[numbers.start]) if len(numbers) == 1 else tuple(box for number in numbers for box in boxes[number])
            device = self._devices[numbers.start] if numbers else self._of_all[path]
            return TensorEntry(path, leaf.dtype, leaf.shape, placed, leaf.kind, leaf.requires_grad, device, rank)  # type: ignore[union-attr]
        if kind is tree.Value:
            return ValueEntry(path, leaf.encoded, rank)  # type: ignore[union-attr]
        if kind is tree.Container:
            return ContainerEntry(path, leaf.type, leaf.meta, rank)  # type: ignore[union-attr]
        if kind is tree.Alias:
            return AliasEntry(path, leaf.target, rank)  # type: ignore[union-attr]
        pickled = self._objects[path]
        written = tuple(boxes[self._numbers_of[path].start]) if path in self._numbers_of else ()
        return ObjectEntry(path, self._types[path], len(pickled.data), pickled.needs_trust, written, rank)

    # Ending

    def abort(self) -> None:
        """Stop writing."""
        for writer in self._writers:
            writer.abort()

    def close(self) -> None:
        """Let go of the staging memory and of the state."""
        if self._staging is not None:
            self._staging.close()
        self._sources = []


def device_name(tensor: torch.Tensor) -> str:
    """Where a tensor lies, as entries record it."""
    return "cpu" if tensor.is_cpu else str(tensor.device)


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


def _source(leaf: tree.Array) -> Source:
    if leaf.kind == "numpy" and leaf.tensor.dtype == torch.uint8 and leaf.dtype != "|u1":
        native = _NUMPY_TO_TORCH.get(leaf.dtype)
        if native is not None:
            return Source(leaf.path, native, leaf.shape, torch.empty(0, dtype=getattr(torch, native)).element_size())
        return Source(leaf.path, BYTES, (leaf.tensor.numel(),), 1)
    if leaf.kind == "numpy":
        return Source(leaf.path, NAMES[leaf.tensor.dtype], leaf.shape, leaf.tensor.element_size())
    return Source(leaf.path, leaf.dtype, leaf.shape, ITEM_SIZES[leaf.dtype])


def _piece_source(leaf: tree.Array | tree.Sharded, piece: share.Piece) -> Source:
    if piece.starts is None and isinstance(leaf, tree.Array):
        return _source(leaf)
    tensor = piece.tensor
    return Source(leaf.path, NAMES[tensor.dtype], tuple(tensor.shape), tensor.element_size(), piece.starts)


_NUMPY_TO_TORCH = {
    "|b1": "bool",
    "|i1": "int8",
    "<i2": "int16",
    "<i4": "int32",
    "<i8": "int64",
    "<u2": "uint16",
    "<u4": "uint32",
    "<u8": "uint64",
    "<f2": "float16",
    "<f4": "float32",
    "<f8": "float64",
    "<c8": "complex64",
}


def _bytes_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _without_values(leaf: tree.Leaf) -> tree.Leaf:
    if isinstance(leaf, tree.Array):
        return tree.Array(leaf.path, leaf.kind, leaf.dtype, leaf.shape, torch.empty(0, device="cpu"), None, leaf.requires_grad)
    if isinstance(leaf, tree.Sharded):
        return tree.Sharded(leaf.path, leaf.kind, leaf.dtype, leaf.shape, (), (), None, leaf.requires_grad)
    if isinstance(leaf, tree.Container):
        return tree.Container(leaf.path, leaf.type, leaf.meta, None)
    if isinstance(leaf, tree.Value):
        return tree.Value(leaf.path, None, leaf.encoded)
    return tree.Alias(leaf.path, leaf.target, None) if isinstance(leaf, tree.Alias) else tree.Object(leaf.path, None)
