"""Tensors whose boxes differ, seen in slabs: runs of elements in row-major order that are put together from whatever boxes hold them.

Gets pairs of entries and room for one side of a slab; hands on slabs, and the reads that fill one from a snapshot's boxes.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import msgspec

from expstate.diff.compare import placed
from expstate.engine.read import target
from expstate.engine.source import region

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from expstate.engine.read import Read
    from expstate.engine.source import SnapshotSource
    from expstate.format.manifest import TensorEntry


class Slab(msgspec.Struct, frozen=True, gc=False):
    """Rows ``low`` to ``high`` of what lies below the indices ``prefix`` of a tensor of shape ``grid``.

    Where elements are only bytes to compare, the bytes of an element are the last dimension of the grid.
    """

    grid: tuple[int, ...]
    prefix: tuple[int, ...]
    low: int
    high: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of the slab."""
        return self.high - self.low, *self.grid[len(self.prefix) + 1 :]

    @property
    def first(self) -> int:
        """The number of its first element in the grid."""
        index = 0
        for number, size in zip((*self.prefix, self.low), self.grid, strict=False):
            index = index * size + number
        return index * math.prod(self.grid[len(self.prefix) + 1 :])


def cut(grid: tuple[int, ...], most: int) -> Iterator[Slab]:
    """Slabs of at most ``most`` elements that together are the whole, in order.

    >>> [(slab.prefix, slab.low, slab.high) for slab in cut((2, 5), 3)]
    [((0,), 0, 3), ((0,), 3, 5), ((1,), 0, 3), ((1,), 3, 5)]
    """
    depth = next(depth for depth in range(len(grid)) if math.prod(grid[depth + 1 :]) <= most)
    step = max(1, most // math.prod(grid[depth + 1 :]))
    for prefix in itertools.product(*map(range, grid[:depth])):
        for low in range(0, grid[depth], step):
            yield Slab(grid, prefix, low, min(low + step, grid[depth]))


def slab_reads(source: SnapshotSource, entry: TensorEntry, slab: Slab, dense: torch.Tensor) -> Iterator[Read]:
    """The reads that fill a slab: only the blocks that hold its elements.

    Parameters
    ----------
    source : SnapshotSource
        Its files open.
    entry : TensorEntry
        What is read.
    slab : Slab
        Which part of it.
    dense : torch.Tensor
        Flat uint8 memory for the slab, on the host.
    """
    tail = slab.grid[len(entry.shape) :]
    itemsize = entry.itemsize // math.prod(tail)
    dense = dense.view(*slab.sizes, itemsize)
    depth = len(slab.prefix)
    for (starts, sizes), box in placed(entry).items():
        box_starts, box_sizes = (*starts, *(0 for _ in tail)), (*sizes, *tail)
        index = 0
        for number, start, size in zip(slab.prefix, box_starts, box_sizes, strict=False):
            if not start <= number < start + size:
                break
            index = index * size + number - start
        else:
            first = max(slab.low, box_starts[depth])
            last = min(slab.high, box_starts[depth] + box_sizes[depth])
            if first < last:
                row = math.prod(box_sizes[depth + 1 :]) * itemsize
                begin = (index * box_sizes[depth] + first - box_starts[depth]) * row
                place = (first - slab.low, *box_starts[depth + 1 :], 0), (last - first, *box_sizes[depth + 1 :], itemsize)
                goal = target(region(dense, *place))
                nbytes = math.prod(sizes) * entry.itemsize
                yield from source.box_reads(entry.path, box, nbytes, begin, begin + (last - first) * row, goal)
