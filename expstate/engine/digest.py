"""Digests of blocks and boxes.

A block's digest is the BLAKE3 of its bytes; a box's is that of its block, or the BLAKE3 of its blocks' digests if it has several.
"""

from __future__ import annotations

from blake3 import blake3

from expstate.format.manifest import BLOCK_BYTES, DIGEST_BYTES

EMPTY = blake3(b"").digest()
"""The digest of a box without bytes."""


def block_digests(data: memoryview) -> bytes:
    """The digests of the blocks of ``data``, one after the other; its last block may be short."""
    if len(data) <= BLOCK_BYTES:
        return blake3(data).digest()
    return b"".join(blake3(data[start : start + BLOCK_BYTES]).digest() for start in range(0, len(data), BLOCK_BYTES))


def box_digest(blocks: bytes | bytearray) -> bytes:
    """The digest of a box from those of its blocks."""
    if not blocks:
        return EMPTY
    return bytes(blocks) if len(blocks) == DIGEST_BYTES else blake3(blocks).digest()
