"""Live state in the form of a manifest: flattened as a take does it, its tensors digested where they lie.

Gets an app state and the entries that it will be compared with; hands on entries cut into the same boxes, and the tensors behind them.
Nothing live changes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec

from expstate import collector
from expstate.diff.compare import Listing, Place, placed
from expstate.engine import crew, inplace
from expstate.engine.digest import EMPTY, block_digests, box_digest
from expstate.engine.source import region
from expstate.engine.take import state_dicts
from expstate.engine.unchanged import LiveBox, fingerprints
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
    from collections.abc import Iterable, Iterator, Mapping

    from expstate.engine.inplace import Digesting, Piece
    from expstate.state.stateful import Stateful


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
    yield from inplace.cut(tensor, 0, nbytes, address, step)


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

    def listing(self, other: Listing, fingerprint_key: str | None, *, budget: int, progress: ProgressOption) -> Listing:
        """The entries, digested so that they can be compared with those of ``other``.

        Parameters
        ----------
        other : Listing
            The snapshot's entries. A tensor is digested in boxes like those of its counterpart there, and not at all if no tensor there
            has its dtype and shape: then none is the same. On an accelerator fingerprints are compared instead, where all that it could be
            equal to have one.
        fingerprint_key : str or None
            The key of the snapshot's fingerprints.
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
        known = {} if fingerprint_key is None else self._digests_by_fingerprint(boxes, other, bytes.fromhex(fingerprint_key))
        self._digest({path: places for path, places in boxes.items() if path not in known}, budget, progress)
        with collector.paused():
            found = {path: {place: box_digest(digests) for place, digests in places.items()} for path, places in boxes.items()} | known
            entries = tuple(self._entry(leaf, found) for leaf in self._leaves)
        return Listing(entries, {entry.path: entry for entry in entries})

    def _digests_by_fingerprint(
        self, boxes: Mapping[str, Mapping[Place, bytearray]], other: Listing, key: bytes
    ) -> dict[str, dict[Place, bytes]]:
        """The digests of what lies on accelerators, as the snapshot has them for their fingerprints; empty for one that it has not."""
        digests: dict[tuple[str, tuple[int, ...], bytes], bytes] = {}
        without: set[tuple[str, tuple[int, ...]]] = set()
        for entry in other.entries:
            if not isinstance(entry, TensorEntry):
                continue
            for box in entry.boxes:
                sizes = entry.shape if box.sizes is None else box.sizes
                if box.fingerprint is None:
                    without.add((entry.dtype, sizes))
                else:
                    digests[entry.dtype, sizes, box.fingerprint] = box.digest
        wanted: list[tuple[str, Place]] = []
        live: list[LiveBox] = []
        for path, places in boxes.items():
            array = self.arrays[path]
            parts = [
                LiveBox.of(path, array.dtype, region(array.tensor, *place) if place[1] != array.shape else array.tensor) for place in places
            ]
            if all(part.is_on_device and (part.dtype, part.sizes) not in without for part in parts):
                live += parts
                wanted += [(path, place) for place in places]
        prints = fingerprints(live, key)
        found: dict[str, dict[Place, bytes]] = {}
        for number, (path, place) in enumerate(wanted):
            part = live[number]
            digest = digests.get((part.dtype, part.sizes, prints[number]), b"") if number in prints else EMPTY
            found.setdefault(path, {})[place] = digest
        lacking = {path for number, (path, _) in enumerate(wanted) if live[number].nbytes and number not in prints}
        return {path: places for path, places in found.items() if path not in lacking}

    def _digest(self, boxes: Mapping[str, Mapping[Place, bytearray]], budget: int, option: ProgressOption) -> None:
        items: list[Digesting] = []
        for path, places in boxes.items():
            array = self.arrays[path]
            entry = _bare_entry(array)
            for place, digests in places.items():
                items += inplace.filling(pieces(array, entry, place, inplace.PIECE_BYTES), digests)
        bar = Progress("diff", sum(item.piece.nbytes for item in items), option)
        try:
            inplace.digest(items, budget, crew.Stop(), bar.add)
        finally:
            bar.close()

    def _entry(self, leaf: tree.Leaf, boxes: Mapping[str, Mapping[Place, bytes]]) -> Entry:
        path = leaf.path
        if isinstance(leaf, tree.Array):
            entry = _bare_entry(leaf)
            found = tuple(
                Box(-1, 0, digest, None, *(place if place[1] != leaf.shape else (None, None)))
                for place, digest in boxes.get(path, {}).items()
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
