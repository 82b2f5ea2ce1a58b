"""The codec of tensor subclasses that can be taken apart: those with ``__tensor_flatten__`` and ``__tensor_unflatten__``.

Stored are the inner tensors, the context if it is plain, the outer size and strides, and the class by name. A class is looked up among
those that this process has imported, never imported; jagged nested tensors have their offsets checked.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import torch

from expstate.errors import ManifestError, UnknownClassError
from expstate.state.codecs import Codec, Parts, register
from expstate.state.forms import PLAIN_CLASSES, as_formed, is_live, part_forms, shape_of, sizes_of, tensor_form, tensor_part
from expstate.state.values import decode, encode_tree, find_class

if TYPE_CHECKING:
    from collections.abc import Sequence

_JAGGED = ("torch.nested._internal.nested_tensor", "NestedTensor")


def _is_distributed(cls: type) -> bool:
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and issubclass(cls, distributed.DTensor)


def _can_be_taken_apart(cls: type) -> bool:
    methods = hasattr(cls, "__tensor_flatten__") and hasattr(cls, "__tensor_unflatten__")
    return issubclass(cls, torch.Tensor) and cls not in PLAIN_CLASSES and methods and not _is_distributed(cls)


class _Subclass(Codec):
    name = "torch.subclass"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and _can_be_taken_apart(type(value)) and value.device.type != "meta"

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        names, context = value.__tensor_flatten__()
        parts = {name: getattr(value, name) for name in names}
        meta = {
            "module": type(value).__module__,
            "class": type(value).__qualname__,
            "context": encode_tree(context),
            "size": sizes_of(value.size()),
            "stride": sizes_of(value.stride()),
            "strides": {name: list(part.stride()) for name, part in parts.items() if _is_dense(part) and not part.is_contiguous()},
            "parts": part_forms(parts),
            **tensor_form(value),
        }
        return meta, parts

    def check(self, meta: Any) -> None:
        _class_of(meta)

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:
        cls = _class_of(meta)
        context, kept = decode(meta["context"]), is_live(self, meta, parts, live)
        if (meta["module"], meta["class"]) == _JAGGED:
            try:
                _check_jagged(parts, context)
            except Exception:
                if kept:
                    parts["_offsets"].zero_()
                raise
        if kept:
            return live
        inner = {name: _with_stride(part, shape_of(meta["strides"].get(name, []))) for name, part in parts.items()}
        built = cls.__tensor_unflatten__(inner, context, *_outer(meta))
        if type(built) is not cls or sizes_of(built.size()) != meta["size"]:
            msg = f"its parts make a {type(built).__qualname__} of size {sizes_of(built.size())}, not of {meta['size']}"
            raise ManifestError(msg)
        return as_formed(built, meta)


def _is_dense(part: Any) -> bool:
    """Whether a part is a plain tensor whose elements fill its memory in some order, as those of a transposed matrix do."""
    return type(part) is torch.Tensor and part.layout is torch.strided and not part.is_nested and _fills(part.shape, part.stride())


def _fills(shape: Sequence[int], stride: Sequence[int]) -> bool:
    ordered = sorted((step, size) for size, step in zip(shape, stride, strict=True) if size != 1)
    expected = 1
    for step, size in ordered:
        if step != expected:
            return False
        expected *= size
    return True


def _with_stride(part: Any, stride: tuple[int, ...]) -> Any:
    """A part with the strides it had; what is stored is in row-major order."""
    if not stride or not _is_dense(part) or part.stride() == stride or not _fills(part.shape, stride):
        return part
    return torch.empty_strided(part.shape, stride, dtype=part.dtype, device=part.device).copy_(part)


def _class_of(meta: Any) -> Any:
    cls = find_class(meta["module"], meta["class"], torch.Tensor)
    if not _can_be_taken_apart(cls):
        msg = f"class {meta['module']}.{meta['class']} cannot be put together from parts here"
        raise UnknownClassError(msg)
    return cls


def _outer(meta: Any) -> tuple[torch.Size | None, tuple[int, ...] | None]:
    """Size and strides of the whole, as ``__tensor_unflatten__`` wants them; those of a view with gaps have been closed."""
    if None in meta["size"] or None in meta["stride"]:
        return None, None  # ragged, and told by the parts
    size, stride = shape_of(meta["size"]), shape_of(meta["stride"])
    if not _fills(size, stride):
        stride = tuple(math.prod(max(1, count) for count in size[dimension + 1 :]) for dimension in range(len(size)))
    return torch.Size(size), stride


def _check_jagged(parts: Parts, context: Any) -> None:
    """Offsets and lengths of a jagged tensor address memory and are not checked by PyTorch."""
    values, offsets = tensor_part(parts, "_values"), tensor_part(parts, "_offsets")
    dimension = context["ragged_idx"] - 1
    sound = offsets.dim() == 1 and offsets.numel() > 0 and offsets.dtype in {torch.int32, torch.int64} and 0 <= dimension < values.dim()
    sound = sound and 0 <= int(offsets[0]) <= int(offsets[-1]) <= values.shape[dimension] and not bool((offsets.diff() < 0).any())
    if sound:
        lengths = offsets.diff()
        if "_lengths" in parts:
            room, lengths = lengths, tensor_part(parts, "_lengths")
            sound = lengths.shape == room.shape and not bool((lengths < 0).any() or (lengths > room).any())
        if sound and lengths.numel() > 0:
            # They are kept as the first size of an empty tensor.
            shortest, longest = (parts[name].shape[0] if name in parts else None for name in ("_min_seqlen_tensor", "_max_seqlen_tensor"))
            sound = (shortest is None or shortest <= int(lengths.min())) and (
                longest is None or int(lengths.max()) <= longest <= values.shape[dimension]
            )
    if not sound:
        msg = "the offsets of a nested tensor do not fit its values"
        raise ManifestError(msg)


register(_Subclass())
