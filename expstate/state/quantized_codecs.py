"""The codec of quantised tensors: their integers as they lie in memory, and their scales and zero points.

Per-tensor and per-channel schemes, with float zero points too, of every quantised dtype that this torch has. The integers of ``quint4x2``
and ``quint2x4``, several to a byte, are stored as bytes.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from expstate.errors import ManifestError
from expstate.state.codecs import Codec, Parts, register
from expstate.state.forms import PLAIN_CLASSES, as_formed, is_live, shape_of, tensor_form, tensor_part
from expstate.state.values import NotPlainError, decode, encode

_INTEGERS = {"qint8": torch.int8, "quint8": torch.uint8, "qint32": torch.int32}
_PER_BYTE = {"quint4x2": 2, "quint2x4": 4}
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in (*_INTEGERS, *_PER_BYTE) if hasattr(torch, name)}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_SCHEMES: dict[str, torch.qscheme] = {
    str(scheme).removeprefix("torch."): scheme
    for scheme in (torch.per_tensor_affine, torch.per_channel_affine, torch.per_channel_affine_float_qparams)
}
_SCHEME_NAMES = {scheme: name for name, scheme in _SCHEMES.items()}


class _Quantized(Codec):
    name = "torch.quantized"

    def accepts(self, value: Any) -> bool:
        plain = type(value) in PLAIN_CLASSES and value.dtype in _NAMES
        return plain and value.is_quantized and value.qscheme() in _SCHEME_NAMES and value.device.type != "meta"

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        tensor = value.detach()
        scheme = _SCHEME_NAMES[tensor.qscheme()]
        meta = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "scheme": scheme, **tensor_form(value)}
        parts = {"data": _raw(tensor)}
        if scheme == "per_tensor_affine":
            meta["scale"], meta["zero_point"] = encode(tensor.q_scale()), tensor.q_zero_point()
        else:
            meta["axis"] = tensor.q_per_channel_axis()
            parts["scales"], parts["zero_points"] = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
        return meta, parts

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:
        if is_live(self, meta, parts, live):
            return live
        raw, shape, name = tensor_part(parts, "data"), shape_of(meta["shape"]), meta["dtype"]
        expected = _raw_form(name, shape)
        if (raw.dtype, tuple(raw.shape)) != expected or raw.layout is not torch.strided:
            msg = f"its integers are {raw.dtype} {list(raw.shape)}, not {expected[0]} {list(expected[1])}"
            raise ManifestError(msg)
        with warnings.catch_warnings():
            # That quantised tensors will go was said when the tensor was made.
            warnings.simplefilter("ignore", UserWarning)
            return as_formed(_assemble(meta, parts, raw, shape), meta)


def _raw_form(name: str, shape: tuple[int, ...]) -> tuple[torch.dtype, tuple[int, ...]]:
    """Dtype and shape of the integers' part; rows of sub-byte integers are filled up to whole bytes."""
    if name in _INTEGERS:
        return _INTEGERS[name], shape
    rows, last = math.prod(shape[:-1]), shape[-1] if shape else 1
    return torch.uint8, (rows * -(-last // _PER_BYTE[name]),)


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    dtype, shape = _raw_form(_NAMES[tensor.dtype], tuple(tensor.shape))
    stride: tuple[int, ...] = tensor.stride()
    if tensor.dtype not in {_DTYPES[name] for name in _INTEGERS}:
        stride = (1,)
        if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != shape[0]:
            msg = "a view of a tensor of sub-byte integers"
            raise NotPlainError(msg)
    return _over(tensor.untyped_storage(), dtype, int(tensor.storage_offset()), shape, stride)


def _over(storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, shape, stride)


def _assemble(meta: Any, parts: Parts, raw: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    name = meta["dtype"]
    whole_bytes = name in _INTEGERS
    tensor = _empty(meta, parts, raw.device, shape)
    if not whole_bytes:
        # These cannot be laid over a given memory: torch counts a byte for each of their elements.
        _over(tensor.untyped_storage(), torch.uint8, 0, tuple(raw.shape), (1,)).copy_(raw)
        return tensor
    # torch.empty takes the memory only when it is touched, and this one never is.
    raw = raw if meta["scheme"] == "per_tensor_affine" else raw.contiguous()
    return tensor.set_(raw.untyped_storage(), int(raw.storage_offset()), shape, raw.stride())


def _empty(meta: Any, parts: Parts, device: torch.device, shape: tuple[int, ...]) -> torch.Tensor:
    dtype, scheme = _DTYPES[meta["dtype"]], meta["scheme"]
    if scheme == "per_tensor_affine":
        scale, zero_point = decode(meta["scale"]), meta["zero_point"]
        return torch._empty_affine_quantized(shape, scale=scale, zero_point=zero_point, dtype=dtype, device=device)  # noqa: SLF001
    axis, scales, zero_points = meta["axis"], tensor_part(parts, "scales"), tensor_part(parts, "zero_points")
    floating = _SCHEMES[scheme] is torch.per_channel_affine_float_qparams
    if type(axis) is not int or not 0 <= axis < len(shape):
        msg = f"axis {axis!r} is not one of {len(shape)}"
        raise ManifestError(msg)
    # Kernels read one scale for each row without asking how many there are.
    for part, is_number in ((scales, scales.is_floating_point()), (zero_points, zero_points.is_floating_point() == floating)):
        if not is_number or part.is_complex() or tuple(part.shape) != (shape[axis],):
            msg = f"scales and zero points of {part.dtype} {list(part.shape)} do not fit the {shape[axis]} rows of axis {axis}"
            raise ManifestError(msg)
    return torch._empty_per_channel_affine_quantized(  # noqa: SLF001 - no public function takes integers and scales
        shape, scales=scales, zero_points=zero_points, axis=axis, dtype=dtype, device=device
    )


register(_Quantized())
