"""Help for the tests of ``state/``: a state taken apart and put together by way of JSON and bytes, and comparison to the last bit."""

from __future__ import annotations

import collections
import ctypes
import decimal
import math
import struct
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from expstate.errors import ExpstateError
from expstate.state import codecs, numpy_arrays, tree
from expstate.state.objects import pickle_object, unpickle_object
from expstate.state.tensors import DTYPES, copy_in, copy_out
from expstate.state.values import decode


def through_json(value: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value))


def bytes_of(tensor: torch.Tensor) -> bytearray:
    """A tensor's elements, by ``copy_out``."""
    data = bytearray(tensor.numel() * tensor.element_size())
    if data:
        copy_out(tensor, 0, len(data), ctypes.addressof(ctypes.c_char.from_buffer(data)))
    return data


def fill(tensor: torch.Tensor, data: bytearray) -> None:
    """Give a tensor its elements, by ``copy_in``."""
    if data:
        copy_in(tensor, 0, len(data), ctypes.addressof(ctypes.c_char.from_buffer(data)))


def _read_array(leaf: tree.Array) -> Any:
    data = bytes_of(leaf.tensor)
    if leaf.kind == "numpy":
        array, memory = numpy_arrays.empty(leaf.dtype, leaf.shape)
        fill(memory, data)
        return array
    tensor = torch.empty(leaf.shape, dtype=DTYPES[leaf.dtype], device="cpu")
    fill(tensor, data)
    if leaf.kind == "parameter":
        return torch.nn.Parameter(tensor, requires_grad=leaf.requires_grad)
    return tensor.requires_grad_(leaf.requires_grad)


def _parts(leaves: list[tree.Leaf], read: Callable[[tree.Array], Any]) -> list[tree.Part]:
    finished: dict[str, Any] = {}
    parts = []
    for leaf in leaves:
        if isinstance(leaf, tree.Container):
            parts.append(tree.Part(leaf.path, leaf.type, through_json(leaf.meta), None))
            continue
        if isinstance(leaf, tree.Array):
            value = finished[leaf.path] = read(leaf)
        elif isinstance(leaf, tree.Alias):
            value = finished[leaf.target]
        elif isinstance(leaf, tree.Value):
            value = decode(through_json(leaf.encoded))
        else:
            pickled = pickle_object(leaf.value)
            value = unpickle_object(pickled.data, trust=pickled.needs_trust)
        parts.append(tree.Part(leaf.path, None, None, value))
    return parts


def _roundtrip(value: Any) -> Any:
    return tree.build(_parts(tree.flatten("key", value), _read_array), {})


def _refill(value: Any, live: Any) -> Any:
    """What a restore of ``value`` over ``live`` gives, whose tensors and arrays of equal form are read in place."""
    now = {leaf.path: leaf for leaf in tree.flatten("key", live)}

    def read(leaf: tree.Array) -> Any:
        target = now.get(leaf.path)
        if not isinstance(target, tree.Array) or (target.dtype, target.shape) != (leaf.dtype, leaf.shape):
            return _read_array(leaf)
        if target.kind == "numpy" and not (target.value.flags.writeable and target.value.flags.c_contiguous):
            return _read_array(leaf)
        fill(target.tensor, bytes_of(leaf.tensor))
        return target.value

    parts = _parts(tree.flatten("key", value), read)
    return tree.build(parts, {path: leaf.value for path, leaf in now.items() if isinstance(leaf, tree.Container)})


def _assert_same_tensor(expected: torch.Tensor, actual: torch.Tensor) -> None:
    assert expected.layout == actual.layout
    assert expected.dtype == actual.dtype
    assert expected.device == actual.device
    assert expected.requires_grad == actual.requires_grad
    if hasattr(expected, "__tensor_flatten__"):
        names, context = expected.__tensor_flatten__()
        assert (names, context) == actual.__tensor_flatten__()
        for name in names:
            assert_same(getattr(expected, name), getattr(actual, name))
    elif expected.is_nested:
        assert_same(list(expected.detach().unbind()), list(actual.detach().unbind()))
    elif expected.is_quantized:
        assert expected.shape == actual.shape
        assert expected.qscheme() == actual.qscheme()
        assert torch.equal(expected.dequantize(), actual.dequantize())
        if expected.qscheme() == torch.per_tensor_affine:
            assert (expected.q_scale(), expected.q_zero_point()) == (actual.q_scale(), actual.q_zero_point())
        else:
            assert expected.q_per_channel_axis() == actual.q_per_channel_axis()
            assert_same(expected.q_per_channel_scales(), actual.q_per_channel_scales())
            assert_same(expected.q_per_channel_zero_points(), actual.q_per_channel_zero_points())
    elif expected.layout is not torch.strided:
        codec = codecs.find(expected)
        assert codec is not None
        assert_same(codec.flatten(expected), codec.flatten(actual))
    else:
        assert expected.shape == actual.shape
        assert bytes_of(expected.detach()) == bytes_of(actual.detach())


