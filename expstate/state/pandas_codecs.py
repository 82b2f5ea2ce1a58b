"""Codecs of pandas: frames and series by columns and index, index objects, extension arrays, and its scalars.

pandas is recognised through ``sys.modules``. Columns of numbers and times are NumPy arrays, stored and verified like tensors; what has
no plain form (a third-party extension array) is left to ``torch.save``.
"""

from __future__ import annotations

import importlib
import sys
from abc import abstractmethod
from typing import Any, NoReturn

from expstate.errors import ManifestError, UnknownClassError
from expstate.state import paths
from expstate.state.codecs import Codec, Parts, register
from expstate.state.forms import part_forms
from expstate.state.values import NotPlainError, decode, encode, encode_tree

_INDEX, _COLUMNS, _VALUES = "%index", "%columns", "%values"  # no column's part looks like these
_MASKED = ("IntegerArray", "FloatingArray", "BooleanArray")
_ORDINAL_BYTES = 8
_UNITS = frozenset({"s", "ms", "us", "ns"})


def _pandas() -> Any:
    try:
        return importlib.import_module("pandas")
    except ImportError:
        msg = "pandas is not installed here, and this entry is one of its objects; install it, or exclude the entry"
        raise UnknownClassError(msg) from None


def _refuse(reason: str) -> NoReturn:
    raise ManifestError(reason)


def _is_of_pandas(value: Any) -> bool:
    # While pandas is being imported it has not all its names yet, but there are no values of it either.
    return type(value).__module__.partition(".")[0] == "pandas"


class _PandasCodec(Codec):
    def accepts(self, value: Any) -> bool:
        pd = sys.modules.get("pandas")
        return pd is not None and _is_of_pandas(value) and self.accepts_pandas(pd, value)

    def check(self, meta: Any) -> None:  # noqa: ARG002 - the package is what may be missing
        _pandas()

    @abstractmethod
    def accepts_pandas(self, pd: Any, value: Any) -> bool:
        """``accepts``, for what is a value of pandas."""


# Scalars and labels


def _encode_zone(zone: Any) -> Any:
    name = getattr(zone, "zone", None)
    if type(zone).__module__.partition(".")[0] == "pytz" and name is not None:
        return {"pytz": name}
    return encode(zone)


def _decode_zone(encoded: Any) -> Any:
    if not isinstance(encoded, dict) or "pytz" not in encoded:
        return decode(encoded)
    pytz = sys.modules.get("pytz")
    return decode({"type": "timezone", "value": encoded["pytz"]}) if pytz is None else pytz.timezone(encoded["pytz"])


def encode_label(value: Any) -> Any:
    """A name, or an item of pandas, as plain JSON; ``NotPlainError`` if it has no plain form.

    >>> encode_label("loss"), encode_label(("train", 1))
    ('loss', {'type': 'tuple', 'value': ['train', 1]})
    """
    pd = sys.modules.get("pandas")
    if pd is None or not _is_of_pandas(value):
        return encode(value)
    for name in ("NA", "NaT"):
        if value is getattr(pd, name):
            return {"pandas": name}
    if type(value) in {pd.Timestamp, pd.Timedelta}:
        number = value.asm8
        zone = _encode_zone(value.tzinfo) if type(value) is pd.Timestamp else None
        return {"pandas": type(value).__name__, "value": int(number.view("i8")), "unit": value.unit, "zone": zone}
    msg = f"{type(value).__qualname__} of pandas"
    raise NotPlainError(msg)


def decode_label(encoded: Any) -> Any:
    """What ``encode_label`` was given."""
    if not isinstance(encoded, dict) or "pandas" not in encoded:
        return decode(encoded)
    pd, kind = _pandas(), encoded["pandas"]
    if kind in {"NA", "NaT"}:
        return getattr(pd, kind)
    if kind not in {"Timestamp", "Timedelta"} or encoded["unit"] not in _UNITS:
        _refuse(f"unknown item of pandas {str(encoded)[:80]}")
    value = pd.array([encoded["value"]], dtype="int64").to_numpy().view(f"{'M' if kind == 'Timestamp' else 'm'}8[{encoded['unit']}]")[0]
    if kind == "Timedelta":
        return pd.Timedelta(value)
    zone = _decode_zone(encoded["zone"])
    return pd.Timestamp(value) if zone is None else pd.Timestamp(value).tz_localize("UTC").tz_convert(zone)


