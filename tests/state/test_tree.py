"""State dicts become leaves and come back: containers, keys, ties, long values, and whatever hypothesis thinks of."""

from __future__ import annotations

import collections
import copy
import math
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expstate.errors import ExpstateError, ManifestError, UnknownClassError, UnsupportedValueError
from expstate.state import codecs, tree

from .conftest import GARBAGE, assert_same, through_json


class Point(NamedTuple):
    """A namedtuple of this module."""

    x: Any
    y: Any = 0


CONTAINERS = [
    {},
    {"a": {"b": [1, (2, {"c": torch.ones(2)})]}},
    OrderedDict(b=1, a=torch.zeros(1)),
    defaultdict(list, {"a": [torch.ones(1)]}),
    defaultdict(None, {"a": {}}),
    Counter({"a": 3, 1: 2}),
    [torch.zeros(2), {"x": {}}],
    (torch.zeros(2), {}),
    deque([1, {"a": 2}], maxlen=5),
    deque([{}]),
    Point(torch.zeros(2), {"a": 1}),
    {frozenset({1}), ("a", b"b" * 100_000)},
    {1: "a", "1": "b", 1.5: "d", False: "c", "False": "g", (1, "2"): "e", None: "f", "a/b": 1, "100%": 2, "": 3, "%empty": 4, b"k": 5},
    {"é\n\ud800": 1, "1%int": 2, 1: 3},
    {torch.float32: 1, torch.Size([2]): 2},
]


@pytest.mark.parametrize("value", CONTAINERS, ids=lambda value: type(value).__name__)
def test_containers_come_back(value, roundtrip, same) -> None:
    """Each container is rebuilt with its type, its order and its keys."""
    same(value, roundtrip(value))


def test_module_versions_are_kept(roundtrip) -> None:
    """The versions that ``load_state_dict`` upgrades by survive."""
    state = torch.nn.Sequential(torch.nn.BatchNorm1d(3)).state_dict()
    restored = roundtrip(state)
    assert 2 == state._metadata["0"]["version"]
    assert state._metadata == restored._metadata
    assert list(state) == list(restored)


def test_namedtuples_of_unknown_classes_keep_their_fields(roundtrip) -> None:
    """A namedtuple whose class is not here comes back as one of the same name and fields."""
    local = collections.namedtuple("Local", ["first", "second"])  # noqa: PYI024 - made at run time
    restored = roundtrip(local(torch.ones(1), {"a": 1}))
    assert ("Local", ("first", "second")) == (type(restored).__name__, type(restored)._fields)
    assert {"a": 1} == restored.second


def test_paths_are_distinct_and_ordered() -> None:
    """Keys that print alike have paths of their own, containers come before their parts."""
    state = {1: torch.zeros(1), "1": torch.zeros(2), "a/b": {"c": 1, "d": [{}]}}
    found = [leaf.path for leaf in tree.flatten("k", state)]
    assert len(set(found)) == len(found)
    assert found == ["k", "k/1%int", "k/1", "k/a%2Fb", "k/a%2Fb/c", "k/a%2Fb/d", "k/a%2Fb/d/0"]


def test_dicts_of_bools_and_ints_keep_both_kinds_of_key(roundtrip, same) -> None:
    """A bool as a key is not taken for its int, or its text."""
    same({True: 1, "True": 2, 0: 3, "0": 4}, roundtrip({True: 1, "True": 2, 0: 3, "0": 4}))


def test_tied_tensors_are_stored_once_and_tied_again(roundtrip) -> None:
    """Tensors of the same memory, shape and strides are one; overlapping views are not."""
    weight = torch.nn.Parameter(torch.randn(4, 4))
    state = {"a": weight, "b": [weight, weight.data], "c": weight.t(), "d": weight[:2]}
    leaves = tree.flatten("k", state)
    assert [("k/b/0", "k/a"), ("k/b/1", "k/a")] == [(leaf.path, leaf.target) for leaf in leaves if isinstance(leaf, tree.Alias)]
    restored = roundtrip(state)
    assert restored["a"] is restored["b"][0]
    assert restored["c"].data_ptr() != restored["a"].data_ptr()
    assert torch.equal(weight.t(), restored["c"])