def _assert_same_array(expected: Any, actual: Any) -> None:
    import numpy as np

    assert expected.dtype == actual.dtype
    assert expected.shape == actual.shape
    if isinstance(expected, np.ma.MaskedArray):
        assert expected.hardmask == actual.hardmask
        assert (expected.mask is np.ma.nomask) == (actual.mask is np.ma.nomask)
        assert_same(np.ma.getmaskarray(expected), np.ma.getmaskarray(actual))
        assert_same(expected.data, actual.data)
        assert_same(expected.fill_value, actual.fill_value)
    elif expected.dtype.kind in "OT":
        assert_same(expected.reshape(-1).tolist(), actual.reshape(-1).tolist())
    elif expected.dtype.names:  # what is between the fields means nothing
        for name in expected.dtype.names:
            assert_same(expected[name], actual[name])
    elif expected.dtype.char == "g":  # filled up with bytes that mean nothing
        assert np.array_equal(expected, actual)
    else:
        assert expected.tobytes() == actual.tobytes()


def _assert_same_frame(expected: Any, actual: Any) -> None:
    import pandas as pd

    options = {"check_freq": True} if isinstance(expected, (pd.Series, pd.DataFrame)) else {"exact": True}
    compare = next(
        getattr(pd.testing, f"assert_{name}_equal")
        for kind, name in ((pd.Series, "series"), (pd.DataFrame, "frame"), (pd.Index, "index"))
        if isinstance(expected, kind)
    )
    compare(expected, actual, check_exact=True, **options)
    assert_same(getattr(expected, "attrs", {}), getattr(actual, "attrs", {}))
    assert getattr(expected, "freq", None) == getattr(actual, "freq", None)


def _assert_same_items(expected: Any, actual: Any) -> None:
    assert len(expected) == len(actual)
    assert getattr(expected, "maxlen", None) == getattr(actual, "maxlen", None)
    for value, other_value in zip(expected, actual, strict=True):
        assert_same(value, other_value)


def _assert_same_dict(expected: Any, actual: Any) -> None:
    assert_same(list(expected), list(actual))
    assert_same(list(expected.values()), list(actual.values()))


def _assert_same_generator(expected: torch.Generator, actual: torch.Generator) -> None:
    assert expected.device == actual.device
    assert_same(expected.get_state(), actual.get_state())


def _assert_same_printed(expected: Any, actual: Any) -> None:
    assert (
        sorted(map(repr, expected)) == sorted(map(repr, actual)) if isinstance(expected, (set, frozenset)) else str(expected) == str(actual)
    )


_COMPARE: list[tuple[Any, Callable[[Any, Any], None]]] = [
    (torch.Tensor, _assert_same_tensor),
    (torch.Generator, _assert_same_generator),
    ((float, complex), lambda expected, actual: _assert_same_bits(complex(expected), complex(actual))),
    (dict, _assert_same_dict),
    ((list, tuple, collections.deque), _assert_same_items),
    ((set, frozenset, decimal.Decimal), _assert_same_printed),
]


def _assert_same_bits(expected: complex, actual: complex) -> None:
    assert struct.pack("dd", expected.real, expected.imag) == struct.pack("dd", actual.real, actual.imag)


def assert_same(expected: Any, actual: Any) -> None:
    """Equal types and equal values, NaNs and signed zeros by their bits."""
    assert type(expected) is type(actual)
    numpy = sys.modules.get("numpy")
    of_pandas = type(expected).__module__.partition(".")[0] == "pandas"
    if numpy is not None and isinstance(expected, (numpy.ndarray, numpy.generic)):
        _assert_same_array(expected, actual)
    elif of_pandas and hasattr(expected, "index" if hasattr(expected, "iloc") else "is_monotonic_increasing"):
        _assert_same_frame(expected, actual)
    elif compare := next((compare for kinds, compare in _COMPARE if isinstance(expected, kinds)), None):
        compare(expected, actual)
    elif expected is not actual:
        assert expected == actual


@pytest.fixture(scope="session")
def roundtrip() -> Callable[[Any], Any]:
    """A value flattened, carried through JSON and bytes into fresh memory, and built again."""
    return _roundtrip


@pytest.fixture(scope="session")
def refill() -> Callable[[Any, Any], Any]:
    """The same over a live value, whose memory is read into where it fits."""
    return _refill


@pytest.fixture(scope="session")
def same() -> Callable[[Any, Any], None]:
    """Assert equality to the last bit, types included."""
    return assert_same


@pytest.fixture(scope="session")
def hostile() -> Callable[..., None]:
    """Assert that a codec given such metadata and parts raises an error of ours, and nothing else happens."""

    def check(name: str, meta: Any, parts: dict[str, Any] | None = None, live: Any = None) -> None:
        pieces = [tree.Part("key", name, meta, None)]
        pieces += [tree.Part(f"key/{part}", None, None, value) for part, value in (parts or {}).items()]
        with pytest.raises(ExpstateError):
            tree.build(pieces, {} if live is None else {"key": live})

    return check


GARBAGE: list[Any] = [
    None,
    True,
    0,
    -1,
    2**62,
    1.5,
    math.inf,
    "",
    "load",
    [],
    [[]],
    [2**40, 2**40],
    {},
    {"type": "tuple", "value": []},
    {"type": "nothing"},
    {"shape": [-1]},
]
"""What stands where a codec's metadata, or a field of it, should."""
