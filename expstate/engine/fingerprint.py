"""Fingerprints of tensors, computed where they lie, so that a take can tell without a copy that a tensor is what it was.

``Fingerprints`` gets tensors on any device and hands on 16 bytes of each. They depend on a key and the tensor's bytes in row-major order,
and on nothing else: not on its dtype, shape, strides or device, nor on how the work was cut. ``fingerprint_reference`` is the definition.

**Definition.** All numbers are little-endian. The key is 16 random bytes. BLAKE3 in its mode for deriving keys, with the context
``expstate 2026 fingerprint of a tensor`` and the key as its input, gives the *row keys*, 4 x 128 signed numbers of 32 bits, then the
*lane keys*, 4 x 2 x 256 of them, then the *last key*, 32 bytes. The tensor's bytes, and as many zeros after them as are needed, are
signed words of 32 bits. A *chunk* is 32,768 words (128 KiB): a matrix of 128 rows and 256 lanes. For each of four columns ``c``, and
modulo 2**64::

    value[lane] = sum over rows of row_key[c, row] * word[row, lane]
    sum[c]      = sum over lanes of lane_key[c, 0, lane] * low(value[lane]) + lane_key[c, 1, lane] * high(value[lane])

``low`` is the unsigned lower half of a value, ``high`` its signed upper half. The fingerprint is the first 16 bytes of the BLAKE3, keyed
with the last key, of the tensor's length in bytes (64 bits) and the four sums (64 bits each) of each chunk, one after the other.

**Bound.** Two tensors whose bytes differ have the same fingerprint with a probability below 2**-123, if neither depends on the key. Be a
chunk different, and in it a word, by ``d`` with ``0 < abs(d) < 2**32``. Whatever the other row keys are, the two values of that lane are
equal only if ``row_key * d`` is one certain number modulo 2**64. It is for at most one of the 2**32 keys: for two, the difference of the
keys times ``d`` would be a multiple of 2**64, but it is not 0 and smaller than that. If the values are not equal, one half of them
differs, by less than 2**32 again, and for the same reason at most one of 2**32 lane keys makes the sums equal. So a column's sums are
equal with 2 * 2**-32 at most, and those of all four, whose keys are their own, with (2**-31)**4 = 2**-124. That does not grow with the
number of chunks: one that differs suffices. If the sums or the lengths differ, BLAKE3 makes the same 128 bits of them with 2**-128. Among
n comparisons one errs with less than n * 2**-123.

The sums are the multilinear functions of Carter and Wegman, "Universal classes of hash functions" (1979), computed modulo a power of two
as in Lemire and Kaser, "Strongly universal string hashing is fast" (2014). That the bounds of stages add up is from Stinson, "Universal
hashing and authentication codes" (1994).

Two things are assumed. The derived keys are taken for independent and uniform, as is usual of BLAKE3. And the data does not depend on the
key: whoever knows it can make tensors that collide. A fingerprint tells what training or chance has changed; against someone who reads
the key and forges, only digests help.
"""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3

from expstate.engine import crew
from expstate.state import tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

KEY_BYTES = 16
FINGERPRINT_BYTES = 16

_CONTEXT = "expstate 2026 fingerprint of a tensor"
_COLUMNS, _ROWS, _LANES = 4, 128, 256
_ROW_KEYS, _LANE_KEYS, _LAST_KEY_BYTES = _COLUMNS * _ROWS, _COLUMNS * 2 * _LANES, 32
_CHUNK_WORDS = _ROWS * _LANES
_CHUNK_BYTES = 4 * _CHUNK_WORDS
_SUMS_BYTES = 8 * _COLUMNS  # of a chunk

_PIECE_CHUNKS = 128  # 16 MiB: what is gathered at once, or widened to 64 bits on a device without the kernel
_THREAD_CHUNKS = 16  # what a thread takes at a time: torch does not wake threads of its own for tensors of this size
_TRITON_TYPES = frozenset({"cuda", "xpu"})  # ROCm calls itself cuda

