"""Codecs of NumPy's values beyond plain arrays: structured, object, string and masked arrays, its subclasses, dtypes.

NumPy is recognised through ``sys.modules``: a value can only be one of its kinds if it is loaded. Raw bytes become arrays only of dtypes
that hold no pointers.
"""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from typing import Any, NoReturn

from expstate.errors import ManifestError, UnknownClassError
from expstate.state import numpy_arrays
from expstate.state.codecs import Codec, Parts, register
from expstate.state.forms import is_live, part_forms, shape_of
from expstate.state.values import NotPlainError, decode, encode

_SUBCLASSES = ("recarray", "matrix", "memmap")


def _refuse(reason: str) -> NoReturn:
    raise ManifestError(reason)


def _numpy() -> Any:
    import numpy as np  # noqa: PLC0415 - NumPy is optional

    return np


def _extension(dtype: Any) -> Any:
    """The class of a dtype of ``ml_dtypes`` (bfloat16, float8), by which alone it can be told from raw bytes."""
    extensions = sys.modules.get("ml_dtypes")
    known = extensions is not None and vars(extensions).get(dtype.name) is dtype.type
    return dtype.type if known else None


def encode_dtype(dtype: Any) -> Any:
    """A NumPy dtype as plain JSON; ``NotPlainError`` for one that only pickle can name.

    >>> import numpy as np
    >>> encode_dtype(np.dtype([("x", "<f4"), ("n", "<i8")]))["formats"]
    ['<f4', '<i8']
    """
    if dtype.names is not None:
        fields = [dtype.fields[name] for name in dtype.names]
        return {
            "names": [encode(name) for name in dtype.names],
            "titles": [encode(field[2] if len(field) > 2 else None) for field in fields],  # noqa: PLR2004 - title is the third
            "formats": [encode_dtype(field[0]) for field in fields],
            "offsets": [int(field[1]) for field in fields],
            "itemsize": int(dtype.itemsize),
            "aligned": bool(dtype.isalignedstruct),
            "record": dtype.type is _numpy().record,
        }
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return {"base": encode_dtype(base), "shape": [int(size) for size in shape]}
    if numpy_arrays.is_simple(dtype) or dtype.str in numpy_arrays.EMPTY_DTYPES or dtype.str == "|O":
        return dtype.str
    if dtype.kind == "T":
        return {"missing": encode(dtype.na_object) if hasattr(dtype, "na_object") else "none", "coerce": bool(dtype.coerce), "string": True}
    if _extension(dtype) is not None:
        return {"extension": dtype.name}
    msg = f"NumPy dtype {dtype}"
    raise NotPlainError(msg)


def decode_dtype(encoded: Any, *, pointers: bool = False) -> Any:
    """The dtype that ``encode_dtype`` was given; ``ManifestError`` for any other form.

    Parameters
    ----------
    encoded : Any
        Plain JSON, which may come from anywhere.
    pointers : bool, default False
        Whether dtypes whose items are pointers may come out: never for what is laid over bytes.
    """
    np = _numpy()
    if isinstance(encoded, str):
        if encoded == "|O" and pointers:
            return np.dtype(object)
        if encoded not in numpy_arrays.EMPTY_DTYPES:
            numpy_arrays.item_size(encoded)  # refuses what is not a plain name
        dtype = np.dtype(encoded)
    elif "extension" in encoded:
        dtype = _decode_extension(encoded["extension"])
    elif "base" in encoded:
        dtype = np.dtype((decode_dtype(encoded["base"], pointers=pointers), shape_of(encoded["shape"])))
    elif "string" in encoded and pointers:
        missing = {} if encoded["missing"] == "none" else {"na_object": decode(encoded["missing"])}
        return np.dtypes.StringDType(**missing, coerce=encoded["coerce"] is True)
    else:
        fields = {"names": [decode(name) for name in encoded["names"]], "titles": [decode(title) for title in encoded["titles"]]}
        if all(title is None for title in fields["titles"]):
            del fields["titles"]
        formats = [decode_dtype(entry, pointers=pointers) for entry in encoded["formats"]]
        layout = {"formats": formats, "offsets": encoded["offsets"], "itemsize": encoded["itemsize"]}
        dtype = np.dtype({**fields, **layout}, align=encoded["aligned"] is True)
        dtype = np.dtype((np.record, dtype)) if encoded["record"] is True else dtype
    if dtype.hasobject and not pointers:
        _refuse(f"NumPy dtype {dtype} holds pointers")
    return dtype


def _decode_extension(name: Any) -> Any:
    extensions = sys.modules.get("ml_dtypes")
    found = vars(extensions).get(name) if extensions is not None else None
    np = _numpy()
    if not (isinstance(found, type) and issubclass(found, np.generic)):
        msg = f"NumPy dtype {name!r} is not known in this process; import ml_dtypes first"
        raise UnknownClassError(msg)
    return np.dtype(found)


class _NumpyCodec(Codec):
    def accepts(self, value: Any) -> bool:
        np = sys.modules.get("numpy")
        return np is not None and self.accepts_numpy(np, value)

    @abstractmethod
    def accepts_numpy(self, np: Any, value: Any) -> bool:
        """``accepts``, once NumPy is loaded."""