def test_empty_tensors_are_not_tied() -> None:
    """Tensors without memory are not the same tensor."""
    leaves = tree.flatten("k", [torch.empty(0), torch.empty(0), torch.empty(0, 3)])
    assert not [leaf for leaf in leaves if isinstance(leaf, tree.Alias)]


def test_only_the_bytes_of_a_view_are_stored() -> None:
    """A small view of a large storage is small."""
    (leaf,) = tree.flatten("k", torch.zeros(1000, 1000)[3, 5:7])
    assert (2,) == leaf.shape
    assert 2 == leaf.tensor.numel()


DENSE = {
    "scalar": torch.tensor(1.5),
    "empty": torch.empty(3, 0, 2),
    "permuted": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    "expanded": torch.ones(3, 1).expand(3, 4),
    "stepped": torch.arange(20)[::3],
    "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
    "gradient": torch.ones(2, requires_grad=True),
    "not a leaf": torch.ones(2, requires_grad=True) * 2,
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "frozen": torch.nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False),
    "buffer": torch.nn.Buffer(torch.ones(2)),
    "nan": torch.tensor([math.nan, -0.0, math.inf]),
    "float8": torch.randn(5).to(torch.float8_e5m2),
    "bits": torch.arange(6, dtype=torch.uint8).view(torch.bits8),
    "uint64": torch.tensor([2**64 - 1], dtype=torch.uint64),
}


@pytest.mark.parametrize("value", DENSE.values(), ids=DENSE)
def test_dense_tensors_come_back(value, roundtrip, same) -> None:
    """Values to the last bit, dtype, shape, gradient flag and class are kept."""
    restored = roundtrip(value)
    same(value, restored)
    assert restored.is_leaf


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3),
        np.arange(6.0).reshape(2, 3).T,
        np.arange(10)[::-2],
        np.array(3, ">i2"),
        np.zeros((0, 3), "f2"),
        np.array(["ä", "bcd"]),
        np.array([b"a\0b", b""]),
        np.array(["2026", "NaT"], "M8[D]"),
        np.array([1, 2], "m8[25s]"),
        np.array([1 + 2j], "c16"),
        np.array([0.1], "longdouble"),
        np.zeros(3, "V5"),
        np.broadcast_to(np.arange(3), (2, 3)),
        np.array([True, False]),
        np.frombuffer(b"\x00" * 9, np.uint8)[1:].view(">f8"),
    ],
    ids=lambda array: f"{array.dtype.str}{list(array.shape)}",
)
def test_arrays_come_back(array, roundtrip, same) -> None:
    """NumPy arrays keep dtype, byte order, shape and bits; what was not contiguous is so afterwards."""
    same(array, roundtrip(array))
    same({"a": [array]}, roundtrip({"a": [array]}))


def test_columns_of_an_array_are_not_copied() -> None:
    """An array that is not contiguous, or that may not be written to, is seen in the memory where it lies."""
    columns = np.arange(12.0).reshape(4, 3)[:, 1]
    columns.flags.writeable = False
    (leaf,) = tree.flatten("k", columns)
    assert columns.__array_interface__["data"][0] == leaf.tensor.data_ptr()
    assert (3,) == leaf.tensor.stride()


LONG = {
    "bytes": bytes(range(256)) * 300,
    "bytearray": bytearray(70_000),
    "text": "aä€😀\ud800" * 20_000,
    "ints": [*range(-6_000, 6_000), 2**63 - 1, -(2**63)],
    "tuple of ints": tuple(range(10_001)),
    "floats": [math.nan, -0.0, math.inf, 0.1] * 3_000,
    "tuple of floats": (0.5,) * 10_001,
    "strings": ["", "a", None, "ü" * 90, "\ud83d", "\ude00"] * 3_000,
    "tuple of strings": ("abcdefgh",) * 10_001,
}


@pytest.mark.parametrize("value", LONG.values(), ids=LONG)
def test_long_values_are_tensors_and_come_back(value, roundtrip, same) -> None:
    """What is long makes no long JSON, wherever it stands, and comes back exactly."""
    for state in (value, {"a": value}, [1, value], ([{"a": (value,)}],)):
        leaves = tree.flatten("k", state)
        assert all(len(str(leaf.encoded)) < 100 for leaf in leaves if isinstance(leaf, tree.Value))
        assert any(isinstance(leaf, tree.Array) for leaf in leaves)
        assert not any(isinstance(leaf, tree.Object) for leaf in leaves)
        same(state, roundtrip(state))


