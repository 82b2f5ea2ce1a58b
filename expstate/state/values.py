"""Plain Python values as JSON and back, without pickle and without importing anything by name.

``encode`` gives what msgspec writes as it is: ``None``, bool, str, finite float, 64-bit int and lists of these stand for themselves,
all else is an object ``{"type": ..., "value": ...}``. A value outside this list raises ``NotPlainError``.
"""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import enum
import fractions
import math
import pathlib
import struct
import sys
import uuid
import zoneinfo
from typing import TYPE_CHECKING, Any

import torch

from expstate.errors import ManifestError, UnknownClassError
from expstate.state import numpy_arrays

if TYPE_CHECKING:
    from collections.abc import Callable

_INT64 = range(-(2**63), 2**63)


_LONG_BYTES = 64 * 1024
_LONG_ITEMS = 10_000


class NotPlainError(TypeError):
    """The value is not one of the plain kinds, or is too long to be written inline."""


def is_long(value: Any) -> bool:
    """Whether a plain value is stored as a tensor rather than inline: see ``packed``.

    >>> is_long(b"12"), is_long([0.5] * 20_000), is_long([0.5, "a"] * 20_000)
    (False, True, False)
    """
    kind = type(value)
    if kind in {bytes, bytearray, str}:
        return len(value) > _LONG_BYTES
    if kind not in {list, tuple} or len(value) <= _LONG_ITEMS:
        return False
    kinds = set(map(type, value))
    if kinds == {int}:
        return min(value) in _INT64 and max(value) in _INT64
    return kinds == {float} or (str in kinds and kinds <= {str, type(None)})


def _tag(kind: str, value: Any, **more: Any) -> dict[str, Any]:
    return {"type": kind, "value": value, **more}


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _encode_int(value: int) -> Any:
    return value if value in _INT64 else _tag("int", hex(value))


def _encode_float(value: float) -> Any:
    return value if math.isfinite(value) else _tag("float", struct.pack(">d", value).hex())


def _refuse_long(value: Any) -> None:
    if is_long(value):
        msg = f"{type(value).__name__} of {len(value):,} items is too long to be written inline"
        raise NotPlainError(msg)


def _encode_bytes(value: bytes | bytearray) -> Any:
    _refuse_long(value)
    return _tag(type(value).__name__, _text(bytes(value)))


def _encode_list(value: list[Any]) -> list[Any]:
    _refuse_long(value)
    return [encode(item) for item in value]


def _encode_tuple(value: tuple[Any, ...]) -> Any:
    _refuse_long(value)
    return _tag("tuple", [encode(item) for item in value])


def _encode_str(value: str) -> Any:
    _refuse_long(value)
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:
        return _tag("str", _text(value.encode("utf-8", "surrogatepass")))
    return value


def _encode_zone(zone: dt.tzinfo | None) -> Any:
    if zone is None:
        return None
    if type(zone) is dt.timezone:
        offset = zone.utcoffset(None)
        return [offset.days, offset.seconds, offset.microseconds]
    if isinstance(zone, zoneinfo.ZoneInfo) and zone.key:
        return zone.key
    msg = f"time zone of type {type(zone).__qualname__}"
    raise NotPlainError(msg)


def _encode_datetime(value: dt.datetime) -> Any:
    return _tag("datetime", value.replace(tzinfo=None, fold=0).isoformat(), zone=_encode_zone(value.tzinfo), fold=value.fold)


def _encode_time(value: dt.time) -> Any:
    return _tag("time", value.replace(tzinfo=None, fold=0).isoformat(), zone=_encode_zone(value.tzinfo), fold=value.fold)


def _encode_members(kind: str) -> Callable[[Any], Any]:
    # A set has no order of its own: sorted by their encoding, equal sets are equal bytes.
    return lambda value: _tag(kind, sorted((encode(item) for item in value), key=repr))


