"""Copies of whole snapshots: the same files under the same names, verified on the way, committed like a take."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import msgspec

from expstate import settings
from expstate.engine import annotate, crew, memory
from expstate.engine.attempt import Attempt
from expstate.engine.digest import block_digests
from expstate.engine.verify import check_headers
from expstate.engine.windows import WriteWindow, write_windows
from expstate.errors import SnapshotCorruptError, SnapshotExistsError, SnapshotWriteError, UnsupportedFormatError
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


class _Copy:
    def __init__(self, target: Storage, staging: memory.Staging, attempt: Attempt, progress: Progress) -> None:
        self._target = target
        self._staging = staging
        self._attempt = attempt
        self._progress = progress
        self._stop = crew.Stop()
        self._threads = min(settings.current().thread_count, staging.count)
        self.created: list[str] = []

    def _create(self, file: DataFile) -> FileWriter:
        # Noted before it is there: an interrupt may come right after.
        self.created.append(file.name)
        try:
            return self._target.create_file(file.name, file.size)
        except FileExistsError:
            self.created.remove(file.name)
            msg = f"a file {file.name!r} is in {self._target.url!r} already, without a snapshot; copy to another path, or remove it"
            raise SnapshotExistsError(msg) from None
        except FileNotFoundError:
            msg = f"the folder {self._target.url!r} is gone: someone removed it while the copy was at work"
            raise SnapshotWriteError(msg) from None

    def copy_file(self, number: int, reader: FileReader, file: DataFile, digests: Sequence[bytes], entry_paths: Sequence[str]) -> None:
        """Copy one data file and check every block of it."""
        writer = self._create(file)

        def work(window: WriteWindow) -> None:
            with self._staging.lend(self._stop) as buffer:
                size = window.staged_stop - window.start
                reader.read_into(window.start, buffer.view[: -(-size // reader.alignment) * reader.alignment])
                for item in window.fragments:
                    box = file.boxes[item.box]
                    at = box.offset + item.start - window.start
                    first = item.start // BLOCK_BYTES * DIGEST_BYTES
                    if item.digest and box.source != _FILLING:
                        found = block_digests(buffer.view[at : at + item.stop - item.start])
                        if found != digests[box.source][first : first + len(found)]:
                            where = f"at {box.offset + item.start:,} of file {file.name!r}"
                            msg = f"entry {entry_paths[box.source]!r} is damaged {where}; verify() names every place, nothing was copied"
                            raise SnapshotCorruptError(msg)
                if window.stop > window.start:
                    writer.write(window.start, buffer.view[: window.stop - window.start])
                self._progress.add(window.stop - window.start)
                self._attempt.renew()

        try:
            windows = list(write_windows(number, file, self._target.alignment, self._staging.window_bytes))
            crew.run(windows, work, max(1, min(self._threads, len(windows))), self._stop)
            for start, stop in writer.finish():
                self._compare(reader, file.name, start, stop)
        finally:
            writer.abort()

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
    staging = memory.Staging(budget, settings.current().thread_count)
    bar = Progress("copy", sum(record.size for record in manifest.files), progress)
    work = _Copy(target, staging, attempt, bar)
    try:
        attempt.begin(overwrite=False)
        annotations = _annotations(source.storage, manifest.id)
        with source.opened() as opened:
            check_headers(opened)
            files, digests, entry_paths = _files(opened)
            for number, file in enumerate(files):
                reader = opened.files[number]
                assert reader is not None
                work.copy_file(number, reader, file, digests, entry_paths)
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
        staging.close()


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
    for entry in manifest.entries:
        if not isinstance(entry, (TensorEntry, ObjectEntry)):
            continue
        for box, nbytes in source.box_sizes(entry):
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
