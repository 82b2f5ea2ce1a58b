"""A bucket as the tests of snapshots have it: the ways to reach it, the proxy before its server, and what is put there."""

from __future__ import annotations

import uuid
from typing import Any

import torch

from expstate import StateDict
from expstate.storage.objects.storage import ObjectStorage
from expstate.storage.registry import open_storage

from .proxy import FaultProxy

MIB = 2**20
WAYS = {"s3": ("s3", "fsspec"), "s3 by obstore": ("s3", "obstore"), "gs": ("gs", "fsspec")}


class Store:
    """A bucket, a proxy before its server, and the options that lead through it; ``direct`` lead past it."""

    def __init__(self, root: str, proxy: FaultProxy, options: dict[str, Any], direct: dict[str, Any]) -> None:
        self.root = root
        self.proxy = proxy
        self.options = options
        self.direct = direct

    def new(self) -> str:
        return f"{self.root}/run-{uuid.uuid4().hex[:8]}/step-1"

    def storage(self, url: str) -> ObjectStorage:
        """A folder, by whatever client serves URLs now."""
        storage = open_storage(url)
        assert isinstance(storage, ObjectStorage)
        return storage


def app_state(seed: int = 0) -> dict[str, StateDict]:
    """Tensors larger and smaller than a data file, tied ones, an object and plain values."""
    torch.manual_seed(seed)
    large = torch.randn(3 * MIB // 4)
    small = {f"layer.{number}": torch.randn(50, 20) for number in range(12)}
    wide = torch.randn(1, 700_000)  # a row larger than a data file cannot be cut
    return {
        "model": StateDict(large=large, tied=large, wide=wide, **small),
        "progress": StateDict(step=seed, note="text", numbers=[1, 2.5]),
    }


def few(value: float) -> dict[str, StateDict]:
    """Two small tensors that tell which take they are of."""
    return {"model": StateDict(weight=torch.full((50, 20), value), bias=torch.full((20,), value))}


def is_same(one: dict[str, StateDict], other: dict[str, StateDict]) -> bool:
    return all(
        torch.equal(value, other[key][name]) if isinstance(value, torch.Tensor) else value == other[key][name]
        for key, state in one.items()
        for name, value in state.items()
    )


def files(url: str) -> list[str]:
    return sorted(info.name for info in open_storage(url).list())
