"""A proxy on loopback between a client and an object store, which breaks what it is told to break.

Gets the address of a server, and faults; hands requests and replies on byte by byte as they come, and tells what has gone by. The header
``Host`` is left as it is: signatures cover it, and servers answer with addresses made from it, so that what follows goes through here too.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import socket
import struct
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any
from urllib.parse import urlsplit

from typing_extensions import Self

from .faults import Action, Delay, Fault, Flip, Hang, Lost, Request, Reset, Shrink, Status, Truncate

_PIECE = 1 << 16
_CHUNKED = -1
_UNTIL_CLOSED = -2


class FaultProxy:
    """The proxy, in a thread of its own.

    Parameters
    ----------
    server : str
        Where the server answers: ``http://127.0.0.1:8333``.

    Attributes
    ----------
    url : str
        Where the proxy answers: the endpoint for the client.
    latency : float
        Seconds by which every request is held back.
    requests : list of Request
        All that has come, in the order in which it came.
    """

    def __init__(self, server: str) -> None:
        address = urlsplit(server)
        self._server = (address.hostname or "", address.port or 80)
        self.latency = 0.0
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._connections: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self._healed = asyncio.Event()
        self._listener = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = "http://{}:{}".format(*self._listener.sockets[0].getsockname())

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def add(self, fault: Fault) -> Fault:
        """From now on this goes wrong. Of several faults that hit a request, delays add up, and the first other one counts."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Nothing goes wrong any more, and nothing is slow. Requests that hang lose their connection. ``requests`` stays."""
        with self._lock:
            self._faults.clear()
        self.latency = 0.0
        self._run(self._heal())

    async def _heal(self) -> None:
        self._healed.set()
        self._healed = asyncio.Event()

    def close(self) -> None:
        """Close every connection and end."""
        if self._loop.is_closed():
            return
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._listener.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._listener.wait_closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _strike(self, request: Request) -> tuple[float, Action | None]:
        """How long this request is held back, and what happens to it then."""
        with self._lock:
            struck = [fault for fault in self._faults if fault.strikes(request)]
        request.fault = next((fault for fault in struck if not isinstance(fault.action, Delay)), None)
        delay = self.latency
        for fault in struck:
            if isinstance(fault.action, Delay):
                fault.hits += 1
                delay += fault.action.seconds
        if request.fault is None:
            return delay, None
        request.fault.hits += 1
        return delay, request.fault.action

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        exchange = _Exchange(self, _Side(reader, writer))
        # Either side may be gone, or speak otherwise than expected: the connection is closed, and both see it.
        with contextlib.suppress(OSError, EOFError, ValueError, asyncio.LimitOverrunError, asyncio.CancelledError):
            while await exchange.next():
                pass
        for side in (exchange.client, exchange.server):
            if side is not None:
                await side.close()
        self._connections.discard(task)


