"""Tensors that several ranks hold together: which boxes of the whole are here, and which other ranks hold the very same.

Gets a ``DTensor`` (FSDP2, tensor parallel, any mesh) or a ``ShardedTensor`` (FSDP1); hands on a ``Sharding`` of plain local tensors.
"""

from __future__ import annotations

import functools
import itertools
import sys
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from expstate.errors import UnsupportedValueError

Run: TypeAlias = tuple[int, int, int]
"""Indices along one dimension that follow each other: the first in the whole, how many, and the first of them here."""
Cut: TypeAlias = tuple[int, int, int]
"""A dimension of the mesh that one of the tensor is cut by: the split factor of a strided shard or 0, its size, and the coordinate here."""


@dataclass(frozen=True, slots=True)
class Part:
    """A box of the whole that is here: where it begins, its sizes, and a plain tensor of these sizes."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a tensor lies on the ranks, seen from this one.

    Attributes
    ----------
    shape : tuple of int
        Of the whole.
    parts : tuple of Part
        What is here; none where nothing is.
    holders : tuple of int
        Global ranks that hold the same parts, this one among them, in rising order; none if this rank has no place in the mesh.
    mesh : tuple of int
        Sizes of the mesh that it lies on.
    device : torch.device
        Where parts are.
    """

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    holders: tuple[int, ...]
    mesh: tuple[int, ...]
    device: torch.device


def is_sharded(value: object) -> bool:
    """Whether a value is a tensor that several ranks hold together."""
    return _is_dtensor(value) or _is_sharded_tensor(value)


def _is_dtensor(value: object) -> bool:
    # Whoever has such a value has imported its module, which takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def _is_sharded_tensor(value: object) -> bool:
    module = sys.modules.get("torch.distributed._shard.sharded_tensor.api")
    return module is not None and isinstance(value, module.ShardedTensor)


def sharding_of(value: Any) -> Sharding:
    """Which parts of a sharded tensor are here.

    Raises
    ------
    UnsupportedValueError
        If its ranks hold partial sums, or what is here has not the size that its placements say.
    """
    return _of_dtensor(value) if _is_dtensor(value) else _of_sharded_tensor(value)


def _of_sharded_tensor(value: Any) -> Sharding:
    shards = [(shard.metadata, shard.tensor.detach()) for shard in value.local_shards()]
    parts = tuple(Part(tuple(placed.shard_offsets), tuple(placed.shard_sizes), tensor) for placed, tensor in shards)
    metadata = value.metadata().shards_metadata
    device = parts[0].tensor.device if parts else metadata[0].placement.device() if metadata else None
    return Sharding(tuple(value.size()), parts, (torch.distributed.get_rank(),), (), device or torch.device("cpu"))


def _of_dtensor(value: Any) -> Sharding:
    mesh, placements, shape = value.device_mesh, value.placements, tuple(value.shape)
    sizes, device = tuple(mesh.shape), value.device
    if any(placement.is_partial() for placement in placements):
        msg = "is a DTensor of partial sums, which have no values yet; redistribute it first"
        raise UnsupportedValueError(msg)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return Sharding(shape, (), (), sizes, device)
    local = value.detach().to_local()
    local = local.wait() if hasattr(local, "wait") else local  # the result of a collective that may still be under way
    if 0 in shape:
        # Nothing is all of it, on every rank: one of them has to write that it is there.
        nothing = Part((0,) * len(shape), shape, local.new_empty(shape))
        return Sharding(shape, (nothing,), tuple(sorted(mesh.mesh.flatten().tolist())), sizes, device)
    cuts: list[list[Cut]] = [[] for _ in shape]
    kept: list[int | slice] = []
    for dimension, placement in enumerate(placements):
        if (cut := getattr(placement, "dim", None)) is None:
            kept.append(slice(None))
            continue
        kept.append(coordinate[dimension])
        factor = int(getattr(placement, "split_factor", 0))
        cuts[cut % len(shape)].append((factor, mesh.size(dimension), coordinate[dimension]))
    runs = [_runs(length, tuple(cut)) for length, cut in zip(shape, cuts, strict=True)]
    here = tuple(sum(count for _, count, _ in found) for found in runs)
    if here != tuple(local.shape):
        msg = f"is a DTensor whose shard has shape {tuple(local.shape)} on this rank, and {here} by its placements {placements}"
        raise UnsupportedValueError(msg)
    holders = tuple(sorted(mesh.mesh[tuple(kept)].flatten().tolist()))
    return Sharding(shape, tuple(_part(local, box) for box in itertools.product(*runs)), holders, sizes, device)


def _part(local: torch.Tensor, box: tuple[Run, ...]) -> Part:
    tensor = local
    for dimension, (_, count, at) in enumerate(box):
        tensor = tensor.narrow(dimension, at, count)
    return Part(tuple(start for start, _, _ in box), tuple(count for _, count, _ in box), tensor)


@functools.lru_cache(maxsize=4096)
def _runs(length: int, cuts: tuple[Cut, ...]) -> list[Run]:
    """The indices of one dimension that are here, after it was cut for these dimensions of the mesh."""
    runs = [(0, length)] if length else []
    for factor, size, coordinate in _in_turn(cuts):
        runs = _strided(runs, factor, size, coordinate) if factor else _chunk(runs, size, coordinate)
    found: list[Run] = []
    at = 0
    for start, count in runs:
        if found and found[-1][0] + found[-1][1] == start:
            found[-1] = (found[-1][0], found[-1][1] + count, found[-1][2])
        else:
            found.append((start, count, at))
        at += count
    return found


def _in_turn(cuts: tuple[Cut, ...]) -> list[Cut]:
    """Cuts in the order in which they were made: a strided one after so many of the later ones that these make its factor.

    That is how FSDP2 cuts what tensor parallelism has cut. A factor that they do not make stands for cuts that nobody else knows.
    """
    found: list[Cut] = []
    for factor, size, coordinate in reversed(cuts):
        before, at = 1, 0
        while before < factor and at < len(found):
            before *= found[at][1]
            at += 1
        if factor and before != factor:
            return list(cuts)
        found.insert(at, (0, size, coordinate))
    return found


def _chunk(runs: list[tuple[int, int]], size: int, coordinate: int) -> list[tuple[int, int]]:
    """One of ``size`` chunks, as ``torch.chunk`` makes them: all but the last of one length."""
    length = sum(count for _, count in runs)
    step = -(-length // size)
    return _slice(runs, coordinate * step, min(length, (coordinate + 1) * step))


def _strided(runs: list[tuple[int, int]], factor: int, size: int, coordinate: int) -> list[tuple[int, int]]:
    """Of each of ``factor`` chunks one of ``size`` chunks."""
    return [run for number in range(factor) for run in _chunk(_chunk(runs, factor, number), size, coordinate)]


def _slice(runs: list[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    found = []
    at = 0
    for start, count in runs:
        begin, end = max(first, at), min(last, at + count)
        if begin < end:
            found.append((start + begin - at, end - begin))
        at += count
    return found
