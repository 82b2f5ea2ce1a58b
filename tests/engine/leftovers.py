"""What the tests of garbage collection share: folders as attempts that died, and others that live, leave them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import msgspec
import torch

from expstate import Snapshot, StateDict
from expstate.engine.lease import LEASE_SECONDS, decode_lease, encode_lease
from expstate.format import names

DEAD, LIVING = "deadbeef" * 4, "0123456789abcdef" * 2


def data_name(snapshot_id: str = DEAD, number: int = 1) -> str:
    return f"model-{number:05d}-{snapshot_id[:8]}.safetensors"


def put(folder: Path, *given: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in given:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 10)


def age(path: Path, seconds: float = 2 * LEASE_SECONDS) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def lease(folder: Path, snapshot_id: str = DEAD, action: str = "take", named: tuple[str, ...] = (), **changes: Any) -> Path:
    """A lease of a process of another machine that gave no sign for two days; ``changes`` make it another's."""
    folder.mkdir(parents=True, exist_ok=True)
    own = decode_lease(encode_lease(snapshot_id, action, named))
    assert own is not None
    path = folder / names.lease_name(names.attempt_of(snapshot_id))
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(own, **{"boot": "another", **changes})))
    age(path)
    return path


def own_lease(folder: Path, snapshot_id: str = LIVING) -> Path:
    """A lease of this process."""
    path = folder / names.lease_name(names.attempt_of(snapshot_id))
    path.write_bytes(encode_lease(snapshot_id, "take", ()))
    return path


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else ["(gone)"]


def take(folder: Path, **more: Any) -> Snapshot:
    return Snapshot.take(folder, {"a": StateDict(x=torch.arange(5.0))}, **more)
