"""What the codecs of tensors and arrays share: shapes read from metadata, what a tensor is beside its values, parts read in place.

``tensor_form`` and ``as_formed`` keep ``Parameter`` and gradient flags; ``is_live`` tells whether parts are the memory of a live object.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from expstate.errors import ManifestError

if TYPE_CHECKING:
    from expstate.state.codecs import Codec, Parts


PLAIN_CLASSES = frozenset({torch.Tensor, torch.nn.Parameter})
"""The classes whose tensors are what their layout and dtype say."""


_MOST_DIMENSIONS = 64
_MOST_ELEMENTS = 2**62


def shape_of(encoded: Any) -> tuple[int, ...]:
    """A shape from metadata; ``ManifestError`` if it is none.

    >>> shape_of([2, 3])
    (2, 3)
    """
    if not isinstance(encoded, list) or len(encoded) > _MOST_DIMENSIONS or any(type(size) is not int or size < 0 for size in encoded):
        msg = f"invalid shape {str(encoded)[:80]}"
        raise ManifestError(msg)
    if math.prod(encoded) >= _MOST_ELEMENTS:
        msg = f"shape {str(encoded)[:80]} is too large"
        raise ManifestError(msg)
    return tuple(encoded)


def tensor_form(value: torch.Tensor) -> dict[str, Any]:
    """What a tensor is beside its values: whether it is a ``Parameter`` and whether it wants a gradient."""
    return {"parameter": isinstance(value, torch.nn.Parameter), "requires_grad": value.requires_grad}


def as_formed(tensor: torch.Tensor, form: dict[str, Any]) -> torch.Tensor:
    """``tensor`` as its ``tensor_form`` says."""
    if form["parameter"] is True:
        return torch.nn.Parameter(tensor, requires_grad=form["requires_grad"] is True)
    return tensor.requires_grad_() if form["requires_grad"] is True and not tensor.requires_grad else tensor


def tensor_part(parts: Parts, name: str) -> torch.Tensor:
    """A part that has to be a tensor; ``ManifestError`` if it is missing or something else."""
    part = parts.get(name)
    if not isinstance(part, torch.Tensor):
        msg = f"part {name!r} is not a tensor"
        raise ManifestError(msg)
    return part


def part_forms(parts: Parts) -> dict[str, Any]:
    """Dtype and shape of each part that is a tensor or an array, for the metadata of its container.

    Live parts are read in place only where the metadata is equal: all of them fit, or none is touched.
    """
    return {
        name: [str(part.dtype), sizes_of(part.shape)] for name, part in parts.items() if hasattr(part, "dtype") and hasattr(part, "shape")
    }


def sizes_of(shape: Any) -> list[int | None]:
    """A shape or strides as metadata; None for the ragged sizes of nested tensors, which are symbols of this process."""
    return [int(size) if type(size) is int else None for size in shape]


def is_live(codec: Codec, meta: Any, parts: Parts, live: Any) -> bool:
    """Whether ``live`` has this metadata and its parts are these very objects or their memory: then it has been read in place."""
    if live is None:
        return False
    live_meta, live_parts = codec.flatten(live)
    if meta != live_meta or list(parts) != list(live_parts):
        return False
    return all(_same_memory(parts[name], live_parts[name]) for name in parts)


def _same_memory(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if type(one) in PLAIN_CLASSES:
        strided = one.layout is other.layout is torch.strided and not one.is_nested
        return strided and _tensor_memory(one) == _tensor_memory(other)
    if isinstance(one, torch.Tensor):
        return False  # a subclass tells nothing about where its values are
    if (interface := getattr(one, "__array_interface__", None)) is not None:
        return _array_memory(interface) == _array_memory(other.__array_interface__)
    return False


def _tensor_memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    # Empty tensors have no memory to share; of equal form they are as good as one another.
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_conj(), tensor.is_neg()


def _array_memory(interface: dict[str, Any]) -> tuple[Any, ...]:
    return interface["data"][0], interface["shape"], interface["strides"], interface["typestr"], str(interface["descr"])