class _Scalar(_PandasCodec):
    name = "pandas.scalar"

    def accepts_pandas(self, pd: Any, value: Any) -> bool:
        return value is pd.NA or value is pd.NaT or type(value) in {pd.Timestamp, pd.Timedelta}

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        return encode_label(value), {}

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:  # noqa: ARG002 - a scalar has no parts
        return decode_label(meta)


# Arrays


def _column(values: Any) -> Any:
    """The array of a series or index: NumPy's where it is one, else pandas' own."""
    import numpy as np  # noqa: PLC0415 - where pandas is, NumPy is

    if not isinstance(values.dtype, np.dtype):
        return values.array
    return _fixed(values.to_numpy())


def _fixed(array: Any) -> Any:
    """The array, not to be written to: frames share memory behind their users' backs, so that a restore must not refill it."""
    array = array.view()
    array.flags.writeable = False
    return array


def _ordinals(data: Any) -> Any:
    if getattr(getattr(data, "dtype", None), "kind", None) != "i" or data.dtype.itemsize != _ORDINAL_BYTES or data.ndim != 1:
        _refuse("times have to be a row of 64-bit numbers")
    return data


def _times(data: Any, unit: Any) -> Any:
    if unit not in _UNITS:
        _refuse(f"unknown unit of time {str(unit)[:80]}")
    return _ordinals(data).view(f"M8[{unit}]")


class _Array(_PandasCodec):
    """Extension arrays that pandas ships."""

    name = "pandas.array"

    def accepts_pandas(self, pd: Any, value: Any) -> bool:
        return isinstance(value, pd.api.extensions.ExtensionArray)

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        pd = _pandas()
        kind = type(value).__name__
        meta, parts = self._take_apart(pd, kind, value)
        return {"kind": kind, "parts": part_forms(parts), **meta}, parts

    def _take_apart(self, pd: Any, kind: str, value: Any) -> tuple[dict[str, Any], Parts]:
        if isinstance(value.dtype, pd.StringDtype):
            missing = "NA" if getattr(value.dtype, "na_value", pd.NA) is pd.NA else "nan"
            items = value.to_numpy(object, na_value=None).tolist()
            return {"kind": "String", "storage": value.dtype.storage, "missing": missing}, {"items": items}
        if type(value) is getattr(pd.arrays, kind, None):
            if kind == "Categorical":
                return {"ordered": bool(value.ordered)}, {"codes": _fixed(value.codes), "categories": value.categories}
            if kind in _MASKED:
                return {}, {"data": _fixed(value._data), "mask": _fixed(value._mask)}  # noqa: SLF001 - lossless only there
            if kind == "DatetimeArray" and value.tz is not None:
                return {"zone": _encode_zone(value.tz), "unit": value.dtype.unit}, {"data": _fixed(value.asi8)}
            if kind == "PeriodArray":
                return {"freq": value.freqstr}, {"data": _fixed(value.asi8)}
            if kind == "IntervalArray":
                return {"closed": value.closed}, {"left": value.left, "right": value.right}
        msg = f"{kind} of pandas"
        raise NotPlainError(msg)

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:  # noqa: ARG002 - pandas shares memory: arrays are made anew
        pd = _pandas()
        kind = meta["kind"]
        if kind == "Categorical":
            dtype = pd.CategoricalDtype(parts["categories"], ordered=meta["ordered"] is True)
            return pd.Categorical.from_codes(parts["codes"], dtype=dtype)
        if kind == "String":
            return pd.array(parts["items"], dtype=_string_dtype(pd, meta))
        if kind in _MASKED:
            return getattr(pd.arrays, kind)(parts["data"], parts["mask"])
        if kind == "DatetimeArray":
            times = pd.DatetimeIndex(_times(parts["data"], meta["unit"]))
            return times.tz_localize("UTC").tz_convert(_decode_zone(meta["zone"])).array
        if kind == "PeriodArray":
            return pd.arrays.PeriodArray(_ordinals(parts["data"]), dtype=pd.PeriodDtype(meta["freq"]))
        if kind == "IntervalArray":
            return pd.arrays.IntervalArray.from_arrays(parts["left"], parts["right"], closed=meta["closed"])
        _refuse(f"unknown array of pandas {str(kind)[:80]}")


