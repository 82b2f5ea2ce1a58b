"""Snapshots that have a file in common, and the room that they take up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from expstate import Snapshot, StateDict

SIZE = 50_000
"""Elements of the tensor that stays the same."""


def state(step: int) -> dict[str, StateDict]:
    """One large tensor that is always the same, and one that is of its step."""
    generator = torch.Generator().manual_seed(0)
    return {"frozen": StateDict(w=torch.randn(SIZE, generator=generator)), "head": StateDict(w=torch.full((3000,), float(step)))}


def take_shared(folder: Path, count: int, **more: Any) -> list[Snapshot]:
    """Snapshots ``0``, ``1``, ... of steps 0, 1, ...: the others go on from the first, and share its file with the large tensor."""
    taken: list[Snapshot] = []
    for step in range(count):
        base = taken[0] if taken else None
        taken.append(Snapshot.take(folder / str(step), state(step), step=step, name=f"step-{step}", base=base, **more))
    return taken


def room(folder: Path) -> int:
    """Bytes of all files below a folder, each counted once however many names it has."""
    found = [path.lstat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum({(status.st_dev, status.st_ino): status.st_size for status in found}.values())


def listing(folder: Path) -> list[str]:
    """Every file and folder below."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
