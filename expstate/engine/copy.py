"""Copies of whole snapshots: the same files under the same names, committed like a take.

What passes through here is verified on the way. Within one object store the server copies, and nothing is read: damage goes along.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import msgspec

from expstate.engine import annotate, crew, memory
from expstate.engine.attempt import Attempt
from expstate.engine.digest import block_digests
from expstate.engine.verify import check_headers
from expstate.engine.windows import Fragment, WriteWindow, write_windows
from expstate.errors import SnapshotCorruptError, SnapshotExistsError, SnapshotReplacedError, SnapshotWriteError, UnsupportedFormatError
from expstate.format import annotations as added
from expstate.format import manifest as manifests
from expstate.format import names
from expstate.format.layout import DataFile, PlacedBox
from expstate.format.manifest import BLOCK_BYTES, DIGEST_BYTES, ObjectEntry, TensorEntry
from expstate.progress import Progress, ProgressOption

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expstate.engine.source import SnapshotSource
    from expstate.format.annotations import Annotations
    from expstate.storage.base import FileReader, FileWriter, Storage

_FILLING = -1
"""``PlacedBox.source`` of headers, digests and bytes between boxes, which were checked before."""


class _File:
    """A data file while it is copied: opened by its first window, made durable by its last."""

    def __init__(self, file: DataFile, reader: FileReader, windows: int) -> None:
        self.file = file
        self.reader = reader
        self.left = windows
        self.lock = threading.Lock()
        self.writer: FileWriter | None = None


class _Copy:
    def __init__(self, source: Storage, target: Storage, budget: int, attempt: Attempt, progress: Progress) -> None:
        self._source = source
        self._target = target
        # What both hold of a window besides, they have from the same budget.
        (read_threads, _), (write_threads, write_budget) = (memory.means(storage, budget) for storage in (source, target))
        self._staging = memory.Staging(write_budget // (1 + source.copies), min(read_threads, write_threads))
        self._threads = min(read_threads, write_threads, self._staging.count)
        self._attempt = attempt
        self._progress = progress
        self._stop = crew.Stop()
        self.created: list[str] = []

    def _create(self, file: DataFile) -> FileWriter:
        # Noted before it is there: an interrupt may come right after.
        self.created.append(file.name)
        try:
            return self._target.create_file(file.name, file.size)
        except FileExistsError:
            raise self._taken(file) from None
        except FileNotFoundError:
            msg = f"the folder {self._target.url!r} is gone: someone removed it while the copy was at work"
            raise SnapshotWriteError(msg) from None

    def _taken(self, file: DataFile) -> SnapshotExistsError:
        self.created.remove(file.name)
        msg = f"a file {file.name!r} is in {self._target.url!r} already, without a snapshot; copy to another path, or remove it"
        return SnapshotExistsError(msg)

    def run(self, readers: Sequence[FileReader | None], files: Sequence[DataFile], digests: Sequence[bytes], paths: Sequence[str]) -> None:
        """Copy all data files: by the storage itself where it can, which reads nothing here, else block by checked block."""
        if self._is_done_there(files):
            return
        jobs: list[tuple[_File, WriteWindow]] = []
        states = []
        for number, (file, reader) in enumerate(zip(files, readers, strict=True)):
            assert reader is not None
            windows = list(write_windows(number, file, self._target.alignment, self._staging.window_bytes))
            state = _File(file, reader, len(windows))
            states.append(state)
            jobs += [(state, window) for window in windows]

        def work(job: tuple[_File, WriteWindow]) -> None:
            self._copy_window(*job, digests, paths)

        try:
            crew.run(jobs, work, max(1, min(self._threads, len(jobs))), self._stop)
        finally:
            for state in states:
                if state.writer is not None:
                    state.writer.abort()
            self._staging.close()

    def _is_done_there(self, files: Sequence[DataFile]) -> bool:
        """Have the storage copy all files; False if it cannot."""
        if not files or not self._is_copied_there(files[0]):
            return False

        def work(file: DataFile) -> None:
            if not self._is_copied_there(file):
                msg = f"{self._target.url!r} copied other files itself, and not {file.name!r}"
                raise SnapshotWriteError(msg)

        crew.run(files[1:], work, max(1, min(self._threads, len(files) - 1)), self._stop)
        return True

    def _is_copied_there(self, file: DataFile) -> bool:
        self.created.append(file.name)
        try:
            is_copied = self._target.copy_file(file.name, self._source, file.name)
        except FileNotFoundError:
            msg = f"{self._source.url}/{file.name} was replaced or removed while it was copied: open the snapshot anew"
            raise SnapshotReplacedError(msg) from None
        if not is_copied:
            self.created.remove(file.name)
            return False
        self._progress.add(file.size)
        self._attempt.renew()
        return True

    def _copy_window(self, state: _File, window: WriteWindow, digests: Sequence[bytes], paths: Sequence[str]) -> None:
        file, reader = state.file, state.reader
        with state.lock:
            if state.writer is None:
                state.writer = self._create(file)
            writer = state.writer
        try:
            with self._staging.lend(self._stop) as buffer:
                size = window.staged_stop - window.start
                reader.read_into(window.start, buffer.view[: -(-size // reader.alignment) * reader.alignment])
                for item in window.fragments:
                    self._check(file, window, item, buffer, digests, paths)
                if window.stop > window.start:
                    writer.write(window.start, buffer.view[: window.stop - window.start])
                self._progress.add(window.stop - window.start)
                self._attempt.renew()
            with state.lock:
                state.left -= 1
                is_last = state.left == 0
            if is_last:
                for start, stop in writer.finish():
                    self._compare(reader, file.name, start, stop)
        except FileExistsError:
            raise self._taken(file) from None

    @staticmethod
    def _check(
        file: DataFile, window: WriteWindow, item: Fragment, buffer: memory.Buffer, digests: Sequence[bytes], paths: Sequence[str]
    ) -> None:
        box = file.boxes[item.box]
        if not item.digest or box.source == _FILLING:
            return
        at = box.offset + item.start - window.start
        first = item.start // BLOCK_BYTES * DIGEST_BYTES
        found = block_digests(buffer.view[at : at + item.stop - item.start])
        if found != digests[box.source][first : first + len(found)]:
            where = f"at {box.offset + item.start:,} of file {file.name!r}"
            msg = f"entry {paths[box.source]!r} is damaged {where}; verify() names every place, nothing was copied"
            raise SnapshotCorruptError(msg)

    def _compare(self, reader: FileReader, name: str, start: int, stop: int) -> None:
        """Read back what the storage may not have written."""
        with self._target.open_file(name) as written:
            for offset in range(start, stop, BLOCK_BYTES):
                wanted, found = bytearray(min(BLOCK_BYTES, stop - offset)), bytearray(min(BLOCK_BYTES, stop - offset))
                reader.read_into(offset, memoryview(wanted))
                written.read_into(offset, memoryview(found))
                if wanted != found:
                    msg = f"{name!r} does not hold what was written at byte {offset:,}: the storage lost a write"
                    raise SnapshotWriteError(msg)


def copy(source: SnapshotSource, data: bytes, target: Storage, *, provenance: bool, budget: int, progress: ProgressOption) -> None:
    """Copy a snapshot to another folder, which is then the same snapshot with the same id; as ``Snapshot.copy`` documents it."""
    manifest = source.manifest
    if not provenance:
        data = manifests.encode(msgspec.structs.replace(manifest, provenance={}))
    attempt = Attempt(target, manifest.id, "copy")
    bar = Progress("copy", sum(record.size for record in manifest.files), progress)
    work = _Copy(source.storage, target, budget, attempt, bar)
    try:
        attempt.begin(overwrite=False)
        annotations = _annotations(source.storage, manifest.id)
        with source.opened() as opened:
            check_headers(opened)
            work.run(opened.files, *_files(opened))
        attempt.commit(data, {record.name: record.size for record in manifest.files})
        annotate.remove_others(target, manifest.id)
        if isinstance(annotations, bytes):
            with contextlib.suppress(FileExistsError):
                target.create(names.ANNOTATIONS, annotations, token=attempt.token)
        elif annotations is not None:
            annotate.update(target, annotations)
        attempt.finish()
    except BaseException:
        attempt.abort(work.created)
        raise
    finally:
        bar.close()


def _annotations(storage: Storage, snapshot_id: str) -> Annotations | bytes | None:
    """What was added to the snapshot, which goes along: it is the same snapshot. What cannot be understood, as it is."""
    try:
        return annotate.read(storage, snapshot_id)
    except (SnapshotCorruptError, UnsupportedFormatError):
        return storage.read(names.ANNOTATIONS, limit=added.MAX_BYTES)


def _files(source: SnapshotSource) -> tuple[list[DataFile], list[bytes], list[str]]:
    """The data files as a take lays them out, with digests and paths by ``PlacedBox.source``."""
    manifest = source.manifest
    # Headers are copied with what is between the boxes, as they are: nothing of a file is left out.
    files = [DataFile(record.name, b"", record.size) for record in manifest.files]
    digests: list[bytes] = []
    entry_paths: list[str] = []
    seen: set[tuple[int, int]] = set()
    for entry in manifest.entries:
        if not isinstance(entry, (TensorEntry, ObjectEntry)):
            continue
        for box, nbytes in source.box_sizes(entry):
            if nbytes:
                if (box.file, box.offset) in seen:
                    continue  # another box of equal content
                seen.add((box.file, box.offset))
            files[box.file].boxes.append(PlacedBox(len(digests), 0, nbytes, box.offset))
            digests.append(source.block_digests(entry.path, box, nbytes) if nbytes else b"")
            entry_paths.append(entry.path)
    for file in files:
        file.boxes = _filled(file)
    return files, digests, entry_paths


def _filled(file: DataFile) -> list[PlacedBox]:
    filled = []
    position = 0
    for box in [*sorted(file.boxes, key=lambda box: box.offset), PlacedBox(_FILLING, 0, 0, file.size)]:
        if box.offset > position:
            filled.append(PlacedBox(_FILLING, 0, box.offset - position, position))
        filled.append(box)
        position = box.offset + box.nbytes
    return filled
