"""Frames, series, index objects, extension arrays and scalars of pandas."""

from __future__ import annotations

import datetime as dt
import importlib.util
import subprocess
import sys
import zoneinfo
from typing import Any

import numpy as np
import pytest

from expstate.errors import UnknownClassError
from expstate.state import codecs, pandas_codecs, tree

from .conftest import GARBAGE, through_json

pd = pytest.importorskip("pandas")

BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")


def _named(value: Any, **extras: Any) -> Any:
    for name, extra in extras.items():
        setattr(value, name, extra)
    return value


SERIES = {
    "floats": pd.Series([1.5, np.nan, -0.0], name="loss"),
    "float32": pd.Series(np.arange(3, dtype=np.float32)),
    "float16": pd.Series(np.arange(3, dtype=np.float16)),
    "ints": pd.Series([1, 2], index=["a", "b"], dtype="int8"),
    "bools": pd.Series([True, False]),
    "complex": pd.Series([1j, 2]),
    "objects": pd.Series(["a", None, 1.5, (1, 2)], dtype=object),
    "texts as objects": pd.Series(["a", "b"], dtype=object),
    "texts": pd.Series(["a", None, "ü"], dtype="str"),
    "string": pd.Series(["a", None], dtype="string[python]"),
    "Int64": pd.Series([1, None], dtype="Int64"),
    "UInt8": pd.Series([1, None], dtype="UInt8"),
    "Float32": pd.Series([1.5, None], dtype="Float32"),
    "boolean": pd.Series([True, None, False], dtype="boolean"),
    "category": pd.Series(["b", "a", None], dtype="category"),
    "ordered category": pd.Series(pd.Categorical([1, 3, 1], categories=[3, 2, 1], ordered=True)),
    "times": pd.Series(pd.to_datetime(["2026-01-01", None])),
    "seconds": pd.Series(np.array([1, 2], "M8[s]")),
    "times in a zone": pd.Series(pd.to_datetime(["2026-07-01 00:00:00.5", None, "2026-01-01 01:02:03.4"]).tz_localize(BERLIN)),
    "times in utc": pd.Series(pd.to_datetime(["2026-07-01"]).tz_localize("UTC")),
    "times at an offset": pd.Series(pd.to_datetime(["2026-07-01"]).tz_localize(dt.timezone(dt.timedelta(hours=5)))),
    "spans": pd.Series(pd.to_timedelta([1, None], unit="s")),
    "periods": pd.Series(pd.period_range("2026-01", periods=2, freq="M")),
    "intervals": pd.Series(pd.arrays.IntervalArray.from_breaks([0.0, 1.5, 2.0], closed="left")),
    "empty": pd.Series([], dtype="float64"),
    "empty objects": pd.Series([], dtype=object, name=("a", 1)),
    "timestamp as name": pd.Series([1], name=pd.Timestamp("2026-01-01", tz=BERLIN)),
    "attrs": _named(pd.Series([1]), attrs={"unit": "m", 1: [2.5]}),
    "no duplicates": pd.Series([1, 2]).set_flags(allows_duplicate_labels=False),
    "nested objects": pd.Series([np.arange(2), {"a": 1}], dtype=object),
}

INDEXES = {
    "range": pd.RangeIndex(2, 11, 3, name="i"),
    "ints": pd.Index([3, 1], dtype="int16"),
    "floats": pd.Index([0.5, np.nan], name=("a", "b")),
    "bools": pd.Index([True, False]),
    "objects": pd.Index(["a", 1, None], dtype=object),
    "texts": pd.Index(["a", "b"], dtype="str"),
    "texts as objects": pd.Index(["a", "b"], dtype=object),
    "Int64": pd.Index([1, None], dtype="Int64"),
    "times": pd.DatetimeIndex(["2026-01-01", "2026-01-03"], name="t"),
    "times with a frequency": pd.date_range("2026", periods=3, freq="2h"),
    "times in a zone with a frequency": pd.date_range("2026-03-28", periods=4, freq="D", tz=BERLIN),
    "month ends": pd.date_range("2026", periods=3, freq="ME"),
    "nanoseconds": pd.DatetimeIndex(np.array([1, 2], "M8[ns]")),
    "spans": pd.timedelta_range("1s", periods=3, freq="min"),
    "categories": pd.CategoricalIndex(["a", "b", "a"], ordered=True, name="c"),
    "intervals": pd.interval_range(0, 3),
    "intervals of times": pd.interval_range(pd.Timestamp("2026"), periods=2, freq="D", closed="both"),
    "periods": pd.period_range("2026Q1", periods=3, freq="Q"),
    "levels": pd.MultiIndex.from_product([["a", "b"], [1, 2], pd.to_datetime(["2026"])], names=["x", None, 3]),
    "levels not used": pd.MultiIndex(levels=[["a", "b"], [1.5]], codes=[[1, -1], [0, 0]], names=["x", "x"]),
    "empty": pd.Index([], dtype=object),
    "empty levels": pd.MultiIndex.from_arrays([[], []], names=["a", "b"]),
}