class _Side:
    """One end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer

    async def head(self) -> tuple[str, dict[str, str], bytes]:
        """The first line, the headers, and all of it as it came."""
        raw = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
        pairs = (line.partition(":") for line in lines)
        return first, {name.strip().lower(): value.strip() for name, _, value in pairs}, raw

    async def body(self, length: int) -> AsyncIterator[tuple[bytes, bytes]]:
        """A body in pieces: as they came, and what is the object's in them."""
        if length != _CHUNKED:
            while length and (piece := await self.reader.read(_PIECE if length < 0 else min(length, _PIECE))):
                length -= len(piece) if length > 0 else 0
                yield piece, piece
            if length > 0:
                raise EOFError
            return
        while size := int((line := await self.reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            yield line, b""
            async for both in self.body(size):
                yield both
            yield await self.reader.readexactly(2), b""
        while line != b"\r\n":
            yield line, b""
            line = await self.reader.readuntil(b"\r\n")
        yield line, b""

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    def abort(self) -> None:
        """Reset the connection."""
        # No waiting for what was sent: then the other side is told that it was not closed in an orderly way.
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def close(self) -> None:
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except asyncio.CancelledError:
            self._writer.transport.abort()  # whoever is there does not read what is left
        except OSError:
            pass


class _Exchange:
    """Requests of one connection of a client, one after the other, and the connection to the server that belongs to it."""

    def __init__(self, proxy: FaultProxy, client: _Side) -> None:
        self._proxy = proxy
        self.client = client
        self.server: _Side | None = None

    async def next(self) -> bool:
        """Take the next request; whether another may follow."""
        first, headers, raw = await self.client.head()
        method, target, _ = first.split(" ", 2)
        request = Request(method, target, headers)
        self._proxy.requests.append(request)
        healed = self._proxy._healed
        delay, action = self._proxy._strike(request)
        await asyncio.sleep(delay)
        if isinstance(action, Reset):
            self.client.abort()
            return False
        if isinstance(action, Hang) and not action.stored:
            await healed.wait()
            return False
        if isinstance(action, Status):
            return await self._answer(request, action)
        if self.server is None:
            self.server = _Side(*await asyncio.open_connection(*self._proxy._server))
        await self.server.send(raw)
        upload = asyncio.ensure_future(self._upload(request, self.server, action))
        try:
            goes_on = await self._reply(request, self.server, action)
            if request.up == _length_of_request(headers):
                await upload
            if isinstance(action, Hang):
                await healed.wait()
        finally:
            upload.cancel()  # a server may refuse a body before it has read it
            await asyncio.gather(upload, return_exceptions=True)
        return goes_on and not upload.cancelled() and headers.get("connection", "").lower() != "close"

    async def _answer(self, request: Request, status: Status) -> bool:
        if "100-continue" in request.headers.get("expect", "").lower():
            await self.client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        async for raw, _ in self.client.body(_length_of_request(request.headers)):
            request.up += len(raw)
        reason = http.HTTPStatus(status.code).phrase if status.code in http.HTTPStatus._value2member_map_ else "Unknown"
        headers = {"Content-Length": str(len(status.body)), **status.headers}
        request.status = status.code
        body = b"" if request.method == "HEAD" else status.body
        request.down += len(body)
        await self.client.send(_head(f"HTTP/1.1 {status.code} {reason}", headers) + body)
        return request.headers.get("connection", "").lower() != "close"

    async def _upload(self, request: Request, server: _Side, action: Action | None) -> None:
        length = _length_of_request(request.headers)
        flips = _Flipper(action, length) if isinstance(action, Flip) and action.upload else None
        try:
            async for raw, data in self.client.body(length):
                request.up += len(raw)
                await server.send(flips.turn(raw) if flips and data else raw)
        except (OSError, EOFError, ValueError):
            server.abort()  # the client is gone: half a body is not waited for

    async def _reply(self, request: Request, server: _Side, action: Action | None) -> bool:
        """Hand on what the server says; whether the connection goes on."""
        while True:
            first, headers, raw = await server.head()
            code = int(first.split(" ", 2)[1])
            if code >= http.HTTPStatus.OK:
                break
            await self.client.send(raw)  # go on with the body
        length = _length_of_reply(request.method, code, headers)
        body = server.body(length)
        if isinstance(action, Lost | Hang):
            async for _ in body:
                pass
            return False
        request.status = code
        if isinstance(action, Truncate | Shrink):
            return await self._shorten(request, action, first, headers, body)
        await self.client.send(raw)
        flips = _Flipper(action, length) if isinstance(action, Flip) and not action.upload else None
        async for piece, data in body:
            request.down += len(piece)
            await self.client.send(flips.turn(piece) if flips and data else piece)
        return length != _UNTIL_CLOSED and headers.get("connection", "").lower() != "close"

    async def _shorten(
        self, request: Request, action: Truncate | Shrink, first: str, headers: dict[str, str], body: AsyncIterator[tuple[bytes, bytes]]
    ) -> bool:
        whole = b"".join([data async for _, data in body])
        kept = whole[: len(whole) // 2 if action.keep is None else action.keep]
        announced = whole if isinstance(action, Truncate) else kept
        headers = {name: value for name, value in headers.items() if name != "transfer-encoding"} | {"content-length": str(len(announced))}
        request.down += len(kept)
        await self.client.send(_head(first, headers) + kept)
        return len(kept) == len(announced)


class _Flipper:
    """Turns one bit of a body that goes by in pieces."""

    def __init__(self, flip: Flip, length: int) -> None:
        self._left = max(length, 0) // 2 if flip.at is None else flip.at

    def turn(self, piece: bytes) -> bytes:
        at, self._left = self._left, self._left - len(piece)
        return piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :] if 0 <= at < len(piece) else piece


def _head(first: str, headers: Mapping[str, str]) -> bytes:
    return "\r\n".join([first, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode("latin-1")


def _length_of_request(headers: Mapping[str, str]) -> int:
    return _CHUNKED if "chunked" in headers.get("transfer-encoding", "").lower() else int(headers.get("content-length", "0"))


def _length_of_reply(method: str, code: int, headers: Mapping[str, str]) -> int:
    if method == "HEAD" or code in {http.HTTPStatus.NO_CONTENT, http.HTTPStatus.NOT_MODIFIED}:
        return 0
    if "chunked" in headers.get("transfer-encoding", "").lower():
        return _CHUNKED
    return int(headers.get("content-length", _UNTIL_CLOSED))
