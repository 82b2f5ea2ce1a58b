"""The bytes of tensors: dtypes by name, contiguous runs of a tensor's elements, and copies between tensors and staging memory.

Bytes are counted in the tensor's row-major order, whatever its strides are. Nothing here makes a second copy of a tensor: what is not
contiguous is gathered and scattered in runs of at most ``_RUN_BYTES``.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_RUN_BYTES = 1024**2

_NAMES = (
    "bool",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex32",
    "complex64",
    "complex128",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float4_e2m1fn_x2",
    "uint1",
    "uint2",
    "uint3",
    "uint4",
    "uint5",
    "uint6",
    "uint7",
    "int1",
    "int2",
    "int3",
    "int4",
    "int5",
    "int6",
    "int7",
    "bits8",
    "bits16",
    "bits1x8",
    "bits2x4",
    "bits4x2",
)

DTYPES: dict[str, torch.dtype] = {name: dtype for name in _NAMES if isinstance(dtype := getattr(torch, name, None), torch.dtype)}
"""Name to dtype, of all dtypes that are stored as their bytes and that this torch has."""

NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

ITEM_SIZES: dict[str, int] = {name: dtype.itemsize for name, dtype in DTYPES.items()}
"""Name to bytes of one element."""

_memory_view = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_view.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_memory_view.restype = ctypes.py_object
_WRITABLE = 0x200  # PyBUF_WRITE

move_memory = ctypes.memmove
"""``memmove(target address, source address, bytes)``; the interpreter lock is not held meanwhile."""

move_small = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.CDLL(None).memmove, ctypes.c_void_p).value or 0
)
"""The same with the lock held: for a few KiB, passing it on to another thread takes longer than the copy."""

SMALL_BYTES = 32 * 1024
"""Copies of no more than this are small."""


def memory(address: int, nbytes: int) -> memoryview:
    """A writable view of memory that the caller keeps alive."""
    if nbytes == 0:
        return memoryview(bytearray())
    view: memoryview = _memory_view(address, nbytes, _WRITABLE)
    return view


def is_plain_memory(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements lie one after the other in host memory, so that its bytes can be copied as they are."""
    return tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def is_same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape are the same elements of one memory: tied."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.dtype == other.dtype
        and one.stride() == other.stride()
        and one.device == other.device
        and (one.is_conj(), one.is_neg()) == (other.is_conj(), other.is_neg())
    )


