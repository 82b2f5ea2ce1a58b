"""The kernel of fingerprints for accelerators that Triton serves: one pass over the memory, in which each byte is read once.

Gets words and keys on a device; hands on the sums of their chunks there. ``fingerprint`` says what they are, and imports this
module only when a tensor lies on such a device: Triton need not be installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_UNROLLED_ROWS = 8  # the loads that a thread has under way
_WARPS = 1 if torch.version.hip else 2  # 64 threads: each loads 16 bytes of a row of 256 words


def chunk_sums(words: torch.Tensor, row_keys: torch.Tensor, lane_keys: torch.Tensor) -> torch.Tensor:
    """The sums of each chunk, queued on the current stream of the current device.

    Parameters
    ----------
    words : torch.Tensor
        Flat int32 on that device, at least one; its address is a multiple of 4.
    row_keys, lane_keys : torch.Tensor
        int32 on that device, of shapes (4, rows) and (4, 2, lanes).

    Returns
    -------
    torch.Tensor
        int64 of shape (chunks, 4).
    """
    columns, rows = row_keys.shape
    lanes = lane_keys.shape[2]
    chunks = triton.cdiv(words.numel(), rows * lanes)
    sums = torch.empty(chunks, columns, dtype=torch.int64, device=words.device)
    _chunk_sums[(chunks,)](words, words.numel(), row_keys, lane_keys, sums, rows, lanes, _UNROLLED_ROWS, num_warps=_WARPS)
    return sums


@triton.jit(do_not_specialize=["count"])  # lengths of all kinds are served by one compilation
def _chunk_sums(words, count, row_keys, lane_keys, sums, rows: tl.constexpr, lanes: tl.constexpr, unrolled: tl.constexpr):
    # One program makes one chunk's sums. The four columns are written out, since Triton has no arrays of tensors.
    chunk = tl.program_id(0).to(tl.int64)
    start = chunk * (rows * lanes)
    here = tl.minimum(count - start, rows * lanes).to(tl.int32)
    lane = tl.arange(0, lanes)
    words += start + lane
    value0 = tl.zeros([lanes], tl.int64)
    value1 = tl.zeros([lanes], tl.int64)
    value2 = tl.zeros([lanes], tl.int64)
    value3 = tl.zeros([lanes], tl.int64)
    whole = here // (unrolled * lanes) * unrolled
    for first in range(0, whole, unrolled):
        for index in tl.static_range(unrolled):
            row = first + index
            # Widened right here, so that the compiler sees a product of 32 by 32 bits: one instruction, not four.
            word = tl.load(words + row * lanes).to(tl.int64)
            value0 += word * tl.load(row_keys + row).to(tl.int64)
            value1 += word * tl.load(row_keys + rows + row).to(tl.int64)
            value2 += word * tl.load(row_keys + 2 * rows + row).to(tl.int64)
            value3 += word * tl.load(row_keys + 3 * rows + row).to(tl.int64)
    for row in range(whole, tl.cdiv(here, lanes)):
        word = tl.load(words + row * lanes, mask=row * lanes + lane < here, other=0).to(tl.int64)
        value0 += word * tl.load(row_keys + row).to(tl.int64)
        value1 += word * tl.load(row_keys + rows + row).to(tl.int64)
        value2 += word * tl.load(row_keys + 2 * rows + row).to(tl.int64)
        value3 += word * tl.load(row_keys + 3 * rows + row).to(tl.int64)
    sums += chunk * 4
    lane_keys += lane
    tl.store(sums, _lanes_sum(value0, lane_keys, lanes))
    tl.store(sums + 1, _lanes_sum(value1, lane_keys + 2 * lanes, lanes))
    tl.store(sums + 2, _lanes_sum(value2, lane_keys + 4 * lanes, lanes))
    tl.store(sums + 3, _lanes_sum(value3, lane_keys + 6 * lanes, lanes))


@triton.jit
def _lanes_sum(value, keys, lanes: tl.constexpr):
    low = value & 0xFFFFFFFF
    high = value >> 32
    return tl.sum(low * tl.load(keys).to(tl.int64) + high * tl.load(keys + lanes).to(tl.int64))
