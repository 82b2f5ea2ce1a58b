"""NumPy arrays as tensors over the same memory, without importing NumPy for those who do not use it."""

from __future__ import annotations

import re
import sys
from typing import Any

import torch

_LARGEST_ITEM = 8  # of the real dtypes that torch shares with NumPy
_KINDS = frozenset("biufcSUmMV")
EMPTY_DTYPES = frozenset({"<U0", ">U0", "|S0", "|V0"})
"""Names of dtypes without bytes, which are not simple: an array of them has nothing to read."""

_NAME = re.compile(r"[<>|]([biufcSUmMV])([1-9]\d{0,9})(?:\[[0-9a-zA-Zμ]+\])?")


def as_tensor(value: Any) -> torch.Tensor | None:
    """The bytes of a NumPy array as a tensor, or None for anything else.

    Only dtypes with a short name (``<f4``, ``<U10``, ``<M8[ns]``) are taken; structured and object arrays have codecs. The tensor shares
    the array's memory where it is contiguous or of a dtype that torch has; else it is a copy.
    """
    np = sys.modules.get("numpy")
    if np is None or type(value) is not np.ndarray or not is_simple(value.dtype):
        return None
    if value.nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    if not value.flags.c_contiguous:
        if value.dtype.kind in "biuf" and value.dtype.isnative and value.dtype.itemsize <= _LARGEST_ITEM:
            try:
                return torch.from_numpy(_writable(value))
            except (TypeError, ValueError):
                pass  # negative strides, or strides that are no multiple of the item
        value = np.ascontiguousarray(value)
    return torch.from_numpy(_writable(value.reshape(-1).view(np.uint8)))


def is_simple(dtype: Any) -> bool:
    """Whether a NumPy dtype is fully described by ``dtype.str``; those of other packages (bfloat16) look like raw bytes there."""
    return dtype.kind in _KINDS and not dtype.hasobject and dtype.itemsize > 0 and bool(sys.modules["numpy"].dtype(dtype.str) == dtype)


def _writable(array: Any) -> Any:
    # torch warns of read-only arrays, and this one is only read.
    if array.flags.writeable:
        return array
    np = sys.modules["numpy"]
    interface = dict(array.__array_interface__, data=(array.__array_interface__["data"][0], False))
    holder = type("_Memory", (), {"__array_interface__": interface, "owner": array})()
    return np.asarray(holder)


def empty(dtype: str, shape: tuple[int, ...]) -> tuple[Any, torch.Tensor]:
    """A new array of this dtype and shape, and a flat uint8 tensor over its memory.

    Raises
    ------
    ValueError
        If ``dtype`` is not a simple one.
    """
    import numpy as np  # noqa: PLC0415 - NumPy is optional

    parsed = np.dtype(dtype)
    if not is_simple(parsed):
        msg = f"dtype {dtype!r} is not a plain one"
        raise ValueError(msg)
    array = np.empty(shape, parsed)
    if array.nbytes == 0:
        return array, torch.empty(0, dtype=torch.uint8, device="cpu")
    return array, torch.from_numpy(array.reshape(-1).view(np.uint8))


def item_size(dtype: str) -> int:
    """Bytes of one element of a simple dtype, read off its name; ``ValueError`` for another.

    >>> item_size("<f4"), item_size("<U10"), item_size("<M8[ns]")
    (4, 40, 8)
    """
    match = _NAME.fullmatch(dtype)
    if match is None:
        msg = f"dtype {dtype!r} is not a plain one"
        raise ValueError(msg)
    kind, size = match.group(1), int(match.group(2))
    return size * 4 if kind == "U" else size
