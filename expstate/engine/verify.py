"""Verification: every byte of a snapshot read and compared with its digest, all damage named."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from blake3 import blake3

from expstate import settings
from expstate.engine import crew, memory
from expstate.engine.read import Damage, PieceReader, Read
from expstate.engine.report import VerifyReport
from expstate.errors import SnapshotCorruptError, StorageError
from expstate.format import names
from expstate.format.manifest import ObjectEntry, TensorEntry
from expstate.progress import Progress, ProgressOption

if TYPE_CHECKING:
    from expstate.engine.source import SnapshotSource


def verify(source: SnapshotSource, *, budget: int, progress: ProgressOption) -> VerifyReport:
    """Read everything; as ``Snapshot.verify`` documents it."""
    started = time.perf_counter()
    damages: list[Damage] = []
    with source.opened(on_damage=damages.append) as opened:
        _check_headers(opened, damages)
        reads: list[Read] = []
        for entry in opened.manifest.entries:
            if isinstance(entry, (TensorEntry, ObjectEntry)):
                try:
                    reads += opened.reads(entry, None)
                except (SnapshotCorruptError, StorageError) as error:
                    record = opened.manifest.files[entry.boxes[0].file]
                    damages.append(Damage(entry.path, record.name, entry.boxes[0].offset, entry.nbytes, str(error)))
        total = sum(read.nbytes for read in reads)
        bar = Progress("verify", total, progress)
        threads = settings.current().thread_count
        staging = memory.Staging(budget, threads)
        try:
            PieceReader(opened.files, staging, threads, bar, crew.Stop(), on_damage=damages.append).run(reads)
        finally:
            bar.close()
            staging.close()
    known = {record.name for record in source.manifest.files} | {names.MANIFEST, names.ANNOTATIONS}
    unknown = sorted(info.name for info in source.storage.list() if info.name not in known and not names.attempt_of_lease(info.name))
    damages.sort(key=lambda damage: (damage.file, damage.offset))
    return VerifyReport(not damages, tuple(damages), tuple(unknown), total, time.perf_counter() - started)


def _check_headers(source: SnapshotSource, damages: list[Damage]) -> None:
    for record, file in zip(source.manifest.files, source.files, strict=True):
        if file is None:
            continue
        header = bytearray(record.header_bytes)
        try:
            file.read_into(0, memoryview(header))
        except (SnapshotCorruptError, StorageError) as error:
            damages.append(Damage("", record.name, 0, record.header_bytes, str(error)))
            continue
        if blake3(header).digest() != record.header_digest:
            damages.append(Damage("", record.name, 0, record.header_bytes, "its header is not the one that was taken"))
