"""Verification: every byte of a snapshot read and compared with its digest, all damage named."""

from __future__ import annotations

import bisect
import time
from typing import TYPE_CHECKING

import msgspec
from blake3 import blake3

from expstate.engine import crew, memory
from expstate.engine.read import Damage, PieceReader, Read
from expstate.engine.report import VerifyReport
from expstate.errors import SnapshotCorruptError, StorageError
from expstate.format import names
from expstate.format.manifest import FileRecord, ObjectEntry, TensorEntry
from expstate.progress import Progress, ProgressOption

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from expstate.engine.source import SnapshotSource
    from expstate.format.manifest import Manifest
    from expstate.storage.base import FileReader


def verify(source: SnapshotSource, *, budget: int, progress: ProgressOption) -> VerifyReport:
    """Read everything; as ``Snapshot.verify`` documents it."""
    started = time.perf_counter()
    damages: list[Damage] = []
    with source.opened(on_damage=damages.append) as opened:
        check_headers(opened, damages.append)
        wanted: list[Read] = []
        for entry in opened.manifest.entries:
            if isinstance(entry, (TensorEntry, ObjectEntry)):
                wanted += _reads(opened, entry, damages)
        # Equal boxes may lie at one place, a million of them: what lies there is read once.
        reads: dict[tuple[int, int], Read] = {}
        shared = [read for read in wanted if reads.setdefault((read.file, read.offset), read) is not read]
        total = sum(read.nbytes for read in reads.values())
        bar = Progress("verify", total, progress)
        threads, budget = memory.means(source.storage, budget)
        staging = memory.Staging(budget, threads)
        try:
            PieceReader(opened.files, staging, threads, bar, crew.Stop(), on_damage=damages.append).run(list(reads.values()))
        finally:
            bar.close()
            staging.close()
    damages += _damages_of_shared(shared, source.manifest, damages)
    known = {record.name for record in source.manifest.files} | {names.MANIFEST, names.ANNOTATIONS}
    unknown = sorted(info.name for info in source.storage.list() if info.name not in known and not names.attempt_of_lease(info.name))
    damages.sort(key=lambda damage: (damage.file, damage.offset))
    return VerifyReport(not damages, tuple(damages), tuple(unknown), total, time.perf_counter() - started)


def _reads(source: SnapshotSource, entry: TensorEntry | ObjectEntry, damages: list[Damage]) -> Sequence[Read]:
    """What to read of an entry; damage where its file ends too early, however much the manifest says that there is."""
    beyond = []
    for box, nbytes in source.box_sizes(entry):
        file = source.files[box.file]
        if file is not None and box.offset + nbytes > file.size:
            beyond.append(Damage(entry.path, file.name, box.offset, nbytes, f"the file ends at {file.size:,}"))
    damages += beyond
    if beyond:
        return ()
    try:
        return list(source.reads(entry, None))
    except (SnapshotCorruptError, StorageError) as error:
        box = entry.boxes[0]
        damages.append(Damage(entry.path, source.manifest.files[box.file].name, box.offset, entry.nbytes, str(error)))
        return ()


def _damages_of_shared(shared: Sequence[Read], manifest: Manifest, damages: Sequence[Damage]) -> list[Damage]:
    """The first damage in what other entries have too, for each of these."""
    places: dict[str, list[Damage]] = {}
    for damage in sorted(damages, key=lambda damage: damage.offset):
        if damage.entry:
            places.setdefault(damage.file, []).append(damage)
    found: dict[str, Damage] = {}
    for read in shared:
        of_file = places.get(manifest.files[read.file].name, [])
        at = bisect.bisect_left(of_file, read.offset, key=lambda damage: damage.offset)
        if at < len(of_file) and of_file[at].offset < read.offset + read.nbytes:
            found.setdefault(read.path, msgspec.structs.replace(of_file[at], entry=read.path))
    return list(found.values())


def check_headers(source: SnapshotSource, on_damage: Callable[[Damage], None] | None = None) -> None:
    """Compare the header of each open file with its digest.

    Raises
    ------
    SnapshotCorruptError
        If one is damaged; with ``on_damage`` it is told instead.
    """
    for record, file in zip(source.manifest.files, source.files, strict=True):
        problem = None if file is None else _header_problem(record, file)
        if problem is None:
            continue
        damage = Damage("", record.name, 0, record.header_bytes, problem)
        if on_damage is None:
            raise SnapshotCorruptError(str(damage))
        on_damage(damage)


def _header_problem(record: FileRecord, file: FileReader) -> str | None:
    if file.size < record.header_bytes:
        return f"the file ends at {file.size:,}, in its header"
    header = bytearray(record.header_bytes)
    try:
        file.read_into(0, memoryview(header))
    except (SnapshotCorruptError, StorageError) as error:
        return str(error)
    return None if blake3(header).digest() == record.header_digest else "its header is not the one that was taken"
