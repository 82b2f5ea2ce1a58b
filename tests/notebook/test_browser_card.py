"""The card of a tensor: what it says is what torch says, whatever the dtype, and it is read in slices."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.errors import InvalidArgumentError
from expstate.notebook.browser import card as cards
from expstate.notebook.browser.card import BINS, card


def card_of(folder: Path, value: Any, told: Any = None) -> dict[str, Any]:
    snapshot = Snapshot.take(folder / "one", {"values": StateDict(it=value)}, catalog=False)
    return card(snapshot, snapshot.manifest.entries[-1], told)


def test_moments_and_counts_are_those_of_torch(tmp_path: Path):
    value = torch.randn(300, 50)
    value[0, :7] = 0
    found = card_of(tmp_path, value)
    stats = dict(found["stats"])
    for name, expected in (("mean", value.mean()), ("std", value.std(correction=0)), ("min", value.min()), ("max", value.max())):
        assert math.isclose(float(stats[name]), float(expected), rel_tol=0.01)
    assert ("7", "0") == (stats["zeros"], stats["NaN"])
    assert "300\N{MULTIPLICATION SIGN}50 float32" == found["form"]


def test_the_histogram_counts_every_finite_value(tmp_path: Path):
    value = torch.cat([torch.linspace(-1, 1, 480, dtype=torch.float64), torch.tensor([math.nan, math.inf], dtype=torch.float64)])
    found = card_of(tmp_path, value)
    assert (BINS, 480) == (len(found["bins"]), sum(found["bins"]))
    assert max(found["bins"]) - min(found["bins"]) <= 2
    assert ("1", "1") == (dict(found["stats"])["NaN"], dict(found["stats"])["inf"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64, torch.uint8, torch.bool])
def test_any_dtype_of_numbers_has_a_card(tmp_path: Path, dtype: torch.dtype):
    found = card_of(tmp_path, torch.tensor([0, 1, 1, 0, 1]).to(dtype))
    assert {"mean": "0.6", "zeros": "2", "min": "0", "max": "1"}.items() <= dict(found["stats"]).items()


def test_complex_values_are_shown_by_their_size(tmp_path: Path):
    found = card_of(tmp_path, torch.tensor([3 + 4j, 0j]))
    assert ("2.5", "of the absolute values") == (dict(found["stats"])["mean"], found["note"])


def test_arrays_of_numpy_have_a_card_and_texts_say_that_they_have_none(tmp_path: Path):
    assert "2" == dict(card_of(tmp_path, np.array([1.0, 3.0]))["stats"])["mean"]
    assert "no numbers" in card_of(tmp_path / "texts", np.array(["a", "b"]))["note"]


@pytest.mark.parametrize("value", [torch.tensor(2.5), torch.full((4,), 2.5)])
def test_a_scalar_and_equal_values_stand_in_one_bar(tmp_path: Path, value: torch.Tensor):
    found = card_of(tmp_path, value)
    assert value.numel() == max(found["bins"])
    assert "2.5" == dict(found["stats"])["mean"]


def test_extreme_values_do_not_overflow_the_bins(tmp_path: Path):
    assert 2 == sum(card_of(tmp_path, torch.tensor([-1.7e308, 1.7e308], dtype=torch.float64))["bins"])


def test_a_tensor_without_elements_says_so(tmp_path: Path):
    assert "no elements" in card_of(tmp_path, torch.zeros(0, 3))["note"]


def test_a_large_tensor_is_read_twice_in_slices_and_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cards, "SLICE_BYTES", 4000)
    monkeypatch.setattr(cards, "KEPT_BYTES", 10_000)
    slices: list[slice] = []
    read = Snapshot.read_object

    def watched(self: Snapshot, path: str, **options: Any) -> Any:
        slices.append(options["rows"])
        return read(self, path, **options)

    monkeypatch.setattr(Snapshot, "read_object", watched)
    told: list[tuple[int, int]] = []
    value = torch.randn(100, 100)
    found = card_of(tmp_path, value, lambda *update: told.append(update))
    assert 20 == len(slices)
    assert all(one.stop - one.start == 10 for one in slices)
    assert (80_000, 80_000) == told[-1]
    assert 10_000 == sum(found["bins"])


def test_what_the_progress_raises_ends_the_reading(tmp_path: Path):
    def stop(*_: int) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        card_of(tmp_path, torch.ones(3), stop)


def test_a_row_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cards, "LONGEST_ROW_BYTES", 100)
    with pytest.raises(InvalidArgumentError, match="one row"):
        card_of(tmp_path, torch.ones(2, 100))
