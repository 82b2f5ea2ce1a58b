"""The codec of long plain values: bytes and text beyond 64 KiB, and lists of more than 10,000 ints, floats or strings.

Inline they would swell the manifest, so they become one tensor (bytes, int64 or float64) that is stored and verified like any other. What
is long is told by ``values.is_long``; types and values come back exactly.
"""

from __future__ import annotations

from array import array
from typing import Any

import torch

from expstate.errors import ManifestError
from expstate.state.codecs import Codec, Parts, register
from expstate.state.forms import tensor_part
from expstate.state.tensors import memory
from expstate.state.values import is_long

_NUMBERS: dict[str, tuple[str, torch.dtype]] = {"int": ("q", torch.int64), "float": ("d", torch.float64)}
_KINDS: dict[str, type] = {kind.__name__: kind for kind in (bytes, bytearray, str, list, tuple)}
_MISSING = -1


def _as_tensor(buffer: bytearray | array[Any], dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(buffer, dtype=dtype) if len(buffer) > 0 else torch.empty(0, dtype=dtype, device="cpu")


def _row(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    part = tensor_part(parts, "data")
    if part.dtype != dtype or part.dim() != 1:
        msg = f"a long value of {part.dtype} {list(part.shape)}, not of a row of {dtype}"
        raise ManifestError(msg)
    return part.detach().cpu().contiguous()


class _Packed(Codec):
    name = "packed"

    def accepts(self, value: Any) -> bool:
        return is_long(value)

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        kind = type(value)
        if kind is str:
            text = bytearray(value.encode("utf-8", "surrogatepass"))
            return {"kind": "str", "length": len(text)}, {"data": _as_tensor(text, torch.uint8)}
        if kind in {bytes, bytearray}:
            # A copy: the part is memory that may be written to, which these bytes must not be.
            return {"kind": kind.__name__, "length": len(value)}, {"data": _as_tensor(bytearray(value), torch.uint8)}
        items = next((item for item in map(type, value) if item is not type(None)), str).__name__
        meta = {"kind": kind.__name__, "items": items, "length": len(value)}
        if items == "str":
            lengths = [_MISSING if item is None else len(item) for item in value]
            return meta, {"text": "".join(item or "" for item in value), "lengths": lengths}
        code, dtype = _NUMBERS[items]
        return meta, {"data": _as_tensor(array(code, value), dtype)}

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:  # noqa: ARG002 - plain values are made anew
        kind = _KINDS[meta["kind"]]
        if "items" not in meta:
            data = _row(parts, torch.uint8)
            view = memory(data.data_ptr(), data.numel())
            return str(view, "utf-8", "surrogatepass") if kind is str else kind(view)
        if meta["items"] == "str":
            return kind(_cut(parts["text"], parts["lengths"]))
        return kind(_row(parts, _NUMBERS[meta["items"]][1]).tolist())


def _cut(text: Any, lengths: Any) -> list[str | None]:
    sound = type(text) is str and type(lengths) is list and all(type(length) is int and length >= _MISSING for length in lengths)
    if not sound or sum(length for length in lengths if length > 0) != len(text):
        msg = "the lengths of a long list of strings do not fit its text"
        raise ManifestError(msg)
    result: list[str | None] = []
    position = 0
    for length in lengths:
        result.append(None if length == _MISSING else text[position : position + length])
        position += max(length, 0)
    return result


CODEC = _Packed()
register(CODEC)
