"""Results as JSON can hold them, whatever the library gave: nothing is lost, and every reader of JSON takes it.

Times are ISO 8601 in UTC, floats that are not finite are the texts ``nan``, ``inf`` and ``-inf``, bytes are hexadecimal digits, and so are
whole numbers that Python writes in no other way.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

_MOST_BITS = 14_000
"""A whole number of more bits may have more decimal digits than Python writes and reads, 4,300."""


def plain(value: Any) -> Any:
    """A value as ``json.dumps`` takes it.

    >>> plain({"loss": float("nan"), "when": dt.timedelta(seconds=90), 1: (2, b"a")})
    {'loss': 'nan', 'when': 90.0, '1': [2, '61']}
    """
    for kinds, convert in _FORMS:
        if isinstance(value, kinds):
            return convert(value)
    if not isinstance(value, type) and callable(getattr(value, "to_dict", None)):
        return plain(value.to_dict())
    if isinstance(value, msgspec.Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value) if not item.name.startswith("_")}
    return str(value)


def _number(value: float) -> float | str:
    return float(value) if math.isfinite(value) else str(float(value))


def _integer(value: int) -> int | str:
    return int(value) if value.bit_length() <= _MOST_BITS else hex(value)


_FORMS: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    ((bool, type(None)), lambda value: value),
    (str, str.__str__),
    (int, _integer),
    (float, _number),
    ((bytes, bytearray), lambda value: value.hex()),
    ((dt.date, dt.time), lambda value: value.isoformat()),
    (dt.timedelta, dt.timedelta.total_seconds),
    (Mapping, lambda value: {str(name): plain(item) for name, item in value.items()}),
    ((list, tuple), lambda value: [plain(item) for item in value]),
    (AbstractSet, lambda value: sorted((plain(item) for item in value), key=repr)),
)
"""Kinds of values, the narrower first, and what becomes of them."""