def test_long_lists_of_other_things_stay_what_they_are(roundtrip, same) -> None:
    """Lists whose items differ, or are ints beyond 64 bits, are stored as any list."""
    for value in ([1] * 10_000 + [2**70], [1] * 10_000 + [True], [1] * 10_000 + [0.5]):
        same(value, roundtrip(value))


def test_a_live_long_value_is_never_written_to(refill) -> None:
    """Bytes of Python do not change: a restore makes new ones."""
    live, value = bytes(70_000), bytes([1]) * 70_000
    assert value == refill(value, live)
    assert bytes(70_000) == live


@pytest.mark.parametrize(
    ("meta", "parts"),
    [
        ({"kind": "bytes"}, {"data": torch.zeros(3)}),
        ({"kind": "bytes"}, {"data": torch.zeros(3, 3, dtype=torch.uint8)}),
        ({"kind": "bytes"}, {"data": b"abc"}),
        ({"kind": "bytes"}, {}),
        ({"kind": "str"}, {"data": torch.full((3,), 255, dtype=torch.uint8)}),
        ({"kind": "list"}, {"data": torch.zeros(3)}),
        ({"kind": "list", "items": "int"}, {"data": torch.zeros(3)}),
        ({"kind": "list", "items": "float"}, {"data": torch.zeros(3, dtype=torch.int64)}),
        ({"kind": "list", "items": "object"}, {"data": torch.zeros(3, dtype=torch.int64)}),
        ({"kind": "list", "items": "str"}, {"text": "abc", "lengths": [1, 1]}),
        ({"kind": "list", "items": "str"}, {"text": "abc", "lengths": [9, -1]}),
        ({"kind": "list", "items": "str"}, {"text": "abc", "lengths": [5, -2]}),
        ({"kind": "list", "items": "str"}, {"text": "abc", "lengths": [1.0, 2]}),
        ({"kind": "list", "items": "str"}, {"text": b"abc", "lengths": [3]}),
        ({"kind": "list", "items": "str"}, {"text": "abc"}),
        ({"kind": "eval"}, {"data": torch.zeros(3, dtype=torch.uint8)}),
    ],
)
def test_hostile_long_values_are_refused(meta, parts, hostile) -> None:
    """Parts that do not make the value that they are said to be are an error of ours."""
    hostile("packed", meta, parts)


def test_unplain_values_are_objects() -> None:
    """What no codec knows is left to ``torch.save``, item by item."""
    leaves = tree.flatten("k", {"a": [object(), 1], "b": print})
    assert ["k/a/0", "k/b"] == [leaf.path for leaf in leaves if isinstance(leaf, tree.Object)]


@pytest.mark.parametrize("value", [torch.empty(2, device="meta"), torch.nn.UninitializedParameter()], ids=["meta", "lazy"])
def test_tensors_without_values_are_refused(value) -> None:
    """The message names the path and says what to do."""
    with pytest.raises(UnsupportedValueError, match=r"'k/a/0'.*before the take"):
        tree.flatten("k", {"a": [value]})


def test_containers_that_hold_themselves_are_refused() -> None:
    """Whether list, dict or array of objects, a circle is an error that names it."""
    ring: list[Any] = [torch.zeros(1)]
    ring.append(ring)
    knot: dict[str, Any] = {}
    knot["a"] = {"b": knot}
    loop = np.empty(1, object)
    loop[0] = loop
    plain: list[Any] = []
    plain.append(plain)
    for value in (ring, knot, loop, plain):
        with pytest.raises(UnsupportedValueError, match="holds itself"):
            tree.flatten("k", value)


def test_the_same_list_twice_is_no_circle(roundtrip, same) -> None:
    """A value may stand in several places."""
    shared = [torch.zeros(1), {}]
    same([shared, shared], roundtrip([shared, shared]))


def test_keys_that_cannot_be_stored_are_named() -> None:
    """A key that is not plain is an error before anything is written."""
    with pytest.raises(UnsupportedValueError, match=r"'k/a'.*key"):
        tree.flatten("k", {"a": {object(): torch.zeros(1)}})


