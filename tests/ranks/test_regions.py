"""Any box of a tensor is read from any other boxes that it was stored in: the same values, and few bytes more than they have."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from expstate import Snapshot
from expstate.engine.fetch import read_all
from expstate.engine.read import Read, windows
from expstate.engine.source import region
from expstate.format.manifest import BLOCK_BYTES, TensorEntry
from expstate.state.tensors import DTYPES, copy_part_in, rectangles
from tests.snapshot.boxes import Shard, write_boxes

MIB = 1024**2
Box = tuple[tuple[int, ...], tuple[int, ...]]


def _tiling(shape: Sequence[int], cuts: Sequence[Sequence[int]]) -> list[Shard]:
    """Boxes that cut each dimension at these places."""
    spans = []
    for length, places in zip(shape, cuts, strict=True):
        ends = sorted({0, length, *(place for place in places if 0 < place < length)})
        spans.append([(start, stop - start) for start, stop in itertools.pairwise(ends)])
    return [(tuple(start for start, _ in box), tuple(size for _, size in box)) for box in itertools.product(*spans)]


def _values(shape: Sequence[int], dtype: torch.dtype = torch.int16) -> torch.Tensor:
    """Bytes without a pattern that a shift could repeat."""
    raw = torch.arange(math.prod(shape) * dtype.itemsize, dtype=torch.int64)
    return ((raw * 2654435761) >> 7).to(torch.uint8).view(dtype).reshape(tuple(shape)) if raw.numel() else torch.empty(shape, dtype=dtype)


def _region_reads(folder: Path, box: Box, target: torch.Tensor, dtype: torch.dtype | None = None, budget: int = 64 * MIB) -> list[Read]:
    """Read a box of ``s/x`` into a tensor; what was read."""
    source = Snapshot(folder)._source
    entry = source.by_path["s/x"]
    assert isinstance(entry, TensorEntry)
    with source.opened(source.files_of([entry])) as opened:
        reads = list(opened.region_reads(entry, box[0], target, dtype))
        read_all(opened, reads, budget, verify=True)
    return reads


def _check_no_block_twice(reads: list[Read]) -> None:
    spans = sorted((read.file, read.offset, read.offset + read.nbytes) for read in reads)
    assert all(one[0] != other[0] or one[2] <= other[1] for one, other in itertools.pairwise(spans))


@st.composite
def _cases(draw: Any, lengths: st.SearchStrategy[int], most: int) -> tuple[tuple[int, ...], list[Shard], Box]:
    shape = tuple(draw(st.lists(lengths, min_size=1, max_size=4)))
    while math.prod(shape) > most:
        shape = shape[:-1]
    cuts = [draw(st.lists(st.integers(1, max(1, length)), max_size=2)) for length in shape]
    starts = tuple(draw(st.integers(0, length - 1)) for length in shape)
    sizes = tuple(draw(st.integers(1, length - start)) for length, start in zip(shape, starts, strict=True))
    return shape, _tiling(shape, cuts), (starts, sizes)


def _check_read(shape: tuple[int, ...], shards: list[Shard], box: Box, dtype: torch.dtype, budget: int, *, strided: bool) -> None:
    full = _values(shape, dtype)
    target = _values(box[1], dtype).clone()
    if strided:
        target = target.repeat_interleave(2, -1)[..., ::2]
    with tempfile.TemporaryDirectory() as folder:
        write_boxes(Path(folder) / "a", "s/x", full, shards)
        reads = _region_reads(Path(folder) / "a", box, target, budget=budget)
    assert torch.equal(region(full, *box), target)
    _check_no_block_twice(reads)


@given(_cases(st.integers(1, 9), 3000), st.booleans())
@settings(max_examples=60)
def test_small_boxes(case, strided):
    _check_read(*case, torch.int32, 64 * MIB, strided=strided)


@given(
    case=_cases(st.sampled_from([1, 2, 3, 30, 999, 20_000, 1_500_000]), 5_000_000),
    budget=st.sampled_from([2 * MIB, 3 * MIB, 64 * MIB]),
    strided=st.booleans(),
)
@example(case=((3, 1_500_000), [((0, 0), (3, 1_500_000))], ((0, 1_400_000), (3, 7))), budget=2 * MIB, strided=False)
@example(case=((999, 2, 999), [((0, 0, 0), (999, 2, 999))], ((1, 1, 1), (998, 1, 500))), budget=2 * MIB, strided=True)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_boxes_of_many_blocks_within_small_budgets(case, budget, strided):
    _check_read(*case, torch.int8, budget, strided=strided)


@pytest.mark.parametrize("name", sorted(DTYPES))
@pytest.mark.parametrize("cut", [0, 100_000], ids=["within-a-box", "over-boxes"])
def test_every_dtype(name, cut, tmp_path):
    dtype = DTYPES[name]
    raw = _values((3, 400_000), torch.uint8)
    full = (raw % 2 if dtype is torch.bool else raw).view(dtype)
    columns = full.shape[1]
    write_boxes(tmp_path / "a", "s/x", full, _tiling(full.shape, [[], [cut // dtype.itemsize]]))
    target = torch.zeros(2, 400_000 // 2, dtype=torch.uint8).view(dtype)
    _region_reads(tmp_path / "a", ((1, columns // 8), (2, columns // 2)), target)
    expected = full.view(torch.uint8)[1:, 400_000 // 8 : 400_000 // 8 + 400_000 // 2]
    assert torch.equal(expected, target.view(torch.uint8))


@pytest.mark.parametrize(
    ("stored", "live"),
    [(torch.float32, torch.bfloat16), (torch.float16, torch.float64), (torch.int16, torch.float32), (torch.float64, torch.complex64)],
    ids=str,
)
@pytest.mark.parametrize("budget", [2 * MIB, 64 * MIB])
def test_values_are_converted(stored, live, budget, tmp_path):
    full = torch.arange(700 * 900).remainder(251).to(stored).reshape(700, 900)
    write_boxes(tmp_path / "a", "s/x", full, _tiling(full.shape, [[300], [450]]))
    box = (100, 200), (500, 600)
    target = torch.zeros(box[1], dtype=live)
    _region_reads(tmp_path / "a", box, target, full.dtype, budget)
    assert torch.equal(region(full, *box).to(live), target)


def test_a_conjugated_target_has_the_values(tmp_path):
    full = torch.complex(torch.arange(12.0), torch.arange(12.0) + 100).reshape(3, 4)
    write_boxes(tmp_path / "a", "s/x", full, _tiling(full.shape, [[], [3]]))
    target = torch.zeros(2, 4, dtype=torch.complex64).conj()
    _region_reads(tmp_path / "a", ((1, 0), (2, 4)), target)
    assert torch.equal(full[1:], target.resolve_conj())


@pytest.mark.parametrize(("ranks", "others"), [(2, 1), (1, 2), (3, 2), (2, 3), (4, 4), (5, 3)])
def test_rows_cut_otherwise_cost_two_blocks_at_most(ranks, others, tmp_path):
    """Shards along the first dimension, read by another number of ranks: what is needed, and whole blocks at the ends."""
    rows, columns = 1000, 5001
    full = _values((rows, columns))
    write_boxes(tmp_path / "a", "s/x", full, _tiling(full.shape, [[rows * number // ranks for number in range(1, ranks)], []]))
    for number in range(others):
        first, last = rows * number // others, rows * (number + 1) // others
        target = torch.zeros(last - first, columns, dtype=torch.int16)
        reads = _region_reads(tmp_path / "a", ((first, 0), (last - first, columns)), target)
        assert torch.equal(full[first:last], target)
        _check_no_block_twice(reads)
        assert sum(read.nbytes for read in reads) <= target.nbytes + 2 * BLOCK_BYTES


def test_columns_that_lie_far_apart_are_read_alone(tmp_path):
    full = _values((4, 2_000_000))
    write_boxes(tmp_path / "a", "s/x", full, [((0, 0), (4, 2_000_000))])
    target = torch.zeros(4, 10, dtype=torch.int16)
    reads = _region_reads(tmp_path / "a", ((0, 1_000_000), (4, 10)), target)
    assert torch.equal(full[:, 1_000_000:1_000_010], target)
    assert 4 * BLOCK_BYTES == sum(read.nbytes for read in reads)


def test_reads_of_all_shards_of_one_rank_are_joined(tmp_path):
    """Strided shards of one box: parts that lie in the same blocks are read from the storage by one window."""
    full = _values((64, 1000))
    write_boxes(tmp_path / "a", "s/x", full, [((0, 0), (64, 1000))])
    source = Snapshot(tmp_path / "a")._source
    entry = source.by_path["s/x"]
    targets = [torch.zeros(4, 1000, dtype=torch.int16) for _ in range(8)]
    with source.opened() as opened:
        reads = [read for number, target in enumerate(targets) for read in opened.region_reads(entry, (8 * number, 0), target)]
        assert 1 == len(windows(reads, 16 * MIB))
        read_all(opened, reads, 64 * MIB, verify=True)
    assert all(torch.equal(full[8 * number : 8 * number + 4], target) for number, target in enumerate(targets))


@given(st.lists(st.integers(1, 6), max_size=4), st.data())
def test_rectangles_are_the_elements_in_order(sizes, data):
    total = math.prod(sizes)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    numbers = torch.arange(total).reshape(sizes)
    found = []
    for starts, counts, first in rectangles(tuple(sizes), start, stop):
        elements = region(numbers, starts, counts).reshape(-1).tolist()
        assert elements[0] == first
        found += elements
    assert list(range(start, stop)) == found


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_any_bytes_of_a_box_go_to_the_part_that_holds_them(sizes, data):
    box = torch.arange(math.prod(sizes), dtype=torch.int16).reshape(sizes)
    starts = tuple(data.draw(st.integers(0, size - 1)) for size in sizes)
    counts = tuple(data.draw(st.integers(1, size - start)) for size, start in zip(sizes, starts, strict=True))
    ends = sorted({0, box.numel(), *data.draw(st.lists(st.integers(0, box.numel()), max_size=4))})
    part = torch.full(counts, -1, dtype=torch.int16)
    for start, stop in itertools.pairwise(ends):
        copy_part_in(part, tuple(sizes), starts, 2 * start, 2 * stop, box.data_ptr() + 2 * start)
    assert torch.equal(region(box, starts, counts), part)
