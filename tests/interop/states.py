"""Help for the tests of interop: a small model that has trained, checkpoints of DCP, and what its errors hold."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from expstate.state.objects import safe_mode_holds

KEEPS_PLANS = pytest.mark.skipif(
    "enable_plan_caching" not in inspect.signature(DefaultSavePlanner).parameters, reason="DCP of this torch keeps no plans"
)
STAGES = pytest.mark.skipif(
    "async_stager" not in inspect.signature(dcp.async_save).parameters,
    reason="async_save of this torch copies nothing on the host",
)
NEEDS_SAFE_MODE = pytest.mark.skipif(not safe_mode_holds(), reason="this torch reads no pickled object without trust")


class Model(torch.nn.Module):
    """Two layers with tied weights, a norm, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(12, 8)
        self.inner = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
        self.head = torch.nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.embedding(words)))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> float:
    loss = torch.zeros(())
    for step in range(steps):
        words = torch.arange(6) + step
        loss = model(words).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def trained(seed: int = 0) -> tuple[Model, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer)
    return model, optimizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torch says of checkpoints in one process, and of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def save(state: dict[str, Any], writer: Any, **more: Any) -> Any:
    with quiet():
        return dcp.save(state, storage_writer=writer, **more)


def load(state: dict[str, Any], reader: Any, **more: Any) -> None:
    with quiet():
        dcp.load(state, storage_reader=reader, **more)


def save_folder(state: dict[str, Any], folder: Path) -> None:
    """A checkpoint as DCP itself writes it."""
    with quiet():
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder))


def error_of(info: pytest.ExceptionInfo[BaseException]) -> BaseException:
    """What a rank has raised, without what DCP wraps around it."""
    assert isinstance(info.value, CheckpointException)
    return next(iter(info.value.failures.values()))[0]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def assert_equal(expected: Any, found: Any) -> None:
    """Equal values of equal types, tensors bit by bit."""
    assert type(expected) is type(found)
    if isinstance(expected, dict):
        assert list(expected) == list(found)
        for key, value in expected.items():
            assert_equal(value, found[key])
    elif isinstance(expected, (list, tuple)):
        assert len(expected) == len(found)
        for one, other in zip(expected, found, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, torch.Tensor):
        assert (expected.dtype, expected.shape) == (found.dtype, found.shape)
        assert torch.equal(expected, found)
    else:
        assert expected == found
