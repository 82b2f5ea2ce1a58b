"""How far changed tensors are apart: against a reference in double precision, and at the edges of every dtype."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expstate.diff.stats import CHUNK, Scratch, Statistics, Sums, torch_dtype

from .conftest import Take

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64, torch.bool]
COMPLEX = [torch.complex64, torch.complex128]


def measured(old: torch.Tensor, new: torch.Tensor) -> Statistics:
    sums = Sums(old.dtype, new.dtype)
    sums.add(old.reshape(-1), new.reshape(-1), Scratch())
    return sums.statistics()


def reference(old: torch.Tensor, new: torch.Tensor) -> dict[str, float]:
    """The same over everything at once, in double precision."""
    dtype = torch.complex128 if old.is_complex() or new.is_complex() else torch.float64
    one, other = old.to(dtype).reshape(-1), new.to(dtype).reshape(-1)
    finite = torch.isfinite(one) & torch.isfinite(other)
    one, other = one[finite], other[finite]
    apart = other - one
    norms = [float(torch.linalg.vector_norm(side)) for side in (apart, one, other)]
    product = float((one.conj() * other).real.sum())
    return {
        "l2": norms[0] if len(one) else math.nan,
        "relative": norms[0] / norms[1] if norms[1] else (math.inf if norms[0] else 0.0) if len(one) else math.nan,
        "max_abs": float(apart.abs().max()) if len(one) else math.nan,
        "cosine": product / norms[1] / norms[2] if norms[1] and norms[2] else math.nan,
    }


def is_close(expected: float, found: float, tolerance: float = 1e-6) -> bool:
    if math.isnan(expected) or math.isinf(expected):
        return expected == found or (math.isnan(expected) and math.isnan(found))
    return abs(expected - found) <= tolerance * abs(expected) + 1e-300


def filled(dtype: torch.dtype, count: int, seed: int, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.rand(count, generator=generator) < 0.5
    if not dtype.is_floating_point and not dtype.is_complex:
        raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        return raw.view(dtype)
    values = torch.randn(2 * count, generator=generator, dtype=torch.float64) * scale
    return torch.view_as_complex(values.view(-1, 2)).to(dtype) if dtype.is_complex else values[:count].to(dtype)


@given(
    dtype=st.sampled_from([*FLOATS, *COMPLEX, torch.int8, torch.uint16, torch.int32, torch.uint32, torch.bool]),
    count=st.sampled_from([1, 2, 7, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    nearness=st.sampled_from([0.0, 1e-4, 1.0]),
    odd=st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 0.0]), max_size=3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_statistics_are_those_of_double_precision(
    dtype: torch.dtype, count: int, scale: float, nearness: float, odd: list[float], seed: int
) -> None:
    old = filled(dtype, count, seed, scale)
    new = filled(dtype, count, seed + 1, scale)
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        new = (old.to(wide) + nearness * new.to(wide)).to(dtype)
        for number, value in enumerate(odd):
            (old, new)[number % 2].view(-1)[(seed * number) % count] = torch.tensor(value).to(dtype)  # some types have no infinity
    found, expected = measured(old, new), reference(old, new)

    assert count == found.elements
    assert is_close(expected["l2"], found.l2)
    assert is_close(expected["relative"], found.relative)
    assert is_close(expected["max_abs"], found.max_abs)
    assert is_close(expected["cosine"], found.cosine) or abs(expected["cosine"] - found.cosine) < 1e-6
    wide = torch.complex128 if dtype.is_complex else torch.float64
    assert [int(torch.isnan(side.to(wide)).sum()) for side in (old, new)] == [found.nan_old, found.nan_new]
    assert [int((torch.isinf(side.to(wide)) & ~torch.isnan(side.to(wide))).sum()) for side in (old, new)] == [found.inf_old, found.inf_new]
    same_bits = old.view(torch.uint8).view(count, -1) == new.view(torch.uint8).view(count, -1)
    assert int((~same_bits.all(1)).sum()) == found.changed_elements
    assert found.changed_elements / count == found.changed


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-18, 1e18, 1e25, 3e38])
def test_squares_beyond_single_precision_count_in_full(scale: float) -> None:
    """Second moments of optimizers are as small, and what diverges is as large."""
    old = torch.rand(5000) * scale
    new = old * 0.5
    found, expected = measured(old, new), reference(old, new)

    assert is_close(expected["l2"], found.l2)
    assert is_close(expected["relative"], found.relative)
    assert is_close(1.0, found.cosine)


def test_a_chunk_of_zeros_and_one_of_the_smallest_numbers_are_told_apart() -> None:
    old = torch.zeros(2 * CHUNK)
    new = old.clone()
    new[-1] = 1e-40

    assert is_close(float(new[-1]), measured(old, new).l2)
    assert 1 == measured(old, new).changed_elements


@pytest.mark.parametrize(("dtype", "base"), [(torch.int64, 2**62), (torch.uint64, 2**63), (torch.int64, -(2**63))])
def test_integers_that_floats_cannot_tell_apart_are(dtype: torch.dtype, base: int) -> None:
    old = torch.tensor([base, base + 1, base + 7], dtype=dtype)
    new = torch.tensor([base + 1, base + 1, base + 4], dtype=dtype)
    found = measured(old, new)

    assert (3.0, 2) == (found.max_abs, found.changed_elements)
    assert is_close(math.sqrt(10), found.l2)


def test_integers_as_far_apart_as_can_be() -> None:
    found = measured(torch.tensor([-(2**63), 5]), torch.tensor([2**63 - 1, 5]))

    assert is_close(2.0**64, found.max_abs)


def test_nothing_can_be_said_of_what_is_not_finite() -> None:
    found = measured(torch.tensor([math.nan, math.inf]), torch.tensor([1.0, -math.inf]))

    assert (1, 0, 1, 1) == (found.nan_old, found.nan_new, found.inf_old, found.inf_new)
    assert math.isnan(found.l2)
    assert math.isnan(found.relative)
    assert 2 == found.changed_elements


def test_a_nan_that_stays_has_not_changed() -> None:
    found = measured(torch.tensor([math.nan, 1.0]), torch.tensor([math.nan, 2.0]))

    assert (1, 1, 1) == (found.changed_elements, found.nan_old, found.nan_new)
    assert 1.0 == found.l2 == found.max_abs


@pytest.mark.parametrize(
    ("old", "new", "relative", "cosine"),
    [([0.0, 0.0], [0.0, 1.0], math.inf, math.nan), ([1.0], [0.0], 1.0, math.nan), ([0.0], [-0.0], 0.0, math.nan), ([], [], 0.0, math.nan)],
)
def test_norms_of_zero(old: list[float], new: list[float], relative: float, cosine: float) -> None:
    found = measured(torch.tensor(old), torch.tensor(new))

    assert relative == found.relative
    assert math.isnan(cosine) == math.isnan(found.cosine)


def test_a_changed_sign_of_zero_is_a_change() -> None:
    """Digests tell of it too."""
    found = measured(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))

    assert (1, 0.0) == (found.changed_elements, found.l2)


@pytest.mark.parametrize("old", [*FLOATS, *INTEGERS, *COMPLEX])
@pytest.mark.parametrize("new", [torch.bfloat16, torch.float64, torch.int64, torch.complex64])
def test_another_dtype_is_converted(old: torch.dtype, new: torch.dtype) -> None:
    values = torch.tensor([0, 1, 1, 0, 1] * 3)
    found = measured(values.to(old), (values + torch.tensor([0] * 14 + [1])).to(new))

    assert (1.0, 1.0) == (found.l2, found.max_abs)
    if old != new:
        assert 1 == found.changed_elements


def test_values_that_stay_equal_in_another_dtype_have_not_changed() -> None:
    found = measured(torch.tensor([0.5, math.nan, math.inf, -0.0]), torch.tensor([0.5, math.nan, math.inf, 0.0], dtype=torch.bfloat16))

    assert 0 == found.changed_elements


def test_every_dtype_that_is_no_number_is_left_out() -> None:
    assert None is torch_dtype("tensor", "float4_e2m1fn_x2")
    assert None is torch_dtype("tensor", "uint4")
    assert None is torch_dtype("numpy", "<U4")
    assert None is torch_dtype("numpy", ">f4")
    assert torch.float32 is torch_dtype("numpy", "<f4")
    assert torch.complex32 is torch_dtype("tensor", "complex32")


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_halves_of_complex_numbers() -> None:
    old, new = torch.tensor([3 + 4j, 0j]).to(torch.complex32), torch.tensor([0j, 1j]).to(torch.complex32)

    assert is_close(math.sqrt(26), measured(old, new).l2)
    assert 5.0 == measured(old, new).max_abs


def test_chunks_stay_below_what_torch_shares_among_threads() -> None:
    """Its threads would fight with ours."""
    assert CHUNK < 32 * 1024
    assert 0 == CHUNK % 1024


# Through snapshots


@pytest.mark.parametrize("budget", [2 * 2**20, 5 * 2**20, None])
@pytest.mark.parametrize(
    ("old", "new"),
    [(torch.float32, torch.float32), (torch.float64, torch.int8), (torch.complex128, torch.bool), (torch.bfloat16, torch.float32)],
)
def test_tensors_of_many_blocks_within_any_budget(take: Take, budget: int | None, old: torch.dtype, new: torch.dtype) -> None:
    one = (torch.randn(700, 1001) * 3).to(old)
    other = (torch.randn(700, 1001) * 3).to(new)
    expected = reference(one, other)
    found = take(x=one, y=1).diff(take(x=other, y=1), stats=True, memory_budget_bytes=budget)["state/x"].statistics

    assert 700 * 1001 == found.elements
    assert is_close(expected["l2"], found.l2)
    assert is_close(expected["max_abs"], found.max_abs)


def test_many_small_tensors_each_have_their_statistics(take: Take) -> None:
    """They are read many at a time; some lie elsewhere, or are gone, on the other side."""
    old = {f"t{number}": torch.full((number % 7 + 1,), float(number)) for number in range(300)}
    new = {name: tensor + 1 for name, tensor in reversed(old.items()) if name != "t7"} | {"large": torch.zeros(2000)}
    diff = take(**old).diff(take(**new), stats=True)

    assert {f"state/t{number}": 1.0 for number in range(300) if number != 7} == {
        row.entry: row.statistics.max_abs for row in diff.entries("changed")
    }


def test_only_what_changed_and_can_be_measured_has_statistics(take: Take) -> None:
    old = {
        "same": torch.ones(3),
        "shape": torch.ones(3),
        "text": np.array(["a"]),
        "value": 1,
        "number": np.ones(3, ">f4"),
        "w": torch.ones(3),
    }
    new = {
        "same": torch.ones(3),
        "shape": torch.ones(4),
        "text": np.array(["b"]),
        "value": 2,
        "number": np.zeros(3, ">f4"),
        "w": torch.ones(3) * 2,
    }
    diff = take(**old).diff(take(**new), stats=True)

    assert ["state/w"] == [row.entry for row in diff if row.statistics is not None]
    assert not any(row.statistics for row in take(**old).diff(take(**new)))


@pytest.mark.parametrize(
    "values",
    [
        (torch.tensor(1.0), torch.tensor(3.0)),
        (np.arange(4.0), np.arange(4.0) + 2 * (np.arange(4) == 1)),
        (np.array([1, 5], np.int16), np.array([1, 3], np.int16)),
        (torch.zeros(5, dtype=torch.uint64), torch.tensor([2, 0, 0, 0, 0], dtype=torch.uint64)),
    ],
)
def test_scalars_and_arrays(take: Take, values: tuple[Any, Any]) -> None:
    found = take(x=values[0]).diff(take(x=values[1]), stats=True)["state/x"].statistics

    assert (2.0, 2.0, 1) == (found.l2, found.max_abs, found.changed_elements)


def test_an_empty_tensor_of_another_dtype(take: Take) -> None:
    found = take(x=torch.zeros(0, 3)).diff(take(x=torch.zeros(0, 3, dtype=torch.int8)), stats=True)["state/x"].statistics

    assert (0.0, 0.0, 0) == (found.l2, found.changed, found.elements)


def test_progress_ends_at_the_bytes_of_both_sides(take: Take) -> None:
    updates: list[Any] = []
    take(x=torch.zeros(3 * 2**20)).diff(take(x=torch.ones(3 * 2**20)), stats=True, progress=updates.append, memory_budget_bytes=2**22)

    assert ("diff", 24 * 2**20, 24 * 2**20) == (updates[-1].operation, updates[-1].done_bytes, updates[-1].total_bytes)
    assert len(updates) > 1
