"""Help for the tests of comparisons: snapshots taken one after the other in a folder of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.engine.source import SnapshotSource

Take = Callable[..., Snapshot]


@pytest.fixture
def take(tmp_path: Path) -> Take:
    """Take values under the key ``state`` to a new place, and give the snapshot, opened anew."""
    taken: list[Snapshot] = []

    def take(_options: dict[str, Any] | None = None, /, **values: Any) -> Snapshot:
        place = tmp_path / f"s{len(taken)}"
        Snapshot.take(place, {"state": StateDict(values)}, **(_options or {}))
        taken.append(Snapshot(place))
        return taken[-1]

    return take


class Thing:
    """Stored by pickle."""

    def __init__(self, value: Any) -> None:
        self.value = value


class TiedModel(torch.nn.Module):
    """An embedding and an output layer that share their weight, or have it twice."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(12, 6)
        self.head = torch.nn.Linear(6, 12, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        with torch.no_grad():
            self.embedding.weight.fill_(2.0)
            self.head.weight.fill_(2.0)


def forged(snapshot: Snapshot, **changes: Any) -> Snapshot:
    """A snapshot whose manifest says something else, as anybody could have written it."""
    source = snapshot._source
    manifest = msgspec.structs.replace(source.manifest, **changes)
    snapshot._loaded = SnapshotSource(source.storage, manifest, snapshot._loaded[1]), snapshot._loaded[1]
    return snapshot
