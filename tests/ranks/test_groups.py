"""Which ranks take together: a part of them, several groups at once, several takes at once, and what is done only once."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from expstate import Catalog, Snapshot, StateDict
from expstate.errors import InvalidArgumentError
from tests.ranks import worlds


def test_a_part_of_the_ranks(tmp_path):
    def work(rank):
        group = dist.new_group([1, 3])
        if rank not in {1, 3}:
            with pytest.raises(InvalidArgumentError, match="pg must be a process group"):
                Snapshot.take(tmp_path / "a", {"s": StateDict(x=rank)}, pg=group)
            return None
        snapshot = Snapshot.take(tmp_path / "a", {"s": StateDict(x=rank)}, pg=group)
        live = StateDict(x=-1)
        snapshot.restore({"s": live}, pg=group)
        opened = StateDict(x=-1)
        Snapshot(tmp_path / "a").restore({"s": opened}, pg=group)
        return snapshot.metadata.world_size, live["x"], opened["x"], snapshot.read_object("s/x", rank=1)

    assert [None, (2, 1, 1, 3), None, (2, 3, 3, 3)] == worlds.results(4, work)


def test_what_all_have_taken_is_restored_by_a_part(tmp_path):
    def work(rank):
        Snapshot.take(tmp_path / "a", {"s": StateDict(x=rank)})
        group = dist.new_group([2, 1])
        live = StateDict(x=-1)
        if rank:
            Snapshot(tmp_path / "a").restore({"s": live}, pg=group, strict=False)
        return live["x"]

    # In the group, rank 1 is the first and rank 2 the second.
    assert [-1, 0, 1] == worlds.results(3, work)


def test_groups_take_at_the_same_time(tmp_path):
    def work(rank):
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        mine = groups[rank // 2]
        pending = [
            Snapshot.async_take(tmp_path / f"{rank // 2}-{number}", {"s": StateDict(x=10 * number + rank)}, pg=mine) for number in range(3)
        ]
        everyone = Snapshot.take(tmp_path / "all", {"s": StateDict(x=rank)})
        taken = [one.wait() for one in pending]
        return everyone.metadata.world_size, [one.read_object("s/x", rank=rank % 2) for one in taken]

    assert [(4, [rank, 10 + rank, 20 + rank]) for rank in range(4)] == worlds.results(4, work)


def test_several_takes_are_in_flight(tmp_path):
    full = torch.arange(1_000_000)

    def work(rank):
        state = StateDict(x=full.clone(), own=rank)
        pending = []
        for number in range(4):
            state["x"].add_(1)
            pending.append(Snapshot.async_take(tmp_path / str(number), {"s": state}, replicated=["s/x"]))
        state["x"].zero_()
        taken = [one.wait() for one in reversed(pending)]
        return [int((one.read_object("s/x") - full).unique()) for one in taken], [one.read_object("s/own") for one in taken]

    assert [([4, 3, 2, 1], [rank] * 4) for rank in range(2)] == worlds.results(2, work)
    assert all(Snapshot(tmp_path / str(number)).verify().ok for number in range(4))


def test_async_takes_are_waited_for_until_the_commit(tmp_path):
    def work(rank):
        pending = Snapshot.async_take(tmp_path / "a", {"s": StateDict(x=torch.full((1000,), rank))})
        snapshot = pending.wait()
        assert (tmp_path / "a" / "snapshot.json").exists()
        assert pending.done()
        return snapshot.id, pending.id

    assert 1 == len({one for found in worlds.results(3, work) for one in found})


def test_one_record_goes_into_the_catalog(tmp_path):
    def work(rank):
        Snapshot.take(tmp_path / "a", {"s": StateDict(x=rank)}, name="together", catalog=tmp_path / "catalog.db")
        dist.barrier()
        Snapshot.async_take(tmp_path / "b", {"s": StateDict(x=rank)}, name="behind", catalog=tmp_path / "catalog.db").wait()

    worlds.results(3, work)
    catalog = Catalog(tmp_path / "catalog.db")
    records = list(catalog.search())
    catalog.close()
    assert ["behind", "together"] == sorted(record.name for record in records)
    assert [3, 3] == [record.world_size for record in records]


def test_many_takes_after_each_other_leave_nothing_in_the_store(tmp_path):
    def work(rank):
        store = dist.distributed_c10d._get_default_store()
        for number in range(3):
            Snapshot.take(tmp_path / str(number), {"s": StateDict(x=torch.arange(10), own=rank)}, replicated=["s/x"], overwrite=True)
        dist.barrier()
        before = store.num_keys()
        dist.barrier()
        for number in range(5):
            Snapshot.take(tmp_path / "again", {"s": StateDict(x=number, own=rank)}, overwrite=number > 0)
        dist.barrier()
        return store.num_keys() - before

    for more in worlds.results(2, work):
        assert more <= 2, "keys of the barriers"


def test_a_store_in_a_file_will_do(tmp_path):
    def work(rank):
        dist.destroy_process_group()
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2)
        pending = Snapshot.async_take(tmp_path / "a", {"s": StateDict(x=rank)})
        snapshot = Snapshot.take(tmp_path / "b", {"s": StateDict(x=rank)})
        return pending.wait().read_object("s/x"), snapshot.read_object("s/x")

    assert [(0, 0), (1, 1)] == worlds.results(2, work)


def test_overwriting_replaces_what_other_ranks_have_written(tmp_path):
    def first(rank):
        Snapshot.take(tmp_path / "a", {"s": StateDict(x=torch.full((1000,), rank))})

    worlds.results(3, first)

    def second(rank):
        snapshot = Snapshot.take(tmp_path / "a", {"s": StateDict(x=torch.full((1000,), 10 + rank))}, overwrite=True)
        return snapshot.read_object("s/x")[0].item()

    assert [10, 11] == worlds.results(2, second)
    snapshot = Snapshot(tmp_path / "a")
    assert {record.name for record in snapshot.manifest.files} | {"snapshot.json"} == {path.name for path in (tmp_path / "a").iterdir()}
    assert 2 == snapshot.metadata.world_size


def test_only_the_first_rank_shows_progress(tmp_path):
    def work(rank):
        seen = []
        Snapshot.take(tmp_path / "a", {"s": StateDict(x=torch.full((1000,), rank))}, progress=seen.append)
        return bool(seen)

    assert [True, False] == worlds.results(2, work)
