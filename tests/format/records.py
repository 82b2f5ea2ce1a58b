"""The smallest manifest that says something."""

from __future__ import annotations

from typing import Any

from blake3 import blake3

from expstate.format.manifest import Box, ContainerEntry, FileRecord, KeyRecord, Manifest, Metadata, TensorEntry, ValueEntry

DIGEST = blake3(b"x").digest()


def small(**changes: Any) -> Manifest:
    """A manifest of one tensor and one value."""
    fields: dict[str, Any] = {
        "format": 1,
        "id": "0123456789abcdef" * 2,
        "created_at": "2026-01-02T03:04:05.678+00:00",
        "writer": "expstate 0",
        "requires": (),
        "world_size": 1,
        "metadata": Metadata(),
        "provenance": {},
        "keys": (KeyRecord("a", "x.Y"),),
        "files": (FileRecord("a-00001-01234567.safetensors", 4104, 4096, DIGEST),),
        "entries": (
            ContainerEntry("a", "dict"),
            TensorEntry("a/t", "float32", (2,), (Box(0, 4096, DIGEST),)),
            ValueEntry("a/v", 3),
        ),
    }
    return Manifest(**{**fields, **changes})
