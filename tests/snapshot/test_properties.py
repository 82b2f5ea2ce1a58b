"""Whatever hypothesis thinks of as a state comes back as it was, and equal states have equal digests."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

import expstate
from expstate import Snapshot, StateDict
from expstate.format.manifest import ObjectEntry, TensorEntry
from expstate.state.tensors import DTYPES
from tests.state.conftest import assert_same

MIB = 2**20

_texts = st.text(max_size=12) | st.sampled_from(["a/b", "100%", "%2F", "1", "True", "", "%empty", "\ud800", "..", "a#0", "__metadata__"])
_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63, -(2**63) - 1, 2**500])
    | st.floats()
    | st.complex_numbers()
    | _texts
    | st.binary(max_size=40)
    | st.datetimes()
    | st.timedeltas()
    | st.decimals(allow_nan=False)
    | st.sampled_from([torch.float8_e5m2, torch.Size([2, 3]), torch.device("cpu"), Path("a/b"), ..., math.nan])
)
_keys = (
    _texts
    | st.integers()
    | st.booleans()
    | st.tuples(st.integers(), _texts)
    | st.none()
    | st.binary(max_size=5)
    | st.floats(allow_nan=False)
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors of every dtype, of up to three dimensions, with any strides that slicing, transposing and expanding make."""
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    count, itemsize = math.prod(shape), DTYPES[dtype].itemsize
    raw = torch.tensor(list(draw(st.binary(min_size=count * itemsize, max_size=count * itemsize))), dtype=torch.uint8)
    if dtype == "bool":
        raw %= 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # complex32 is announced as experimental
        tensor = (
            torch.empty(0, dtype=DTYPES[dtype]).set_(raw.untyped_storage(), 0, tuple(shape))
            if count
            else torch.empty(shape, dtype=DTYPES[dtype])
        )
    for _ in range(draw(st.integers(0, 2))):
        tensor = _changed(draw, tensor)
    if dtype in {"float32", "float64", "bfloat16"}:
        if draw(st.booleans()):
            return torch.nn.Parameter(tensor, requires_grad=draw(st.booleans()))
        return tensor.requires_grad_(draw(st.booleans()))
    return tensor


def _changed(draw: st.DrawFn, tensor: torch.Tensor) -> torch.Tensor:
    how = draw(st.sampled_from(["slice", "transpose", "expand", "conj", "scalar"]))
    if how == "slice" and tensor.dim():
        return tensor[draw(st.integers(0, 2)) :: draw(st.integers(1, 3))]
    if how == "transpose" and tensor.dim() > 1:
        return tensor.transpose(0, -1)
    if how == "expand":
        return tensor.unsqueeze(0).expand(draw(st.integers(0, 3)), *tensor.shape)
    if how == "conj" and tensor.is_complex() and tensor.dtype is not torch.complex32:
        return tensor.conj()
    if how == "scalar" and tensor.numel():
        return tensor[(0,) * tensor.dim()]
    return tensor


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    """NumPy arrays and scalars of the dtypes that it has, either byte order, any strides."""
    dtype = draw(
        numpy_strategies.scalar_dtypes()
        | numpy_strategies.unicode_string_dtypes(max_len=5)
        | numpy_strategies.byte_string_dtypes(max_len=5)
        | numpy_strategies.array_dtypes(subtype_strategy=numpy_strategies.scalar_dtypes(), max_size=3)
    )
    shape = draw(numpy_strategies.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    raw = np.zeros(shape, dtype)
    if raw.nbytes and dtype.kind != "U":
        data = draw(st.binary(min_size=raw.nbytes, max_size=raw.nbytes))
        data = bytes(byte % 2 for byte in data) if dtype.kind == "b" else data
        raw = np.frombuffer(bytearray(data), dtype).reshape(shape)
    if raw.ndim and draw(st.booleans()):
        raw = raw[:: draw(st.sampled_from([-1, 1, 2]))].T
    return raw[()] if draw(st.booleans()) and raw.ndim == 0 else raw


_leaves = st.deferred(lambda: _scalars | tensors() | arrays())
_values = st.recursive(
    _leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(_keys, inner, max_size=4)
        | st.tuples(inner, inner)
        | st.sets(st.integers() | _texts, max_size=4)
        | st.builds(lambda value: [value, {"again": value}], tensors())
    ),
    max_leaves=12,
)
_states = st.dictionaries(_texts, _values, max_size=5)
_several = settings(
    max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
)
_numbers = itertools.count()


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@_several
@given(state=_states)
def test_any_state_comes_back(tmp_path: Path, state: dict[str, Any]) -> None:
    """Read anew, restored into nothing, and restored over itself."""
    place = tmp_path / str(next(_numbers))
    Snapshot.take(place, {"state": StateDict(state)})
    snapshot = Snapshot(place)
    fresh, live = StateDict(), StateDict(state)
    snapshot.restore({"state": fresh})
    snapshot.restore({"state": live})

    assert_same(state, snapshot.get_state_dict_for_key("state"))
    assert_same(state, fresh.state_dict())
    assert_same(state, live.state_dict())
    assert snapshot.verify().ok


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@_several
@given(state=_states, other=_states)
def test_any_state_replaces_any_other(tmp_path: Path, state: dict[str, Any], other: dict[str, Any]) -> None:
    """Whatever is live: the result is what was taken, unless a dtype differs, and then nothing has changed."""
    place = tmp_path / str(next(_numbers))
    Snapshot.take(place, {"state": StateDict(state)})
    live = StateDict(other)
    problems: tuple[str, ...] = ()
    try:
        Snapshot(place).restore({"state": live})
    except expstate.errors.RestoreMismatchError as error:
        problems = error.problems

    assert all("has dtype" in problem or "same memory" in problem for problem in problems)
    assert_same(other if problems else state, live.state_dict())


