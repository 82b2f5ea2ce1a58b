"""Snapshots written by hand: one tensor in several boxes, as the ranks of a sharded take would leave it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from expstate.engine.digest import block_digests, box_digest
from expstate.format import manifest as manifests
from expstate.format.layout import Source, lay_out
from expstate.format.manifest import BLOCK_BYTES, Box, ContainerEntry, KeyRecord, Manifest, Metadata, TensorEntry
from expstate.format.names import FileNamer
from expstate.state.tensors import _as_integers, memory

_ID = "0123456789abcdef" * 2

Shard = tuple[tuple[int, ...], tuple[int, ...]]


def write_boxes(place: Path, path: str, value: Any, shards: list[Shard], **changes: Any) -> None:
    """Write a snapshot of one entry, each shard (starts, sizes) of it in a file of its own; ``changes`` are fields of the manifest."""
    place.mkdir(parents=True)
    key, _, name = path.partition("/")
    is_tensor = isinstance(value, torch.Tensor)
    dtype = str(value.dtype).removeprefix("torch.") if is_tensor else value.dtype.str
    namer = FileNamer(_ID[:8])
    files, boxes = [], []
    for number, (starts, sizes) in enumerate(shards):
        part = value[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]
        data = _bytes_of(part) if is_tensor else part.tobytes()
        source = Source(f"{key}/{name}#{'_'.join(map(str, starts))}", "uint8", (len(data),), 1)
        (file,) = lay_out(key, [source], (), namer, 2**40)
        (place / file.name).write_bytes(file.header + data)
        digests = block_digests(memoryview(data)) if data else b""
        inline = digests if len(data) > BLOCK_BYTES else None
        boxes.append(Box(number, file.boxes[0].offset, box_digest(digests), inline, starts, sizes))
        files.append(file.record)
    entry = TensorEntry(path, dtype, tuple(value.shape), tuple(boxes), "tensor" if is_tensor else "numpy")
    manifest = Manifest(
        **{
            "format": manifests.FORMAT,
            "id": _ID,
            "created_at": "2026-11-01T00:00:00+00:00",
            "writer": "by hand",
            "requires": (),
            "world_size": len(shards),
            "metadata": Metadata(),
            "provenance": {},
            "keys": (KeyRecord(key, "expstate.StateDict"),),
            "files": tuple(files),
            "entries": (ContainerEntry(key, "dict"), entry),
            **changes,
        }
    )
    (place / "snapshot.json").write_bytes(manifests.encode(manifest))


def _bytes_of(part: torch.Tensor) -> bytes:
    dense = _as_integers(part).contiguous()
    return bytes(memory(dense.data_ptr(), dense.nbytes))
