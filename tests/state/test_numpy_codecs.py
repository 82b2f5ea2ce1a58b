"""NumPy's arrays beyond plain ones, its dtypes and random generators."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from expstate.errors import ManifestError, UnknownClassError
from expstate.state import codecs, numpy_arrays, numpy_codecs, numpy_random, tree
from expstate.state.values import encode_tree

from .conftest import GARBAGE, through_json

NESTED = np.dtype(
    {
        "names": ["id", "näme", "place", "grid"],
        "formats": ["<u4", "<U7", [("x", ">f8"), ("y", "S3")], ("i2", (2, 3))],
        "offsets": [0, 8, 40, 60],
        "itemsize": 96,
    }
)
ALIGNED = np.dtype([("a", "i1"), ("b", "f8")], align=True)
TITLED = np.dtype([(("a title", "a"), "i4")])


def _filled(dtype: Any, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    array = np.zeros(shape, dtype)
    array.reshape(-1).view(np.uint8)[:] = np.arange(array.nbytes) % 100
    return array


def _objects() -> np.ndarray[Any, Any]:
    array = np.empty((2, 3), object)
    array[:] = [[None, "a", 2**80], [1.5, ["x", {"y": np.arange(3)}], torch.ones(2)]]
    return array


def _masked(**options: Any) -> Any:
    return np.ma.MaskedArray(np.arange(6.0).reshape(2, 3), **options)


ARRAYS = {
    "structured": _filled(NESTED, (3, 2)),
    "structured scalar array": _filled(ALIGNED, ()),
    "structured empty": np.zeros((0, 2), ALIGNED),
    "structured permuted": _filled(ALIGNED, (3, 4)).T,
    "structured scalar": _filled(ALIGNED, (2,))[1],
    "aligned": _filled(ALIGNED, (2,)),
    "titled": _filled(TITLED, (2,)),
    "no fields": np.zeros(3, []),
    "empty strings": np.ndarray((2, 3), "U0"),
    "empty bytes": np.ndarray((4,), "S0"),
    "void of nothing": np.zeros(2, "V0"),
    "records": _filled([("a", "i4"), ("b", "f4")], (3,)).view(np.recarray),
    "record": _filled([("a", "i4"), ("b", "f4")], (3,)).view(np.recarray)[1],
    "matrix": np.arange(6).reshape(2, 3).view(np.matrix),
    "objects": _objects(),
    "object scalar": np.array(None, object),
    "no objects": np.zeros((2, 0), object),
    "texts": np.array(["a", "ä" * 50, ""], object),
    "masked": _masked(mask=[[0, 1, 0], [1, 0, 0]], fill_value=-1.0),
    "masked by nothing": _masked(),
    "masked hard": _masked(mask=True, hard_mask=True),
    "masked fields": np.ma.MaskedArray(_filled(ALIGNED, (2,)), mask=[(0, 1), (1, 0)]),
    "masked texts": np.ma.MaskedArray(np.array(["a", "b"]), mask=[0, 1], fill_value="?"),
}


@pytest.mark.parametrize("value", ARRAYS.values(), ids=ARRAYS)
def test_arrays_come_back_without_pickle(value, roundtrip, same) -> None:
    """Dtype, shape, class, mask and items are kept, and nothing is left to pickle."""
    assert not any(isinstance(leaf, tree.Object) for leaf in tree.flatten("key", {"a": value}))
    restored = roundtrip({"a": value})["a"]
    same(value, restored)
    assert value.dtype.isalignedstruct == restored.dtype.isalignedstruct


needs_strings = pytest.mark.skipif(not hasattr(np, "dtypes") or not hasattr(np.dtypes, "StringDType"), reason="needs NumPy 2")


@needs_strings
@pytest.mark.parametrize("options", [{}, {"na_object": None}, {"na_object": np.nan}, {"na_object": "n/a"}, {"coerce": False}], ids=str)
def test_arrays_of_strings_of_any_length_come_back(options, roundtrip) -> None:
    """``StringDType`` keeps what stands for a missing string, and which those are."""
    dtype = np.dtypes.StringDType(**options)
    items = ["a", "ä" * 100, "", options.get("na_object", "x")]
    array = np.array(items, dtype).reshape(2, 2)
    restored = roundtrip(array)
    assert (dtype, (2, 2)) == (restored.dtype, restored.shape)
    assert repr(array.tolist()) == repr(restored.tolist())
    assert "coerce" not in options or not restored.dtype.coerce


def test_memory_maps_come_back_in_memory(tmp_path, roundtrip, same) -> None:
    """A ``memmap`` is stored by its values, and needs no file afterwards."""
    mapped = np.memmap(tmp_path / "m", np.float32, "w+", shape=(3,))
    mapped[:] = [1, 2, 3]
    same(np.array([1, 2, 3], np.float32), roundtrip(mapped))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int4"])
def test_dtypes_of_ml_dtypes_are_not_taken_for_raw_bytes(dtype, roundtrip, same) -> None:
    """Arrays and scalars of dtypes that NumPy itself has not keep them."""
    extension = pytest.importorskip("ml_dtypes")
    array = np.array([1, 2, 3]).astype(getattr(extension, dtype))
    same(array, roundtrip(array))
    same(array[1], roundtrip([array[1]])[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "ml_dtypes")
        with pytest.raises(UnknownClassError, match="import ml_dtypes"):
            numpy_codecs.decode_dtype({"extension": dtype})
        with pytest.raises(TypeError, match=dtype):
            numpy_codecs.encode_dtype(array.dtype)


def test_a_long_array_of_texts_is_no_long_json() -> None:
    """Columns of strings are packed."""
    leaves = tree.flatten("key", np.array(["some text", None] * 10_000, object))
    assert all(len(str(leaf.encoded)) < 100 for leaf in leaves if isinstance(leaf, tree.Value))


@pytest.mark.parametrize(
    "dtype",
    [np.dtype("f4"), np.dtype(">i8"), np.dtype("M8[ns]"), np.dtype("U3"), np.dtype(object), NESTED, ALIGNED, np.dtype(("i2", (2, 3)))],
    ids=str,
)
def test_dtypes_are_values(dtype, roundtrip) -> None:
    """A dtype in a state is the same dtype afterwards."""
    restored = roundtrip({"dtype": dtype, "list": [dtype]})
    assert [dtype, dtype] == [restored["dtype"], restored["list"][0]]


def test_gaps_between_fields_hold_nothing_of_others() -> None:
    """Gathering a structured array does not write what happened to be in memory."""
    value = np.zeros((16, 16), np.dtype({"names": ["a"], "formats": ["i1"], "offsets": [0], "itemsize": 64})).T
    for fill in (b"\xaa", b"\xbb"):
        scrap = [np.frombuffer(fill * value.nbytes, np.uint8).copy() for _ in range(4)]
        del scrap
        *_, leaf = tree.flatten("key", value)
        assert 0 == int(leaf.tensor.count_nonzero())


@needs_strings
def test_string_dtypes_are_values(roundtrip) -> None:
    """So is one of strings of any length."""
    assert np.dtypes.StringDType(na_object=None) == roundtrip([np.dtypes.StringDType(na_object=None)])[0]


def test_live_arrays_are_refilled(refill, same) -> None:
    """Arrays of equal form are read in place, where their memory may be written to."""
    for value in (_filled(NESTED, (3,)), _masked(mask=[[0, 1, 0], [1, 0, 0]]), _filled([("a", "i4")], (2,)).view(np.recarray)):
        live = value.copy()
        (live.data if isinstance(live, np.ma.MaskedArray) else np.asarray(live)).fill(0)
        assert live is refill({"a": value}, {"a": live})["a"]
        same(value, live)


def test_parts_that_were_not_read_in_place_make_a_new_array(roundtrip, same) -> None:
    """A live array of equal form is not taken for restored when its own memory holds other values still."""
    value, live = _filled(NESTED, (3,)), np.zeros(3, NESTED)
    codec = codecs.find(value)
    meta, parts = codec.flatten(value)
    restored = tree.build(
        [tree.Part("key", codec.name, through_json(meta), None), tree.Part("key/data", None, None, parts["data"].copy())], {"key": live}
    )
    assert restored is not live
    same(value, restored)


def test_pointers_of_other_packages_are_refused(monkeypatch, hostile) -> None:
    """Even a dtype that another package calls its own is looked at."""
    monkeypatch.setitem(sys.modules, "ml_dtypes", SimpleNamespace(pointer=np.object_))
    hostile("numpy.records", {"dtype": {"extension": "pointer"}, "shape": [2], "scalar": False}, {"data": _BYTES})


@pytest.mark.parametrize("dtype", ["|O", "<U0", "V8, O", "load"])
def test_plain_arrays_have_plain_dtypes(dtype) -> None:
    """Neither memory nor a size is given for a dtype that has no short name."""
    with pytest.raises((ValueError, TypeError)):
        numpy_arrays.empty(dtype, (2,))
    with pytest.raises(ValueError, match="plain"):
        numpy_arrays.item_size(dtype)


def test_arrays_with_fields_of_objects_are_left_to_pickle() -> None:
    """Pointers among raw bytes are never written."""
    (leaf,) = tree.flatten("key", np.zeros(2, [("a", object)]))
    assert isinstance(leaf, tree.Object)


# Hostile

_BYTES = np.zeros(16, np.uint8)


@pytest.mark.parametrize(
    "dtype",
    [
        "|O",
        "O",
        "object",
        "<f4,|O",
        {"names": ["a"], "titles": [None], "formats": ["|O"], "offsets": [0], "itemsize": 8, "aligned": False, "record": False},
        {"base": "|O", "shape": [2]},
        {"string": True, "missing": "none", "coerce": True},
        {"names": ["a"], "titles": [None], "formats": ["<f8"], "offsets": [12], "itemsize": 16, "aligned": False, "record": False},
        {"names": ["a"], "titles": [None], "formats": ["<f8"], "offsets": [-8], "itemsize": 16, "aligned": False, "record": False},
        {
            "names": ["a", "a"],
            "titles": [None] * 2,
            "formats": ["<f4"] * 2,
            "offsets": [0, 4],
            "itemsize": 8,
            "aligned": False,
            "record": 0,
        },
        {"base": "<f4", "shape": [2**40]},
        {"base": "<f4", "shape": [-1]},
        {"extension": "numpy"},
        {"extension": "finfo"},
        {"extension": "os"},
        "<f4x",
        "<U99999999999",
        "<V4294967296",
        "<f3",
        *GARBAGE,
    ],
    ids=str,
)
def test_bytes_never_become_pointers(dtype, hostile) -> None:
    """A dtype that holds objects, or does not fit the bytes, is refused."""
    hostile("numpy.records", {"dtype": dtype, "shape": [2], "scalar": False}, {"data": _BYTES})


@pytest.mark.parametrize(
    ("meta", "data"),
    [
        ({"shape": [3]}, _BYTES),
        ({"shape": [2**60]}, _BYTES),
        ({"shape": [-2]}, _BYTES),
        ({"shape": 2}, _BYTES),
        ({"shape": [True, 2]}, _BYTES),
        ({}, _BYTES.astype("i4")),
        ({}, list(range(16))),
        ({}, torch.zeros(16, dtype=torch.uint8)),
        ({}, np.array([None] * 2)),
    ],
)
def test_bytes_have_to_fit_their_shape(meta, data, hostile) -> None:
    """Neither more nor fewer items are made than there are bytes for."""
    hostile("numpy.records", {"dtype": "<f8", "shape": [2], "scalar": False, **meta}, {"data": data})


@pytest.mark.parametrize(
    ("name", "meta", "parts"),
    [
        ("numpy.objects", {"dtype": "|O", "shape": [3]}, {"items": [1, 2]}),
        ("numpy.objects", {"dtype": "|O", "shape": [2**50]}, {"items": [1, 2]}),
        ("numpy.objects", {"dtype": "<f8", "shape": [2]}, {"items": [1, 2]}),
        ("numpy.objects", {"dtype": "|O", "shape": [2]}, {"items": "ab"}),
        ("numpy.masked", {"fill": False, "hard": False}, {"data": np.zeros(3), "mask": np.zeros(9, bool)}),
        ("numpy.masked", {"fill": True, "hard": False}, {"data": np.zeros(3)}),
        ("numpy.subclass", {"class": "ndarray"}, {"array": np.zeros(3)}),
        ("numpy.subclass", {"class": "load"}, {"array": np.zeros(3)}),
        ("numpy.subclass", {"class": "matrix"}, {"array": [1]}),
        ("numpy.dtype", "load", {}),
        ("numpy.dtype", {"names": 3}, {}),
    ],
)
def test_hostile_metadata_is_refused(name, meta, parts, hostile) -> None:
    """What the codecs never write is an error of ours."""
    hostile(name, meta, parts)


# Random generators

BITS = ["MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"]


@pytest.mark.parametrize("name", BITS)
def test_generators_go_on_where_they_were(name, roundtrip) -> None:
    """The next numbers of each kind, and the generators spawned next, are the same."""
    generator = np.random.Generator(getattr(np.random, name)(7))
    generator.random(5)
    generator.integers(0, 9, dtype=np.int32)
    generator.spawn(2)
    restored = roundtrip({"g": generator})["g"]
    assert generator.random(9).tolist() == restored.random(9).tolist()
    assert generator.integers(0, 9, 9, dtype=np.int32).tolist() == restored.integers(0, 9, 9, dtype=np.int32).tolist()
    assert generator.spawn(1)[0].random() == restored.spawn(1)[0].random()


@pytest.mark.parametrize("name", BITS)
def test_live_generators_are_refilled(name, refill) -> None:
    """The generator that others hold stays the object it is, and spawns where the stored one would."""
    make = getattr(np.random, name)
    generator, live = np.random.Generator(make(7)), np.random.Generator(make(7))
    generator.random(3)
    generator.spawn(3)
    assert live is refill([generator], [live])[0]
    assert generator.random() == live.random()
    assert generator.spawn(1)[0].random() == live.spawn(1)[0].random()


def test_live_generators_of_another_kind_are_replaced(refill) -> None:
    """A state fits only bits of its kind."""
    generator, live = np.random.default_rng(1), np.random.Generator(np.random.MT19937(1))
    restored = refill([generator], [live])[0]
    assert restored is not live
    assert generator.random() == restored.random()


@pytest.mark.parametrize("name", [None, *BITS])
def test_legacy_generators_go_on_where_they_were(name, roundtrip, refill) -> None:
    """``RandomState`` too, with the second of a pair of normal numbers that it holds back."""
    generator = np.random.RandomState(3) if name is None else np.random.RandomState(getattr(np.random, name)(3))
    generator.normal()
    live = np.random.RandomState(9) if name is None else np.random.RandomState(getattr(np.random, name)(9))
    assert live is refill([generator], [live])[0]
    expected = roundtrip(generator).normal(size=5).tolist()
    assert expected == live.normal(size=5).tolist()
    assert expected == generator.normal(size=5).tolist()


def test_generators_without_a_seed_come_back(roundtrip) -> None:
    """Entropy of the system is kept like a seed."""
    generator = np.random.default_rng()
    restored = roundtrip(generator)
    assert generator.spawn(1)[0].random() == restored.spawn(1)[0].random()


def test_generators_seeded_in_the_old_way_come_back(roundtrip, refill) -> None:
    """Bits without a seed sequence have none afterwards that matters: the next numbers are the same."""
    generator = np.random.Generator(np.random.RandomState(3)._bit_generator)
    live = np.random.default_rng(np.random.MT19937(1))
    assert live is refill([generator], [live])[0]
    expected = roundtrip([generator])[0].random(3).tolist()
    assert expected == live.random(3).tolist()
    assert expected == generator.random(3).tolist()


def test_only_bit_generators_of_numpy_are_made() -> None:
    """A name is looked up in a table, not in a module."""
    with pytest.raises(ManifestError, match="'load'"):
        numpy_random.new_bit_generator("load")


def test_other_bit_generators_are_left_to_pickle() -> None:
    """A state of a kind that is not NumPy's own is not guessed at."""

    class Own(np.random.PCG64):
        pass

    generator = np.random.Generator(Own(1))
    state = dict(generator.bit_generator.state, bit_generator="Own")
    with pytest.raises(TypeError, match="Own"):
        numpy_random.encode_state(state)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("MT19937", {"state": {"key": bytes(4 * 624), "pos": 625}}),
        ("MT19937", {"state": {"key": bytes(4 * 624), "pos": -1}}),
        ("MT19937", {"state": {"key": bytes(4 * 624), "pos": 2**40}}),
        ("MT19937", {"state": {"key": bytes(4 * 624), "pos": 1.5}}),
        ("MT19937", {"state": {"key": bytes(4 * 623), "pos": 1}}),
        ("MT19937", {"state": {"key": [1] * 624, "pos": 1}}),
        ("MT19937", {"state": {"pos": 1}}),
        ("MT19937", {"state": None}),
        ("Philox", {"buffer_pos": 5}),
        ("Philox", {"buffer_pos": -1}),
        ("Philox", {"buffer": bytes(8)}),
        ("Philox", {"buffer": [1, 2, 3, 4]}),
        ("SFC64", {"state": {"state": bytes(8)}}),
        ("SFC64", {"state": {"state": 5}}),
        ("SFC64", {"has_uint32": 2**70}),
        ("PCG64", {"state": {"state": "x", "inc": 1}}),
        ("PCG64", {"state": {"state": -1, "inc": 1}}),
        ("PCG64", {"bit_generator": "load"}),
        ("PCG64", {"bit_generator": ["PCG64"]}),
        ("PCG64", {"bit_generator": None}),
    ],
)
def test_hostile_states_are_refused(name, change, hostile) -> None:
    """NumPy believes positions; a wrong one would read past its buffers."""
    state = numpy_random.encode_state(getattr(np.random, name)(1).state) | change
    meta = through_json({"state": encode_tree(state), "sequence": None})
    hostile("numpy.Generator", meta)
    hostile("numpy.RandomState", meta)