@_several
@given(state=_states, budget=st.sampled_from([None, 2 * MIB]))
def test_equal_states_have_equal_digests(tmp_path: Path, state: dict[str, Any], budget: int | None) -> None:
    """Taken twice, at once or in the background, with much memory or little."""
    place = tmp_path / str(next(_numbers))
    one = Snapshot.take(place / "one", {"state": StateDict(state)})
    other = Snapshot.async_take(place / "other", {"state": StateDict(state)}, memory_budget_bytes=budget).wait()

    def digests(snapshot: Snapshot) -> list[Any]:
        return [
            (entry.path, [box.digest for box in entry.boxes]) if isinstance(entry, (TensorEntry, ObjectEntry)) else entry
            for entry in snapshot.entries()
        ]

    assert digests(one) == digests(other)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 5000),
    columns=st.integers(1, 400),
    dtype=st.sampled_from([torch.uint8, torch.float32, torch.complex128]),
    target=st.sampled_from([MIB, 3 * MIB, 2**34]),
    part=st.tuples(st.integers(-6000, 6000), st.integers(-6000, 6000)),
    is_transposed=st.booleans(),
)
def test_large_tensors_of_any_shape_come_back(
    tmp_path: Path, rows: int, columns: int, dtype: torch.dtype, target: int, part: tuple[int, int], is_transposed: bool
) -> None:
    """Of several blocks, cut into several files or not, whole and by rows, from and to any layout."""
    place = tmp_path / str(next(_numbers))
    count = rows * columns
    tensor = torch.arange(count, dtype=torch.float64).to(dtype)
    tensor = tensor.view(columns, rows).t() if is_transposed else tensor.view(rows, columns)
    with expstate.settings.override(data_file_bytes=target):
        snapshot = Snapshot.take(place, {"state": StateDict(x=tensor)}, memory_budget_bytes=4 * MIB)
    live = StateDict(x=torch.zeros(columns, rows, dtype=dtype).t())
    snapshot.restore({"state": live}, memory_budget_bytes=4 * MIB)
    rows_wanted = slice(*part)

    assert torch.equal(tensor, live["x"])
    assert torch.equal(tensor, snapshot.read_object("state/x"))
    assert torch.equal(tensor[rows_wanted], snapshot.read_object("state/x", rows=rows_wanted))
    for file in place.iterdir():
        file.unlink()
