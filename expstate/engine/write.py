"""Tensors to storage: windows staged, digested and written by several threads.

Gets data files laid out and the tensors they hold; hands on the digests of every block. ``write_now`` stages and writes window by window;
``stage_all`` copies everything first (or as far as the budget goes), so that the caller may change the tensors while the rest
happens behind it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from expstate.engine import crew
from expstate.engine.digest import block_digests
from expstate.engine.memory import Buffer
from expstate.engine.streams import SideStreams
from expstate.engine.windows import WriteWindow, write_windows
from expstate.errors import SnapshotExistsError, SnapshotWriteError
from expstate.format.manifest import BLOCK_BYTES, DIGEST_BYTES
from expstate.state import tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from expstate.engine.memory import Staging
    from expstate.format.layout import DataFile, PlacedBox
    from expstate.storage.base import FileWriter, Storage


class _OpenFile:
    """A data file while its windows are written: opened by the first, made durable by the last."""

    def __init__(self, file: DataFile, windows: int) -> None:
        self.file = file
        self.lock = threading.Lock()
        self.left = windows
        self.writer: FileWriter | None = None
        self.doubtful: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True, slots=True)
class _Staged:
    """A window that is in a buffer, and the events after which it is really there."""

    window: WriteWindow
    buffer: Buffer
    events: list[Any]


class FilesWriter:
    """Writes data files.

    Parameters
    ----------
    storage : Storage
        Where to.
    files : sequence of DataFile
        What, laid out.
    sources : sequence of torch.Tensor
        The tensors that ``PlacedBox.source`` counts.
    addresses : sequence of int or None
        Where each lies in host memory, if its bytes can be copied as they are.
    staging : Staging
        Buffers.
    threads : int
        Threads to use.
    written : callable
        Is given the number of bytes of each window that is written.
    stop : crew.Stop
        Ends the work.

    Attributes
    ----------
    digests : list of list of bytearray
        For each file and box the digests of its blocks, complete when everything is written.
    created : list of str
        Names of the files that were begun.
    """

    def __init__(
        self,
        storage: Storage,
        files: Sequence[DataFile],
        sources: Sequence[torch.Tensor],
        addresses: Sequence[int | None],
        staging: Staging,
        threads: int,
        written: Callable[[int], None],
        stop: crew.Stop,
    ) -> None:
        self._storage = storage
        self._sources = sources
        self._addresses = addresses
        self._staging = staging
        self._written = written
        self._stop = stop
        self._streams = SideStreams(tensor.device for tensor, address in zip(sources, addresses, strict=True) if address is None)
        per_file = [list(write_windows(number, file, storage.alignment, staging.window_bytes)) for number, file in enumerate(files)]
        self._windows = [window for windows in per_file for window in windows]
        self._open = [_OpenFile(file, len(windows)) for file, windows in zip(files, per_file, strict=True)]
        self._threads = max(1, min(threads, staging.count, len(self._windows)))
        self._create_lock = threading.Lock()
        self._behind: crew.Crew[_Staged] | None = None
        self._staged: queue.SimpleQueue[_Staged | None] = queue.SimpleQueue()
        self.digests = [[bytearray(box.block_count * DIGEST_BYTES) for box in file.boxes] for file in files]
        self.created: list[str] = []

    # Staging

    def _stage(self, window: WriteWindow, buffer: Buffer, *, digest: bool) -> list[Any]:
        """Copy a window's bytes into a buffer, and digest those from plain host memory on the way if asked; events to wait for."""
        boxes = self._open[window.file].file.boxes
        digests = self.digests[window.file]
        with self._streams.entered() as events:
            for item in window.fragments:
                number, start = item.box, item.start
                nbytes = item.stop - start
                box = boxes[number]
                at = box.offset + start - window.start
                address = self._addresses[box.source]
                first = box.first_byte + start
                if address is None:
                    self._copy(self._sources[box.source], first, first + nbytes, buffer, at)
                elif not (digest and item.digest):
                    tensors.move_memory(buffer.address + at, address + first, nbytes)
                elif box.nbytes <= BLOCK_BYTES:
                    move = tensors.move_small if nbytes <= tensors.SMALL_BYTES else tensors.move_memory
                    move(buffer.address + at, address + first, nbytes)
                    digests[number][:] = blake3(buffer.view[at : at + nbytes]).digest()
                else:
                    _move_and_digest(address + first, buffer, at, nbytes, digests[number], start // BLOCK_BYTES * DIGEST_BYTES)
        return events

    @staticmethod
    def _copy(tensor: torch.Tensor, start: int, stop: int, buffer: Buffer, at: int) -> None:
        target = None if tensor.is_cpu else buffer.tensor[at : at + stop - start]
        tensors.copy_out(tensor, start, stop, buffer.address + at, target)

    def _digest_staged(self, window: WriteWindow, buffer: Buffer, *, plain: bool) -> None:
        """Digest what ``_stage`` has only copied: everything, or what did not come from plain host memory."""
        boxes = self._open[window.file].file.boxes
        for item in window.fragments:
            box = boxes[item.box]
            if item.digest and (plain or self._addresses[box.source] is None):
                at = box.offset + item.start - window.start
                first = item.start // BLOCK_BYTES * DIGEST_BYTES
                found = block_digests(buffer.view[at : at + item.stop - item.start])
                self.digests[window.file][item.box][first : first + len(found)] = found

    # Writing

    def _write(self, window: WriteWindow, buffer: Buffer) -> None:
        self._stop.check()
        state = self._open[window.file]
        writer = self._writer(state)
        try:
            if window.stop > window.start:
                writer.write(window.start, buffer.view[: window.stop - window.start])
            self._written(window.nbytes)
            with state.lock:
                state.left -= 1
                is_last = state.left == 0
            if is_last:
                state.doubtful = writer.finish()
        except FileExistsError:
            raise self._taken(state.file) from None

    def _writer(self, state: _OpenFile) -> FileWriter:
        with state.lock:
            if state.writer is None:
                with self._create_lock:
                    self._stop.check()
                    state.writer = self._create(state.file)
                self._write_header(state.file, state.writer)
            return state.writer

    def _create(self, file: DataFile) -> FileWriter:
        # Noted before it is there: an interrupt may come right after.
        self.created.append(file.name)
        try:
            return self._storage.create_file(file.name, file.size)
        except FileExistsError:
            raise self._taken(file) from None
        except FileNotFoundError:
            msg = f"the folder {self._storage.url!r} is gone: someone removed it while the take was at work"
            raise SnapshotWriteError(msg) from None

    def _taken(self, file: DataFile) -> SnapshotExistsError:
        self.created.remove(file.name)
        return SnapshotExistsError(f"a file {file.name!r} is in {self._storage.url!r} already, which is not of this take")

    def _write_header(self, file: DataFile, writer: FileWriter) -> None:
        # Direct writes need aligned memory, and a bytes object lies anywhere.
        buffer = Buffer(min(BLOCK_BYTES, len(file.header)), None)
        for start in range(0, len(file.header), buffer.size):
            part = file.header[start : start + buffer.size]
            buffer.view[: len(part)] = part
            writer.write(start, buffer.view[: len(part)])

    def write_now(self) -> None:
        """Stage, digest and write every window; returns when all files are durable."""

        def work(window: WriteWindow) -> None:
            with self._staging.lend(self._stop) as buffer:
                for event in self._stage(window, buffer, digest=True):
                    event.synchronize()
                self._digest_staged(window, buffer, plain=False)
                self._write(window, buffer)

        crew.run(self._windows, work, self._threads, self._stop, self._streams.on_device)
        self._finish()

    def stage_all(self) -> None:
        """Copy every window into a buffer; those that the budget cannot hold at once are written meanwhile.

        When this returns, the tensors may change. ``finish_staged`` must be called, from any thread.
        """
        events: list[Any] = []

        def stage(window: WriteWindow) -> None:
            buffer = self._staging.acquire(self._stop)
            try:
                item = _Staged(window, buffer, self._stage(window, buffer, digest=False))
            except BaseException:
                self._staging.release(buffer)
                raise
            events.extend(item.events)
            self._staged.put(item)

        try:
            if len(self._windows) > self._staging.count:
                self._begin_behind(or_work_here=False)
            on_device = [window for window in self._windows if self._is_on_device(window)]
            on_host = [window for window in self._windows if not self._is_on_device(window)]
            # What a device copies is only queued here: several threads would wait for each other and not for it.
            for windows, threads in (on_device, 1), (on_host, self._threads):
                if windows:
                    crew.run(windows, stage, threads, self._stop, self._streams.on_device)
            for event in events:
                event.synchronize()
            self._streams.join()
            self._sources = ()  # live state is not kept alive by a take that is still being written
        except BaseException as error:
            self._stop.set(error)
            raise
        finally:
            self._staged.put(None)

    def _is_on_device(self, window: WriteWindow) -> bool:
        boxes = self._open[window.file].file.boxes
        return not any(self._sources[boxes[item.box].source].is_cpu for item in window.fragments)

    def _begin_behind(self, *, or_work_here: bool) -> None:
        """Start the threads that digest and write what is staged; this thread does it where none can be started."""

        def write(item: _Staged) -> None:
            try:
                for event in item.events:
                    event.synchronize()
                self._digest_staged(item.window, item.buffer, plain=True)
                self._write(item.window, item.buffer)
            finally:
                self._staging.release(item.buffer)

        self._behind = crew.Crew(_until_end(self._staged), write, self._threads, self._stop, self._streams.on_device)
        self._behind.start(or_work_here=or_work_here)

    def finish_staged(self) -> None:
        """Write what ``stage_all`` has copied and wait until it is durable."""
        if self._behind is None:
            # Not before the copies are made: threads that digest and write would slow them, and their start is time of the caller.
            self._begin_behind(or_work_here=True)
        assert self._behind is not None
        self._behind.wait()
        self._finish()

    def _finish(self) -> None:
        for number, state in enumerate(self._open):
            if state.writer is None:  # a file without a byte of data
                state.doubtful = self._writer(state).finish()
            for start, stop in state.doubtful:
                self._read_back(number, start, stop)

    def abort(self) -> None:
        """Wait for the threads to leave, and let go of all files."""
        if self._behind is not None:
            self._behind.join()
        self._release_staged()
        for state in self._open:
            if state.writer is not None:
                state.writer.abort()

    def _release_staged(self) -> None:
        """Give back the buffers of windows that nobody will write, once nothing moves in them."""
        # A device that has failed moves nothing either, and says so.
        with self._streams.on_device(), contextlib.suppress(queue.Empty, RuntimeError):
            while True:
                item = self._staged.get_nowait()
                if item is not None:
                    for event in item.events:
                        event.synchronize()
                    self._staging.release(item.buffer)

    # Reading back what a storage may not have written

    def _read_back(self, number: int, start: int, stop: int) -> None:
        file = self._open[number].file
        buffer = Buffer(BLOCK_BYTES, None)
        with self._storage.open_file(file.name) as reader:

            def check(offset: int, nbytes: int, expected: bytes) -> None:
                view = buffer.view[:nbytes]
                reader.read_into(offset, view)
                if block_digests(view) != expected:
                    msg = f"{file.name!r} does not hold what was written at byte {offset:,}: the storage lost a write"
                    raise SnapshotWriteError(msg)

            for offset in range(0, min(stop, len(file.header)), BLOCK_BYTES):
                part = file.header[offset : offset + BLOCK_BYTES]
                check(offset, len(part), block_digests(memoryview(part)))
            for box, digests in zip(file.boxes, self.digests[number], strict=True):
                for block in _blocks_within(box, start, stop):
                    at = block * BLOCK_BYTES
                    expected = digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]
                    check(box.offset + at, min(BLOCK_BYTES, box.nbytes - at), bytes(expected))


def _blocks_within(box: PlacedBox, start: int, stop: int) -> range:
    first = max(0, start - box.offset) // BLOCK_BYTES
    last = -(-min(box.nbytes, max(0, stop - box.offset)) // BLOCK_BYTES)
    return range(first, last)


def _move_and_digest(source: int, buffer: Buffer, at: int, nbytes: int, digests: bytearray, position: int) -> None:
    """Copy block by block and digest each while it is in the cache."""
    target = buffer.address + at
    for start in range(0, nbytes, BLOCK_BYTES):
        size = min(BLOCK_BYTES, nbytes - start)
        tensors.move_memory(target + start, source + start, size)
        digests[position : position + DIGEST_BYTES] = block_digests(buffer.view[at + start : at + start + size])
        position += DIGEST_BYTES


def _until_end(items: queue.SimpleQueue[_Staged | None]) -> Iterator[_Staged]:
    while (item := items.get()) is not None:
        yield item