@pytest.mark.parametrize("sequence", [(1, [], 10**9, 0), (1, [], 4), ("x", [], 4, 0), (-1, [], 4, 0), (1, ["x"], 4, 0), (1, [], 4, -1.5)])
def test_hostile_sequences_are_refused(sequence, hostile) -> None:
    """What generators are spawned from is checked, too."""
    generator = np.random.default_rng(1)
    meta, _ = codecs.find(generator).flatten(generator)
    hostile("numpy.Generator", through_json({**meta, "sequence": encode_tree(sequence)}))


@pytest.mark.parametrize("state", [None, 3, {}, {"bit_generator": "MT19937", "state": {"pos": -1}}], ids=str)
def test_states_that_are_none_are_errors_of_ours(state) -> None:
    """``decode_state`` serves the global generator as well, so it raises our error itself."""
    with pytest.raises(ManifestError):
        numpy_random.decode_state(state)


def test_numpy_is_not_imported_by_the_codecs() -> None:
    """Flattening values of other kinds loads no part of NumPy that was not loaded, such as ``numpy.ma`` and ``numpy.random``."""
    code = (
        "import sys, numpy\n"
        "from expstate.state import tree\n"
        "before = set(sys.modules)\n"
        "tree.flatten('key', {'a': numpy.zeros(3), 'b': object(), 'c': [numpy.zeros(2, [('x', 'i4')])], 'd': numpy.zeros(1, object)})\n"
        "loaded = {name for name in set(sys.modules) - before if name.startswith(('numpy', 'pandas'))}\n"
        "assert not loaded, loaded\n"
        "assert 'pandas' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (0, "") == (done.returncode, done.stderr)
