"""Digests of arrays where they lie, on all cores: what tells whether state has changed, before anything is moved.

Plain host memory is digested in place, all else by way of staging buffers. ``digest`` fills in the digests of the blocks of pieces.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

from expstate import settings
from expstate.engine import crew, memory
from expstate.engine.digest import block_digests
from expstate.engine.streams import SideStreams
from expstate.format.manifest import BLOCK_BYTES, DIGEST_BYTES
from expstate.state import tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import torch

    from expstate.engine.memory import Buffer

PIECE_BYTES = memory.WINDOW_BYTES
"""What one thread digests at a time."""

_JOB_PIECES = 512
"""Pieces of one job at most: small tensors are digested many at a time."""


class Piece(msgspec.Struct, frozen=True, gc=False):
    """Bytes ``start`` to ``stop`` of a tensor, in row-major order; ``address`` of the first if they lie so in host memory."""

    view: torch.Tensor
    start: int
    stop: int
    address: int | None

    @property
    def nbytes(self) -> int:
        """How many bytes."""
        return self.stop - self.start

    def stage(self, buffer: Buffer, at: int) -> None:
        """Copy them to a buffer; from a device that only begins here."""
        target = None if self.view.is_cpu else buffer.tensor[at : at + self.nbytes]
        tensors.copy_out(self.view, self.start, self.stop, buffer.address + at, target)


class Digesting(msgspec.Struct, frozen=True, gc=False):
    """A piece of whole blocks, and where the digests of its blocks go: from byte ``at`` of ``digests`` on."""

    piece: Piece
    digests: bytearray
    at: int


def cut(view: torch.Tensor, start: int, stop: int, address: int | None, step: int) -> Iterator[Piece]:
    """Bytes ``start`` to ``stop`` of a tensor in pieces of ``step``; ``address`` is that of byte ``start``, if they lie in host memory."""
    for first in range(start, stop, step):
        yield Piece(view, first, min(stop, first + step), None if address is None else address + first - start)


def filling(pieces: Iterable[Piece], digests: bytearray, at: int = 0) -> Iterator[Digesting]:
    """Pieces of a box that follow each other, whose digests are to fill this from byte ``at`` on."""
    for piece in pieces:
        yield Digesting(piece, digests, at)
        at += -(-piece.nbytes // BLOCK_BYTES) * DIGEST_BYTES


def staging_for(views: Iterable[torch.Tensor], budget: int, threads: int) -> memory.Staging:
    """Buffers that the devices of these tensors can copy to."""
    return memory.Staging(budget, threads, next((view.device.type for view in views if not view.is_cpu), None))


def digest(items: Iterable[Digesting], budget: int, stop: crew.Stop, done: Callable[[int], object]) -> None:
    """Digest the blocks of pieces.

    Parameters
    ----------
    items : iterable of Digesting
        What to digest, and where the digests go.
    budget : int
        Most host memory for what does not lie in plain host memory, in bytes.
    stop : crew.Stop
        Ends the work.
    done : callable
        Is given numbers of bytes as they are digested.
    """
    plain: list[Digesting] = []
    staged: list[Digesting] = []
    for item in items:
        (staged if item.piece.address is None else plain).append(item)
    if plain:
        jobs = _jobs(plain, PIECE_BYTES)
        # It is the cores that work here, and no disk is waited for.
        crew.run(jobs, lambda job: _digest_in_place(job, done), max(1, min(_core_count(), len(jobs))), stop)
    if staged:
        _digest_staged(staged, budget, done, stop)


def _core_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _jobs(items: Sequence[Digesting], room: int) -> list[list[Digesting]]:
    """Pieces that are done together."""
    jobs: list[list[Digesting]] = []
    left, count = 0, 0
    for item in items:
        if item.piece.nbytes > left or count >= _JOB_PIECES:
            jobs.append([])
            left, count = room, 0
        jobs[-1].append(item)
        left -= item.piece.nbytes
        count += 1
    return jobs


def _digest_in_place(job: Sequence[Digesting], done: Callable[[int], object]) -> None:
    for item in job:
        assert item.piece.address is not None
        found = block_digests(tensors.memory(item.piece.address, item.piece.nbytes))
        item.digests[item.at : item.at + len(found)] = found
    done(sum(item.piece.nbytes for item in job))


def _digest_staged(items: Sequence[Digesting], budget: int, done: Callable[[int], object], stop: crew.Stop) -> None:
    views = [item.piece.view for item in items]
    threads = settings.current().thread_count
    streams = SideStreams(view.device for view in views)
    staging = staging_for(views, budget, threads)

    def work(job: Sequence[Digesting]) -> None:
        with staging.lend(stop) as buffer:
            at = 0
            with streams.entered() as events:
                for item in job:
                    item.piece.stage(buffer, at)
                    at += item.piece.nbytes
            for event in events:
                event.synchronize()
            at = 0
            for item in job:
                found = block_digests(buffer.view[at : at + item.piece.nbytes])
                item.digests[item.at : item.at + len(found)] = found
                at += item.piece.nbytes
        done(at)

    try:
        jobs = _jobs(_smaller(items, staging.window_bytes), staging.window_bytes)
        crew.run(jobs, work, max(1, min(threads, staging.count, len(jobs))), stop, streams.on_device)
    finally:
        streams.join()
        staging.close()


def _smaller(items: Sequence[Digesting], most: int) -> list[Digesting]:
    """Pieces that a buffer holds, of whole blocks."""
    return [
        Digesting(part, item.digests, item.at + (part.start - item.piece.start) // BLOCK_BYTES * DIGEST_BYTES)
        for item in items
        for part in cut(item.piece.view, item.piece.start, item.piece.stop, None, most)
    ]
