"""A world of many simulated ranks, in one process: what each of them would have written, merged; and a restore on one of them.

Each rank holds one box of 4 KiB of every tensor, all zero, in one data file. Gets a ``Task``, gives an ``Outcome``.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from blake3 import blake3

from expstate import collector
from expstate.bench import measure, shards
from expstate.bench.measure import Meter
from expstate.bench.outcomes import measured
from expstate.bench.plan import SNAPSHOT, Outcome, Task
from expstate.bench.systems import KEY
from expstate.engine import merge as merging
from expstate.format import manifest as manifests
from expstate.format import names
from expstate.format.manifest import Box, ContainerEntry, FileRecord, KeyRecord, Manifest, Metadata, TensorEntry
from expstate.format.validate import validate
from expstate.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from expstate.bench.plan import Workload

_ROWS, _COLUMNS = 4, 256
_BOX_BYTES = 4 * _ROWS * _COLUMNS
_HEADER_BYTES = 96
"""Of each tensor in a data file."""
_ATTEMPT = "5afe5afe"


def join(rank: int, size: int) -> None:
    """Become one rank of a world in which nobody else is there, and nothing is sent."""
    from torch.testing._internal.distributed import fake_pg

    store: Any = fake_pg.FakeStore()
    torch.distributed.init_process_group("fake", store=store, rank=rank, world_size=size)


def _files(workload: Workload) -> tuple[int, Iterator[str]]:
    """The size of each rank's data file, and their names."""
    size = (_HEADER_BYTES + _BOX_BYTES) * workload.small_tensors
    return size, (names.FileNamer(_ATTEMPT, rank).name(KEY) for rank in range(workload.ranks))


def _parts(workload: Workload) -> Iterator[bytes]:
    """What each rank sends to the first."""
    digest = blake3(bytes(_BOX_BYTES)).digest()
    size, file_names = _files(workload)
    header = _HEADER_BYTES * workload.small_tensors
    shape = (_ROWS * workload.ranks, _COLUMNS)
    for rank, name in enumerate(file_names):
        tensors = (
            TensorEntry(
                f"{KEY}/{tensor}",
                "float32",
                shape,
                (Box(0, header + index * _BOX_BYTES, digest, None, (rank * _ROWS, 0), (_ROWS, _COLUMNS)),),
                device="cpu",
            )
            for index, tensor in enumerate(_tensors(workload))
        )
        file = FileRecord(name, size, header, blake3(name.encode()).digest())
        yield merging.encode(merging.RankPart((file,), (ContainerEntry(KEY, "dict", rank=rank), *tensors)))


def _tensors(workload: Workload) -> list[str]:
    return [f"layers.{index}.weight" for index in range(workload.small_tensors)]


def _manifest(workload: Workload, files: tuple[FileRecord, ...], entries: tuple[manifests.Entry, ...]) -> Manifest:
    return Manifest(
        format=manifests.FORMAT,
        id=names.new_id(),
        created_at="2026-01-01T00:00:00.000+00:00",
        writer="expstate",
        requires=(),
        world_size=workload.ranks,
        metadata=Metadata(),
        provenance={},
        keys=(KeyRecord(KEY, "TensorState"),),
        files=files,
        entries=entries,
    )


def merge(task: Task) -> Outcome:
    """What the first rank does before it commits."""
    workload = task.workload
    parts = list(_parts(workload))
    meter = Meter()
    with meter, collector.paused():
        start = time.perf_counter()
        files, entries = merging.merge(map(merging.decode, parts))
        merged = time.perf_counter()
        manifest = _manifest(workload, files, entries)
        validate(manifest)
        validated = time.perf_counter()
        data = manifests.encode(manifest)
        encoded = time.perf_counter()
    boxes = sum(len(entry.boxes) for entry in entries if isinstance(entry, TensorEntry))
    expected = workload.ranks * workload.small_tensors
    return Outcome(
        meter.seconds,
        meter.cpu_seconds,
        meter.peak_extra_bytes,
        parts={"merge": merged - start, "validate": validated - merged, "encode": encoded - validated},
        figures={"manifest_bytes": len(data), "sent_bytes": sum(map(len, parts))},
        error="" if boxes == expected else f"the manifest has {boxes:,} boxes, and the ranks have written {expected:,}",
    )


def prepare(task: Task) -> Outcome:
    """The snapshot of such a world, with files that have their sizes and no bytes on the disk."""
    folder = Path(task.kept) / "simulated" / SNAPSHOT
    folder.mkdir(parents=True)
    size, file_names = _files(task.workload)
    for name in file_names:
        with open(folder / name, "wb") as file:
            os.truncate(file.fileno(), size)
    with collector.paused():
        merged = merging.merge(map(merging.decode, _parts(task.workload)))
        (folder / names.MANIFEST).write_bytes(manifests.encode(_manifest(task.workload, *merged)))
    return Outcome()


def plan(task: Task) -> Outcome:
    """A restore by the rank that this process is: the manifest is not known before, and the shards are small."""
    folder = Path(task.kept) / "simulated"
    local = {name: torch.ones(_ROWS, _COLUMNS) for name in _tensors(task.workload)}
    live = shards.joined(local.items())
    left = measure.evict(folder)
    meter = Meter()
    with meter:
        start = time.perf_counter()
        snapshot = Snapshot(folder / SNAPSHOT)
        manifest = snapshot.manifest
        read = time.perf_counter()
        snapshot.restore({KEY: live}, progress=False)
        restored = time.perf_counter()
    parts = {"manifest": read - start, "restore": restored - read}
    wrong = [name for name, tensor in local.items() if tensor.any()]
    error = f"{len(wrong)} tensors did not come back, the first is {wrong[0]!r}" if wrong else ""
    figures = {"boxes": len(manifest.files) * len(local)}
    return measured(meter, 0, cached_bytes=left, parts=parts, figures=figures, error=error)
