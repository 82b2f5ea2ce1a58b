"""Values on ranks: what is each one's own, what all have alike, and how either is reached."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from expstate import Snapshot, StateDict
from expstate.errors import AppStateError, InvalidArgumentError, RankFailedError
from expstate.format.manifest import TensorEntry
from tests.ranks import worlds


class Thing:
    """What only pickle can store."""

    def __init__(self, number: int) -> None:
        self.number = number


def test_each_rank_s_own_values_come_back_on_it(tmp_path):
    def work(rank):
        own = StateDict(
            tensor=torch.full((3,), float(rank)),
            number=torch.tensor(rank),
            empty=torch.empty(rank, 0),
            array=np.arange(rank + 1),
            value=rank,
            text="alike",
            object={rank, "set"},
            inner={f"of rank {rank}": [torch.full((2,), rank)]},
        )
        snapshot = Snapshot.take(tmp_path / "a", {"own": own})
        live = StateDict(own.data, tensor=torch.zeros(3), value=-1)
        snapshot.restore({"own": live})
        for path, other in (("value", 1 - rank), ("object", {1 - rank, "set"})):
            assert snapshot.read_object(f"own/{path}", rank=1 - rank) == other
        assert live["tensor"].tolist() == [rank] * 3
        assert {"own/inner", "own/inner/of rank 1"} <= {entry.path for entry in snapshot.entries(rank=1)}
        state = snapshot.get_state_dict_for_key("own")
        return (state["number"].item(), state["array"].tolist(), live["value"], state["empty"].shape, list(state["inner"]))

    for rank, found in enumerate(worlds.results(2, work)):
        assert (rank, list(range(rank + 1)), rank, (rank, 0), [f"of rank {rank}"]) == found
    snapshot = Snapshot(tmp_path / "a")
    assert 2 == snapshot.metadata.world_size
    assert [0, 1, None] == [entry.rank for entry in snapshot.manifest.entries if entry.path in {"own/value", "own/text"}]
    # One process sees the first rank's, unless it names another.
    assert 0 == snapshot.read_object("own/value")
    assert [1, 1, 1] == snapshot.read_object("own/tensor", rank=1).tolist()
    assert [1, 1] == snapshot.get_state_dict_for_key("own", rank=1)["inner"]["of rank 1"][0].tolist()
    with pytest.raises(InvalidArgumentError, match="rank must be one of the 2 that took the snapshot, got 2"):
        snapshot.read_object("own/value", rank=2)
    assert snapshot.verify().ok


def test_what_matches_a_glob_is_written_once_by_both(tmp_path):
    full = torch.arange(3_000_000)

    def work(rank):
        state = StateDict(large=full, small=full[:5], number=torch.tensor(3), empty=torch.empty(0, 4), array=np.arange(5), step=7)
        snapshot = Snapshot.take(
            tmp_path / "a", {"s": state, "own": StateDict(x=torch.ones(1))}, replicated=["s/**"], check_replicated=True
        )
        live = StateDict(
            {name: torch.zeros_like(value) for name, value in state.items() if isinstance(value, torch.Tensor)}, array=None, step=0
        )
        snapshot.restore({"s": live})
        return torch.equal(full, live["large"]), live["array"].tolist(), live["step"], live["empty"].shape, live["number"].item()

    assert [(True, [0, 1, 2, 3, 4], 7, (0, 4), 3)] * 2 == worlds.results(2, work)
    snapshot = Snapshot(tmp_path / "a")
    assert {None} == {entry.rank for entry in snapshot.entries("s/**")}
    written = [sum(path.stat().st_size for path in (tmp_path / "a").glob(f"*-r0000{rank}-*")) for rank in range(2)]
    assert [0, 1] == [entry.rank for entry in snapshot.manifest.entries if entry.path == "own/x"]
    large = snapshot.entries("s/large")[0]
    assert isinstance(large, TensorEntry)
    assert 2 == len(large.boxes)
    assert all(0.45 <= nbytes / sum(written) <= 0.55 for nbytes in written)
    assert torch.equal(full[1_400_000:1_600_000], snapshot.read_object("s/large", rows=slice(1_400_000, 1_600_000)))
    assert snapshot.verify().ok


def _refused(tmp_path, state_of, match, **options):
    """The take is refused on the first rank by an error of its own, elsewhere by the news of it; nothing is left."""

    def work(rank):
        Snapshot.take(tmp_path / "a", {"s": StateDict(state_of(rank))}, replicated=["**"], **options)

    first, *others = worlds.errors(3, work)
    assert isinstance(first, AppStateError)
    for error in (first, *others):
        with pytest.raises(type(error), match=match):
            raise error
    assert all(isinstance(error, RankFailedError) and error.rank == 0 for error in others)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("value", [torch.ones(3), np.ones(3)], ids=["tensor", "array"])
def test_an_entry_that_one_rank_lacks_is_named(tmp_path, value):
    def state(rank):
        return {"x": torch.ones(2), "y": value} if rank != 1 else {"x": torch.ones(2)}

    _refused(tmp_path, state, r"entry 's/y' should be the same on all ranks: rank 0 has it, rank 1 has not")


@pytest.mark.filterwarnings("ignore::expstate.errors.NeedsTrustWarning")
@pytest.mark.parametrize("lacking", [0, 1])
def test_an_object_that_one_rank_lacks_is_named(tmp_path, lacking):
    def state(rank):
        return {"x": 1} if rank == lacking else {"x": 1, "y": Thing(1)}

    _refused(tmp_path, state, rf"entry 's/y' should be the same on all ranks: rank {1 - lacking} has it, rank {lacking} has not")


def test_another_shape_or_dtype_is_named(tmp_path):
    _refused(
        tmp_path,
        lambda rank: {"x": torch.ones(2, dtype=torch.float64 if rank == 2 else torch.float32)},
        r"entry 's/x' should be the same on all ranks: it is float32 \(2,\) .*on rank 0, and float64 \(2,\) .*on rank 2",
    )


def test_a_value_that_differs_is_named_when_asked(tmp_path):
    def state(rank):
        x = torch.zeros(1000)
        x[777] = rank % 2
        return {"w": torch.ones(3), "x": x}

    _refused(
        tmp_path,
        state,
        r"entry 's/x' should be the same on all ranks: its values on rank 0 are not those on ranks \[1\]",
        check_replicated=True,
    )


def test_an_array_that_differs_is_named_when_asked(tmp_path):
    _refused(
        tmp_path,
        lambda rank: {"x": np.array([rank // 2])},
        r"entry 's/x' .* its values on rank 0 are not those on ranks \[2\]",
        check_replicated=True,
    )


def test_plain_values_that_differ_are_named_when_asked(tmp_path):
    _refused(
        tmp_path, lambda rank: {"x": rank}, r"entry 's/x' .* its values on rank 0 are not those on ranks \[1, 2\]", check_replicated=True
    )


def test_values_are_believed_when_not_asked(tmp_path):
    def work(rank):
        snapshot = Snapshot.take(tmp_path / "a", {"s": StateDict(x=torch.full((3,), rank))}, replicated=["s/x"])
        return snapshot.read_object("s/x").tolist()

    one, other = worlds.results(2, work)
    assert one == other


@pytest.mark.filterwarnings("ignore::expstate.errors.NeedsTrustWarning")
def test_objects_of_all_are_written_by_the_first_alone(tmp_path):
    def work(rank):
        state = StateDict(alike=Thing(rank), own=Thing(rank))
        snapshot = Snapshot.take(tmp_path / "a", {"s": state}, replicated=["s/alike"])
        return snapshot.read_object("s/alike", trust=True).number, snapshot.read_object("s/own", trust=True).number

    assert [(0, 0), (0, 1)] == worlds.results(2, work)


def test_tied_tensors_stay_tied(tmp_path):
    def work(rank):
        x = torch.arange(4.0) + rank
        y = torch.arange(4.0)
        snapshot = Snapshot.take(
            tmp_path / "a", {"own": StateDict(one=x, other=x), "all": StateDict(one=y, other=y)}, replicated=["all/**"]
        )
        own, alike = snapshot.get_state_dict_for_key("own"), snapshot.get_state_dict_for_key("all")
        assert own["one"] is own["other"]
        assert alike["one"] is alike["other"]
        return own["one"].tolist(), alike["one"].tolist()

    assert [([rank, rank + 1, rank + 2, rank + 3], [0, 1, 2, 3]) for rank in range(2)] == worlds.results(2, work)
    assert [0, 1, None] == [entry.rank for entry in Snapshot(tmp_path / "a").manifest.entries if entry.path.endswith("/other")]


def test_dicts_in_another_order_are_the_same(tmp_path):
    def work(rank):
        items = {"large": torch.arange(1_000_000), "small": torch.ones(3), "number": torch.tensor(1)}
        state = StateDict(dict(items if rank else reversed(items.items())))
        snapshot = Snapshot.take(tmp_path / "a", {"s": state}, replicated=["s/**"], check_replicated=True)
        return [torch.equal(value, snapshot.read_object(f"s/{name}")) for name, value in items.items()]

    assert [[True] * 3] * 2 == worlds.results(2, work)


def test_keys_in_another_order_or_type_of_container_stay_each_rank_s(tmp_path):
    def work(rank):
        state = {"a": 1, "b": torch.full((2,), rank)} if rank else [torch.full((2,), rank), 1]
        snapshot = Snapshot.take(tmp_path / "a", {"s": StateDict(inner=state)})
        dist.barrier()
        return snapshot.read_object("s/inner", rank=0), snapshot.read_object("s/inner", rank=1)

    for one, other in worlds.results(2, work):
        assert ([0, 0], 1) == (one[0].tolist(), one[1])
        assert ([1, 1], 1) == (other["b"].tolist(), other["a"])


def test_a_take_of_one_process_among_many_is_its_own(tmp_path):
    """A group of one rank has nobody to agree with."""

    def work(rank):
        groups = [dist.new_group([number]) for number in range(2)]
        snapshot = Snapshot.take(tmp_path / str(rank), {"s": StateDict(x=rank)}, pg=groups[rank])
        return snapshot.metadata.world_size, snapshot.read_object("s/x")

    assert [(1, 0), (1, 1)] == worlds.results(2, work)
