"""Where the parts of a DTensor lie in the whole is what PyTorch itself says, for every mesh and placement."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.placement_types import Partial, _StridedShard
from torch.testing._internal.distributed import fake_pg

from expstate.errors import UnsupportedValueError
from expstate.state.sharding import Sharding, _runs, sharding_of


@contextlib.contextmanager
def _as_rank(rank: int, size: int) -> Iterator[None]:
    """This process as one of a world in which nobody talks."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=fake_pg.FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _distributed(full: torch.Tensor, mesh: Any, placements: list[Any]) -> DTensor:
    """As PyTorch cuts it; that of 2.6 would ask another rank for its part."""
    if "src_data_rank" in inspect.signature(distribute_tensor).parameters:
        return distribute_tensor(full, mesh, placements, src_data_rank=None)
    return _laid_out(full, mesh, placements)


def _of_all(mesh_shape: tuple[int, ...], placements: list[Any], full: torch.Tensor) -> list[Sharding]:
    found = []
    for rank in range(math.prod(mesh_shape)):
        with _as_rank(rank, math.prod(mesh_shape)):
            mesh = init_device_mesh("cpu", mesh_shape)
            found.append(sharding_of(_distributed(full, mesh, placements)))
    return found


def _check(full: torch.Tensor, of_ranks: list[Sharding]) -> None:
    """Parts have the values of their places; those who hold the same are named alike, and all of them together cover the whole once."""
    counts = torch.zeros(full.shape, dtype=torch.int64)
    for rank, found in enumerate(of_ranks):
        assert tuple(full.shape) == found.shape
        assert rank in found.holders
        assert all(of_ranks[holder].holders == found.holders for holder in found.holders)
        places = [(part.starts, part.sizes) for part in found.parts]
        assert all([(part.starts, part.sizes) for part in of_ranks[holder].parts] == places for holder in found.holders)
        for part in found.parts:
            at = tuple(slice(start, start + size) for start, size in zip(part.starts, part.sizes, strict=True))
            assert torch.equal(full[at], part.tensor)
            if rank == found.holders[0]:
                counts[at] += 1
    assert bool((counts == 1).all())


@st.composite
def _worlds(draw: Any) -> tuple[tuple[int, ...], list[Any], tuple[int, ...]]:
    mesh = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    shape = tuple(draw(st.lists(st.integers(0, 7), min_size=1, max_size=3)))
    dims = [draw(st.none() | st.integers(0, len(shape) - 1)) for _ in mesh]
    return mesh, [Replicate() if dim is None else Shard(dim) for dim in dims], shape


@given(_worlds())
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_shards_and_replicas(world):
    mesh, placements, shape = world
    full = torch.arange(math.prod(shape)).reshape(shape)
    _check(full, _of_all(mesh, placements, full))


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8, 13, 24])
@pytest.mark.parametrize(
    ("mesh", "placements"),
    [
        ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
        ((3, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
        ((2, 2, 2), [Replicate(), _StridedShard(0, split_factor=2), Shard(0)]),
        ((2, 2, 2), [_StridedShard(0, split_factor=2), Replicate(), Shard(0)]),
        ((2, 2, 2), [_StridedShard(0, split_factor=4), _StridedShard(0, split_factor=2), Shard(0)]),
        ((2, 3, 2), [_StridedShard(0, split_factor=3), Shard(0), Shard(0)]),
        ((2, 2), [_StridedShard(-2, split_factor=2), Shard(0)]),
        ((2, 3), [Shard(0), Shard(1)]),
        ((4,), [Shard(-1)]),
    ],
    ids=str,
)
def test_shards_of_shards(mesh, placements, length):
    full = torch.arange(length * 5).reshape(length, 5)
    of_ranks = []
    for rank in range(math.prod(mesh)):
        with _as_rank(rank, math.prod(mesh)):
            value = _laid_out(full, init_device_mesh("cpu", mesh), placements)
            if [getattr(one, "split_factor", 0) for one in value.placements] != [getattr(one, "split_factor", 0) for one in placements]:
                pytest.skip("this torch forgets the strides of shards along dimensions that are counted from the end")
            of_ranks.append(sharding_of(value))
    _check(full, of_ranks)


def _laid_out(full: torch.Tensor, mesh: Any, placements: list[Any]) -> DTensor:
    """A DTensor as FSDP2 makes it on top of tensor parallelism: cut by the inner dimensions of the mesh first, then by the outer ones."""
    local = full
    made = 1
    left = list(enumerate(placements))
    while left:
        # The first that is due, of those that may be cut now.
        number, placement = next((number, one) for number, one in left if getattr(one, "split_factor", 1) <= made)
        left.remove((number, placement))
        if (dim := getattr(placement, "dim", None)) is not None:
            chunks = list(torch.chunk(local, mesh.size(number), dim=dim))
            empty = local.narrow(dim, 0, 0)
            local = [*chunks, *[empty] * mesh.size(number)][mesh.get_coordinate()[number]]
            made *= mesh.size(number)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())


def test_runs_that_touch_are_one():
    assert [(0, 6, 0)] == _runs(12, ((0, 2, 0),))
    assert [(0, 12, 0)] == _runs(12, ((3, 1, 0),))
    assert [] == _runs(2, ((0, 4, 3),))


def test_a_stride_that_no_dimension_of_the_mesh_makes():
    assert [(0, 2, 0), (6, 2, 2)] == _runs(12, ((2, 3, 0),))
    assert [(2, 1, 0), (5, 1, 1)] == _runs(6, ((2, 3, 2),))


def test_a_rank_outside_of_the_mesh_holds_nothing():
    with _as_rank(3, 4):
        mesh = dist.device_mesh.DeviceMesh("cpu", [0, 1])
        value = DTensor.from_local(torch.empty(0, 3), mesh, [Shard(0)], run_check=False, shape=torch.Size((4, 3)), stride=(3, 1))
        assert Sharding((4, 3), (), (), (2,), torch.device("cpu")) == sharding_of(value)


def test_a_mesh_that_is_not_in_the_order_of_the_ranks():
    full = torch.arange(8)
    for rank, at in itertools.product(range(2), (0,)):
        with _as_rank(rank, 2):
            mesh = dist.device_mesh.DeviceMesh("cpu", [1, 0])
            found = sharding_of(_distributed(full, mesh, [Shard(0)]))
        (part,) = found.parts
        assert (at + 4 * (1 - rank),) == part.starts
        assert (rank,) == found.holders


def test_partial_sums_are_refused():
    with _as_rank(0, 2):
        value = DTensor.from_local(torch.ones(3), init_device_mesh("cpu", (2,)), [Partial()], run_check=False)
        with pytest.raises(UnsupportedValueError, match="partial sums"):
            sharding_of(value)


def test_a_shard_of_another_size_than_its_placements_say_is_refused():
    with _as_rank(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        value = DTensor.from_local(torch.ones(5), mesh, [Shard(0)], run_check=False, shape=torch.Size((6,)), stride=(1,))
        with pytest.raises(UnsupportedValueError, match=r"shard has shape \(5,\) on this rank, and \(3,\)"):
            sharding_of(value)
