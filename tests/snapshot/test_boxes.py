"""Manifests of several boxes, as the ranks of a sharded take would leave them, are read as one tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.format import manifest as manifests
from tests.state.conftest import assert_same

from .boxes import write_boxes

GLOBAL = torch.arange(5 * 6, dtype=torch.float32).view(5, 6)
SHARDS = {
    "row-wise": [((0, 0), (2, 6)), ((2, 0), (3, 6))],
    "column-wise": [((0, 0), (5, 4)), ((0, 4), (5, 2))],
    "in a grid": [((0, 0), (2, 4)), ((0, 4), (2, 2)), ((2, 0), (3, 1)), ((2, 1), (3, 5))],
    "out of order, one empty": [((3, 0), (2, 6)), ((0, 0), (3, 6)), ((5, 0), (0, 6))],
}


@pytest.mark.parametrize("shards", SHARDS.values(), ids=SHARDS)
def test_boxes_make_one_tensor(place: Path, shards: list[Any]) -> None:
    """A manifest of several boxes, as several ranks would write it, is read as the whole tensor, its rows, and into place."""
    write_boxes(place, "state/w", GLOBAL, shards)
    snapshot = Snapshot(place)
    live, strided = StateDict(w=torch.zeros(5, 6)), StateDict(w=torch.zeros(6, 5).t())
    places = live["w"].data_ptr(), strided["w"].data_ptr()
    snapshot.restore({"state": live})
    snapshot.restore({"state": strided})

    assert torch.equal(GLOBAL, snapshot.read_object("state/w"))
    assert torch.equal(GLOBAL[1:4], snapshot.read_object("state/w", rows=slice(1, 4)))
    assert torch.equal(GLOBAL, snapshot.get_state_dict_for_key("state")["w"])
    assert torch.equal(GLOBAL, live["w"])
    assert torch.equal(GLOBAL, strided["w"])
    assert places == (live["w"].data_ptr(), strided["w"].data_ptr())
    assert snapshot.verify().ok


@pytest.mark.parametrize("shards", SHARDS.values(), ids=SHARDS)
def test_boxes_are_cast_and_read_atomically(place: Path, shards: list[Any]) -> None:
    """Boxes into a tensor of another dtype, and by way of shadows."""
    write_boxes(place, "state/w", GLOBAL, shards)
    live = StateDict(w=torch.zeros(5, 6, dtype=torch.float64))
    report = Snapshot(place).restore({"state": live}, cast=True, atomic=True)

    assert torch.equal(GLOBAL.double(), live["w"])
    assert ("state/w",) == report.cast


@pytest.mark.parametrize("dtype", ["<f8", ">i4", "<U3"])
def test_boxes_of_arrays_make_one_array(place: Path, dtype: str) -> None:
    """NumPy arrays in boxes, by rows and by columns, of dtypes that torch has and has not."""
    array = np.arange(30).reshape(5, 6).astype(dtype)
    write_boxes(place, "state/w", array, SHARDS["in a grid"])
    snapshot = Snapshot(place)
    live = StateDict(w=np.zeros((5, 6), dtype))
    kept = live["w"]
    snapshot.restore({"state": live})

    assert_same(array, snapshot.read_object("state/w"))
    assert_same(array[1:4], snapshot.read_object("state/w", rows=slice(1, 4)))
    assert_same(array, kept)
    assert kept is live["w"]


def test_boxes_larger_than_a_block(place: Path) -> None:
    """Columns of several blocks each: every row of them goes to its place."""
    large = torch.randn(1500, 700)
    write_boxes(place, "state/w", large, [((0, 0), (1500, 300)), ((0, 300), (1500, 400))])
    snapshot = Snapshot(place)

    assert torch.equal(large, snapshot.read_object("state/w", memory_budget_bytes=2 * 1024 * 1024))
    assert torch.equal(large[700:1300], snapshot.read_object("state/w", rows=slice(700, 1300)))


def test_a_format_beyond_ours_is_not_read(place: Path) -> None:
    """The hand-made manifest is refused when it says that it is of a newer format."""
    write_boxes(place, "state/w", GLOBAL, SHARDS["row-wise"], format=manifests.FORMAT + 1)
    with pytest.raises(ValueError, match="upgrade expstate"):
        Snapshot(place).keys()
