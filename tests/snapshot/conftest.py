"""Help for the tests of what users do with snapshots: places, small models, and states whose fate can be watched."""

from __future__ import annotations

import gc
import hashlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.engine import memory

KEPT = pytest.mark.campaign("Old snapshots are read", "kept snapshots of the first format: plain, incremental, shared, fingerprints")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where a snapshot can be taken to."""
    return tmp_path / "snapshot"


@pytest.fixture
def taken(place: Path) -> Any:
    """Take values under the key ``state`` and give the snapshot, opened anew."""

    def take(**values: Any) -> Snapshot:
        Snapshot.take(place, {"state": StateDict(values)})
        return Snapshot(place)

    return take


@pytest.fixture
def no_staging_left() -> Any:
    """Staging memory of earlier tests is given back before this one, and its own afterwards."""
    memory.free_idle()
    gc.collect()
    yield
    memory.free_idle()


class Watched:
    """A stateful that tells what was done to it."""

    def __init__(self, **state: Any) -> None:
        self.state = state
        self.loads: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loads.append(state)
        self.state = dict(state)


class Refusing(Watched):
    """A stateful that does not take any state back."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loads.append(state)
        msg = "this state is not for me"
        raise RuntimeError(msg)


class TiedModel(torch.nn.Module):
    """An embedding and an output layer that share their weight, as language models do."""

    def __init__(self, *, tied: bool = True, device: str | None = None) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(12, 6, device=device)
        self.head = torch.nn.Linear(6, 12, bias=False, device=device)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(tokens))


def mlp(seed: int = 0) -> torch.nn.Sequential:
    """A small network with parameters and buffers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 3))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, seed: int = 1) -> None:
    """Some steps, so that the optimizer has a state."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 8, generator=generator)).square().mean().backward()
        optimizer.step()


def of_every_layout() -> dict[str, torch.Tensor]:
    """Tensors of layouts and kinds that are stored in parts."""
    dense = torch.tensor([[0.0, 1.5], [2.5, 0.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # most of them are announced as beta, or as deprecated
        found = {layout: getattr(dense, f"to_sparse_{layout}")() for layout in ("csr", "csc")}
        found |= {layout: getattr(dense, f"to_sparse_{layout}")((1, 1)) for layout in ("bsr", "bsc")}
        found["coo"] = dense.to_sparse()
        found["quantised"] = torch.quantize_per_tensor(dense, 0.5, 1, torch.qint8)
        scales, zeros = torch.tensor([0.5, 0.25], dtype=torch.float64), torch.tensor([0, 1])
        found["per_channel"] = torch.quantize_per_channel(dense, scales, zeros, 0, torch.quint8)
        found["nested"] = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(1, 3)])
        found["jagged"] = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(1, 3)], layout=torch.jagged)
    return found


def digest_of(*states: Any) -> str:
    """A digest of all tensors in state dicts, to see that not a byte has changed."""
    found = hashlib.blake2b()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            plain = value.detach().cpu().contiguous().reshape(-1)
            found.update(bytes(plain.view(torch.uint8).tolist()))
        elif isinstance(value, dict):
            for key, item in value.items():
                found.update(repr(key).encode())
                add(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            found.update(repr(value).encode())

    for state in states:
        add(state)
    return found.hexdigest()


def is_equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two modules have the same names with the same values."""
    left, right = one.state_dict(), other.state_dict()
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)
