"""The body of an HTTP request by aiohttp: buffers sent one after the other without being joined, and cut off at once if need be.

Gets buffers that stay the caller's, or the chunks that botocore makes of them; hands pieces to the connection. Nothing holds on to the
buffers after ``release``.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import socket
import struct
from typing import TYPE_CHECKING, Any

from aiohttp.payload import Payload

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Sequence

    from aiohttp.abc import AbstractStreamWriter

    from expstate.storage.objects.client import Buffer

_PIECE_BYTES = 1 << 18
"""What a connection takes at once; no more than this is copied, and can still be on its way when the body is cut off."""


class _Body(Payload):
    def __init__(self, value: object, stall_seconds: float) -> None:
        super().__init__(value, content_type="application/octet-stream")
        self._stall_seconds = stall_seconds
        self._transport: asyncio.Transport | None = None
        self._is_sent = False

    async def _send(self, writer: Any, piece: Buffer) -> None:
        transport = self._transport = writer.transport
        # aiohttp waits for ever for a server that has stopped reading.
        timer = writer.loop.call_later(self._stall_seconds, transport.abort) if transport is not None else None
        try:
            await writer.write(piece)
        finally:
            if timer is not None:
                timer.cancel()

    def answered(self) -> None:
        """Break the connection if the server has answered without waiting for all of the body, so that no more of that is read."""
        if not self._is_sent:
            self.abort()

    def abort(self) -> None:
        """Break the connection that the body went through. What the server does not have yet, it never gets."""
        transport, self._transport = self._transport, None
        if transport is not None:
            # Without this the system sends what it has taken, and a request that was cancelled is fulfilled after all.
            with contextlib.suppress(OSError, AttributeError):
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        raise NotImplementedError(encoding, errors)


class Body(_Body):
    """Buffers, one after the other; for botocore a file that can be read and sought.

    Parameters
    ----------
    buffers : sequence of buffers
        Contiguous memory.
    stall_seconds : float
        The connection is broken if a piece is not taken for so long.
    """

    def __init__(self, buffers: Sequence[Buffer], stall_seconds: float) -> None:
        super().__init__(None, stall_seconds)
        self._views = [memoryview(buffer).cast("B") for buffer in buffers if memoryview(buffer).nbytes]
        self._starts = [0, *itertools.accumulate(map(len, self._views))]
        self._size = self._starts.pop()
        self._at = 0

    def __len__(self) -> int:
        return self._size or 0

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, (0, self._at, len(self))[whence] + offset)
        return self._at

    def read(self, size: int | None = None) -> Buffer:
        """At most ``size`` bytes, not copied if they are of one buffer; all that are left without a size."""
        left = max(0, len(self) - self._at)
        left = left if size is None or size < 0 else min(left, size)
        pieces: list[memoryview] = []
        index = bisect.bisect_right(self._starts, self._at) - 1
        while left:
            offset = self._at - self._starts[index]
            pieces.append(self._views[index][offset : offset + left])
            self._at += len(pieces[-1])
            left -= len(pieces[-1])
            index += 1
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def write(self, writer: AbstractStreamWriter) -> None:
        self._at = 0
        while piece := self.read(_PIECE_BYTES):
            await self._send(writer, piece)
        self._is_sent = True

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:  # noqa: ARG002 - it is that of the body
        await self.write(writer)

    async def __aiter__(self) -> AsyncIterator[Buffer]:
        self._at = 0
        while piece := self.read(_PIECE_BYTES):
            yield piece

    def release(self) -> None:
        """Let go of the buffers."""
        self._views.clear()
        self._transport = None


class ChunkedBody(_Body):
    """What botocore wraps around a body to send its checksum after it."""

    async def write(self, writer: AbstractStreamWriter) -> None:
        async for chunk in self._value:
            await self._send(writer, chunk)
        self._is_sent = True

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:  # noqa: ARG002 - not known
        await self.write(writer)
