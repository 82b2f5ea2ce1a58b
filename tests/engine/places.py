"""What the tests of attempts share: leases, files and manifests as they may lie in a snapshot's folder."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import msgspec

from expstate.engine.attempt import Attempt
from expstate.engine.lease import Lease, decode_lease, encode_lease
from expstate.format import manifest as manifests
from expstate.format.manifest import FileRecord, Manifest, Metadata
from expstate.storage.local import LocalStorage

ID, OTHER = "0123456789abcdef" * 2, "fedcba9876543210" * 2
ELSEWHERE = {"boot": "another boot", "namespace": "pid:[1]"}


def files(storage: LocalStorage) -> list[str]:
    return sorted(path.name for path in Path(storage.path).iterdir()) if Path(storage.path).exists() else []


def data_name(snapshot_id: str = ID, number: int = 1) -> str:
    return f"model-{number:05d}-{snapshot_id[:8]}.safetensors"


def manifest_of(*given: str, snapshot_id: str = ID) -> bytes:
    """A manifest that names these data files of 4096 bytes."""
    records = tuple(FileRecord(name, 4096, 4096, bytes(32)) for name in given)
    return manifests.encode(
        Manifest(
            format=1,
            id=snapshot_id,
            created_at="",
            writer="",
            requires=(),
            world_size=1,
            metadata=Metadata(),
            provenance={},
            keys=(),
            files=records,
            entries=(),
        )
    )


def put(storage: LocalStorage, name: str, size: int = 4096) -> None:
    Path(storage.path, name).write_bytes(bytes(size))


def begun(storage: LocalStorage, snapshot_id: str = ID, *, overwrite: bool = False, action: str = "take") -> Attempt:
    attempt = Attempt(storage, snapshot_id, action)
    attempt.begin(overwrite=overwrite)
    return attempt


def committed(storage: LocalStorage, snapshot_id: str = ID, *, overwrite: bool = False) -> bytes:
    """A snapshot of one data file."""
    attempt = begun(storage, snapshot_id, overwrite=overwrite)
    put(storage, data_name(snapshot_id))
    data = manifest_of(data_name(snapshot_id), snapshot_id=snapshot_id)
    attempt.commit(data, {data_name(snapshot_id): 4096})
    attempt.finish()
    return data


def lease(**changes: Any) -> Lease:
    """The lease of this process, with changes."""
    own = decode_lease(encode_lease(ID, "take", ()))
    assert own is not None
    return msgspec.structs.replace(own, **changes)


def age(storage: LocalStorage, name: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(Path(storage.path, name), (then, then))