refusals: dict[torch.device, Exception] = {}
"""Devices that the kernel could not be compiled for in this process, and why; torch's own operations serve them."""


def new_key() -> bytes:
    """A random key: for a series of takes, whose fingerprints are compared with each other."""
    return os.urandom(KEY_BYTES)


def _derived(key: bytes) -> bytes:
    """The row keys, the lane keys and the last key, one after the other."""
    if len(key) != KEY_BYTES:
        msg = f"a key of fingerprints has {KEY_BYTES} bytes, not {len(key)}"
        raise ValueError(msg)
    return blake3(key, derive_key_context=_CONTEXT).digest(length=4 * (_ROW_KEYS + _LANE_KEYS) + _LAST_KEY_BYTES)


def _fingerprint(nbytes: int, sums: bytes | bytearray, last_key: bytes) -> bytes:
    return blake3(struct.pack("<Q", nbytes) + sums, key=last_key).digest(length=FINGERPRINT_BYTES)


def fingerprint_reference(data: bytes | bytearray | memoryview, key: bytes) -> bytes:
    """The fingerprint of a tensor's bytes as it is defined, slowly: for tests, and for readers of the format.

    Parameters
    ----------
    data : bytes-like
        In row-major order.
    key : bytes
        Of ``KEY_BYTES``.

    Raises
    ------
    ValueError
        If the key has another length.

    Examples
    --------
    >>> fingerprint_reference(b"", bytes(KEY_BYTES)).hex()
    'b09bc1365873a2e2aef8b399d28c0fed'
    """
    derived = _derived(key)
    row_keys = struct.unpack_from(f"<{_ROW_KEYS}i", derived)
    lane_keys = struct.unpack_from(f"<{_LANE_KEYS}i", derived, 4 * _ROW_KEYS)
    data = bytes(data)
    sums = bytearray()
    for start in range(0, len(data), _CHUNK_BYTES):
        words = struct.unpack(f"<{_CHUNK_WORDS}i", data[start : start + _CHUNK_BYTES].ljust(_CHUNK_BYTES, b"\0"))
        for column in range(_COLUMNS):
            of_rows = row_keys[column * _ROWS : (column + 1) * _ROWS]
            of_lanes = lane_keys[column * 2 * _LANES : (column + 1) * 2 * _LANES]
            total = 0
            for lane in range(_LANES):
                value = sum(row_key * word for row_key, word in zip(of_rows, words[lane::_LANES], strict=True))
                low, high = struct.unpack("<Ii", struct.pack("<Q", value % 2**64))
                total += of_lanes[lane] * low + of_lanes[_LANES + lane] * high
            sums += struct.pack("<Q", total % 2**64)
    return _fingerprint(len(data), sums, derived[-_LAST_KEY_BYTES:])


@dataclass(frozen=True)
class _Keys:
    """The row keys (columns, rows) and the lane keys (columns, 2, lanes) on one device, in 32 bits and widened to 64."""

    row: torch.Tensor
    lane: torch.Tensor
    row_wide: torch.Tensor
    lane_wide: torch.Tensor


@dataclass(frozen=True, eq=False)
class _Queue:
    """What one stream of a device, or a device without streams, is to compute: the sums of one tensor's chunks after the other's."""

    device: torch.device
    stream: Any
    keys: _Keys
    sums: list[torch.Tensor] = field(default_factory=list)

    def on_host(self) -> memoryview:
        """All sums, once the stream has come so far."""
        if not self.sums:
            return memoryview(b"")
        with contextlib.nullcontext() if self.stream is None else torch.get_device_module(self.device).stream(self.stream):
            joined = torch.cat(self.sums).cpu()
        return memoryview(bytes(tensors.memory(joined.data_ptr(), joined.numel() * joined.element_size())))


