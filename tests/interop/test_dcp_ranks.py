"""DCP on several ranks: what they save is one snapshot, which any number of ranks loads, in any sharding."""

from __future__ import annotations

import inspect
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from expstate import Catalog, Snapshot, StateDict, gc
from expstate.errors import RankFailedError, SnapshotNotFoundError, StorageError
from expstate.interop.dcp import Reader, Writer
from tests.ranks import worlds

from .states import KEEPS_PLANS, STAGES, Model, assert_equal, load, names, save, train, trained


def sharded(seed: int = 0) -> tuple[Model, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.inner, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def whole(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.full_tensor().clone() if isinstance(value, DTensor) else value for name, value in state.items()}


def save_sharded(path: Path, steps: int) -> dict[str, Any]:
    model, optimizer = sharded()
    train(model, optimizer, steps)
    state, its_state = get_state_dict(model, optimizer)
    save({"model": state, "optim": its_state, "step": steps}, Writer(path, step=steps))
    return whole(state)


def load_sharded(path: Path) -> tuple[dict[str, Any], float, int]:
    model, optimizer = sharded(seed=1)
    state, its_state = get_state_dict(model, optimizer)
    everything = {"model": state, "optim": its_state, "step": 0}
    load(everything, Reader(path))
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=its_state)
    return whole(model.state_dict()), train(model, optimizer, 1), everything["step"]


@worlds.NEEDS_FSDP
@pytest.mark.parametrize(("saving", "loading"), [(2, 1), (1, 2), (2, 2)])
def test_fsdp2_goes_on_with_other_ranks(tmp_path: Path, saving: int, loading: int) -> None:
    saved = worlds.results(saving, lambda _: save_sharded(tmp_path / "s", 3))
    loaded = worlds.results(loading, lambda _: load_sharded(tmp_path / "s"))
    uninterrupted, losses, _ = worlds.results(1, lambda _: (save_sharded(tmp_path / "one", 3), *load_sharded(tmp_path / "one")[1:]))[0]

    for state, loss, step in loaded:
        assert 3 == step
        assert_equal(saved[0], state)
        assert losses == pytest.approx(loss, rel=1e-5)
    for name, tensor in uninterrupted.items():
        assert torch.allclose(tensor, saved[0][name], rtol=1e-4, atol=1e-5)

    snapshot = Snapshot(tmp_path / "s")
    assert snapshot.verify().ok
    assert saving == snapshot.metadata.world_size
    assert {None} == {entry.rank for entry in snapshot.entries()}
    assert_equal(
        {name: value for name, value in saved[0].items() if name != "head.weight"},
        {name: snapshot.read_object(f"model/{name}") for name in saved[0] if name != "head.weight"},
    )
    assert set() == {name for name in names(tmp_path / "s") if name.startswith(".")}


@worlds.NEEDS_FSDP
def test_what_was_taken_on_ranks_is_loaded_on_one_and_the_other_way_round(tmp_path: Path) -> None:
    def take(rank: int) -> dict[str, Any]:
        model, optimizer = sharded()
        train(model, optimizer)
        Snapshot.take(tmp_path / "taken", {"model": model, "own": StateDict(rank=rank)})
        save({"model": model.state_dict()}, Writer(tmp_path / "saved"))
        own = {"rank": -1}
        load({"own": own}, Reader(tmp_path / "taken"))
        assert rank == own["rank"]
        return whole(model.state_dict())

    (expected, _) = worlds.results(2, take)
    for path in ("taken", "saved"):
        model, _ = trained(seed=1)
        load({"model": model}, Reader(tmp_path / path))
        assert_equal(expected, dict(model.state_dict()))
        other, _ = trained(seed=1)
        Snapshot(tmp_path / path).restore({"model": other})
        assert_equal(expected, dict(other.state_dict()))
    own = {"rank": -1}
    load({"own": own}, Reader(tmp_path / "taken", rank=1))
    assert 1 == own["rank"]


def tensors_in(placements: list[Any], values: dict[str, torch.Tensor], mesh: Any) -> dict[str, DTensor]:
    return {name: distribute_tensor(value, mesh, placements) for name, value in values.items()}


VALUES = {
    "square": torch.arange(35.0).reshape(5, 7),
    "row": torch.arange(7.0),
    "one": torch.ones(1, 3),
    "empty": torch.ones(0, 3),
    "bytes": torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4),
}


def test_any_sharding_is_loaded_into_any_other(tmp_path: Path) -> None:
    layouts = [[Shard(0)], [Replicate()], [Shard(-1)]]

    def work(_: int) -> None:
        mesh = init_device_mesh("cpu", (2,))
        for number, layout in enumerate(layouts):
            save({"t": tensors_in(layout, VALUES, mesh), "plain": VALUES["row"] + 1}, Writer(tmp_path / str(number)))
            for other in layouts:
                found = tensors_in(other, {name: torch.zeros_like(value) for name, value in VALUES.items()}, mesh)
                load({"t": found}, Reader(tmp_path / str(number)))
                assert_equal(VALUES, whole(found))

    worlds.results(2, work)
    for number in range(len(layouts)):
        snapshot = Snapshot(tmp_path / str(number))
        assert_equal(VALUES, snapshot.get_state_dict_for_key("t"))
        assert_equal(VALUES["row"] + 1, snapshot.read_object("state/plain"))
        assert snapshot.verify().ok


