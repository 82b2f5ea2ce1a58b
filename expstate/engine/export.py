"""Exports: tensors of a snapshot as plain safetensors files, which need nothing of ours to be read.

Gets a committed snapshot and the place for the files; every block is verified on its way. A file's header is written when all else is in
it, so that one that was not finished is opened by no program.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from expstate import settings
from expstate.engine import crew, exportable, memory
from expstate.engine.read import PieceReader, Target
from expstate.engine.report import bytes_text
from expstate.engine.windows import WriteWindow, write_windows
from expstate.errors import ExportExistsError, ExpstateError, MemoryBudgetError, SnapshotWriteError
from expstate.format.manifest import BLOCK_BYTES
from expstate.progress import Progress, ProgressOption
from expstate.state import paths, tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from expstate.engine.exportable import ExportFile
    from expstate.engine.memory import Buffer
    from expstate.engine.read import Read
    from expstate.engine.source import SnapshotSource
    from expstate.format.manifest import Box, TensorEntry
    from expstate.storage.base import FileWriter, Storage


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote, and what of the snapshot is not in it.

    Attributes
    ----------
    files : tuple of str
        Paths of the files, one for each key.
    tensors : int
        Tensors in them.
    tied : int
        Names of tied tensors, which the files have as metadata.
    left_out : tuple of str
        Entry paths of values, objects and containers that are no tensors.
    nbytes : int
        Bytes of the tensors.
    seconds : float
        Time it took.
    """

    files: tuple[str, ...]
    tensors: int
    tied: int
    left_out: tuple[str, ...] = field(repr=False)
    nbytes: int
    seconds: float

    def __str__(self) -> str:
        tied = f" and {self.tied:,} tied names" if self.tied else ""
        text = f"exported {self.tensors:,} tensors{tied} ({bytes_text(self.nbytes)}) to {', '.join(map(paths.printable, self.files))}"
        if self.left_out:
            shown = ", ".join(map(paths.printable, self.left_out[:3]))
            more = f" and {len(self.left_out) - 3:,} more" if len(self.left_out) > 3 else ""  # noqa: PLR2004 - as many as fit a line
            text += f"; left out, as no tensors: {shown}{more}"
        return text