def test_deep_nesting_is_an_error_of_ours() -> None:
    """State nested beyond what Python can walk is refused, not a crash."""
    value: Any = {}
    for _ in range(sys.getrecursionlimit() * 2):
        value = {"a": value}
    with pytest.raises(UnsupportedValueError, match="nested too deeply"):
        tree.flatten("k", value)


def _merged(value: Any, names: list[str], live: Any) -> Any:
    """What a restore of some parts of ``value`` over ``live`` gives."""
    codec = codecs.find(value)
    assert codec is not None
    meta, parts = codec.flatten(value)
    whole = tree.Part("k", codec.name, through_json(meta), None)
    return tree.build([whole, *(tree.Part(f"k/{name}", None, None, parts[name]) for name in names)], {"k": live}, {"k": whole})


@pytest.mark.parametrize(
    ("value", "names", "live", "expected"),
    [
        ({"a": 1, "b": 2}, ["b"], {"a": 5, "c": 6}, {"a": 5, "c": 6, "b": 2}),
        ({1: 1, "1": 2}, ["1%int"], {"1": 7}, {"1": 7, 1: 1}),
        ({"a": 1}, ["a"], {2: 3, "a": 4}, {2: 3, "a": 1}),
        (OrderedDict(a=1, b=2), ["a"], OrderedDict(b=3), OrderedDict(b=3, a=1)),
        (defaultdict(int, a=1, b=2), ["a"], defaultdict(int, b=3), defaultdict(int, b=3, a=1)),
        ([1, 2, 3], ["1"], [7, 8, 9], [7, 2, 9]),
        ((1, 2, 3), ["2"], (7, 8), (7, 8, 3)),
        (deque([1, 2], maxlen=4), ["0"], deque([5, 6], maxlen=4), deque([1, 6], maxlen=4)),
        (Point(1, 2), ["y"], Point(5, 6), Point(5, 2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_partial_restores_keep_what_is_live(value, names, live, expected, same) -> None:
    """A container that the snapshot brings only in part keeps its other items, and their order."""
    same(expected, _merged(value, names, live))


def test_versions_of_live_modules_are_kept_in_a_partial_restore() -> None:
    """The versions beside a module's state are those of the live module."""
    value, live = (torch.nn.BatchNorm1d(2).state_dict() for _ in range(2))
    live._metadata[""]["version"] = 1
    merged = _merged(value, ["weight"], live)
    assert 1 == merged._metadata[""]["version"]
    assert list(live) == list(merged)


@pytest.mark.parametrize(
    ("value", "names", "live"),
    [
        ([1, 2, 3], ["2"], [7]),
        ({1, 2}, ["0"], {3}),
        (deque([1], maxlen=2), ["0"], deque([1], maxlen=3)),
        (torch.eye(2).to_sparse(), ["values"], torch.eye(3).to_sparse()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_partial_restores_that_do_not_fit_are_errors(value, names, live) -> None:
    """Where a part would have no place, or the form differs, nothing is made up."""
    with pytest.raises(ManifestError):
        _merged(value, names, live)


@pytest.mark.parametrize("name", sorted(codecs._registered))
def test_garbage_for_any_codec_is_an_error_of_ours(name) -> None:
    """Whatever metadata and parts a file claims, a codec makes a value or raises our error."""
    parts: list[Any] = [None, 1, -1, "x", [1], torch.zeros(2), torch.zeros(0, dtype=torch.int64), np.zeros(3, np.uint8), {}]
    fields = {field for source in GARBAGE for field in (source if isinstance(source, dict) else ())} | {
        "keys",
        "versions",
        "factory",
        "shape",
        "layout",
        "kind",
        "items",
        "dtype",
        "parts",
        "device",
        "state",
        "name",
        "names",
        "class",
        "module",
    }
    metas = [*GARBAGE, *(dict.fromkeys(fields, value) for value in GARBAGE)]
    for meta in metas:
        for part in parts:
            for labels in ((), ("0",), ("data",), ("indices", "values"), ("%index", "%columns", "0"), ("%index", "%values"), ("items",)):
                pieces = [tree.Part("k", name, through_json(copy.deepcopy(meta)), None)]
                pieces += [tree.Part(f"k/{label}", None, None, part) for label in labels]
                try:
                    tree.build(pieces, {})
                except ExpstateError:
                    continue


def test_unknown_types_are_damage() -> None:
    """A container type that nobody wrote is an error that names it."""
    with pytest.raises(ManifestError, match=r"'os\.system'"):
        tree.build([tree.Part("k", "os.system", None, None)], {})


def test_errors_of_codecs_name_the_entry() -> None:
    """An error while an entry is put together says which."""
    with pytest.raises(UnknownClassError, match="'k/a'"):
        tree.build(
            [
                tree.Part("k", "dict", None, None),
                tree.Part("k/a", "torch.subclass", {"module": "nobody", "class": "X"}, None),
            ],
            {},
        )


def test_every_codec_is_known_to_readers() -> None:
    """Importing ``tree`` makes each kind of entry known."""
    expected = {
        "dict",
        "packed",
        "torch.sparse_coo",
        "torch.quantized",
        "torch.subclass",
        "numpy.records",
        "numpy.Generator",
        "pandas.DataFrame",
    }
    assert expected <= set(codecs._registered)


# Whatever there is

_DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint16, torch.float8_e4m3fn]

_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters(exclude_categories=()), max_size=20),
    st.binary(max_size=20),
    st.fractions(),
    st.decimals(),
    st.timedeltas(),
    st.dates(),
    st.uuids(),
    st.sampled_from([torch.float32, torch.Size([1]), torch.device("cpu"), ..., range(3)]),
)
_keys = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=8), st.integers(), st.booleans(), st.none(), st.tuples(st.integers(), st.text())
)


@st.composite
def _tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from(_DTYPES))
    count = torch.Size(shape).numel() * dtype.itemsize
    data = draw(st.binary(min_size=count, max_size=count))
    if dtype == torch.bool:
        data = bytes(byte & 1 for byte in data)
    tensor = torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
    if shape and draw(st.booleans()):
        tensor = tensor.movedim(0, -1)
    if draw(st.booleans()):
        return torch.nn.Parameter(tensor, requires_grad=dtype.is_floating_point)
    return tensor


@st.composite
def _arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    dtype = np.dtype(draw(st.sampled_from(["<f4", ">i2", "<U3", "S2", "M8[s]", "?", "<c8"])))
    shape = draw(st.lists(st.integers(0, 3), max_size=2))
    size = math.prod(shape)
    if dtype.kind in "?bUS":
        return np.array(draw(st.lists(st.integers(0, 1), min_size=size, max_size=size)), dtype).reshape(shape)
    data = draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))
    return np.frombuffer(data, dtype).reshape(shape)


