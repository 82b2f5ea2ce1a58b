"""What several ranks hold alike is written once, each rank its part of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expstate.engine.share import _LEAST_CUT_BYTES, Holdings, Piece, _shares
from expstate.state import sharding, tree

MIB = 1024**2

boxes = st.lists(st.tuples(st.integers(1, 200), st.integers(0, 1000)), max_size=20)


def _array(path: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tree.Array:
    # On the meta device: what is shared is sizes, and a world of terabytes fits a test.
    return tree.Array(path, "tensor", str(dtype).removeprefix("torch."), shape, torch.empty(shape, dtype=dtype, device="meta"), None)


def _pieces_of_all(leaves: list[tree.Array], size: int) -> list[dict[str, list[Piece]]]:
    holdings = Holdings()
    for leaf in leaves:
        holdings.add(leaf, range(size))
    return [holdings.pieces(rank) for rank in range(size)]


def _written(pieces: dict[str, list[Piece]]) -> int:
    return sum(piece.tensor.nbytes for found in pieces.values() for piece in found)


def _rows_of(path: str, of_ranks: list[dict[str, list[Piece]]], rows: int) -> list[int]:
    """How many ranks write each row of an entry."""
    counts = [0] * rows
    for pieces in of_ranks:
        for piece in pieces.get(path, ()):
            first = 0 if piece.starts is None else piece.starts[0]
            for row in range(first, first + piece.tensor.shape[0]):
                counts[row] += 1
    return counts


@given(boxes, st.integers(1, 40))
def test_each_row_is_one_rank_s(lines, ranks):
    of_ranks = [_shares(lines, ranks, rank) for rank in range(ranks)]
    for number, (rows, _) in enumerate(lines):
        spans = sorted(shares[number] for shares in of_ranks if shares[number][0] < shares[number][1])
        assert [0, *(last for _, last in spans)] == [*(first for first, _ in spans), rows]


@given(boxes, st.integers(1, 40))
def test_no_rank_writes_more_than_its_part_and_a_row_at_each_end(lines, ranks):
    total = sum(rows * row_bytes for rows, row_bytes in lines)
    longest = max((row_bytes for _, row_bytes in lines), default=0)
    for rank in range(ranks):
        own = sum((last - first) * row_bytes for (first, last), (_, row_bytes) in zip(_shares(lines, ranks, rank), lines, strict=True))
        assert abs(own - total / ranks) <= longest + 1


@given(st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=12), st.sampled_from([2, 3, 4]))
@settings(max_examples=30)
def test_pieces_cover_every_entry_once(shapes, size):
    leaves = [_array(f"s/{number}", shape) for number, shape in enumerate(shapes)]
    of_ranks = _pieces_of_all(leaves, size)
    for leaf in leaves:
        assert {1} == set(_rows_of(leaf.path, of_ranks, leaf.shape[0]))


def test_a_small_entry_is_one_rank_s_as_a_whole():
    small = _array("s/small", (_LEAST_CUT_BYTES // 4 - 1,))
    of_ranks = _pieces_of_all([_array("s/large", (1000, 10_000)), small], 3)
    (piece,) = [piece for pieces in of_ranks for piece in pieces.get("s/small", ())]
    assert piece.starts is None


@pytest.mark.parametrize(
    "shapes",
    [
        [(32_000, 4096), *[(4096, 4096), (4096,), (11_008, 4096), (4096, 11_008)] * 8],
        [(1024, 1024)] * 16,
        [(256, 1024)] * 40,  # none of these is cut
        [(50_000_000,)],
        [(3, 5, 7, 200_000)],
    ],
    ids=["model", "matrices", "small", "one", "few-rows"],
)
def test_two_ranks_write_half_each(shapes):
    leaves = [_array(f"s/{number}", shape) for number, shape in enumerate(shapes)]
    one, other = map(_written, _pieces_of_all(leaves, 2))
    assert sum(leaf.tensor.nbytes for leaf in leaves) == one + other
    if shapes != [(3, 5, 7, 200_000)]:  # whose three rows are one and two
        assert 0.45 <= one / (one + other) <= 0.55


@pytest.mark.parametrize("size", [16, 256, 1024])
def test_large_worlds_share_evenly(size):
    leaves = [_array(f"s/{number}", shape, torch.bfloat16) for number, shape in enumerate([(8192, 8192), (28_672, 8192), (8192,)] * 30)]
    of_ranks = _pieces_of_all(leaves, size)
    total = sum(leaf.tensor.nbytes for leaf in leaves)
    written = [_written(pieces) for pieces in of_ranks]
    assert total == sum(written)
    assert max(written) <= 1.05 * total / size
    for leaf in leaves[:3]:
        assert {1} == set(_rows_of(leaf.path, of_ranks, leaf.shape[0]))


def test_an_entry_without_elements_is_written_by_the_first_holder_alone():
    of_ranks = _pieces_of_all([_array("s/empty", (0, 5)), _array("s/large", (1000, 10_000))], 4)
    assert [True, False, False, False] == ["s/empty" in pieces for pieces in of_ranks]


def test_a_number_is_written_once():
    of_ranks = _pieces_of_all([_array("s/number", ())], 4)
    assert 1 == sum("s/number" in pieces for pieces in of_ranks)


def test_shards_are_shared_among_those_who_hold_the_same():
    """A mesh of 2 x 2, cut along its second dimension: ranks 0 and 2 have the first half, 1 and 3 the second."""
    whole = (4096, 1024)
    of_ranks = []
    for rank in range(4):
        start = 2048 * (rank % 2)
        part = sharding.Part((start, 0), (2048, 1024), torch.empty(2048, 1024, device="meta"))
        holdings = Holdings()
        holdings.add(tree.Sharded("s/x", "tensor", "float32", whole, (part,), (), None), (rank % 2, rank % 2 + 2))
        of_ranks.append(holdings.pieces(rank))
    assert {1} == set(_rows_of("s/x", of_ranks, 4096))
    assert [math.prod(whole)] * 4 == [_written(pieces) for pieces in of_ranks]


def test_what_lies_on_parts_of_a_mesh_is_cut_alike_on_each():
    """Ranks 0 and 2 of one part and 1 and 3 of the other know nothing of each other, and other tensors of theirs differ."""
    cuts = []
    for part in range(2):
        holdings = Holdings()
        holders = (part, part + 2)
        of_the_whole_mesh = sharding.Part((0,), (1_000_000 * (1 + part),), torch.empty(1_000_000 * (1 + part), device="meta"))
        of_a_part = sharding.Part((0,), (3_000_000,), torch.empty(3_000_000, device="meta"))
        holdings.add(tree.Sharded("s/a", "tensor", "float32", (3_000_000,), (of_the_whole_mesh,), (), None, mesh=(2, 2)), holders)
        holdings.add(tree.Sharded("s/b", "tensor", "float32", (3_000_000,), (of_a_part,), (), None, mesh=(2,)), holders)
        cuts.append([[(piece.starts, piece.tensor.shape) for piece in holdings.pieces(rank)["s/b"]] for rank in holders])
    assert cuts[0] == cuts[1]


def test_who_holds_nothing_writes_nothing():
    holdings = Holdings()
    holdings.add(_array("s/x", (100,)), (1, 2))
    assert {} == holdings.pieces(0)