class _Records(_NumpyCodec):
    """Arrays and scalars whose dtype needs more than a short name: structured ones, ``ml_dtypes``, items of no bytes."""

    name = "numpy.records"

    def accepts_numpy(self, np: Any, value: Any) -> bool:
        known = type(value) is np.ndarray or (isinstance(value, np.generic) and type(value) is value.dtype.type)
        return known and not value.dtype.hasobject and not numpy_arrays.is_simple(value.dtype)

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        np = _numpy()
        meta = {"dtype": encode_dtype(value.dtype), "shape": list(value.shape), "scalar": not isinstance(value, np.ndarray)}
        if value.nbytes == 0:
            return meta, {}
        if not value.flags.c_contiguous:
            # Not ascontiguousarray, which fills the gaps between fields with whatever was in memory.
            dense = np.zeros(value.shape, value.dtype)
            dense[...] = value
            value = dense
        return meta, {"data": np.atleast_1d(value).reshape(-1).view(np.uint8)}

    def check(self, meta: Any) -> None:
        decode_dtype(meta["dtype"])

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:
        if is_live(self, meta, parts, live):
            return live
        np = _numpy()
        dtype, shape = decode_dtype(meta["dtype"]), shape_of(meta["shape"])
        data = parts["data"] if parts else np.empty(0, np.uint8)
        if type(data) is not np.ndarray or data.dtype != np.uint8 or data.nbytes != math.prod(shape) * dtype.itemsize:
            _refuse(f"its bytes do not make {list(shape)} items of {dtype}")
        array = np.ndarray(shape, dtype, buffer=np.ascontiguousarray(data))
        return array[()] if meta["scalar"] is True else array


class _Objects(_NumpyCodec):
    """Arrays of Python objects and of strings of variable length: the items as a list."""

    name = "numpy.objects"

    def accepts_numpy(self, np: Any, value: Any) -> bool:
        return type(value) is np.ndarray and value.dtype.kind in "OT"

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        meta = {"dtype": encode_dtype(value.dtype), "shape": list(value.shape)}
        items = value.reshape(-1).tolist()
        if value.dtype.kind == "T":
            # What stands for a missing item is in the dtype.
            items = [item if type(item) is str else None for item in items]
        return meta, {"items": items}

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:  # noqa: ARG002 - its items are no memory to read into
        np = _numpy()
        dtype, shape, items = decode_dtype(meta["dtype"], pointers=True), shape_of(meta["shape"]), parts["items"]
        if type(items) is not list or len(items) != math.prod(shape) or dtype.kind not in "OT":
            _refuse(f"its items do not make an array of {list(shape)} objects")
        array = np.empty(len(items), dtype)
        for index, item in enumerate(items):
            array[index] = dtype.na_object if item is None and dtype.kind == "T" else item
        return array.reshape(shape)


class _Masked(_NumpyCodec):
    name = "numpy.masked"

    def accepts_numpy(self, np: Any, value: Any) -> bool:
        # numpy.ma is loaded when it is first used, which this is not.
        return isinstance(value, np.ndarray) and "numpy.ma" in sys.modules and type(value) is np.ma.MaskedArray

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        np = _numpy()
        # The private name: the public one makes a default up where there is none, and keeps it.
        filling = value._fill_value  # noqa: SLF001
        parts = {"data": value.data}
        if value.mask is not np.ma.nomask:
            parts["mask"] = np.ma.getmaskarray(value)
        if filling is not None:
            parts["fill"] = np.asarray(filling)
        return {"fill": filling is not None, "hard": bool(value.hardmask), "parts": part_forms(parts)}, parts

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:
        if is_live(self, meta, parts, live):
            return live
        np = _numpy()
        fill = parts["fill"][()] if meta["fill"] is True else None
        mask = parts.get("mask", np.ma.nomask)
        return np.ma.MaskedArray(parts["data"], mask=mask, fill_value=fill, hard_mask=meta["hard"] is True)


class _Subclassed(_NumpyCodec):
    """``recarray`` and ``matrix`` as views of an array; a ``memmap`` comes back as an array in memory."""

    name = "numpy.subclass"

    def accepts_numpy(self, np: Any, value: Any) -> bool:
        return isinstance(value, np.ndarray) and any(type(value) is getattr(np, name, None) for name in _SUBCLASSES)

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        parts = {"array": _numpy().asarray(value)}
        return {"class": type(value).__name__, "parts": part_forms(parts)}, parts

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:
        if is_live(self, meta, parts, live):
            return live
        np = _numpy()
        if meta["class"] not in _SUBCLASSES or type(parts["array"]) is not np.ndarray:
            _refuse(f"unknown class of arrays {meta['class']!r}")
        return parts["array"] if meta["class"] == "memmap" else parts["array"].view(getattr(np, meta["class"]))


class _Dtype(_NumpyCodec):
    name = "numpy.dtype"

    def accepts_numpy(self, np: Any, value: Any) -> bool:
        return isinstance(value, np.dtype)

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        return encode_dtype(value), {}

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:  # noqa: ARG002 - a dtype has no parts
        return decode_dtype(meta, pointers=True)


for _codec in (_Records(), _Objects(), _Masked(), _Subclassed(), _Dtype()):
    register(_codec)