def _string_dtype(pd: Any, meta: Any) -> Any:
    missing = {} if meta["missing"] == "NA" else {"na_value": float("nan")}
    try:
        return pd.StringDtype(meta["storage"], **missing)
    except ImportError:
        # The same strings, without pyarrow.
        return pd.StringDtype("python", **missing)


# Index objects


class _Index(_PandasCodec):
    name = "pandas.Index"

    def accepts_pandas(self, pd: Any, value: Any) -> bool:
        return isinstance(value, pd.Index) and type(value) is getattr(pd, type(value).__name__, None)

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        pd = _pandas()
        if isinstance(value, pd.MultiIndex):
            codes = [_fixed(codes) for codes in value.codes]
            return {"names": [encode_label(name) for name in value.names]}, {"levels": list(value.levels), "codes": codes}
        meta: dict[str, Any] = {"name": encode_label(value.name)}
        if isinstance(value, pd.RangeIndex):
            return meta | {"range": [int(value.start), int(value.stop), int(value.step)]}, {}
        if isinstance(value, (pd.DatetimeIndex, pd.TimedeltaIndex)):
            meta["freq"] = value.freqstr
        parts = {_VALUES: _column(value)}
        return meta | {"parts": part_forms(parts)}, parts

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:  # noqa: ARG002 - an index never changes
        pd = _pandas()
        if "names" in meta:
            names = [decode_label(name) for name in meta["names"]]
            return pd.MultiIndex(levels=parts["levels"], codes=parts["codes"], names=names, verify_integrity=True)
        name = decode_label(meta["name"])
        if "range" in meta:
            return pd.RangeIndex(*meta["range"], name=name)
        values = parts[_VALUES]
        built = pd.Index(values, dtype=values.dtype, name=name, copy=False)
        if meta.get("freq") is not None:
            built.freq = meta["freq"]
        return built


# Series and frames


def _encode_extras(value: Any) -> dict[str, Any]:
    return {"attrs": encode_tree(dict(value.attrs)), "duplicates": bool(value.flags.allows_duplicate_labels)}


def _add_extras(value: Any, meta: Any) -> Any:
    value.attrs = decode(meta["attrs"])
    if meta["duplicates"] is False:
        value.flags.allows_duplicate_labels = False
    return value


def _series(pd: Any, values: Any, index: Any) -> Any:
    if not isinstance(index, pd.Index) or getattr(values, "ndim", None) != 1:
        _refuse("a column or an index is missing, or not a row")
    # With its dtype named, pandas does not infer another.
    return pd.Series(values, index=index, dtype=values.dtype, copy=False)


class _Series(_PandasCodec):
    name = "pandas.Series"

    def accepts_pandas(self, pd: Any, value: Any) -> bool:
        return type(value) is pd.Series

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        parts = {_INDEX: value.index, _VALUES: _column(value)}
        return {"name": encode_label(value.name), **_encode_extras(value), "parts": part_forms(parts)}, parts

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:  # noqa: ARG002 - pandas shares memory: series are made anew
        series = _series(_pandas(), parts[_VALUES], parts[_INDEX])
        series.name = decode_label(meta["name"])
        return _add_extras(series, meta)


class _Frame(_PandasCodec):
    name = "pandas.DataFrame"

    def accepts_pandas(self, pd: Any, value: Any) -> bool:
        return type(value) is pd.DataFrame

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        names = paths.key_parts(list(value.columns))
        if len(set(names)) < len(names):
            names = [str(number) for number in range(len(names))]
        columns = {name: _column(value.iloc[:, number]) for number, name in enumerate(names)}
        parts = {_INDEX: value.index, _COLUMNS: value.columns, **columns}
        return {**_encode_extras(value), "parts": part_forms(parts)}, parts

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:  # noqa: ARG002 - pandas shares memory: frames are made anew
        pd = _pandas()
        index, names = parts[_INDEX], parts[_COLUMNS]
        columns = [values for part, values in parts.items() if part not in {_INDEX, _COLUMNS}]
        if not isinstance(names, pd.Index) or len(names) != len(columns):
            _refuse(f"{len(columns)} columns do not fit their names")
        frame = pd.DataFrame({number: _series(pd, values, index) for number, values in enumerate(columns)}, index=index, copy=False)
        frame.columns = names
        return _add_extras(frame, meta)


for _codec in (_Scalar(), _Array(), _Index(), _Series(), _Frame()):
    register(_codec)
