"""Tensors that are cut into boxes: compared by digests where both sides are cut alike, else by reading them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from expstate import Snapshot, StateDict, settings
from expstate.diff.slabs import cut
from expstate.errors import SnapshotCorruptError
from expstate.settings import MIB
from tests.snapshot.boxes import Shard, write_boxes

from .conftest import Take

GLOBAL = torch.arange(5 * 6, dtype=torch.float32).view(5, 6)
SHARDS: dict[str, list[Shard]] = {
    "whole": [((0, 0), (5, 6))],
    "row-wise": [((0, 0), (2, 6)), ((2, 0), (3, 6))],
    "column-wise": [((0, 0), (5, 4)), ((0, 4), (5, 2))],
    "in a grid": [((0, 0), (2, 4)), ((0, 4), (2, 2)), ((2, 0), (3, 1)), ((2, 1), (3, 5))],
    "out of order, one empty": [((3, 0), (2, 6)), ((0, 0), (3, 6)), ((5, 0), (0, 6))],
}


def sharded(folder: Path, name: str, value: Any, shards: list[Shard]) -> Snapshot:
    write_boxes(folder / name, "state/w", value, shards)
    return Snapshot(folder / name)


@pytest.mark.parametrize("one", SHARDS)
@pytest.mark.parametrize("other", SHARDS)
def test_another_cut_is_told_and_read_only_if_asked_for(tmp_path: Path, one: str, other: str) -> None:
    old = sharded(tmp_path, "old", GLOBAL, SHARDS[one])
    new = sharded(tmp_path, "new", GLOBAL, SHARDS[other])
    row = old.diff(new)["state/w"]

    if one == other:
        assert ("same", ()) == (row.change, row.differs)
    else:
        assert ("changed", ("layout",)) == (row.change, row.differs)
        assert "layout differs" in old.diff(new).summary()
    for read in (old.diff(new, content=True), old.diff(new, stats=True)):
        assert read.is_same
        assert ("layout",) * (one != other) == read["state/w"].differs


@pytest.mark.parametrize("one", SHARDS)
@pytest.mark.parametrize("other", SHARDS)
def test_a_change_is_found_through_any_two_cuts(tmp_path: Path, one: str, other: str) -> None:
    changed = GLOBAL.clone()
    changed[3, 4] += 2
    old, new = sharded(tmp_path, "old", GLOBAL, SHARDS[one]), sharded(tmp_path, "new", changed, SHARDS[other])
    found = old.diff(new, stats=True)["state/w"]

    assert ("content" in old.diff(new, content=True)["state/w"].differs) is True
    assert (2.0, 2.0, 1) == (found.statistics.l2, found.statistics.max_abs, found.statistics.changed_elements)


@pytest.mark.parametrize("dtype", ["<f8", ">i4", "<U3"])
def test_boxes_of_arrays(tmp_path: Path, dtype: str) -> None:
    """Dtypes that torch has not are compared as bytes."""
    array = np.arange(30).reshape(5, 6).astype(dtype)
    changed = array.copy()
    changed[4, 5] = 0
    old = sharded(tmp_path, "old", array, SHARDS["in a grid"])

    assert old.diff(sharded(tmp_path, "same", array, SHARDS["column-wise"]), content=True).is_same
    assert ("layout", "content") == old.diff(sharded(tmp_path, "new", changed, SHARDS["row-wise"]), content=True)["state/w"].differs


@pytest.mark.parametrize("budget", [2 * MIB, None])
def test_cuts_larger_than_blocks_and_buffers(tmp_path: Path, budget: int | None) -> None:
    large = torch.randn(1500, 700)
    changed = large.clone()
    changed[1499, 699] += 1
    columns: list[Shard] = [((0, 0), (1500, 300)), ((0, 300), (1500, 400))]
    rows: list[Shard] = [((0, 0), (1001, 700)), ((1001, 0), (499, 700))]
    old, new = sharded(tmp_path, "old", large, columns), sharded(tmp_path, "new", changed, rows)

    assert old.diff(sharded(tmp_path, "same", large, rows), content=True, memory_budget_bytes=budget).is_same
    assert 1 == old.diff(new, stats=True, memory_budget_bytes=budget)["state/w"].statistics.changed_elements


def test_a_tensor_of_one_row_that_no_buffer_holds(tmp_path: Path) -> None:
    wide = torch.randn(1, 2, 400_000)
    halves: list[Shard] = [((0, 0, 0), (1, 2, 150_000)), ((0, 0, 150_000), (1, 2, 250_000))]
    old = sharded(tmp_path, "old", wide, halves)
    new = sharded(tmp_path, "new", wide, [((0, 0, 0), (1, 1, 400_000)), ((0, 1, 0), (1, 1, 400_000))])

    assert old.diff(new, content=True, memory_budget_bytes=2 * MIB).is_same


def test_the_target_size_of_data_files_makes_no_difference_to_the_content(take: Take) -> None:
    """A large tensor is cut where data files are small; cut alike, its digests tell."""
    value = torch.randn(3000, 300)
    array = np.random.default_rng(0).normal(size=(800, 300))
    with settings.override(data_file_bytes=MIB):
        old, alike = take(w=value, a=array), take(w=value, a=array)
        changed = take(w=value * 2, a=array)
    whole = take(w=value, a=array)

    assert old.diff(alike).is_same
    assert ("content",) == old.diff(changed)["state/w"].differs
    assert ("state/w", "state/a") == old.diff(whole).changed
    assert old.diff(whole, content=True).is_same
    assert pytest.approx(1.0) == whole.diff(changed, stats=True)["state/w"].statistics.relative
    assert pytest.approx(1.0) == old.diff(changed, stats=True, memory_budget_bytes=2 * MIB)["state/w"].statistics.relative


def test_live_state_is_digested_in_the_snapshots_boxes(tmp_path: Path, take: Take) -> None:
    """So its layout never differs; contiguous or not, tensor or array."""
    values = {"w": torch.randn(3000, 300), "t": torch.randn(300, 3000).t(), "a": np.random.default_rng(0).normal(size=(800, 300))}
    with settings.override(data_file_bytes=MIB):
        cut_up = take(**values)
    assert cut_up.diff({"state": StateDict(values)}).is_same
    values["t"][2999, 299] += 1
    found = cut_up.diff({"state": StateDict(values)}, stats=True)

    assert ("state/t",) == found.changed
    assert 1 == found["state/t"].statistics.changed_elements
    for name, shards in SHARDS.items():
        for live in (GLOBAL, GLOBAL.t().contiguous().t()):
            assert sharded(tmp_path, f"{name}{live.is_contiguous()}", GLOBAL, shards).diff({"state": StateDict(w=live)}).is_same


@pytest.mark.parametrize("dtype", ["<f8", ">i4", "<U3", "|u1"])
def test_live_arrays_are_digested_in_the_snapshots_boxes(tmp_path: Path, dtype: str) -> None:
    array = np.arange(30).reshape(5, 6).astype(dtype)
    snapshot = sharded(tmp_path, "old", array, SHARDS["in a grid"])

    for live in (array, np.asfortranarray(array), np.repeat(array, 2, axis=0)[::2]):
        assert snapshot.diff({"state": StateDict(w=live)}).is_same
    array[4, 5] = 0
    assert ("content",) == snapshot.diff({"state": StateDict(w=array)})["state/w"].differs


def test_damage_in_another_cut_is_noticed(tmp_path: Path) -> None:
    old, new = sharded(tmp_path, "old", GLOBAL, SHARDS["row-wise"]), sharded(tmp_path, "new", GLOBAL, SHARDS["column-wise"])
    path = min((tmp_path / "new").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    with pytest.raises(SnapshotCorruptError, match="entry 'state/w' is damaged"):
        old.diff(new, content=True)


@given(grid=st.lists(st.integers(1, 7), min_size=1, max_size=4), most=st.integers(1, 60))
@hypothesis_settings(max_examples=60)
def test_slabs_are_the_whole_in_order(grid: list[int], most: int) -> None:
    slabs = list(cut(tuple(grid), most))
    position = 0
    for slab in slabs:
        count = int(np.prod(slab.sizes))
        assert 0 < count <= most
        assert position == slab.first
        position += count

    assert int(np.prod(grid)) == position