def is_writable_in_place(tensor: torch.Tensor) -> bool:
    """Whether each element has a memory of its own, so that values can be read into it."""
    if tensor.is_contiguous():
        return True
    extent = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1):
        if stride < extent:
            return False
        extent += (size - 1) * stride
    return True


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A flat uint8 tensor over the memory of a contiguous tensor of any dtype, on any device."""
    storage = tensor.untyped_storage()
    start = tensor.storage_offset() * tensor.element_size()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, start, (tensor.numel() * tensor.element_size(),), (1,))


_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements as a dtype that can be copied; sub-byte dtypes cannot, and bool would change bytes that are neither 0 nor 1."""
    integer = _SAME_SIZE.get(tensor.element_size())
    return tensor if integer is None or tensor.is_conj() or tensor.is_neg() else tensor.detach().view(integer)


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of any strided tensor with the same bytes in row-major order, where it lies."""
    return _as_integers(tensor).resolve_conj().resolve_neg().contiguous()


def runs(tensor: torch.Tensor, start: int, stop: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Views that together are the elements ``start`` to ``stop`` in row-major order, each with its first element's number.

    A view is the whole range where the tensor is contiguous, else contiguous itself or at most ``_RUN_BYTES`` long.
    """
    if start >= stop:
        return
    if tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        yield tensor.view(-1)[start:stop], start
        return
    if tensor.dim() == 0:
        tensor = tensor.view(1)
    if tensor.dim() == 1:
        step = max(1, _RUN_BYTES // tensor.element_size())
        for first in range(start, stop, step):
            yield tensor[first : min(first + step, stop)], first
        return
    row = tensor[0].numel()
    step = _RUN_BYTES // (row * tensor.element_size())
    position = start
    while position < stop:
        index, within = divmod(position, row)
        whole = min(step, (stop - position) // row) if within == 0 else 0
        if whole:
            yield tensor[index : index + whole], position
            position += whole * row
        else:
            end = min(stop, (index + 1) * row)
            for view, number in runs(tensor[index], within, end - index * row):
                yield view, number + index * row
            position = end


def copy_out(tensor: torch.Tensor, start: int, stop: int, address: int, target: torch.Tensor | None = None) -> None:
    """Copy the bytes ``start`` to ``stop`` of a tensor to host memory.

    Parameters
    ----------
    tensor : torch.Tensor
        Any strided tensor on any device.
    start, stop : int
        Bytes, multiples of the element size.
    address : int
        Where they go, on the host.
    target : torch.Tensor, optional
        The same memory as a flat uint8 tensor; needed for a tensor on a device. The copy is asynchronous on the current
        stream if that memory is pinned.
    """
    if is_plain_memory(tensor):
        move_memory(address, tensor.data_ptr() + start, stop - start)
        return
    size = tensor.element_size()
    for view, first in runs(_as_integers(tensor), start // size, stop // size):
        dense = view.resolve_conj().resolve_neg().contiguous()
        offset = first * size - start
        nbytes = dense.numel() * size
        if dense.is_cpu:
            move_memory(address + offset, dense.data_ptr(), nbytes)
        else:
            assert target is not None, "a copy from a device needs the target as a tensor"
            target[offset : offset + nbytes].copy_(as_bytes(dense), non_blocking=True)


def copy_in(
    tensor: torch.Tensor, start: int, stop: int, address: int, source: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> None:
    """Copy host memory over the bytes ``start`` to ``stop`` of a tensor; undoes ``copy_out``.

    Parameters
    ----------
    tensor : torch.Tensor
        Any strided tensor on any device, whose elements do not share memory.
    start, stop : int
        Bytes of the stored form, multiples of its element size.
    address : int
        Where they come from, on the host.
    source : torch.Tensor, optional
        The same memory as a flat uint8 tensor; needed for a tensor on a device.
    dtype : torch.dtype, optional
        The dtype of the stored form, if values are to be converted.
    """
    stored = dtype or tensor.dtype
    if stored == tensor.dtype and is_plain_memory(tensor):
        move_memory(tensor.data_ptr() + start, address, stop - start)
        return
    if stored == tensor.dtype:
        tensor = _as_integers(tensor)
        stored = tensor.dtype
    size = stored.itemsize
    with torch.no_grad():
        for view, first in runs(tensor, start // size, stop // size):
            offset = first * size - start
            nbytes = view.numel() * size
            if stored == view.dtype and not view.is_cpu and view.is_contiguous() and not (view.is_conj() or view.is_neg()):
                assert source is not None, "a copy to a device needs the source as a tensor"
                as_bytes(view).copy_(source[offset : offset + nbytes], non_blocking=True)
                continue
            dense = torch.empty(view.shape, dtype=stored, device="cpu")
            move_memory(dense.data_ptr(), address + offset, nbytes)
            view.copy_(dense)


def rectangles(sizes: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Boxes that together are the elements ``start`` to ``stop`` of a shape in row-major order.

    Of each: where it begins, its sizes, and the number of its first element.

    >>> list(rectangles((4, 10), 8, 30))
    [((0, 8), (1, 2), 8), ((1, 0), (2, 10), 10)]
    """
    if start >= stop:
        return
    if len(sizes) <= 1:
        yield (start,)[: len(sizes)], (stop - start,)[: len(sizes)], start
        return
    row = math.prod(sizes[1:])
    while start < stop:
        index, within = divmod(start, row)
        if whole := 0 if within else (stop - start) // row:
            yield (index, *((0,) * (len(sizes) - 1))), (whole, *sizes[1:]), start
            start += whole * row
            continue
        end = min(stop, (index + 1) * row)
        for starts, counts, first in rectangles(sizes[1:], within, end - index * row):
            yield (index, *starts), (1, *counts), first + index * row
        start = end


def copy_part_in(
    tensor: torch.Tensor,
    sizes: tuple[int, ...],
    starts: tuple[int, ...],
    start: int,
    stop: int,
    address: int,
    dtype: torch.dtype | None = None,
) -> None:
    """Copy those of the bytes ``start`` to ``stop`` of a box to a tensor that are part of it.

    Parameters
    ----------
    tensor : torch.Tensor
        The part, on any device.
    sizes : tuple of int
        Of the box.
    starts : tuple of int
        Where in the box the tensor begins.
    start, stop : int
        Bytes of the box, multiples of its element size.
    address : int
        Where they are, in host memory.
    dtype : torch.dtype, optional
        That of the box, if values are to be converted.
    """
    stored = dtype or tensor.dtype
    if stored == tensor.dtype:
        tensor = _as_integers(tensor)
        stored = tensor.dtype
    size = stored.itemsize
    with torch.no_grad():
        for begin, counts, first in rectangles(sizes, start // size, stop // size):
            source = torch.frombuffer(memory(address + first * size - start, math.prod(counts) * size), dtype=stored).view(counts)
            target = tensor
            for dimension, (at, count, low, high) in enumerate(zip(begin, counts, starts, tensor.shape, strict=True)):
                lowest, highest = max(at, low), min(at + count, low + high)
                if lowest >= highest:
                    break
                source = source.narrow(dimension, lowest - at, highest - lowest)
                target = target.narrow(dimension, lowest - low, highest - lowest)
            else:
                target.copy_(source)
