"""DTensors on meshes: taken once whatever the placements are, and restored in place into any others."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from expstate import Snapshot, StateDict
from expstate.errors import RestoreMismatchError, UnsupportedValueError
from tests.ranks import worlds

FULL = torch.arange(7 * 5 * 3).reshape(7, 5, 3)
LAYOUTS_2D = [[Replicate(), Replicate()], [Shard(0), Replicate()], [Replicate(), Shard(1)], [Shard(0), Shard(0)], [Shard(2), Shard(0)]]


def _zeros(placements, mesh, full=FULL) -> DTensor:
    return worlds.distribute(torch.zeros_like(full), mesh, placements)


def _whole(value: DTensor) -> torch.Tensor:
    found = value.full_tensor()
    return found.wait() if hasattr(found, "wait") else found


def test_every_layout_of_a_line_into_every_other(tmp_path):
    layouts = [Replicate(), Shard(0), Shard(1), Shard(2)]

    def work(rank):
        mesh = init_device_mesh("cpu", (3,))
        for number, layout in enumerate(layouts):
            snapshot = Snapshot.take(tmp_path / str(number), {"s": StateDict(x=distribute_tensor(FULL, mesh, [layout]))})
            for other in layouts:
                live = StateDict(x=_zeros([other], mesh))
                kept = live["x"]
                snapshot.restore({"s": live})
                assert live["x"] is kept, "it is restored in place"
                assert torch.equal(FULL, _whole(live["x"])), (layout, other)
            assert torch.equal(FULL, snapshot.read_object("s/x"))
            assert torch.equal(FULL[2:6], snapshot.read_object("s/x", rows=slice(2, 6)))

    worlds.results(3, work)
    for number in range(len(layouts)):
        snapshot = Snapshot(tmp_path / str(number))
        assert [None] == [entry.rank for entry in snapshot.entries("s/x")]
        assert torch.equal(FULL, snapshot.read_object("s/x"))
        assert torch.equal(FULL, snapshot.get_state_dict_for_key("s")["x"])
        live = StateDict(x=torch.zeros_like(FULL))
        snapshot.restore({"s": live})
        assert torch.equal(FULL, live["x"])
        assert FULL.nbytes == sum(path.stat().st_size - _header_bytes(path) for path in (tmp_path / str(number)).glob("*.safetensors"))


def _header_bytes(path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_every_layout_of_a_square_into_every_other(tmp_path):
    def take(rank):
        mesh = init_device_mesh("cpu", (2, 2))
        for number, layout in enumerate(LAYOUTS_2D):
            snapshot = Snapshot.take(tmp_path / str(number), {"s": StateDict(x=distribute_tensor(FULL, mesh, layout))})
            for other in LAYOUTS_2D:
                live = StateDict(x=_zeros(other, mesh))
                snapshot.restore({"s": live})
                assert torch.equal(FULL, _whole(live["x"])), (layout, other)

    worlds.results(4, take)

    def on_three(rank):
        mesh = init_device_mesh("cpu", (3,))
        for number in range(len(LAYOUTS_2D)):
            live = StateDict(x=_zeros([Shard(0)], mesh))
            Snapshot(tmp_path / str(number)).restore({"s": live})
            assert torch.equal(FULL, _whole(live["x"])), number

    worlds.results(3, on_three)
    assert all(torch.equal(FULL, Snapshot(tmp_path / str(number)).read_object("s/x")) for number in range(len(LAYOUTS_2D)))


@pytest.mark.skipif("src_data_rank" not in inspect.signature(distribute_tensor).parameters, reason="this torch cuts no empty tensors")
def test_empty_shards_numbers_and_tensors_without_elements(tmp_path):
    """Of two rows on three ranks the last has none."""
    state = {"rows": torch.arange(8.0).reshape(2, 4), "number": torch.tensor(3.0), "empty": torch.empty(0, 4), "flat": torch.empty(5, 0)}

    def sharded(mesh, values):
        layouts = {name: [Shard(0) if value.dim() else Replicate()] for name, value in values.items()}
        return {name: worlds.distribute(value, mesh, layouts[name]) for name, value in values.items()}

    def work(rank):
        mesh = init_device_mesh("cpu", (3,))
        snapshot = Snapshot.take(tmp_path / "a", {"s": StateDict(sharded(mesh, state))})
        live = StateDict(sharded(mesh, {name: torch.full_like(value, 9) for name, value in state.items()}))
        snapshot.restore({"s": live})
        return {name: _whole(value).tolist() for name, value in live.items()}

    assert [{name: value.tolist() for name, value in state.items()}] * 3 == worlds.results(3, work)
    snapshot = Snapshot(tmp_path / "a")
    for name, value in state.items():
        assert torch.equal(value, snapshot.read_object(f"s/{name}"))
    live = StateDict({name: torch.full_like(value, 9) for name, value in state.items()})
    snapshot.restore({"s": live})
    assert all(torch.equal(value, live[name]) for name, value in state.items())
    assert snapshot.verify().ok


def test_tied_dtensors_are_stored_once(tmp_path):
    """Where a rank has no part of them too, which cannot see that they are one."""
    full = torch.arange(6.0).reshape(2, 3)

    def work(rank):
        mesh = init_device_mesh("cpu", (3,))
        x = distribute_tensor(full, mesh, [Shard(0)])
        snapshot = Snapshot.take(tmp_path / "a", {"s": StateDict(one=x, other=x)})
        live = StateDict(one=_zeros([Shard(0)], mesh, full), other=_zeros([Shard(1)], mesh, full))
        snapshot.restore({"s": live})
        return torch.equal(full, _whole(live["one"])) and torch.equal(full, _whole(live["other"]))

    assert [True] * 3 == worlds.results(3, work)
    assert ["tensor", "alias"] == [type(entry).__name__.removesuffix("Entry").lower() for entry in Snapshot(tmp_path / "a").entries("s/o*")]
    state = Snapshot(tmp_path / "a").get_state_dict_for_key("s")
    assert state["one"] is state["other"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.complex128, torch.float8_e4m3fn, torch.int8], ids=str)
def test_dtypes(tmp_path, dtype):
    full = torch.arange(35).remainder(2).to(dtype).reshape(7, 5)

    def work(rank):
        mesh = init_device_mesh("cpu", (2,))
        local = [full[:4], full[4:]][rank]
        x = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride())
        snapshot = Snapshot.take(tmp_path / "a", {"s": StateDict(x=x)})
        columns = torch.zeros(7, [3, 2][rank], dtype=dtype)
        live = StateDict(x=DTensor.from_local(columns, mesh, [Shard(1)], run_check=False, shape=full.shape, stride=full.stride()))
        snapshot.restore({"s": live})
        return torch.equal([full[:, :3], full[:, 3:]][rank].contiguous().view(torch.uint8), columns.view(torch.uint8))

    assert [True, True] == worlds.results(2, work)


def test_local_memory_that_is_not_contiguous(tmp_path):
    full = torch.arange(12.0).reshape(4, 3)

    def work(rank):
        mesh = init_device_mesh("cpu", (2,))

        def sharded(values):
            local = torch.empty(3, 2).t()
            local.copy_(values[2 * rank : 2 * rank + 2])
            return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride())

        snapshot = Snapshot.take(tmp_path / "a", {"s": StateDict(x=sharded(full))})
        live = StateDict(x=sharded(torch.zeros_like(full)))
        snapshot.restore({"s": live})
        return torch.equal(full[2 * rank : 2 * rank + 2], live["x"].to_local())

    assert [True, True] == worlds.results(2, work)


@pytest.mark.parametrize("budget", [None, 2 * 1024**2], ids=["held", "read-twice"])
def test_atomic_restores(tmp_path, budget):
    full = torch.arange(1_500_000).reshape(3000, 500)

    def work(rank):
        mesh = init_device_mesh("cpu", (2,))
        snapshot = Snapshot.take(tmp_path / "a", {"s": StateDict(x=distribute_tensor(full, mesh, [Shard(0)]))})
        live = StateDict(x=_zeros([Shard(1)], mesh, full))
        snapshot.restore({"s": live}, atomic=True, memory_budget_bytes=budget)
        dist.barrier()
        if rank == 0:
            damaged = next((tmp_path / "a").glob("*r00001*"))
            with damaged.open("r+b") as file:
                file.seek(-8, 2)
                file.write(b"damaged!")
        dist.barrier()
        other = StateDict(x=_zeros([Shard(1)], mesh, full))
        message = ""
        try:
            snapshot.restore({"s": other}, atomic=True, memory_budget_bytes=budget)
        except Exception as error:  # noqa: BLE001 - told
            message = str(error)
        return torch.equal(full, _whole(live["x"])), int(other["x"].to_local().abs().sum()), message

    for whole, changed, message in worlds.results(2, work):
        assert (True, 0) == (whole, changed)
        assert "entry 's/x' is damaged" in message


@pytest.mark.parametrize("budget", [None, 2 * 1024**2], ids=["held", "written-before-the-return"])
def test_async_takes_have_the_values_of_their_moment(tmp_path, budget):
    full = torch.arange(1_500_000).reshape(3000, 500)

    def work(rank):
        mesh = init_device_mesh("cpu", (2,))
        x = distribute_tensor(full, mesh, [Shard(1)])
        pending = Snapshot.async_take(tmp_path / "a", {"s": StateDict(x=x)}, memory_budget_bytes=budget)
        x.to_local().zero_()
        snapshot = pending.wait()
        snapshot.restore({"s": StateDict(x=x)})
        return torch.equal(full, _whole(x))

    assert [True, True] == worlds.results(2, work)


def test_live_shards_are_compared_where_they_are_whole(tmp_path):
    def work(rank):
        mesh = init_device_mesh("cpu", (2,))
        whole, part = distribute_tensor(FULL, mesh, [Replicate()]), distribute_tensor(FULL, mesh, [Shard(0)])
        snapshot = Snapshot.take(tmp_path / "a", {"s": StateDict(whole=whole), "t": StateDict(part=part)})
        assert not snapshot.diff({"s": StateDict(whole=whole)})
        whole.to_local()[0] += 1
        assert ["s/whole"] == list(snapshot.diff({"s": StateDict(whole=whole)}).changed)
        with pytest.raises(UnsupportedValueError, match="entry 't/part' cannot be compared: only a part of this tensor is here"):
            snapshot.diff({"t": StateDict(part=part)})

    worlds.results(2, work)


def test_cast_restores(tmp_path):
    full = torch.arange(35.0).reshape(7, 5)

    def work(rank):
        mesh = init_device_mesh("cpu", (2,))
        snapshot = Snapshot.take(tmp_path / "a", {"s": StateDict(x=distribute_tensor(full, mesh, [Shard(0)]))})
        live = StateDict(x=_zeros([Shard(1)], mesh, full.to(torch.bfloat16)))
        with pytest.raises(RestoreMismatchError, match=r"'s/x' has dtype float32 in the snapshot and bfloat16 live; pass cast=True"):
            snapshot.restore({"s": live})
        found = []
        for atomic in (False, True):
            live["x"].to_local().zero_()
            report = snapshot.restore({"s": live}, cast=True, atomic=atomic)
            found += [_whole(live["x"]).tolist(), report.cast]
        return found

    assert [[full.tolist(), ("s/x",)] * 2] * 2 == worlds.results(2, work)


def test_a_shape_that_does_not_fit_is_named(tmp_path):
    def work(rank):
        mesh = init_device_mesh("cpu", (2,))
        snapshot = Snapshot.take(tmp_path / "a", {"m": torch.nn.Linear(3, 4)}, replicated=["**"])
        live = torch.nn.Linear(3, 5)
        live.weight = torch.nn.Parameter(distribute_tensor(live.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(RestoreMismatchError, match=r"'m/weight' has shape \(4, 3\) in the snapshot and \(5, 3\) live"):
            snapshot.restore({"m": live})

    worlds.results(2, work)


def test_what_one_process_has_taken_is_restored_by_many(tmp_path):
    Snapshot.take(tmp_path / "a", {"s": StateDict(x=FULL, y=3)})

    def work(rank):
        mesh = init_device_mesh("cpu", (2, 2))
        live = StateDict(x=_zeros([Shard(0), Shard(1)], mesh), y=0)
        Snapshot(tmp_path / "a").restore({"s": live})
        return torch.equal(FULL, _whole(live["x"])), live["y"]

    assert [(True, 3)] * 4 == worlds.results(4, work)


def test_each_rank_reads_only_what_it_needs(tmp_path):
    full = torch.arange(4_000_000).reshape(4000, 1000)

    def work(rank):
        mesh = init_device_mesh("cpu", (2,))
        x = distribute_tensor(full, mesh, [Shard(0)])
        snapshot = Snapshot.take(tmp_path / "a", {"s": StateDict(x=x)})
        seen = []
        live = StateDict(x=_zeros([Shard(0)], mesh, full))
        report = snapshot.restore({"s": live}, progress=lambda update: seen.append(update.done_bytes))
        return report.nbytes, max(seen)

    assert [(full.nbytes // 2, full.nbytes // 2)] * 2 == worlds.results(2, work)


def test_a_mesh_of_some_ranks_leaves_the_others_out(tmp_path):
    full = torch.arange(10.0)

    def work(rank):
        mesh = dist.device_mesh.DeviceMesh("cpu", [2, 0])
        local = {2: full[:5], 0: full[5:]}.get(rank, torch.empty(0))
        x = DTensor.from_local(local.clone(), mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride())
        snapshot = Snapshot.take(tmp_path / "a", {"s": StateDict(x=x)})
        local = torch.zeros(5 if rank != 1 else 0)
        live = StateDict(x=DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride()))
        snapshot.restore({"s": live})
        return local.tolist()

    assert [[5, 6, 7, 8, 9], [], [0, 1, 2, 3, 4]] == worlds.results(3, work)


def test_shards_that_ranks_outside_of_the_group_hold_are_missed(tmp_path):
    def work(rank):
        mesh = init_device_mesh("cpu", (3,))
        x = distribute_tensor(torch.arange(9.0), mesh, [Shard(0)])
        group = dist.new_group([0, 1])
        if rank < 2:
            Snapshot.take(tmp_path / "a", {"s": StateDict(x=x)}, pg=group)

    first, second, third = worlds.run(3, work)
    assert "entry 's/x' is not covered by its boxes" in str(first.error)
    assert "rank 0 failed" in str(second.error)
    assert third.error is None
    assert not (tmp_path / "a").exists()


def test_replicas_are_written_by_all_who_hold_them(tmp_path):
    full = torch.arange(4_000_000).reshape(4000, 1000)

    def work(rank):
        mesh = init_device_mesh("cpu", (2, 2))
        Snapshot.take(tmp_path / "a", {"s": StateDict(x=worlds.distribute(full, mesh, [Replicate(), Shard(0)]))})

    worlds.results(4, work)
    (entry,) = Snapshot(tmp_path / "a").entries("s/x")
    assert [(0, 0), (1000, 0), (2000, 0), (3000, 0)] == [box.starts for box in entry.boxes]
    assert 4 == len({box.file for box in entry.boxes})
