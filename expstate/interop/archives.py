"""Archives that ``torch.save`` writes, as views of mapped files: nothing is copied, and nothing in them is run."""

from __future__ import annotations

import io
import math
import zipfile
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from expstate.errors import CheckpointFormatError, PickleNotAllowedError
from expstate.interop import pickles
from expstate.state.objects import unpickle_object
from expstate.state.tensors import NAMES

if TYPE_CHECKING:
    import mmap

_STORAGES = {
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_LOCAL_HEADER_BYTES = 30
_MOST_PICKLE_BYTES = 1 << 20
"""A tensor's own pickle has a few hundred."""


class _Storage(NamedTuple):
    """The bytes of a tensor: their dtype (None where the tensor says it), name in the archive, and count of elements."""

    dtype: torch.dtype | None
    key: str
    numel: int


class _Tensor(NamedTuple):
    """A tensor as its pickle describes it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class _View(io.RawIOBase):
    """A part of a mapped file, as a file."""

    def __init__(self, mapped: mmap.mmap, start: int, length: int) -> None:
        self._view = memoryview(mapped)[start : start + length]
        self._at = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._view)}[whence]
        if base + offset < 0:
            msg = "a place before the beginning"
            raise OSError(msg)
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        found = self._view[self._at : self._at + len(buffer)]
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


def read_tensor(mapped: mmap.mmap, start: int, length: int) -> torch.Tensor | None:
    """The tensor in an archive, as a view of the file.

    Parameters
    ----------
    mapped : mmap.mmap
        The file, mapped so that it may be written to (of which nothing comes to the file).
    start, length : int
        Where the archive lies in it, in bytes.

    Returns
    -------
    torch.Tensor or None
        None if it holds something else than a strided tensor.

    Raises
    ------
    CheckpointFormatError
        If it is no archive, or describes what is not in it.
    """
    members = _members(mapped, start, length)
    data = _pickle_of(members, mapped, start, most=_MOST_PICKLE_BYTES)
    if data is None:
        return None
    try:
        found = pickles.read(data, _tensor_table(), persistent=_storage_of)
    except PickleNotAllowedError:
        return None
    if not isinstance(found, _Tensor):
        return None
    itemsize = found.dtype.itemsize
    name = next((name for name in members if name.endswith(f"/data/{found.storage.key}")), None)
    first, nbytes = members[name] if name is not None else (0, 0)
    if name is None or nbytes != found.storage.numel * (found.storage.dtype or torch.uint8).itemsize:
        msg = "a tensor's bytes are not in its archive"
        raise CheckpointFormatError(msg)
    if math.prod(found.shape) == 0:
        return torch.empty(found.shape, dtype=found.dtype, device="cpu")
    last = found.offset + sum((size - 1) * stride for size, stride in zip(found.shape, found.strides, strict=True))
    if (last + 1) * itemsize > nbytes:
        msg = f"a tensor of shape {found.shape} and strides {found.strides} is not within its {nbytes:,} bytes"
        raise CheckpointFormatError(msg)
    flat = torch.frombuffer(mapped, dtype=torch.uint8, count=nbytes // itemsize * itemsize, offset=start + first).view(found.dtype)
    return flat.as_strided(found.shape, found.strides, found.offset)


def read_value(mapped: mmap.mmap, start: int, length: int, *, trust: bool) -> Any:
    """What else an archive holds: plain values by ourselves, others by ``torch.load`` as safely as it can.

    Raises
    ------
    PickleNotAllowedError
        If it needs trust, and there is none.
    CheckpointFormatError, SnapshotCorruptError
        If it cannot be read.
    """
    data = _pickle_of(_members(mapped, start, length), mapped, start)
    if data is not None:
        try:
            return pickles.checked(pickles.read(data, {("collections", "OrderedDict"): OrderedDict}), len(data))
        except PickleNotAllowedError:
            pass
    return unpickle_object(mapped[start : start + length], trust=trust)


def _members(mapped: mmap.mmap, start: int, length: int) -> dict[str, tuple[int, int]]:
    """The files in an archive: where their bytes begin in it, and how many there are."""
    found: dict[str, tuple[int, int]] = {}
    try:
        with zipfile.ZipFile(io.BufferedReader(_View(mapped, start, length))) as archive:
            members = archive.infolist()
    except Exception as error:
        msg = f"it is no archive that torch.save has written: {type(error).__name__}: {error}"[:300]
        raise CheckpointFormatError(msg) from error
    for member in members:
        at = start + member.header_offset
        header = mapped[at : at + _LOCAL_HEADER_BYTES]
        first = member.header_offset + _LOCAL_HEADER_BYTES + int.from_bytes(header[26:28], "little")
        first += int.from_bytes(header[28:30], "little")
        if member.compress_type != zipfile.ZIP_STORED or not 0 <= first <= first + member.file_size <= length:
            msg = "its archive is packed, or broken off"
            raise CheckpointFormatError(msg)
        found[member.filename] = (first, member.file_size)
    return found


def _pickle_of(members: dict[str, tuple[int, int]], mapped: mmap.mmap, start: int, *, most: int | None = None) -> bytes | None:
    """The pickle of an archive; None if it has more than so many bytes, or was written where bytes have another order."""
    name = next((name for name in members if name.endswith("/data.pkl")), None)
    if name is None:
        msg = "it is no archive that torch.save has written: it has no data.pkl"
        raise CheckpointFormatError(msg)
    order = next((place for other, place in members.items() if other.endswith("/byteorder")), None)
    first, size = members[name]
    if (most is not None and size > most) or (order is not None and mapped[start + order[0] : start + sum(order)] != b"little"):
        return None
    return mapped[start + first : start + first + size]


# What stands for the names in a tensor's pickle


def _storage_of(pid: Any) -> _Storage:
    kind, dtype, key, _, numel = pid
    if kind != "storage" or type(key) is not str or not _is_size(numel) or not isinstance(dtype, (torch.dtype, bytes)):
        msg = "a reference that is none to the bytes of a tensor"
        raise TypeError(msg)
    return _Storage(dtype if isinstance(dtype, torch.dtype) else None, key, numel)


def _rebuilt(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any) -> _Tensor:
    sound = (
        isinstance(storage, _Storage)
        and isinstance(dtype, torch.dtype)
        and dtype in NAMES
        and type(shape) is tuple
        and type(strides) is tuple
        and len(shape) == len(strides)
        and all(map(_is_size, (offset, *shape, *strides)))
    )
    if not sound:
        msg = "a tensor that cannot be"
        raise TypeError(msg)
    return _Tensor(storage, offset, shape, strides, dtype)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _tensor_table() -> pickles.Table:
    def second(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
        return _rebuilt(storage, offset, shape, strides, storage.dtype)

    def third(storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, dtype: Any, *_: Any) -> _Tensor:
        del requires_grad, hooks
        return _rebuilt(storage, offset, shape, strides, dtype)

    return {
        ("torch._utils", "_rebuild_tensor_v2"): second,
        ("torch._utils", "_rebuild_tensor_v3"): third,
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        ("torch.storage", "UntypedStorage"): b"untyped",
        ("collections", "OrderedDict"): dict,
        **{("torch", name): dtype for name, dtype in _STORAGES.items()},
        **{("torch", name): dtype for dtype, name in NAMES.items()},
    }