class _Export:
    """The files of one export while they are written.

    Parameters
    ----------
    source : SnapshotSource
        Open.
    target : Storage
        The folder.
    budget : int
        Bytes of memory; half of it holds what is written, half what is read.
    progress : Progress
        Told of every window.
    """

    def __init__(self, source: SnapshotSource, target: Storage, budget: int, progress: Progress) -> None:
        threads = settings.current().thread_count
        self._source = source
        self._target = target
        self._budget = budget
        self._progress = progress
        self._stop = crew.Stop()
        self._filled = memory.Staging(budget // 2, threads)
        self._read = memory.Staging(budget // 2, threads)
        self._threads = min(threads, self._filled.count, self._read.count)
        self.created: list[str] = []

    def write(self, number: int, file: ExportFile) -> None:
        """Write one file and make it durable."""
        layout = file.layout
        windows = list(write_windows(number, layout, self._target.alignment, self._filled.window_bytes))
        writer = self._create(layout.name, layout.size)

        def work(window: WriteWindow) -> None:
            with self._filled.lend(self._stop) as buffer:
                self._fill(file, window, buffer)
                if window.stop > window.start:
                    writer.write(window.start, buffer.view[: window.stop - window.start])
                self._progress.add(window.nbytes)

        # Rows that are gathered from several boxes take memory of their own, so one thread gathers them.
        threads = 1 if any(not exportable.is_in_rows(entry) for entry in file.entries) else self._threads
        try:
            crew.run(windows, work, max(1, min(threads, len(windows))), self._stop)
            self._write_header(layout.header, writer)
            doubtful = writer.finish()
        finally:
            writer.abort()
        if doubtful:
            self._compare(file, windows, doubtful)

    def _create(self, name: str, size: int) -> FileWriter:
        # Noted before it is there: an interrupt may come right after.
        self.created.append(name)
        try:
            return self._target.create_file(name, size)
        except FileExistsError:
            self.created.remove(name)
            raise _exists(self._target, name) from None
        except FileNotFoundError:
            msg = f"the folder {self._target.url!r} is gone: someone removed it while the export was at work"
            raise SnapshotWriteError(msg) from None

    @staticmethod
    def _write_header(header: bytes, writer: FileWriter) -> None:
        # Direct writes need aligned memory, and a bytes object lies anywhere. The first part, with the length, comes last.
        buffer = memory.Buffer(min(BLOCK_BYTES, len(header)), None)
        for start in reversed(range(0, len(header), buffer.size)):
            part = header[start : start + buffer.size]
            buffer.view[: len(part)] = part
            writer.write(start, buffer.view[: len(part)])

    # Filling a window from the snapshot

    def _fill(self, file: ExportFile, window: WriteWindow, buffer: Buffer) -> None:
        reads: list[Read] = []
        for item in window.fragments:
            box = file.layout.boxes[item.box]
            at = box.offset + item.start - window.start
            entry = file.entries[box.source]
            if exportable.is_in_rows(entry):
                reads += self._row_reads(entry, item.start, item.stop, buffer, at)
            else:
                self._gather(entry, item.start, item.stop, buffer, at)
        self._do(reads)

    def _do(self, reads: Sequence[Read]) -> None:
        PieceReader(self._source.files, self._read, 1, Progress("read", 0, option=False), crew.Stop()).run(reads)

    def _row_reads(self, entry: TensorEntry, start: int, stop: int, buffer: Buffer, at: int) -> Iterator[Read]:
        """The reads that put bytes ``start`` to ``stop`` of a tensor at byte ``at`` of a buffer; each of its boxes is some of its rows."""
        for box, nbytes in self._source.box_sizes(entry):
            before = _rows_before(entry, box)
            first, last = max(start, before), min(stop, before + nbytes)
            if first < last:
                goal = Target(buffer.tensor, None, buffer.address + at + first - start)
                yield from self._source.box_reads(entry.path, box, nbytes, first - before, last - before, goal)

    def _gather(self, entry: TensorEntry, start: int, stop: int, buffer: Buffer, at: int) -> None:
        """The same for a tensor whose boxes lie side by side: through the rows that hold the bytes."""
        row_bytes = entry.nbytes // entry.shape[0]
        rows = range(start // row_bytes, -(-stop // row_bytes))
        if len(rows) * row_bytes > self._budget:
            needed = len(rows) * row_bytes
            msg = f"to put rows of entry {entry.path!r} together from shards, {needed:,} bytes are needed: the budget is {self._budget:,}"
            raise MemoryBudgetError(msg)
        gathered = torch.empty(len(rows) * row_bytes, dtype=torch.uint8, device="cpu")
        # Arrays are read as bytes.
        view = gathered if entry.kind == "numpy" else gathered.view(tensors.DTYPES[entry.dtype]).view(len(rows), *entry.shape[1:])
        self._do(list(self._source.row_reads(entry, rows, view)))
        tensors.move_memory(buffer.address + at, gathered.data_ptr() + start - rows.start * row_bytes, stop - start)

    # Reading back what the storage may not have written

    def _compare(self, file: ExportFile, windows: Sequence[WriteWindow], doubtful: Sequence[tuple[int, int]]) -> None:
        layout = file.layout
        with self._target.open_file(layout.name) as written, self._filled.lend(self._stop) as buffer:
            found = memory.Buffer(min(BLOCK_BYTES, max(layout.size, 1)), None)

            def check(start: int, expected: memoryview) -> None:
                for at in range(0, len(expected), found.size):
                    part = expected[at : at + found.size]
                    written.read_into(start + at, found.view[: len(part)])
                    if found.view[: len(part)] != part:
                        msg = f"{layout.name!r} does not hold what was written at byte {start + at:,}: the storage lost a write"
                        raise SnapshotWriteError(msg)

            def is_doubtful(start: int, stop: int) -> bool:
                return any(first < stop and start < last for first, last in doubtful)

            if is_doubtful(0, len(layout.header)):
                check(0, memoryview(layout.header))
            for window in windows:
                if is_doubtful(window.start, window.stop):
                    self._fill(file, window, buffer)
                    check(window.start, buffer.view[: window.stop - window.start])


def _rows_before(entry: TensorEntry, box: Box) -> int:
    """Bytes of the tensor that come before a box of whole rows."""
    if not box.starts or not entry.shape[0]:
        return 0
    return box.starts[0] * (entry.nbytes // entry.shape[0])


def _exists(target: Storage, name: str) -> ExportExistsError:
    msg = f"a file {name!r} is in {target.url!r} already, and nothing is overwritten; export to another path, or remove it"
    return ExportExistsError(msg)


def export(
    source: SnapshotSource,
    target: Storage,
    single: str | None,
    *,
    include: tuple[str, ...] | None,
    exclude: tuple[str, ...],
    budget: int,
    progress: ProgressOption,
) -> ExportReport:
    """Write the tensors of a snapshot to a folder; as ``Snapshot.export`` documents it.

    Parameters
    ----------
    source : SnapshotSource
        The snapshot.
    target : Storage
        The folder.
    single : str or None
        The name of the one file there is to be; None for one file for each key, named after it.
    include, exclude : tuple of str
        Globs on entry paths.
    budget : int
        Most bytes of memory.
    progress : None, bool or callable
        As for a take.
    """
    started = time.perf_counter()
    files, left_out = exportable.plan(source, single, include, exclude)
    made_folder = target.prepare()
    nbytes = sum(entry.nbytes for file in files for entry in file.entries)
    bar = Progress("export", nbytes, progress)
    created: list[str] = []
    try:
        for file in files:
            _check_free(target, file.layout.name)
        with source.opened(source.files_of(entry for file in files for entry in file.entries)) as opened:
            work = _Export(opened, target, budget, bar)
            created = work.created
            for number, file in enumerate(files):
                work.write(number, file)
        target.flush()
    except BaseException:
        with contextlib.suppress(ExpstateError, OSError):
            for name in created:
                target.delete(name)
            if made_folder:
                target.remove_folder()
        raise
    finally:
        bar.close()
        memory.Staging.close()
    return ExportReport(
        files=tuple(f"{target.url}/{file.layout.name}" for file in files),
        tensors=sum(len(file.entries) for file in files),
        tied=sum(file.tied for file in files),
        left_out=left_out,
        nbytes=nbytes,
        seconds=time.perf_counter() - started,
    )


def _check_free(target: Storage, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        target.stat(name)
        raise _exists(target, name)
