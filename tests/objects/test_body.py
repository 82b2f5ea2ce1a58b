"""A body is sent from where its buffers are, and can be cut off."""

from __future__ import annotations

import array
import asyncio
import contextlib
import random
from typing import Any

import pytest

pytest.importorskip("aiohttp")

import aiohttp
import aiohttp.web

from expstate.storage.objects.body import Body


def buffers_of(sizes: list[int]) -> list[bytes]:
    return [random.randbytes(size) for size in sizes]


@pytest.mark.parametrize("sizes", [[], [0], [5], [0, 3, 0, 0, 4, 1, 0], [1] * 1000, [10_000, 1, 300_000]])
@pytest.mark.parametrize("size", [1, 2, 7, 1 << 18])
def test_reading_gives_the_buffers_one_after_the_other(sizes: list[int], size: int) -> None:
    buffers = buffers_of(sizes)
    body = Body(buffers, 60)
    assert len(body) == sum(sizes)
    assert body.size == sum(sizes)
    read = bytearray()
    while piece := body.read(size):
        assert len(piece) <= size
        read += piece
        assert body.tell() == len(read)
    assert read == b"".join(buffers)
    assert body.read(size) == b""
    body.seek(0)
    assert bytes(body.read()) == b"".join(buffers)
    assert bytes(body.read()) == b""


def test_seeking_goes_anywhere() -> None:
    body = Body([b"0123", b"456789"], 60)
    assert body.seek(-3, 2) == 7
    assert bytes(body.read(2)) == b"78"
    assert body.seek(-6, 1) == 3
    assert bytes(body.read(3)) == b"345"
    assert body.seek(100) == 100
    assert bytes(body.read(3)) == b""


def test_what_lies_in_one_buffer_is_not_copied() -> None:
    data = bytearray(b"0123456789")
    body = Body([b"abc", data], 60)
    body.seek(3)
    piece = body.read(4)
    data[0] = ord("x")
    assert bytes(piece) == b"x123"


def test_elements_of_several_bytes_are_bytes() -> None:
    numbers = array.array("I", range(10))
    assert bytes(Body([numbers], 60).read()) == numbers.tobytes()  # type: ignore[list-item]


def test_buffers_are_free_after_the_release() -> None:
    data = bytearray(100)
    body = Body([data], 60)
    with pytest.raises(BufferError):
        data.append(1)
    body.release()
    data.append(1)


async def send(body: Body, handler: Any) -> Any:
    """What a server's handler has made of a request with the body."""
    application = aiohttp.web.Application(client_max_size=1 << 30)
    application.router.add_put("/", handler)
    runner = aiohttp.web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        port = runner.addresses[0][1]
        async with aiohttp.ClientSession() as session, session.put(f"http://127.0.0.1:{port}/", data=body) as reply:
            return await reply.read()
    finally:
        await runner.cleanup()


def test_a_server_gets_all_of_it_with_its_length() -> None:
    buffers = buffers_of([1 << 20, 0, 17, *([3] * 1000), 1 << 18])

    async def handler(request: aiohttp.web.Request) -> aiohttp.web.Response:
        assert request.headers["Content-Length"] == str(sum(map(len, buffers)))
        return aiohttp.web.Response(body=await request.read())

    assert asyncio.run(send(Body(buffers, 60), handler)) == b"".join(buffers)


def test_a_server_that_stops_reading_is_left() -> None:
    async def handler(request: aiohttp.web.Request) -> aiohttp.web.Response:
        await request.content.read(1)
        await asyncio.sleep(20)
        return aiohttp.web.Response()

    with pytest.raises(aiohttp.ClientConnectionError):
        asyncio.run(send(Body([bytes(64 << 20)], 0.3), handler))


def test_it_goes_in_pieces_to_a_library_that_iterates() -> None:
    buffers = buffers_of([600_000, 3])

    async def collect() -> bytes:
        return b"".join([bytes(piece) async for piece in Body(buffers, 60)])

    assert asyncio.run(collect()) == b"".join(buffers)


def test_a_server_that_answers_early_gets_no_more_of_it() -> None:
    """Buffers are the caller's again as soon as there is an answer."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 412 No\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        with contextlib.suppress(ConnectionError):
            while await reader.read(1 << 16):  # noqa: ASYNC110 - slower than the client
                await asyncio.sleep(0.01)
        ended.set()
        writer.close()

    ended = asyncio.Event()

    async def ask() -> int:
        body = Body([bytes(64 << 20)], 60)
        async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server, aiohttp.ClientSession() as session:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
            async with session.put(url, data=body) as reply:
                body.answered()
            await asyncio.wait_for(ended.wait(), 20)
            return reply.status

    assert asyncio.run(ask()) == 412