def _nested(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(items, max_size=4),
        st.lists(items, max_size=4).map(tuple),
        st.dictionaries(_keys, items, max_size=4),
        st.dictionaries(st.text(max_size=5), items, max_size=4).map(OrderedDict),
        st.lists(items, max_size=3).map(deque),
        st.tuples(items, items).map(lambda pair: Point(*pair)),
        st.sets(st.integers() | st.text(max_size=3), max_size=4),
    )


@settings(max_examples=200)
@given(st.recursive(_scalars | _tensors() | _arrays(), _nested, max_leaves=12))
def test_any_nested_state_comes_back(roundtrip, value) -> None:
    """Arbitrary nestings of values, tensors and arrays are the same after flatten, JSON, bytes and build."""
    assert_same(value, roundtrip(value))


@settings(max_examples=50)
@given(st.dictionaries(_keys, _tensors() | st.integers(), max_size=6))
def test_a_restore_over_an_equal_form_reads_in_place(refill, state) -> None:
    """Live tensors of the same form hold the values afterwards, and are the tensors of the result."""
    live = {
        key: torch.nn.Parameter(torch.zeros_like(value), value.requires_grad)
        if type(value) is torch.nn.Parameter
        else (torch.zeros_like(value) if isinstance(value, torch.Tensor) else value)
        for key, value in state.items()
    }
    restored = refill(state, live)
    assert_same(state, restored)
    for key, value in live.items():
        if isinstance(value, torch.Tensor):
            assert value is restored[key]
