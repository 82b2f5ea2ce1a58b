"""Which rank writes what: state that several ranks hold is written once, and the work is spread evenly by bytes.

``Holdings`` is told of every array of a rank, and who else holds it; ``pieces`` gives what this rank writes. Each rank works that out
for itself: ranks that hold the same arrays come to shares that fit together.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from expstate.format.manifest import BLOCK_BYTES
from expstate.state import paths, sharding, tree
from expstate.state.tensors import is_plain_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from expstate.state.stateful import Stateful

_LEAST_CUT_BYTES = 2 * BLOCK_BYTES
"""A smaller array is written by one rank as a whole."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of an array that this rank writes: where it begins in the whole (None if it is the whole), and its values."""

    starts: tuple[int, ...] | None
    tensor: torch.Tensor
    address: int | None


@dataclass(slots=True)
class Held:
    """A box that is here, and on other ranks too."""

    path: str
    shape: tuple[int, ...]
    starts: tuple[int, ...]
    tensor: torch.Tensor
    can_be_cut: bool


@dataclass(slots=True)
class Holdings:
    """What a rank holds together with others.

    Attributes
    ----------
    groups : dict
        For ranks that hold the same boxes, in rising order, and the sizes of the mesh that these boxes lie on: the boxes. Of a mesh that is
        a part of another the other parts may have the same boxes, and then they cut them alike.
    """

    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Held]] = field(default_factory=dict)

    def add(self, leaf: tree.Array | tree.Sharded, holders: Sequence[int]) -> None:
        """Note an array; the holders are ranks of the group that takes."""
        mesh = leaf.mesh if isinstance(leaf, tree.Sharded) else ()
        held = self.groups.setdefault((tuple(holders), mesh), [])
        if isinstance(leaf, tree.Sharded):
            held += [Held(leaf.path, leaf.shape, part.starts, part.tensor, can_be_cut=True) for part in leaf.parts]
        else:
            shape = tuple(leaf.tensor.shape)
            held.append(Held(leaf.path, shape, (0,) * len(shape), leaf.tensor, can_be_cut=shape == leaf.shape))

    def of(self, holders: Sequence[int]) -> list[Held]:
        """The boxes that these ranks hold."""
        return in_order(box for (ranks, _), boxes in self.groups.items() if ranks == tuple(holders) for box in boxes)

    def pieces(self, rank: int) -> dict[str, list[Piece]]:
        """What this rank writes, by path; nothing for a path that others write."""
        found: dict[str, list[Piece]] = {}
        for (holders, _), boxes in self.groups.items():
            if rank not in holders:
                continue
            boxes = in_order(boxes)  # noqa: PLW2901 - the same ones
            for box, (first, last) in zip(boxes, _shares([_rows(box) for box in boxes], len(holders), holders.index(rank)), strict=True):
                if first < last:
                    found.setdefault(box.path, []).append(_piece(box, first, last))
        return found


def in_order(boxes: Iterable[Held]) -> list[Held]:
    """Boxes in an order that is the same on all ranks, whatever that of their dicts is."""
    return sorted(boxes, key=lambda box: (box.path, box.starts))


def _rows(box: Held) -> tuple[int, int]:
    """How many rows a box can be cut into, and the bytes of each."""
    nbytes = box.tensor.nbytes
    rows = box.tensor.shape[0] if box.tensor.dim() and box.can_be_cut and nbytes >= _LEAST_CUT_BYTES else 1
    return rows, nbytes // rows


def _piece(box: Held, first: int, last: int) -> Piece:
    rows, _ = _rows(box)
    tensor, starts = box.tensor, box.starts
    if (first, last) != (0, rows):
        tensor = tensor.narrow(0, first, last - first)
        starts = (starts[0] + first, *starts[1:])
    is_whole = tuple(tensor.shape) == box.shape
    address = tensor.data_ptr() if is_plain_memory(tensor) else None
    return Piece(None if is_whole else starts, tensor, address)


def _shares(boxes: Sequence[tuple[int, int]], ranks: int, rank: int) -> list[tuple[int, int]]:
    """Rows of each box that one of several ranks writes.

    The boxes are laid one after the other, and the line is cut into equal parts, at the nearest row.

    >>> _shares([(8, 10), (1, 0), (8, 10)], 2, 0), _shares([(8, 10), (1, 0), (8, 10)], 2, 1)
    ([(0, 8), (0, 1), (0, 0)], [(8, 8), (1, 1), (0, 8)])
    """
    total = sum(rows * row_bytes for rows, row_bytes in boxes)
    low, high = total * rank // ranks, total * (rank + 1) // ranks
    found = []
    at = 0
    for rows, row_bytes in boxes:
        if row_bytes == 0:  # nothing to spread: the first rank writes that it is there
            found.append((0, rows) if rank == 0 else (rows, rows))
            continue
        first, last = (min(rows, max(0, (bound - at + row_bytes // 2) // row_bytes)) for bound in (low, high))
        found.append((first if rank else 0, last if rank < ranks - 1 else rows))
        at += rows * row_bytes
    return found


def replicated_keys(app_state: Mapping[str, Stateful]) -> set[str]:
    """Keys whose statefuls keep their tensors the same on all ranks, but for those that are sharded.

    Modules under DistributedDataParallel or with sharded parameters, and the optimizers of their parameters.
    """
    parallel = getattr(sys.modules.get("torch.nn.parallel.distributed"), "DistributedDataParallel", ())
    keys: set[str] = set()
    alike: set[int] = set()
    for key, stateful in app_state.items():
        if isinstance(stateful, torch.nn.Module):
            parameters = list(stateful.parameters())
            if isinstance(stateful, parallel) or any(map(sharding.is_sharded, parameters)):
                keys.add(key)
                alike.update(map(id, parameters))
    for key, stateful in app_state.items():
        if isinstance(stateful, torch.optim.Optimizer):
            own = [parameter for group in stateful.param_groups for parameter in group["params"]]
            if own and all(id(parameter) in alike or sharding.is_sharded(parameter) for parameter in own):
                keys.add(key)
    return keys


def rule(app_state: Mapping[str, Stateful], globs: Sequence[str]) -> Callable[[str, str], bool]:
    """Whether an entry, by its key and path, is the same on all ranks."""
    keys = replicated_keys(app_state)
    matches = paths.matcher(globs) if globs else None
    return lambda key, path: key in keys or (matches is not None and matches(path))
