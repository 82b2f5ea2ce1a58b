"""Codecs of PyTorch's tensors beyond dense ones, and of its generators: sparse, nested and MKLDNN layouts, ``torch.Generator``.

Each gives the tensors that a value consists of, as views where there are such, and builds it from them with every invariant checked:
indices that came from a file are never trusted.
"""

from __future__ import annotations

import struct
import warnings
from typing import Any

import torch

from expstate.errors import ManifestError, RestoreMismatchError
from expstate.state.codecs import Codec, Parts, register
from expstate.state.forms import PLAIN_CLASSES, as_formed, is_live, part_forms, shape_of, tensor_form, tensor_part

_COMPRESSED: dict[str, tuple[torch.layout, str, str]] = {
    "csr": (torch.sparse_csr, "crow_indices", "col_indices"),
    "csc": (torch.sparse_csc, "ccol_indices", "row_indices"),
    "bsr": (torch.sparse_bsr, "crow_indices", "col_indices"),
    "bsc": (torch.sparse_bsc, "ccol_indices", "row_indices"),
}
_CPU_STATE = struct.Struct("=QiiQ")  # the head of a CPU generator's state: seed, words left, whether seeded, next word
_CPU_WORDS = 624

_COMPRESSED_NAMES = {layout: name for name, (layout, _, _) in _COMPRESSED.items()}


def _has_layout(value: Any, layouts: Any) -> bool:
    return type(value) in PLAIN_CLASSES and value.layout in layouts and value.device.type != "meta"


class _SparseCoo(Codec):
    name = "torch.sparse_coo"

    def accepts(self, value: Any) -> bool:
        return _has_layout(value, (torch.sparse_coo,))

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        tensor = value.detach()
        # The underscored ones are public for this: they also serve tensors that are not coalesced.
        parts = {"indices": tensor._indices(), "values": tensor._values()}  # noqa: SLF001
        meta = {"shape": list(tensor.shape), "coalesced": tensor.is_coalesced(), "parts": part_forms(parts), **tensor_form(value)}
        return meta, parts

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:
        indices, values = tensor_part(parts, "indices"), tensor_part(parts, "values")
        shape, coalesced = shape_of(meta["shape"]), meta["coalesced"] is True
        kept = is_live(self, meta, parts, live)
        try:
            if indices.dtype != torch.int64:
                _refuse(f"indices are {indices.dtype}, not int64")
            built = torch.sparse_coo_tensor(indices, values, shape, device=values.device, is_coalesced=coalesced, check_invariants=True)
        except Exception:
            if kept:
                indices.zero_()
            raise
        return live if kept else as_formed(built, meta)


class _SparseCompressed(Codec):
    name = "torch.sparse_compressed"

    def accepts(self, value: Any) -> bool:
        return _has_layout(value, _COMPRESSED_NAMES)

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        tensor = value.detach()
        layout = _COMPRESSED_NAMES[tensor.layout]
        _, compressed, plain = _COMPRESSED[layout]
        parts = {compressed: getattr(tensor, compressed)(), plain: getattr(tensor, plain)(), "values": tensor.values()}
        return {"layout": layout, "shape": list(tensor.shape), "parts": part_forms(parts), **tensor_form(value)}, parts

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:
        layout, compressed_name, plain_name = _COMPRESSED[meta["layout"]]
        compressed, plain, values = (tensor_part(parts, name) for name in (compressed_name, plain_name, "values"))
        kept = is_live(self, meta, parts, live)
        try:
            with warnings.catch_warnings():
                # That the layout is in beta was said when the tensor was made.
                warnings.simplefilter("ignore", UserWarning)
                built = torch.sparse_compressed_tensor(
                    compressed, plain, values, shape_of(meta["shape"]), layout=layout, device=values.device, check_invariants=True
                )
        except Exception:
            if kept:
                compressed.zero_()
                plain.zero_()
            raise
        return live if kept else as_formed(built, meta)


class _Nested(Codec):
    """Nested tensors of the strided layout; those of the jagged layout are a subclass with ``__tensor_flatten__``."""

    name = "torch.nested"

    def accepts(self, value: Any) -> bool:
        return _has_layout(value, (torch.strided,)) and value.is_nested

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        parts = {str(index): tensor for index, tensor in enumerate(value.detach().unbind())}
        return {"parts": part_forms(parts), **tensor_form(value)}, parts

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:
        if is_live(self, meta, parts, live):
            return live
        tensors = [tensor_part(parts, str(index)) for index in range(len(parts))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that nested tensors are a prototype
            return as_formed(torch.nested.as_nested_tensor(tensors), meta)


class _Mkldnn(Codec):
    name = "torch.mkldnn"

    def accepts(self, value: Any) -> bool:
        return _has_layout(value, (torch._mkldnn,))  # type: ignore[attr-defined]  # noqa: SLF001 - this layout has no public name

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        parts = {"dense": value.detach().to_dense()}
        return {"parts": part_forms(parts), **tensor_form(value)}, parts

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:  # noqa: ARG002 - it cannot be read in place
        return as_formed(tensor_part(parts, "dense").to_mkldnn(), meta)


class _Generator(Codec):
    name = "torch.Generator"

    def accepts(self, value: Any) -> bool:
        return type(value) is torch.Generator

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        return {"device": str(value.device)}, {"state": value.get_state()}

    def check(self, meta: Any) -> None:
        _new_generator(torch.device(meta["device"]))

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:
        device = torch.device(meta["device"])
        state = tensor_part(parts, "state").cpu()
        generator = live if live is not None and live.device == device else _new_generator(device)
        set_generator_state(generator, state)
        return generator


def _new_generator(device: torch.device) -> torch.Generator:
    try:
        return torch.Generator(device)
    except Exception as error:
        msg = f"a generator of device '{device}' cannot be made here ({error}); exclude it, or restore where there is such a device"
        raise RestoreMismatchError(msg) from error


def set_generator_state(generator: torch.Generator, state: torch.Tensor) -> None:
    """``generator.set_state(state)``, for a state that may come from anywhere; ``ManifestError`` if it is not sound."""
    if state.dtype != torch.uint8 or state.dim() != 1:
        _refuse("a generator's state has to be a row of bytes")
    if generator.device.type == "cpu":
        check_cpu_state(state)
    generator.set_state(state.contiguous())


def check_cpu_state(state: torch.Tensor) -> None:
    """Refuse a CPU generator's state whose position would read past its 624 words; PyTorch looks at each number alone."""
    if state.numel() < _CPU_STATE.size:
        _refuse("a generator's state is too short")
    _, left, _, position = _CPU_STATE.unpack(bytes(state[: _CPU_STATE.size].tolist()))
    if not (0 < left <= _CPU_WORDS and position + left <= _CPU_WORDS + 1):
        _refuse("a generator's state has an impossible position")


def _refuse(reason: str) -> None:
    raise ManifestError(reason)


register(_SparseCoo())
register(_SparseCompressed())
register(_Nested())
register(_Mkldnn())
register(_Generator(), [torch.Generator])