_ENCODERS: dict[type, Callable[[Any], Any]] = {
    type(None): lambda value: value,
    bool: lambda value: value,
    int: _encode_int,
    float: _encode_float,
    str: _encode_str,
    bytes: _encode_bytes,
    bytearray: _encode_bytes,
    complex: lambda value: _tag("complex", struct.pack(">dd", value.real, value.imag).hex()),
    list: _encode_list,
    tuple: _encode_tuple,
    set: _encode_members("set"),
    frozenset: _encode_members("frozenset"),
    torch.Size: lambda value: _tag("torch.Size", [int(size) for size in value]),
    torch.dtype: lambda value: _tag("torch.dtype", str(value).removeprefix("torch.")),
    torch.device: lambda value: _tag("torch.device", str(value)),
    torch.layout: lambda value: _tag("torch.layout", str(value).removeprefix("torch.")),
    torch.memory_format: lambda value: _tag("torch.memory_format", str(value).removeprefix("torch.")),
    dt.datetime: _encode_datetime,
    dt.date: lambda value: _tag("date", value.isoformat()),
    dt.time: _encode_time,
    dt.timedelta: lambda value: _tag("timedelta", [value.days, value.seconds, value.microseconds]),
    dt.timezone: lambda value: _tag("timezone", _encode_zone(value)),
    zoneinfo.ZoneInfo: lambda value: _tag("timezone", _encode_zone(value)),
    range: lambda value: _tag("range", [encode(value.start), encode(value.stop), encode(value.step)]),
    slice: lambda value: _tag("slice", [encode(value.start), encode(value.stop), encode(value.step)]),
    type(...): lambda value: _tag("ellipsis", None),  # noqa: ARG005 - all encoders take the value
    decimal.Decimal: lambda value: _tag("decimal", str(value)),
    fractions.Fraction: lambda value: _tag("fraction", [encode(value.numerator), encode(value.denominator)]),
    uuid.UUID: lambda value: _tag("uuid", value.hex),
    pathlib.PosixPath: lambda value: _tag("path", _encode_str(str(value))),
    pathlib.WindowsPath: lambda value: _tag("path", _encode_str(str(value))),
    pathlib.PurePosixPath: lambda value: _tag("pure_posix_path", _encode_str(str(value))),
    pathlib.PureWindowsPath: lambda value: _tag("pure_windows_path", _encode_str(str(value))),
}


def encode(value: Any) -> Any:
    """The JSON form of a plain value.

    Raises
    ------
    NotPlainError
        If the value, or one inside it, is of another kind.

    Examples
    --------
    >>> encode((1, 2.5, "a")), encode(2**70)
    ({'type': 'tuple', 'value': [1, 2.5, 'a']}, {'type': 'int', 'value': '0x400000000000000000'})
    """
    encoder = _ENCODERS.get(type(value))
    if encoder is not None:
        return encoder(value)
    if isinstance(value, enum.Enum):
        number = _encode_int(value.value) if isinstance(value, enum.Flag) else None
        return _tag("enum", [type(value).__module__, type(value).__qualname__, value.name, number])
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic) and not value.dtype.hasobject and numpy.dtype(value.dtype.str) == value.dtype:
        # ``.tobytes()`` of a 0-d array gives the item as it lies in memory, byte order included in ``dtype.str``.
        return _tag("numpy", _text(numpy.asarray(value).tobytes()), dtype=value.dtype.str)
    msg = f"{type(value).__qualname__} is not a plain value"
    raise NotPlainError(msg)


def encode_tree(value: Any) -> Any:
    """Like ``encode``, with dicts allowed: for metadata and for what codecs keep beside their parts."""
    if type(value) is dict:
        return _tag("dict", [[encode(key), encode_tree(item)] for key, item in value.items()])
    if type(value) is list:
        return [encode_tree(item) for item in value]
    if type(value) is tuple:
        return _tag("tuple", [encode_tree(item) for item in value])
    return encode(value)


def find_class(module: str, qualname: str, base: type) -> type:
    """A subclass of ``base`` that this process has already imported; nothing is imported, no module code runs.

    Raises
    ------
    UnknownClassError
        If there is no such class in memory.
    """
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        # vars() rather than getattr: a module's __getattr__ may import.
        found = vars(found).get(name) if hasattr(found, "__dict__") else None
    if isinstance(found, type) and issubclass(found, base):
        return found
    msg = f"class {module}.{qualname} is not known in this process; import {module} first"
    raise UnknownClassError(msg)


def _decode_enum(value: Any) -> Any:
    module, qualname, name, number = value
    cls: Any = find_class(module, qualname, enum.Enum)
    member = cls.__members__.get(name) if name is not None else None
    if member is None and number is not None and issubclass(cls, enum.Flag):
        return cls(decode(number))
    if member is None:
        msg = f"enum {module}.{qualname} has no member {name!r}"
        raise ManifestError(msg)
    return member


def _decode_zone(zone: Any) -> dt.tzinfo | None:
    if zone is None:
        return None
    if isinstance(zone, str):
        return zoneinfo.ZoneInfo(zone)
    days, seconds, microseconds = zone
    return dt.timezone(dt.timedelta(days, seconds, microseconds))