FRAMES = {
    "mixed": pd.DataFrame({"step": [1, 2], "loss": [0.5, np.nan], "note": ["a", None], "ok": [True, False]}),
    "every column": pd.DataFrame(
        {name: series.reset_index(drop=True) for name, series in SERIES.items() if len(series) == 2 and not series.attrs}
    ),
    "index of times": pd.DataFrame({"a": [1.0, 2.0]}, index=pd.date_range("2026", periods=2, freq="D", tz="UTC", name="t")),
    "index of levels": pd.DataFrame({"a": [1, 2]}, index=pd.MultiIndex.from_tuples([("x", 1), ("y", 2)], names=["k", "n"])),
    "columns of levels": pd.DataFrame(np.ones((2, 2)), columns=pd.MultiIndex.from_tuples([("x", 1), ("x", 2)])),
    "columns of ints": pd.DataFrame(np.arange(6).reshape(2, 3)),
    "columns twice": pd.DataFrame([[1, "a"], [2, "b"]], columns=["x", "x"]),
    "columns that print alike": pd.DataFrame([[1, 2, 3]], columns=[1, "1", True]),
    "columns with slashes": pd.DataFrame({"a/b": [1], "100%": [2], "%index": [3], "%columns": [4], "": [5], "%empty": [6]}),
    "columns of times": pd.DataFrame([[1, 2]], columns=pd.date_range("2026", periods=2)),
    "name of the columns": pd.DataFrame({"a": [1]}).rename_axis(columns="metric"),
    "no columns": pd.DataFrame(index=[1, 2]),
    "no rows": pd.DataFrame({"a": pd.Series([], dtype="float32"), "b": pd.Series([], dtype="category")}),
    "nothing": pd.DataFrame(),
    "attrs": _named(pd.DataFrame({"a": [1]}), attrs={"run": {"id": 3}}),
    "slices": pd.DataFrame(np.arange(24.0).reshape(6, 4)).iloc[::2, ::-1],
}


@pytest.mark.parametrize("value", SERIES.values(), ids=SERIES)
def test_series_come_back(value, roundtrip, same) -> None:
    """Values, dtype, index, name and attributes are kept without pickle."""
    assert not any(isinstance(leaf, tree.Object) for leaf in tree.flatten("key", value))
    restored = roundtrip({"a": value})["a"]
    if value.map(type).isin([np.ndarray, dict]).any():
        same(value.tolist(), restored.tolist())
    else:
        same(value, restored)
    assert value.flags.allows_duplicate_labels == restored.flags.allows_duplicate_labels


@pytest.mark.parametrize("value", INDEXES.values(), ids=INDEXES)
def test_indexes_come_back(value, roundtrip, same) -> None:
    """Kind, values, names, levels, zone and frequency are kept without pickle."""
    assert not any(isinstance(leaf, tree.Object) for leaf in tree.flatten("key", value))
    restored = roundtrip([value])[0]
    same(value, restored)
    assert value.names == restored.names


@pytest.mark.parametrize("value", FRAMES.values(), ids=FRAMES)
def test_frames_come_back(value, roundtrip, same) -> None:
    """Columns with their dtypes, names and order, index and attributes are kept without pickle."""
    assert not any(isinstance(leaf, tree.Object) for leaf in tree.flatten("key", value))
    restored = roundtrip({"a": value})["a"]
    same(value, restored)
    same(value.columns, restored.columns)