class Fingerprints:
    """The fingerprints of some tensors. For one thread at a time.

    Parameters
    ----------
    key : bytes
        Of ``KEY_BYTES``. Fingerprints by different keys cannot be compared.

    Raises
    ------
    ValueError
        If the key has another length.

    Examples
    --------
    >>> key = new_key()
    >>> fingerprints = Fingerprints(key)
    >>> fingerprints.add(torch.tensor([[1, 3], [2, 4]], dtype=torch.uint8).t())
    0
    >>> fingerprints.collect() == [fingerprint_reference(bytes([1, 2, 3, 4]), key)]
    True
    """

    def __init__(self, key: bytes) -> None:
        derived = _derived(key)
        # Kept, as a copy of it to a device may only have been queued.
        self._numbers = torch.frombuffer(bytearray(derived[:-_LAST_KEY_BYTES]), dtype=torch.int32)
        self._last_key = derived[-_LAST_KEY_BYTES:]
        self._queues: dict[tuple[torch.device, Any], _Queue] = {}
        self._added: list[tuple[_Queue, int]] = []

    def add(self, tensor: torch.Tensor) -> int:
        """Queue the computation on the current stream of the tensor's device, which is not waited for; in host memory, do it.

        Parameters
        ----------
        tensor : torch.Tensor
            Strided, of any dtype, on any device that holds values. It must not change until the stream has come so far. What is not
            contiguous, or lies at an odd address, is gathered there in pieces of 16 MiB.

        Returns
        -------
        int
            Which of those that ``collect`` gives it is.
        """
        tensor = tensor.detach()
        queue = self._queue(tensor.device)
        sums = [_chunk_sums(words, queue.keys) for words in _words(tensor)]
        queue.sums.extend(sums)  # all or none: a caller may go on after one that failed
        self._added.append((queue, tensor.numel() * tensor.element_size()))
        return len(self._added) - 1

    def collect(self) -> list[bytes]:
        """Wait for the devices, by one copy to the host for each stream, and give the fingerprints in the order of ``add``."""
        sums = {queue: queue.on_host() for queue in self._queues.values()}
        found = []
        for queue, nbytes in self._added:
            own = -(-nbytes // _CHUNK_BYTES) * _SUMS_BYTES
            found.append(_fingerprint(nbytes, bytes(sums[queue][:own]), self._last_key))
            sums[queue] = sums[queue][own:]
        return found

    def _queue(self, device: torch.device) -> _Queue:
        stream = None
        if device.type != "cpu":
            module: Any = torch.get_device_module(device)
            stream = module.current_stream(device) if hasattr(module, "current_stream") and hasattr(module, "stream") else None
        queue = self._queues.get((device, stream))
        if queue is None:
            # Each stream has keys of its own, which are copied before it needs them.
            numbers = self._numbers.to(device, non_blocking=True)
            row, lane = numbers[:_ROW_KEYS].view(_COLUMNS, _ROWS), numbers[_ROW_KEYS:].view(_COLUMNS, 2, _LANES)
            queue = _Queue(device, stream, _Keys(row, lane, row.to(torch.int64), lane.to(torch.int64)))
            self._queues[device, stream] = queue
        return queue


def _words(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The bytes of a tensor as flat int32: whole chunks, but for the last part. A part is to be used before the next is asked for."""
    size = tensor.element_size()
    nbytes = tensor.numel() * size
    offset = tensor.storage_offset() * size
    start = 0
    # The kernel needs an address, and torch an offset, of whole words.
    if tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()) and tensor.data_ptr() % 4 == 0 and offset % 4 == 0:
        start = nbytes if nbytes % 4 == 0 else nbytes // _CHUNK_BYTES * _CHUNK_BYTES
        if start:
            in_place = torch.empty(0, dtype=torch.int32, device=tensor.device)
            yield in_place.set_(tensor.untyped_storage(), offset // 4, (start // 4,), (1,))
    if start == nbytes:
        return
    piece = _PIECE_CHUNKS * _CHUNK_BYTES
    gathered = torch.empty(min(_padded(nbytes - start), piece), dtype=torch.uint8, device=tensor.device)
    for first in range(start, nbytes, piece):
        last = min(first + piece, nbytes)
        for view, number in tensors.runs(tensor, first // size, last // size):
            at = number * size - first
            gathered[at : at + view.numel() * size].copy_(tensors.as_bytes(tensors.dense(view)))
        padded = _padded(last - first)
        gathered[last - first : padded].zero_()
        yield gathered[:padded].view(torch.int32)


def _padded(nbytes: int) -> int:
    """Bytes of the words that hold so many."""
    return -(-nbytes // 4) * 4


def _chunk_sums(words: torch.Tensor, keys: _Keys) -> torch.Tensor:
    """The sums of each chunk, (chunks, columns), where zeros follow the words."""
    device = words.device
    if device.type in _TRITON_TYPES and device not in refusals:
        try:
            from expstate.engine import fingerprint_triton  # noqa: PLC0415 - Triton takes long to import, and need not be there

            with torch.get_device_module(device).device(device):  # where Triton launches, whatever the words are on
                return fingerprint_triton.chunk_sums(words, keys.row, keys.lane)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - no Triton, no compiler that it needs, a device that it does not know
            refusals[device] = error
    whole = words.numel() // _CHUNK_WORDS
    chunks = words[: whole * _CHUNK_WORDS].view(whole, _ROWS, _LANES)
    if not whole:
        sums = []
    elif words.is_cpu:
        sums = _in_threads(chunks.split(_THREAD_CHUNKS), keys)
    else:
        sums = [_sums(piece, keys) for piece in chunks.split(_PIECE_CHUNKS)]
    rest = words[whole * _CHUNK_WORDS :]
    if rest.numel():
        rows = torch.zeros(-(-rest.numel() // _LANES), _LANES, dtype=torch.int32, device=device)
        rows.view(-1)[: rest.numel()].copy_(rest)
        sums.append(_sums(rows[None], keys))
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def _in_threads(parts: Sequence[torch.Tensor], keys: _Keys) -> list[torch.Tensor]:
    """The sums of chunks in host memory, by as many threads as torch uses: it multiplies matrices of integers in a single one."""
    threads = min(torch.get_num_threads(), len(parts))
    if threads <= 1:
        return [_sums(part, keys) for part in parts]
    sums: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        sums[number] = _sums(parts[number], keys)

    crew.run(range(len(parts)), work, threads, crew.Stop())
    return [sums[number] for number in range(len(parts))]


def _sums(chunks: torch.Tensor, keys: _Keys) -> torch.Tensor:
    """The sums of each chunk by torch's own operations; of (chunks, rows, lanes), where rows may be fewer.

    int64 wraps around. It is all that is used, since backends lack most operations of unsigned numbers.
    """
    row_keys = keys.row_wide[:, : chunks.shape[1]]
    values = _values_on_host(chunks, row_keys) if chunks.is_cpu else _values_on_device(chunks, row_keys)
    return ((values & 0xFFFFFFFF) * keys.lane_wide[:, 0] + (values >> 32) * keys.lane_wide[:, 1]).sum(-1)


def _values_on_host(chunks: torch.Tensor, row_keys: torch.Tensor) -> torch.Tensor:
    values = torch.empty(len(chunks), _COLUMNS, _LANES, dtype=torch.int64, device="cpu")
    wide = torch.empty(chunks.shape[1:], dtype=torch.int64, device="cpu")
    for chunk, value in zip(chunks, values, strict=True):
        # One after the other, as one stays in the cache.
        torch.mm(row_keys, wide.copy_(chunk), out=value)
    return values


def _values_on_device(chunks: torch.Tensor, row_keys: torch.Tensor) -> torch.Tensor:
    wide = chunks.to(torch.int64)  # no accelerator multiplies matrices of integers
    return torch.stack([(wide * row_key[:, None]).sum(1) for row_key in row_keys], 1)
