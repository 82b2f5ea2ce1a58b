"""The arrays of a take: their bytes in memory, and their form as the layout is told it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from expstate.engine.unchanged import LiveBox
from expstate.format.layout import BYTES, PlacedBox, Source
from expstate.state import tree
from expstate.state.tensors import ITEM_SIZES, NAMES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expstate.engine import share


@dataclass(frozen=True, slots=True)
class Group:
    """Arrays that are laid out together under a stem: the first one's number, their forms, and the names of tied tensors."""

    stem: str
    first: int
    sources: Sequence[Source]
    aliases: Sequence[tuple[str, str]]


class Arrays:
    """Arrays by number, in groups.

    Attributes
    ----------
    groups : list of Group
        All of them.
    sources : list of Source
        Their forms.
    tensors : list of torch.Tensor
        Where their bytes come from.
    addresses : list of int or None
        Where these lie in host memory, if they can be copied as they are.
    devices : list of str
        Where each lay when it was added.
    numbers_of : dict of str to range
        The numbers of the arrays of each entry.
    """

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.sources: list[Source] = []
        self.tensors: list[torch.Tensor] = []
        self.addresses: list[int | None] = []
        self.devices: list[str] = []
        self.numbers_of: dict[str, range] = {}

    def add(
        self,
        stem: str,
        sources: Sequence[Source],
        tensors: Sequence[torch.Tensor],
        addresses: Sequence[int | None],
        aliases: Sequence[tuple[str, str]] = (),
    ) -> int:
        """Add a group of arrays; the number of their bytes."""
        first = len(self.sources)
        self.groups.append(Group(stem, first, sources, aliases))
        self.sources += sources
        self.tensors += tensors
        self.addresses += addresses
        self.devices += map(device_name, tensors)
        for number, form in enumerate(sources, first):
            before = self.numbers_of.get(form.path)
            self.numbers_of[form.path] = range(number, number + 1) if before is None else range(before.start, number + 1)
        return sum(form.nbytes for form in sources)

    def live_box(self, group: Group, box: PlacedBox) -> LiveBox:
        """A box of a group, whose source it counts within the group, where it lies now."""
        number = group.first + box.source
        form, address = self.sources[number], self.addresses[number]
        sizes = form.shape if box.rows is None else (box.rows[1] - box.rows[0], *form.shape[1:])
        at = None if address is None else address + box.first_byte
        return LiveBox(form.path, form.dtype, sizes, self.tensors[number], box.first_byte, box.nbytes, at)

    def forget(self) -> None:
        """Let go of what is in memory."""
        self.tensors = []
        self.addresses = []


def device_name(tensor: torch.Tensor) -> str:
    """Where a tensor lies, as entries record it."""
    return "cpu" if tensor.is_cpu else str(tensor.device)


def source(leaf: tree.Array) -> Source:
    """An array that is written as a whole."""
    if leaf.kind == "numpy" and leaf.tensor.dtype == torch.uint8 and leaf.dtype != "|u1":
        native = _NUMPY_TO_TORCH.get(leaf.dtype)
        if native is not None:
            return Source(leaf.path, native, leaf.shape, torch.empty(0, dtype=getattr(torch, native)).element_size())
        return Source(leaf.path, BYTES, (leaf.tensor.numel(),), 1)
    if leaf.kind == "numpy":
        return Source(leaf.path, NAMES[leaf.tensor.dtype], leaf.shape, leaf.tensor.element_size())
    return Source(leaf.path, leaf.dtype, leaf.shape, ITEM_SIZES[leaf.dtype])


def piece_source(leaf: tree.Array | tree.Sharded, piece: share.Piece) -> Source:
    """What one rank writes of an array."""
    if piece.starts is None and isinstance(leaf, tree.Array):
        return source(leaf)
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


def bytes_tensor(data: bytes) -> torch.Tensor:
    """A tensor of these bytes."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def without_values(leaf: tree.Leaf) -> tree.Leaf:
    """What the manifest says of a leaf, without what keeps the state alive."""
    if isinstance(leaf, tree.Array):
        return tree.Array(leaf.path, leaf.kind, leaf.dtype, leaf.shape, torch.empty(0, device="cpu"), None, leaf.requires_grad)
    if isinstance(leaf, tree.Sharded):
        return tree.Sharded(leaf.path, leaf.kind, leaf.dtype, leaf.shape, (), (), None, leaf.requires_grad)
    if isinstance(leaf, tree.Container):
        return tree.Container(leaf.path, leaf.type, leaf.meta, None)
    if isinstance(leaf, tree.Value):
        return tree.Value(leaf.path, None, leaf.encoded)
    return tree.Alias(leaf.path, leaf.target, None) if isinstance(leaf, tree.Alias) else tree.Object(leaf.path, None)