@pytest.mark.parametrize(
    "value",
    [
        pd.Timestamp("2026-01-01 01:02:03.000000004"),
        pd.Timestamp("2026-10-25 02:30+02:00").tz_convert(BERLIN),
        pd.Timestamp("2026-10-25 02:30+01:00").tz_convert(BERLIN),
        pd.Timedelta("1ns"),
        pd.Timedelta(days=-3),
        pd.NA,
        pd.NaT,
    ],
    ids=str,
)
def test_scalars_come_back(value, roundtrip) -> None:
    """Times and spans keep unit, zone and fold; what is missing is the same object."""
    restored = roundtrip({"a": [value]})["a"][0]
    assert type(value) is type(restored)
    assert str(value) == str(restored)
    assert getattr(value, "unit", None) == getattr(restored, "unit", None)
    assert getattr(value, "fold", None) == getattr(restored, "fold", None)


@pytest.mark.parametrize(
    "value",
    [
        pd.array([1, None]),
        pd.Categorical(["a"]),
        pd.array(["a", None], dtype="string[python]"),
        pd.date_range("2026", periods=2, tz="UTC").array,
    ],
    ids=lambda value: type(value).__name__,
)
def test_arrays_are_values_of_their_own(value, roundtrip) -> None:
    """An extension array need not be in a series."""
    restored = roundtrip([value])[0]
    assert type(value) is type(restored)
    assert value.dtype == restored.dtype
    assert value.equals(restored)


def test_columns_have_paths_by_name() -> None:
    """A column is found under its name, and one whose name is taken twice by its number."""
    frame = pd.DataFrame({"loss": [1.0], "a/b": [2.0]})
    assert {"k/%index", "k/%columns", "k/loss", "k/a%2Fb"} <= {leaf.path for leaf in tree.flatten("k", frame)}
    twice = pd.DataFrame([[1, 2]], columns=["a", "a"])
    assert {"k/0", "k/1"} <= {leaf.path for leaf in tree.flatten("k", twice)}


def test_numbers_are_streamed_and_not_copied() -> None:
    """A frame of numbers is arrays over the frame's own memory, and its JSON is short."""
    data = np.random.default_rng(0).random((50_000, 3))
    frame = pd.DataFrame(data, columns=["a", "b", "c"])
    leaves = tree.flatten("k", frame)
    arrays = [leaf for leaf in leaves if isinstance(leaf, tree.Array)]
    assert [(50_000,)] * 3 == [leaf.shape for leaf in arrays]
    for number, leaf in enumerate(arrays):
        assert frame.iloc[:, number].to_numpy().__array_interface__["data"][0] == leaf.tensor.data_ptr()
    assert all(len(str(leaf.meta)) < 500 for leaf in leaves if isinstance(leaf, tree.Container))


def test_long_texts_are_packed() -> None:
    """A column of many strings is no long JSON either."""
    frame = pd.DataFrame({"a": pd.Series(["some text", None] * 10_000, dtype="str"), "b": pd.Series(["other"] * 20_000, dtype=object)})
    assert all(len(str(leaf.encoded)) < 100 for leaf in tree.flatten("k", frame) if isinstance(leaf, tree.Value))


def test_live_frames_are_never_written_to(refill, same) -> None:
    """Frames share memory with one another: a restore makes a new one, whatever stands in its place."""
    value, live = pd.DataFrame({"a": [1.0, 2.0], "b": pd.array([1, None])}), pd.DataFrame({"a": [0.0, 0.0], "b": pd.array([3, 4])})
    other = live["a"]
    restored = refill({"f": value}, {"f": live})["f"]
    same(value, restored)
    same(pd.Series([0.0, 0.0], name="a"), other)
    same(pd.DataFrame({"a": [0.0, 0.0], "b": pd.array([3, 4])}), live)


def test_restored_frames_can_be_written_to(roundtrip) -> None:
    """What comes back is a frame like any other."""
    frame = roundtrip(pd.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]}))
    frame.loc[0, "a"] = 5.0
    frame["c"] = 1
    assert [5.0, 2.0] == frame["a"].tolist()


class _Frame(pd.DataFrame):
    """A frame of somebody's own."""


