"""Modules and optimizers that train on several ranks: what DDP, FSDP and tensor parallelism hold comes back, on fewer or more ranks too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from expstate import Snapshot, StateDict
from expstate.errors import RestoreMismatchError
from tests.ranks import worlds

BATCH = 12  # of which each rank has a part: worlds have 1, 2, 3 or 4 ranks


class Net(nn.Module):
    """Layers of which data parallelism makes uneven shards, a buffer, and a parameter that most ranks have nothing of."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(7, 28)
        self.second = nn.Linear(28, 28)
        self.third = nn.Linear(28, 3)
        if tied:
            self.second.weight = self.middle = nn.Parameter(torch.randn(28, 28) / 6)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        hidden = torch.relu(self.second(torch.relu(self.first(x))))
        return self.third(hidden) * self.scale


def _ddp(rank: int) -> nn.Module:
    return DistributedDataParallel(Net())


def _fsdp(rank: int, *, tied: bool = False, mesh: Any = None) -> nn.Module:
    model = Net(tied=tied)
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    if not tied:
        fully_shard(model.second, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _hsdp(rank: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    return _fsdp(rank, mesh=mesh)


def _split(model: nn.Module, mesh: Any) -> nn.Module:
    return parallelize_module(model, mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()})


def _tensor_parallel(rank: int) -> nn.Module:
    return _split(Net(), init_device_mesh("cpu", (dist.get_world_size(),)))


def _fsdp_and_tensor_parallel(rank: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    model = _split(Net(), mesh["tensor"])
    fully_shard(model.second, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return model


def _alone(rank: int) -> nn.Module:
    return Net()


MAKERS = {
    "ddp": _ddp,
    "fsdp": _fsdp,
    "hsdp": _hsdp,
    "tensor-parallel": _tensor_parallel,
    "fsdp-and-tensor-parallel": _fsdp_and_tensor_parallel,
    "alone": _alone,
}
DATA_PARALLEL = {"ddp", "fsdp", "hsdp"}


def _state(kind: str, rank: int) -> dict[str, Any]:
    model = MAKERS[kind](rank)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01), "progress": StateDict(step=0)}


def _train(kind: str, state: dict[str, Any], until: int) -> list[float]:
    """Train; the losses over the whole batch, whatever part of it a rank has."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if kind in DATA_PARALLEL else (0, 1)
    losses = []
    for step in range(state["progress"]["step"], until):
        torch.manual_seed(100 + step)
        x, y = torch.randn(BATCH, 7), torch.randn(BATCH, 3)
        part = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
        loss = nn.functional.mse_loss(state["model"](x[part]), y[part])
        loss.backward()
        state["optimizer"].step()
        state["optimizer"].zero_grad()
        whole = loss.detach().clone()
        if kind in DATA_PARALLEL:
            dist.all_reduce(whole)
        losses.append(float(whole) / size)
    state["progress"]["step"] = until
    return losses


def _full(value: Any) -> torch.Tensor:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.wait() if hasattr(value, "wait") else value.detach().clone()


def _trained(kind: str, place: Path) -> Callable[[int], Any]:
    """Train three steps, take, and train three more; the losses of these, and the parameters at the take."""

    def work(rank: int) -> Any:
        state = _state(kind, rank)
        _train(kind, state, 3)
        Snapshot.take(place, state, check_replicated=True)
        weights = {name.removeprefix("module."): _full(value) for name, value in state["model"].state_dict().items()}
        return _train(kind, state, 6), weights

    return work


def _resumed(kind: str, place: Path) -> Callable[[int], Any]:
    """The same, of a fresh process that restores."""

    def work(rank: int) -> Any:
        state = _state(kind, rank)
        report = Snapshot(place).restore(state)
        assert not report.missing
        assert not report.unexpected
        sharded = [parameter for parameter in state["model"].parameters() if isinstance(parameter, DTensor)]
        for parameter in sharded:
            moments = state["optimizer"].state[parameter]["exp_avg"]
            assert isinstance(moments, DTensor)
            assert (parameter.placements, parameter.device_mesh) == (moments.placements, moments.device_mesh)
        weights = {name.removeprefix("module."): _full(value) for name, value in state["model"].state_dict().items()}
        return _train(kind, state, 6), weights

    return work


def _check(kind: str, size: int, other: str, other_size: int, folder: Path) -> None:
    """The same weights, and losses as of a run that goes on: to the last bit where sums are made in the same order, else to 1e-5."""
    losses, weights = worlds.results(size, _trained(kind, folder / "a"))[0]
    for found, restored in worlds.results(other_size, _resumed(other, folder / "a")):
        assert weights.keys() == restored.keys()
        assert all(torch.equal(value, restored[name]) for name, value in weights.items())
        if (kind, size) == (other, other_size):
            assert losses == found
        else:
            assert found == pytest.approx(losses, rel=1e-5)
    snapshot = Snapshot(folder / "a")
    for name, value in weights.items():
        stored = f"module.{name}" if kind == "ddp" else name
        assert torch.equal(value, snapshot.read_object(f"model/{stored}"))
    assert {None} == {entry.rank for entry in snapshot.manifest.entries}
    assert snapshot.verify().ok


@pytest.mark.parametrize(
    ("kind", "size", "other", "other_size"),
    [
        ("ddp", 2, "ddp", 2),
        ("ddp", 2, "ddp", 3),
        ("ddp", 2, "alone", 1),
        pytest.param("fsdp", 2, "fsdp", 2, marks=worlds.NEEDS_FSDP),
        pytest.param("fsdp", 2, "fsdp", 3, marks=worlds.NEEDS_FSDP),
        pytest.param("fsdp", 3, "fsdp", 2, marks=worlds.NEEDS_FSDP),
        pytest.param("fsdp", 4, "fsdp", 1, marks=worlds.NEEDS_FSDP),
        pytest.param("fsdp", 2, "alone", 1, marks=worlds.NEEDS_FSDP),
        pytest.param("alone", 1, "fsdp", 3, marks=worlds.NEEDS_FSDP),
        pytest.param("fsdp", 2, "ddp", 2, marks=worlds.NEEDS_FSDP),
        ("tensor-parallel", 2, "tensor-parallel", 2),
        ("tensor-parallel", 4, "tensor-parallel", 2),
        ("tensor-parallel", 2, "alone", 1),
        pytest.param("fsdp-and-tensor-parallel", 4, "fsdp-and-tensor-parallel", 4, marks=worlds.NEEDS_FSDP),
        pytest.param("fsdp-and-tensor-parallel", 4, "fsdp-and-tensor-parallel", 2, marks=[pytest.mark.slow, worlds.NEEDS_FSDP]),
        pytest.param("fsdp-and-tensor-parallel", 4, "fsdp", 3, marks=[pytest.mark.slow, worlds.NEEDS_FSDP]),
        pytest.param("hsdp", 4, "hsdp", 4, marks=worlds.NEEDS_FSDP),
        pytest.param("hsdp", 4, "fsdp", 3, marks=[pytest.mark.slow, worlds.NEEDS_FSDP]),
    ],
)
def test_training_goes_on_as_if_it_had_not_been_interrupted(kind, size, other, other_size, tmp_path):
    _check(kind, size, other, other_size, tmp_path)


@worlds.NEEDS_FSDP
@pytest.mark.slow
def test_six_ranks_cut_what_two_have_cut(tmp_path):
    """28 rows cut in two, and each part in three: strided shards of uneven length."""
    _check("fsdp-and-tensor-parallel", 6, "fsdp", 2, tmp_path)


def test_tied_weights_under_fsdp(tmp_path):
    def take(rank):
        model = _fsdp(rank, tied=True)
        assert model.second.weight is model.middle
        Snapshot.take(tmp_path / "a", {"model": model})
        return _full(model.middle)

    expected, *_ = worlds.results(2, take)

    def restore(rank):
        model = _fsdp(rank, tied=True)
        with torch.no_grad():
            model.middle.zero_()
        Snapshot(tmp_path / "a").restore({"model": model})
        assert model.second.weight is model.middle
        return _full(model.second.weight)

    assert all(torch.equal(expected, found) for found in worlds.results(3, restore))
    state = Snapshot(tmp_path / "a").get_state_dict_for_key("model")
    assert state["middle"] is state["second.weight"]
    live = Net(tied=True)
    Snapshot(tmp_path / "a").restore({"model": live})
    assert torch.equal(expected, live.middle)


def test_a_model_that_was_built_on_the_meta_device(tmp_path):
    def work(rank):
        model = _fsdp(rank)
        Snapshot.take(tmp_path / "a", {"model": model})
        with torch.device("meta"):
            bare = Net()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(bare.second, mesh=mesh)
        fully_shard(bare, mesh=mesh)
        with pytest.raises(Exception, match=r"to_empty\(\)"):
            Snapshot(tmp_path / "a").restore({"model": bare})
        bare.to_empty(device="cpu")
        Snapshot(tmp_path / "a").restore({"model": bare})
        return all(torch.equal(_full(value), _full(bare.state_dict()[name])) for name, value in model.state_dict().items())

    assert [True, True] == worlds.results(2, work)


def test_ddp_is_written_once_and_restored_through_its_prefix(tmp_path):
    def work(rank):
        Snapshot.take(tmp_path / "a", {"model": _ddp(rank)})

    worlds.results(2, work)
    assert {None} == {entry.rank for entry in Snapshot(tmp_path / "a").manifest.entries}
    live = Net()
    with torch.no_grad():
        live.first.weight.zero_()
    Snapshot(tmp_path / "a").restore({"model": live})
    assert torch.equal(Net().first.weight, live.first.weight)


def test_an_optimizer_of_another_module_is_each_rank_s_own(tmp_path):
    def work(rank):
        model, other = _ddp(rank), nn.Linear(2, 2)
        nn.init.constant_(other.weight, rank)
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1 * (rank + 1), momentum=0.9)
        other(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        Snapshot.take(tmp_path / "a", {"model": model, "other": other, "optimizer": optimizer})

    worlds.results(2, work)
    snapshot = Snapshot(tmp_path / "a")
    assert [0, 1] == [entry.rank for entry in snapshot.manifest.entries if entry.path == "optimizer/state/0/momentum_buffer"]
    assert [0.1, 0.2] == [snapshot.read_object("optimizer/param_groups/0/lr", rank=rank) for rank in range(2)]


@worlds.NEEDS_FSDP
@pytest.mark.parametrize("size", [2, 3])
def test_fsdp1_through_state_dicts(tmp_path, size):
    """FSDP1 and its optimizer, as ``get_state_dict`` gives them: sharded tensors, under the names of the module."""

    def state_dicts(strategy: ShardingStrategy) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = FullyShardedDataParallel(Net(), sharding_strategy=strategy, device_id=torch.device("cpu"), use_orig_params=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
        torch.manual_seed(number)
        loss = model(torch.randn(BATCH, 7)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    def take(rank: int) -> list[float]:
        model, optimizer = state_dicts(ShardingStrategy.FULL_SHARD)
        step(model, optimizer, 0)
        weights, moments = get_state_dict(model, optimizer)
        Snapshot.take(tmp_path / "a", {"model": StateDict(weights), "optimizer": StateDict(moments)}, replicated=["**"])
        return [step(model, optimizer, number) for number in (1, 2)]

    expected, *_ = worlds.results(2, take)
    assert {None} == {entry.rank for entry in Snapshot(tmp_path / "a").manifest.entries}

    def resume(rank: int) -> list[float]:
        model, optimizer = state_dicts(ShardingStrategy.FULL_SHARD)
        step(model, optimizer, 77)  # so that there is a state to read into
        weights, moments = get_state_dict(model, optimizer, options=StateDictOptions())
        state = {"model": StateDict(weights), "optimizer": StateDict(moments)}
        Snapshot(tmp_path / "a").restore(state)
        set_state_dict(model, optimizer, model_state_dict=state["model"].data, optim_state_dict=state["optimizer"].data)
        return [step(model, optimizer, number) for number in (1, 2)]

    for found in worlds.results(size, resume):
        assert found == (expected if size == 2 else pytest.approx(expected, rel=1e-5))


@worlds.NEEDS_FSDP
def test_a_fresh_optimizer_lacks_nothing_and_a_module_that_differs_is_told(tmp_path):
    def work(rank):
        state = _state("fsdp", rank)
        _train("fsdp", state, 1)
        snapshot = Snapshot.take(tmp_path / "a", state)
        other = nn.Sequential(nn.Linear(7, 28))
        fully_shard(other, mesh=init_device_mesh("cpu", (2,)))
        with pytest.raises(RestoreMismatchError, match="the snapshot lacks"):
            snapshot.restore({"model": other})

    worlds.results(2, work)
