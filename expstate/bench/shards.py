"""The workload in shards: its tensors cut along the first dimension, as FSDP2 cuts parameters, over all ranks of the process group.

Gets a ``Workload``; hands on a ``TensorState`` of DTensors, and says whether a restore brought back every byte of what is here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from expstate.bench import state
from expstate.bench.state import TensorState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from expstate.bench.plan import Workload


def _here(whole: torch.Tensor) -> torch.Tensor:
    """The rows of a tensor that are this rank's."""
    rank = torch.distributed.get_rank()
    chunks = whole.chunk(torch.distributed.get_world_size())
    return chunks[rank] if rank < len(chunks) else whole[:0]


def sharded(tensors: Iterable[tuple[str, torch.Tensor]]) -> TensorState:
    """A state of tensors of which each rank keeps its rows; the whole ones are let go of one by one."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return TensorState({name: _as_dtensor(_here(whole).clone(), mesh, whole.shape, whole.stride()) for name, whole in tensors})


def joined(shards: Iterable[tuple[str, torch.Tensor]]) -> TensorState:
    """A state of tensors of which these are this rank's rows, and every rank has as many."""
    size = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    return TensorState(
        {name: _as_dtensor(local, mesh, torch.Size((local.shape[0] * size, *local.shape[1:])), local.stride()) for name, local in shards}
    )


def _as_dtensor(local: torch.Tensor, mesh: Any, shape: torch.Size, stride: tuple[int, ...]) -> DTensor:
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def differences(workload: Workload, found: TensorState) -> str:
    """Which tensors have other bytes here than the workload's random ones, as a sentence; empty if none."""
    wrong = [name for name, whole in state.random_tensors(workload) if not _is_same(_here(whole), found.tensors[name])]
    return f"{len(wrong)} tensors differ after the restore, the first is {wrong[0]!r}" if wrong else ""


def _is_same(expected: torch.Tensor, found: Any) -> bool:
    # As bytes: random ones are not all numbers.
    return torch.equal(expected.view(torch.uint8), found.to_local().view(torch.uint8))
