"""Incremental takes of several ranks: each links what it would have written, and what was written alone serves many ranks too."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from expstate import Snapshot, StateDict
from expstate.errors import InvalidArgumentError, RankFailedError, RefNotFoundError
from tests.ranks import worlds


class Net(nn.Module):
    """A frozen layer and one that is trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(400, 300)
        self.trained = nn.Linear(300, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trained(torch.relu(self.frozen(x)))


def _change(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.get_submodule("module.trained" if hasattr(model, "module") else "trained").parameters():
            parameter.add_(1)


def _sharded() -> nn.Module:
    model = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


@pytest.mark.parametrize("make", [lambda: DistributedDataParallel(Net()), _sharded], ids=["replicated", "sharded"])
@pytest.mark.parametrize("base", ["auto", "given", "path"])
def test_each_rank_links_its_share(tmp_path: Path, make: Any, base: str) -> None:
    def work(rank: int) -> None:
        model, own = make(), StateDict(rank=torch.full((3000,), float(rank)))
        first = Snapshot.take(tmp_path / "a", {"model": model, "own": own})
        _change(model)
        how: Any = {"auto": "auto", "given": first, "path": str(tmp_path / "a")}[base]
        Snapshot.async_take(tmp_path / "b", {"model": model, "own": own}, base=how).wait()
        dist.barrier()
        if rank == 0:
            shutil.rmtree(tmp_path / "a")
        dist.barrier()
        live, other = make(), StateDict(rank=torch.zeros(3000))
        Snapshot(tmp_path / "b").restore({"model": live, "own": other})
        assert torch.equal(own["rank"], other["rank"])
        for (name, one), (_, two) in zip(model.state_dict().items(), live.state_dict().items(), strict=True):
            assert torch.equal(*(getattr(value, "full_tensor", lambda value=value: value)() for value in (one, two))), name

    worlds.results(2, work)
    snapshot = Snapshot(tmp_path / "b")
    assert snapshot.verify().ok
    written = {name.split("#")[0].removeprefix("module.") for file in (tmp_path / "b").glob("*.safetensors") for name in load_file(file)}
    assert {"trained.weight", "trained.bias"} == written
    assert {"r00000", "r00001"} == {file.name.split("-")[1] for file in (tmp_path / "b" / "base").iterdir()}


def test_ranks_go_on_from_what_was_taken_alone_and_the_other_way_round(tmp_path: Path) -> None:
    values = {f"w{number}": torch.randn(5000) for number in range(4)}
    Snapshot.take(tmp_path / "alone", {"state": StateDict(values)})

    def work(rank: int) -> None:
        Snapshot.take(tmp_path / "both", {"state": StateDict(values)}, replicated=["state/*"], base=str(tmp_path / "alone"))

    worlds.results(2, work)
    third = Snapshot.take(tmp_path / "again", {"state": StateDict(values)}, base=str(tmp_path / "both"))
    shutil.rmtree(tmp_path / "alone")
    for name in ("both", "again"):
        snapshot = Snapshot(tmp_path / name)
        assert snapshot.verify().ok
        assert all(torch.equal(value, snapshot.read_object(f"state/{key}")) for key, value in values.items())
    assert sum(record.size for record in third.manifest.files) >= 4 * 20_000


def test_equal_tensors_of_ranks_are_stored_once_by_each(tmp_path: Path) -> None:
    """And the first rank says so in the manifest, whoever has them."""

    def work(rank: int) -> None:
        values = {"a": torch.ones(5000), "b": torch.ones(5000)} if rank else {"a": torch.zeros(3)}
        snapshot = Snapshot.take(tmp_path / "s", {"state": StateDict(values)}, dedup=True)
        assert torch.equal(values["a"], snapshot.read_object("state/a"))

    worlds.results(2, work)
    assert ("shared_boxes",) == Snapshot(tmp_path / "s").manifest.requires
    assert Snapshot(tmp_path / "s").verify().ok


def test_a_bad_base_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with pytest.raises(RefNotFoundError if rank == 0 else RankFailedError):
            Snapshot.take(tmp_path / "s", {"state": StateDict(x=1)}, base="nobody", catalog=tmp_path / "catalog.db")
        with pytest.raises(InvalidArgumentError if rank == 0 else RankFailedError, match="dedup"):
            Snapshot.take(tmp_path / "s", {"state": StateDict(x=1)}, dedup=rank == 1)

    worlds.results(2, work)
    assert not (tmp_path / "s").exists()
