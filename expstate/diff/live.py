"""Live state in the form of a manifest: flattened as a take does it, its tensors digested where they lie.

Gets an app state and the entries that it will be compared with; hands on entries cut into the same boxes, and the tensors behind them.
Plain host memory is digested in place, all else by way of staging buffers; nothing live changes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec

from expstate import collector, settings
from expstate.diff.compare import Listing, Place, placed
from expstate.engine import crew, memory
from expstate.engine.digest import block_digests, box_digest
from expstate.engine.source import region
from expstate.engine.streams import SideStreams
from expstate.engine.take import state_dicts
from expstate.errors import UnsupportedValueError
from expstate.format.manifest import (
    BLOCK_BYTES,
    DIGEST_BYTES,
    AliasEntry,
    Box,
    ContainerEntry,
    Entry,
    ObjectEntry,
    TensorEntry,
    ValueEntry,
)
from expstate.progress import Progress, ProgressOption
from expstate.state import tensors, tree
from expstate.state.objects import pickle_object

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import torch

    from expstate.engine.memory import Buffer
    from expstate.state.stateful import Stateful

_JOB_PIECES = 512
"""Pieces of one job at most: small tensors are digested many at a time."""


class Piece(msgspec.Struct, frozen=True, gc=False):
    """Bytes ``start`` to ``stop`` of a tensor or a region of one, in row-major order; ``address`` if they lie so in host memory."""

    view: torch.Tensor
    start: int
    stop: int
    address: int | None

    @property
    def nbytes(self) -> int:
        """How many bytes."""
        return self.stop - self.start

    def stage(self, buffer: Buffer, at: int) -> None:
        """Copy them to a buffer; from a device that only begins here."""
        target = None if self.view.is_cpu else buffer.tensor[at : at + self.nbytes]
        tensors.copy_out(self.view, self.start, self.stop, buffer.address + at, target)


def pieces(array: tree.Array, entry: TensorEntry, place: Place, step: int) -> Iterator[Piece]:
    """A box of a live tensor in pieces of ``step`` bytes, a multiple of its item size."""
    tensor = array.tensor
    starts, sizes = place
    nbytes = math.prod(sizes) * entry.itemsize
    if nbytes == 0:
        return
    if sizes != entry.shape:
        if tuple(tensor.shape) != entry.shape or tensor.element_size() != entry.itemsize:
            tensor = tensor.view(*entry.shape, entry.itemsize)  # an array seen as its bytes
        tensor = region(tensor, starts, sizes)
    address = tensor.data_ptr() if tensors.is_plain_memory(tensor) else None
    for start in range(0, nbytes, step):
        yield Piece(tensor, start, min(nbytes, start + step), None if address is None else address + start)


def staging_for(views: Iterable[torch.Tensor], budget: int, threads: int) -> memory.Staging:
    """Buffers that the devices of these tensors can copy to."""
    return memory.Staging(budget, threads, next((view.device.type for view in views if not view.is_cpu), None))


class _Digesting(msgspec.Struct, frozen=True, gc=False):
    """A piece and where the digests of its blocks go."""

    piece: Piece
    digests: bytearray
    at: int


class LiveState:
    """An app state as it is now.

    Parameters
    ----------
    app_state : mapping of str to Stateful
        Checked.

    Attributes
    ----------
    classes : dict of str to str
        The class of the stateful under each key.
    arrays : dict of str to tree.Array
        The tensors and arrays by path.
    """

    def __init__(self, app_state: Mapping[str, Stateful]) -> None:
        self.classes = {key: f"{type(value).__module__}.{type(value).__qualname__}" for key, value in app_state.items()}
        with collector.paused():
            self._leaves = [_whole(leaf) for key, state in state_dicts(app_state).items() for leaf in tree.flatten(key, state)]
        self.arrays = {leaf.path: leaf for leaf in self._leaves if isinstance(leaf, tree.Array)}

    def listing(self, other: Listing, *, budget: int, progress: ProgressOption) -> Listing:
        """The entries, digested so that they can be compared with those of ``other``.

        Parameters
        ----------
        other : Listing
            The snapshot's entries. A tensor is digested in boxes like those of its counterpart there, and not at all if no tensor there
            has its dtype and shape: then none is the same.
        budget : int
            Most host memory to use, in bytes.
        progress : None, bool or callable
            Is told of the bytes digested.
        """
        forms = {(entry.dtype, entry.shape) for entry in other.entries if isinstance(entry, TensorEntry)}
        boxes: dict[str, dict[Place, bytearray]] = {}
        for path, array in self.arrays.items():
            if (array.dtype, array.shape) in forms:
                places = _places(array, other)
                boxes[path] = {place: bytearray(_blocks(array, place) * DIGEST_BYTES) for place in places}
        self._digest(boxes, budget, progress)
        with collector.paused():
            entries = tuple(self._entry(leaf, boxes) for leaf in self._leaves)
        return Listing(entries, {entry.path: entry for entry in entries})

    def _digest(self, boxes: Mapping[str, Mapping[Place, bytearray]], budget: int, option: ProgressOption) -> None:
        plain: list[_Digesting] = []
        staged: list[_Digesting] = []
        for path, places in boxes.items():
            array = self.arrays[path]
            entry = _bare_entry(array)
            for place, digests in places.items():
                for number, piece in enumerate(pieces(array, entry, place, memory.WINDOW_BYTES)):
                    at = number * (memory.WINDOW_BYTES // BLOCK_BYTES) * DIGEST_BYTES
                    (staged if piece.address is None else plain).append(_Digesting(piece, digests, at))
        bar = Progress("diff", sum(item.piece.nbytes for item in (*plain, *staged)), option)
        stop = crew.Stop()
        threads = settings.current().thread_count
        try:
            if plain:
                jobs = _jobs(plain, memory.WINDOW_BYTES)
                crew.run(jobs, lambda job: _digest_in_place(job, bar), min(threads, len(jobs)), stop)
            if staged:
                _digest_staged(staged, budget, threads, bar, stop)
        finally:
            bar.close()

    def _entry(self, leaf: tree.Leaf, boxes: Mapping[str, Mapping[Place, bytearray]]) -> Entry:
        path = leaf.path
        if isinstance(leaf, tree.Array):
            entry = _bare_entry(leaf)
            found = tuple(
                Box(-1, 0, box_digest(digests), None, *(place if place[1] != leaf.shape else (None, None)))
                for place, digests in boxes.get(path, {}).items()
            )
            return msgspec.structs.replace(entry, boxes=found) if found else entry
        if isinstance(leaf, tree.Value):
            return ValueEntry(path, leaf.encoded)
        if isinstance(leaf, tree.Container):
            return ContainerEntry(path, leaf.type, leaf.meta)
        if isinstance(leaf, tree.Alias):
            return AliasEntry(path, leaf.target)
        return _object_entry(path, leaf.value)


def _whole(leaf: tree.Leaf) -> tree.Leaf:
    """A sharded tensor that is here as a whole as one that is not sharded."""
    if not isinstance(leaf, tree.Sharded):
        return leaf
    if len(leaf.parts) != 1 or leaf.parts[0].sizes != leaf.shape:
        msg = f"entry {leaf.path!r} cannot be compared: only a part of this tensor is here; take a snapshot and compare that"
        raise UnsupportedValueError(msg)
    tensor = leaf.parts[0].tensor
    address = tensor.data_ptr() if tensors.is_plain_memory(tensor) else None
    return tree.Array(leaf.path, leaf.kind, leaf.dtype, leaf.shape, tensor, leaf.value, leaf.requires_grad, address)


def _bare_entry(array: tree.Array) -> TensorEntry:
    """The entry of a tensor that was not digested."""
    return TensorEntry(array.path, array.dtype, array.shape, (Box(-1, 0, b""),), array.kind, array.requires_grad)


def _object_entry(path: str, value: Any) -> ObjectEntry:
    try:
        data = pickle_object(value).data
    except UnsupportedValueError as error:
        msg = f"entry {path!r} cannot be compared: {error}"
        raise UnsupportedValueError(msg) from error
    digest = box_digest(block_digests(memoryview(data)))
    kind = type(value)
    return ObjectEntry(path, f"{kind.__module__}.{kind.__qualname__}", len(data), needs_trust=False, boxes=(Box(-1, 0, digest),))


def _places(array: tree.Array, other: Listing) -> Iterable[Place]:
    """Where the snapshot has boxes of this tensor; one box if it has another tensor there, or none."""
    counterpart = other.by_path.get(array.path)
    resolved = None if counterpart is None else other.resolve(counterpart)
    if isinstance(resolved, TensorEntry) and (resolved.dtype, resolved.shape) == (array.dtype, array.shape):
        return placed(resolved) or [((0,) * len(array.shape), array.shape)]
    return [((0,) * len(array.shape), array.shape)]


def _blocks(array: tree.Array, place: Place) -> int:
    return -(-math.prod(place[1]) * _bare_entry(array).itemsize // BLOCK_BYTES)


def _jobs(items: Sequence[_Digesting], room: int) -> list[list[_Digesting]]:
    """Pieces that are done together."""
    jobs: list[list[_Digesting]] = []
    left, count = 0, 0
    for item in items:
        if item.piece.nbytes > left or count >= _JOB_PIECES:
            jobs.append([])
            left, count = room, 0
        jobs[-1].append(item)
        left -= item.piece.nbytes
        count += 1
    return jobs


def _digest_in_place(job: Sequence[_Digesting], bar: Progress) -> None:
    for item in job:
        assert item.piece.address is not None
        found = block_digests(tensors.memory(item.piece.address, item.piece.nbytes))
        item.digests[item.at : item.at + len(found)] = found
    bar.add(sum(item.piece.nbytes for item in job))


def _digest_staged(items: Sequence[_Digesting], budget: int, threads: int, bar: Progress, stop: crew.Stop) -> None:
    views = [item.piece.view for item in items]
    streams = SideStreams(view.device for view in views)
    staging = staging_for(views, budget, threads)

    def work(job: Sequence[_Digesting]) -> None:
        with staging.lend(stop) as buffer:
            at = 0
            with streams.entered() as events:
                for item in job:
                    item.piece.stage(buffer, at)
                    at += item.piece.nbytes
            for event in events:
                event.synchronize()
            at = 0
            for item in job:
                found = block_digests(buffer.view[at : at + item.piece.nbytes])
                item.digests[item.at : item.at + len(found)] = found
                at += item.piece.nbytes
        bar.add(at)

    try:
        jobs = _jobs(_cut(items, staging.window_bytes), staging.window_bytes)
        crew.run(jobs, work, max(1, min(threads, staging.count, len(jobs))), stop, streams.on_device)
    finally:
        streams.join()
        staging.close()


def _cut(items: Sequence[_Digesting], most: int) -> list[_Digesting]:
    """Pieces that a buffer holds, of whole blocks."""
    found = []
    for item in items:
        piece = item.piece
        for start in range(piece.start, piece.stop, most):
            at = item.at + (start - piece.start) // BLOCK_BYTES * DIGEST_BYTES
            found.append(_Digesting(Piece(piece.view, start, min(piece.stop, start + most), None), item.digests, at))
    return found
