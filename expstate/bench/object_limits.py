"""What a bucket and its clients can do at best: raw objects put and got, many requests at once, with nothing in their way.

Gets a folder as a URL, a client and a number of requests; what is timed runs within the meter. ``COMPONENTS`` names the limits, ``CLIENTS``
the clients; which of them is the fastest is not known before.
"""

from __future__ import annotations

import asyncio
import importlib
import os
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expstate.bench import limits
from expstate.bench.limits import PIECE_BYTES
from expstate.bench.places import filesystem, storage_options
from expstate.bench.plan import MIB

if TYPE_CHECKING:
    from collections.abc import Callable

    from expstate.bench.measure import Meter

_MOST_REQUESTS = 16
_LONGEST_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes ``start`` to ``stop`` of an object; its name has no folder."""

    name: str
    start: int
    stop: int


class RawClient(ABC):
    """A client that moves pieces, a number of them at once.

    Parameters
    ----------
    folder : str
        The URL of the folder with the objects.
    """

    @abstractmethod
    def __init__(self, folder: str) -> None: ...

    @abstractmethod
    def put(self, pieces: deque[Piece], buffers: list[bytes]) -> None:
        """Store an object for each piece, with as many requests at once as there are buffers, each sent again and again."""

    @abstractmethod
    def get(self, pieces: deque[Piece], requests: int) -> int:
        """Read the pieces; how many bytes came."""


class ObstoreClient(RawClient):
    """obstore, a thread for each request at once."""

    def __init__(self, folder: str) -> None:
        from expstate.storage.objects import obstore as ours

        scheme, _, rest = folder.partition("://")
        bucket, _, self._folder = rest.partition("/")
        # Its way to say to obstore what fsspec's options mean, and nothing of what it does around a request.
        self._store = ours.client(scheme, bucket, storage_options())._open(_LONGEST_SECONDS)  # noqa: SLF001 - as said above
        self._obstore: Any = importlib.import_module("obstore")
        next(iter(self._obstore.list(self._store, f"{self._folder}/nothing")), None)

    def put(self, pieces: deque[Piece], buffers: list[bytes]) -> None:
        def work(number: int) -> None:
            for piece in limits.take_from(pieces):
                data = memoryview(buffers[number])[: piece.stop - piece.start]
                self._obstore.put(self._store, f"{self._folder}/{piece.name}", data, use_multipart=False)

        limits.in_threads(len(buffers), work)

    def get(self, pieces: deque[Piece], requests: int) -> int:
        counts = [0] * requests

        def work(number: int) -> None:
            for piece in limits.take_from(pieces):
                options = {"range": (piece.start, piece.stop)}
                counts[number] += len(self._obstore.get(self._store, f"{self._folder}/{piece.name}", options=options).bytes())

        limits.in_threads(requests, work)
        return sum(counts)


class FsspecClient(RawClient):
    """s3fs or gcsfs, a task of its event loop for each request at once."""

    def __init__(self, folder: str) -> None:
        self._asyn: Any = importlib.import_module("fsspec.asyn")
        more: dict[str, Any] = {}
        if folder.startswith("s3"):
            # It has ten connections, if nothing else is said.
            more["config_kwargs"] = {"max_pool_connections": _MOST_REQUESTS, **storage_options().get("config_kwargs", {})}
        self._files = filesystem(folder, **more)
        self._folder = folder
        self._files.exists(f"{folder}/nothing")

    def _run(self, works: list[Any]) -> None:
        async def together() -> None:
            await asyncio.gather(*works)

        self._asyn.sync(self._files.loop, together)

    def put(self, pieces: deque[Piece], buffers: list[bytes]) -> None:
        async def work(buffer: bytes) -> None:
            for piece in limits.take_from(pieces):
                length = piece.stop - piece.start
                data = buffer if length == len(buffer) else buffer[:length]
                await self._files._pipe_file(f"{self._folder}/{piece.name}", data)  # noqa: SLF001 - what pipe_file runs

        self._run([work(buffer) for buffer in buffers])

    def get(self, pieces: deque[Piece], requests: int) -> int:
        counts = [0] * requests

        async def work(number: int) -> None:
            for piece in limits.take_from(pieces):
                data = await self._files._cat_file(f"{self._folder}/{piece.name}", start=piece.start, end=piece.stop)  # noqa: SLF001 - as above
                counts[number] += len(data)

        self._run([work(number) for number in range(requests)])
        return sum(counts)


def _objects(total_bytes: int) -> deque[Piece]:
    """Whole objects of so many bytes together."""
    return deque(
        Piece(f"{index:06}", 0, min(PIECE_BYTES, total_bytes - first)) for index, first in enumerate(range(0, total_bytes, PIECE_BYTES))
    )


def put(client: RawClient, total_bytes: int, requests: int, meter: Meter) -> None:
    """Objects of warm memory."""
    buffers = [os.urandom(PIECE_BYTES) for _ in range(requests)]
    pieces = _objects(total_bytes)
    with meter:
        client.put(pieces, buffers)


def _get(client: RawClient, pieces: deque[Piece], requests: int, meter: Meter) -> None:
    expected = sum(piece.stop - piece.start for piece in pieces)
    with meter:
        found = client.get(pieces, requests)
    if found != expected:
        msg = f"{found} bytes came of {expected}"
        raise EOFError(msg)


def get(client: RawClient, total_bytes: int, requests: int, meter: Meter) -> None:
    """All objects, into whatever memory the client has for them."""
    _get(client, _objects(total_bytes), requests, meter)


def get_one(client: RawClient, total_bytes: int, requests: int, meter: Meter) -> None:
    """The first 1 MiB of the object in the middle."""
    pieces = _objects(total_bytes)
    middle = pieces[(len(pieces) - 1) // 2]
    _get(client, deque([Piece(middle.name, 0, min(MIB, middle.stop))]), requests, meter)


CLIENTS: dict[str, Callable[[str], RawClient]] = {"obstore": ObstoreClient, "fsspec": FsspecClient}
COMPONENTS: dict[str, Callable[[RawClient, int, int, Meter], None]] = {component.__name__: component for component in (put, get, get_one)}