def test_two_dimensions_of_a_mesh(tmp_path: Path) -> None:
    def work(_: int) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        save({"t": tensors_in([Shard(0), Shard(1)], VALUES | {"row": torch.ones(2, 2)}, mesh)}, Writer(tmp_path / "s"))
        found = tensors_in([Replicate(), Shard(0)], {"square": torch.zeros(5, 7)}, mesh)
        load({"t": found}, Reader(tmp_path / "s"))
        assert_equal(VALUES["square"], found["square"].full_tensor())

    worlds.results(4, work)
    assert_equal(VALUES["square"], Snapshot(tmp_path / "s").read_object("t/square"))


@worlds.NEEDS_FSDP
def test_fsdp2_with_tensor_parallel(tmp_path: Path) -> None:
    def work(_: int) -> dict[str, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(7, 10), torch.nn.ReLU(), torch.nn.Linear(10, 7))
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["data"])
        state = model.state_dict()
        expected = whole(state)
        save({"model": state}, Writer(tmp_path / "s"))
        for value in state.values():
            value.to_local().zero_()
        load({"model": state}, Reader(tmp_path / "s"))
        assert_equal(expected, whole(state))
        return expected

    assert_equal(worlds.results(4, work)[0], Snapshot(tmp_path / "s").get_state_dict_for_key("model"))


@STAGES
def test_async_save_of_ranks(tmp_path: Path) -> None:
    def work(_: int) -> None:
        model, _ = sharded()
        expected = whole(model.state_dict())
        catalog = Catalog(tmp_path / "catalog.db")
        future = dcp.async_save({"model": model.state_dict()}, storage_writer=Writer(tmp_path / "0", step=0, catalog=catalog))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        future.result()
        assert_equal(expected, {name: Snapshot(tmp_path / "0").read_object(f"model/{name}") for name in expected})
        catalog.close()

    worlds.results(2, work)
    catalog = Catalog(tmp_path / "catalog.db")
    assert [0] == [record.step for record in catalog.search()]
    catalog.close()


@pytest.mark.parametrize("failing", [0, 1])
def test_failure_on_one_rank_is_raised_on_all_and_leaves_nothing(tmp_path: Path, failing: int) -> None:
    class Failing(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            if dist.get_rank() == failing:
                msg = "the disk is gone"
                raise StorageError(msg)
            return super().resolve_data(write_item)

    def work(rank: int) -> list[str]:
        values = {str(number): torch.full((100,), float(number)) for number in range(10)}
        with pytest.raises(dcp.api.CheckpointException) as info:
            save({"t": values, "rank": rank}, Writer(tmp_path / "s"), planner=Failing())
        left = sorted(names(tmp_path))
        dist.barrier()
        save({"t": values, "rank": rank}, Writer(tmp_path / "s"))
        (error, _) = info.value.failures[0]
        assert isinstance(error, RankFailedError)
        assert failing == error.rank
        return [str(error), *left]

    found = worlds.results(2, work)

    assert [[f"rank {failing} failed: StorageError: the disk is gone"]] * 2 == found
    assert 10 == len(Snapshot(tmp_path / "s").get_state_dict_for_key("t"))


def test_rank_that_is_killed_ends_the_save_and_leaves_what_gc_removes(tmp_path: Path) -> None:
    class Killed(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().resolve_data(write_item)

    def work(_: int) -> None:
        values = {str(number): torch.full((100,), float(number)) for number in range(10)}
        with pytest.raises(RuntimeError):  # of gloo
            save({"t": values}, Writer(tmp_path / "s"), planner=Killed())

    ended = worlds.run(2, work)

    assert (None, signal.SIGKILL) == (ended[0].error, ended[1].signal)
    with pytest.raises(SnapshotNotFoundError):
        Snapshot(tmp_path / "s").keys()
    gc(tmp_path / "s")
    assert set() == names(tmp_path)


@KEEPS_PLANS
def test_plans_that_are_kept(tmp_path: Path) -> None:
    def work(_: int) -> None:
        mesh = init_device_mesh("cpu", (2,))
        for step in range(3):
            state = {"t": tensors_in([Shard(0)], {"a": torch.full((4, 2), float(step))}, mesh), "step": step}
            save(state, Writer(tmp_path / str(step)), planner=DefaultSavePlanner(enable_plan_caching=True))

    worlds.results(2, work)
    for step in range(3):
        snapshot = Snapshot(tmp_path / str(step))
        assert step == snapshot.read_object("state/step")
        assert_equal(torch.full((4, 2), float(step)), snapshot.read_object("t/a"))


@pytest.mark.skipif("use_collectives" not in inspect.signature(dcp.save).parameters, reason="DCP of this torch always uses them")
def test_ranks_without_collectives_are_refused(tmp_path: Path) -> None:
    def work(_: int) -> str:
        with pytest.raises(BaseException, match="use_collectives=False is not possible") as info:
            save({"a": 1}, Writer(tmp_path / "s"), use_collectives=False)
        return str(info.value)

    worlds.results(2, work)
    assert set() == names(tmp_path)