@pytest.mark.parametrize(
    "value",
    [
        pd.Series(pd.arrays.SparseArray([0, 0, 1])).array,
        _Frame({"a": [1]}),
        _named(pd.DataFrame({"a": [1]}), attrs={"x": object()}),
        _named(pd.Series([1]), attrs={"x": print}),
        pd.Series([1], name=pd.Interval(0, 1)),
        pd.Series([1], name=type("Text", (str,), {})("a")),
        pd.Interval(0, 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_plain_form_is_left_to_pickle(value) -> None:
    """Subclasses, sparse arrays and attributes of any kind are objects as a whole."""
    (leaf,) = tree.flatten("key", value)
    assert isinstance(leaf, tree.Object)


def test_the_rest_of_a_frame_does_not_need_pickle() -> None:
    """A column that only pickle can store is the only one that it stores."""
    frame = pd.DataFrame({"a": [1.0, 2.0], "s": pd.arrays.SparseArray([0, 1])})
    assert ["key/s"] == [leaf.path for leaf in tree.flatten("key", frame) if isinstance(leaf, tree.Object)]


# Hostile


def _taken_apart(value: Any) -> tuple[str, Any, dict[str, Any]]:
    codec = codecs.find(value)
    assert codec is not None
    meta, parts = codec.flatten(value)
    return codec.name, through_json(meta), parts


@pytest.mark.parametrize(
    ("value", "change", "parts"),
    [
        (pd.Categorical(["a"]), {}, {"codes": np.array([5], np.int8)}),
        (pd.Categorical(["a"]), {}, {"codes": np.array([-2], np.int8)}),
        (pd.Categorical(["a"]), {}, {"codes": "x"}),
        (pd.Categorical(["a"]), {}, {"categories": None}),
        (pd.MultiIndex.from_arrays([[1, 2]]), {}, {"codes": [np.array([0, 9], np.int8)]}),
        (pd.MultiIndex.from_arrays([[1, 2]]), {}, {"codes": [np.array([0, -2], np.int8)]}),
        (pd.MultiIndex.from_arrays([[1, 2]]), {}, {"levels": []}),
        (pd.MultiIndex.from_arrays([[1, 2]]), {"names": []}, {}),
        (pd.RangeIndex(3), {"range": [0, 1, 0]}, {}),
        (pd.RangeIndex(3), {"range": ["a"]}, {}),
        (pd.RangeIndex(3), {"range": None}, {}),
        (pd.Index([1, 2]), {}, {"%values": None}),
        (pd.Index([1, 2]), {}, {"%values": np.zeros((2, 2))}),
        (pd.date_range("2026", periods=3), {"freq": "load"}, {}),
        (pd.date_range("2026", periods=3), {"freq": "h"}, {}),
        (pd.date_range("2026", periods=3, tz=BERLIN).array, {"unit": "D"}, {}),
        (pd.date_range("2026", periods=3, tz=BERLIN).array, {"unit": "O"}, {}),
        (pd.date_range("2026", periods=3, tz=BERLIN).array, {}, {"data": np.zeros(3)}),
        (pd.date_range("2026", periods=3, tz=BERLIN).array, {}, {"data": np.array([None] * 3)}),
        (pd.date_range("2026", periods=3, tz=BERLIN).array, {"zone": {"type": "timezone", "value": "/etc/passwd"}}, {}),
        (pd.date_range("2026", periods=3, tz=BERLIN).array, {"zone": {"pytz": "../../etc/passwd"}}, {}),
        (pd.date_range("2026", periods=3, tz=BERLIN).array, {"zone": "dateutil//etc/passwd"}, {}),
        (pd.array([1, None]), {}, {"mask": np.zeros(9, bool)}),
        (pd.array([1, None]), {}, {"mask": np.zeros(2)}),
        (pd.array([1, None]), {}, {"data": np.array([None, None])}),
        (pd.array([1, None]), {"kind": "load"}, {}),
        (pd.array([1, None]), {"kind": ["IntegerArray"]}, {}),
        (pd.array(["a"], dtype=pd.StringDtype(na_value=np.nan)), {"storage": "load"}, {}),
        (pd.array(["a"], dtype=pd.StringDtype(na_value=np.nan)), {}, {"items": 5}),
        (pd.period_range("2026", periods=2, freq="M").array, {"freq": "load"}, {}),
        (pd.period_range("2026", periods=2, freq="M").array, {}, {"data": np.zeros(2)}),
        (pd.interval_range(0, 2).array, {"closed": "load"}, {}),
        (pd.interval_range(0, 2).array, {}, {"left": pd.Index([9, 9])}),
        (pd.Series([1]), {}, {"%values": np.zeros(5)}),
        (pd.Series([1]), {}, {"%values": np.zeros((1, 1))}),
        (pd.Series([1]), {}, {"%values": "x"}),
        (pd.Series([1]), {}, {"%index": [0]}),
        (pd.Series([1]), {"attrs": [1]}, {}),
        (pd.Series([1]), {"name": {"pandas": "read_pickle"}}, {}),
        (pd.Series([1]), {"name": {"pandas": "Timestamp", "value": "x", "unit": "ns", "zone": None}}, {}),
        (pd.Series([1]), {"name": []}, {}),
        (pd.DataFrame({"a": [1]}), {}, {"a": np.zeros(7)}),
        (pd.DataFrame({"a": [1]}), {}, {"b": np.zeros(1)}),
        (pd.DataFrame({"a": [1]}), {}, {"%columns": None}),
        (pd.DataFrame({"a": [1]}), {}, {"%index": None}),
        (pd.NaT, {"pandas": "Timestamp", "value": 1, "unit": "x", "zone": None}, {}),
        (pd.NaT, {"pandas": "Timestamp", "value": 2**80, "unit": "s", "zone": None}, {}),
        (pd.NaT, {"pandas": "read_pickle"}, {}),
    ],
)
def test_hostile_metadata_is_refused(value, change, parts, hostile) -> None:
    """Codes outside their levels, columns of other lengths, names of functions: each is an error of ours."""
    name, meta, good = _taken_apart(value)
    hostile(name, {**meta, **change}, {**good, **parts})


@pytest.mark.parametrize(
    "value", [pd.Series([1]), pd.DataFrame({"a": [1]}), pd.Index([1]), pd.array([1])], ids=lambda value: type(value).__name__
)
@pytest.mark.parametrize("garbage", GARBAGE, ids=str)
def test_garbage_is_refused(value, garbage, hostile) -> None:
    """Metadata that is not what the codecs write is an error of ours."""
    name, _, parts = _taken_apart(value)
    hostile(name, garbage, parts)


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is here")
def test_strings_of_pyarrow_need_no_pyarrow() -> None:
    """Strings that pyarrow held come back without it."""
    meta = {"kind": "String", "storage": "pyarrow", "missing": "NA"}
    restored = tree.build([tree.Part("key", "pandas.array", meta, None), tree.Part("key/items", None, None, ["a", None])], {})
    assert ["a", pd.NA] == restored.tolist()


def test_absent_pandas_is_told(monkeypatch) -> None:
    """Where pandas is not installed, the error says so and names the entry."""
    name, meta, parts = _taken_apart(pd.RangeIndex(3))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UnknownClassError, match=r"'key'.*pandas is not installed"):
        tree.build([tree.Part("key", name, meta, None)], {})
    assert not parts


def test_zones_of_pytz_are_kept_by_name() -> None:
    """Where pandas used pytz, a zone is that of pytz if it is loaded, else of the standard library."""
    zone = type("Zone", (dt.tzinfo,), {"zone": "Europe/Berlin", "__module__": "pytz.tzfile"})()
    encoded = through_json(pandas_codecs._encode_zone(zone))
    assert {"pytz": "Europe/Berlin"} == encoded
    if "pytz" not in sys.modules:
        assert BERLIN == pandas_codecs._decode_zone(encoded)


def test_pandas_is_not_imported_by_a_take() -> None:
    """Without pandas loaded, nothing of it is loaded to flatten or build other values."""
    code = (
        "import sys\n"
        "from expstate.state import pandas_codecs, tree\n"
        "tree.flatten('key', {'a': object(), 'b': [1, print]})\n"
        "assert pandas_codecs.encode_label('a') == 'a'\n"
        "assert 'pandas' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (0, "") == (done.returncode, done.stderr)