def _named(cls: type) -> Callable[[Any], Any]:
    def decode_named(tag: dict[str, Any]) -> Any:
        # A fixed kind: getattr(torch, "load") is a function and must not come out of here.
        found = getattr(torch, tag["value"], None) if isinstance(tag["value"], str) and tag["value"].isidentifier() else None
        if not isinstance(found, cls):
            msg = f"unknown {cls.__name__} {tag['value']!r}"
            raise ManifestError(msg)
        return found

    return decode_named


def _decode_fraction(tag: dict[str, Any]) -> fractions.Fraction:
    numbers = _items(tag)
    if any(type(number) is not int for number in numbers):
        msg = "a fraction is of whole numbers"  # of a text, 1e999999999 would be written out
        raise ManifestError(msg)
    return fractions.Fraction(*numbers)


def _decode_numpy(tag: dict[str, Any]) -> Any:
    import numpy as np  # noqa: PLC0415 - NumPy is optional

    if tag["dtype"] not in numpy_arrays.EMPTY_DTYPES:
        numpy_arrays.item_size(tag["dtype"])  # refuses what is not a plain name
    dtype = np.dtype(tag["dtype"])
    data = base64.b64decode(tag["value"], validate=True)
    if dtype.itemsize == 0:  # an empty string has no bytes to read it from
        return dtype.type()
    (item,) = np.frombuffer(data, dtype=dtype)
    return item


def _items(tag: dict[str, Any]) -> list[Any]:
    return [decode(item) for item in tag["value"]]


_DECODERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "int": lambda tag: int(tag["value"], 16),
    "float": lambda tag: struct.unpack(">d", bytes.fromhex(tag["value"]))[0],
    "str": lambda tag: base64.b64decode(tag["value"], validate=True).decode("utf-8", "surrogatepass"),
    "bytes": lambda tag: base64.b64decode(tag["value"], validate=True),
    "bytearray": lambda tag: bytearray(base64.b64decode(tag["value"], validate=True)),
    "complex": lambda tag: complex(*struct.unpack(">dd", bytes.fromhex(tag["value"]))),
    "tuple": lambda tag: tuple(_items(tag)),
    "set": lambda tag: set(_items(tag)),
    "frozenset": lambda tag: frozenset(_items(tag)),
    "dict": lambda tag: {decode(key): decode(item) for key, item in tag["value"]},
    "torch.Size": lambda tag: torch.Size(tag["value"]),
    "torch.dtype": _named(torch.dtype),
    "torch.device": lambda tag: torch.device(tag["value"]),
    "torch.layout": _named(torch.layout),
    "torch.memory_format": _named(torch.memory_format),
    "datetime": lambda tag: dt.datetime.fromisoformat(tag["value"]).replace(tzinfo=_decode_zone(tag["zone"]), fold=tag["fold"]),
    "date": lambda tag: dt.date.fromisoformat(tag["value"]),
    "time": lambda tag: dt.time.fromisoformat(tag["value"]).replace(tzinfo=_decode_zone(tag["zone"]), fold=tag["fold"]),
    "timedelta": lambda tag: dt.timedelta(*tag["value"]),
    "timezone": lambda tag: _decode_zone(tag["value"]),
    "range": lambda tag: range(*_items(tag)),
    "slice": lambda tag: slice(*_items(tag)),
    "ellipsis": lambda tag: ...,  # noqa: ARG005 - all decoders take the tag
    "decimal": lambda tag: decimal.Decimal(tag["value"]),
    "fraction": _decode_fraction,
    "uuid": lambda tag: uuid.UUID(hex=tag["value"]),
    "path": lambda tag: pathlib.Path(decode(tag["value"])),
    "pure_posix_path": lambda tag: pathlib.PurePosixPath(decode(tag["value"])),
    "pure_windows_path": lambda tag: pathlib.PureWindowsPath(decode(tag["value"])),
    "enum": lambda tag: _decode_enum(tag["value"]),
    "numpy": _decode_numpy,
}


def decode(encoded: Any) -> Any:
    """The value that ``encode`` or ``encode_tree`` was given.

    Raises
    ------
    ManifestError
        If the form is not one that they write.
    UnknownClassError
        If an enum's class is not imported.

    Examples
    --------
    >>> decode(encode({1, 2}))
    {1, 2}
    """
    kind = type(encoded)
    if kind is list:
        return [decode(item) for item in encoded]
    if kind is not dict:
        return encoded
    try:
        return _DECODERS[encoded["type"]](encoded)
    except (ManifestError, UnknownClassError):
        raise
    except RecursionError:
        msg = "a value is nested too deeply"
        raise ManifestError(msg) from None
    except Exception as error:
        # Whatever a hostile form trips over in a decoder, it is one thing to the caller.
        msg = f"a value of the manifest cannot be read: {str(encoded)[:80]}"
        raise ManifestError(msg) from error
