"""Snapshots that come back on more or fewer ranks: what each had of its own, and the random generators."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch

from expstate import RNGState, Snapshot, StateDict
from expstate.errors import RestoreMismatchError
from tests.ranks import worlds


def _take(folder, size):
    def work(rank):
        state = StateDict(own=rank, tensor=torch.full((2,), rank), alike="alike", whole=torch.arange(4))
        Snapshot.take(folder, {"s": state}, replicated=["s/whole"])

    worlds.results(size, work)
    return folder


def _live():
    return StateDict(own=-1, tensor=torch.full((2,), -1), alike="", whole=torch.zeros(4, dtype=torch.int64))


def _told(state):
    return state["own"], state["tensor"].tolist(), state["alike"], state["whole"].tolist()


def test_on_as_many_ranks_each_has_its_own(tmp_path):
    folder = _take(tmp_path / "a", 3)

    def work(rank):
        live = _live()
        Snapshot(folder).restore({"s": live})
        return _told(live)

    assert [(rank, [rank] * 2, "alike", [0, 1, 2, 3]) for rank in range(3)] == worlds.results(3, work)


def test_values_of_ranks_that_are_gone_are_an_error(tmp_path):
    folder = _take(tmp_path / "a", 3)

    def work(rank):
        live = _live()
        with pytest.raises(RestoreMismatchError, match=r"no rank 2 any more to take its values of 's/own', 's/tensor'; pass strict=False"):
            Snapshot(folder).restore({"s": live})
        assert _told(live) == (-1, [-1, -1], "", [0, 0, 0, 0])
        Snapshot(folder).restore({"s": live}, include=["s/alike", "s/whole"])
        assert _told(live) == (-1, [-1, -1], "alike", [0, 1, 2, 3])
        Snapshot(folder).restore({"s": live}, strict=False)
        return _told(live)

    assert [(rank, [rank] * 2, "alike", [0, 1, 2, 3]) for rank in range(2)] == worlds.results(2, work)
    with pytest.raises(RestoreMismatchError, match=r"there is no rank 1 to 2 any more"):
        Snapshot(folder).restore({"s": _live()})
    live = _live()
    Snapshot(folder).restore({"s": live}, strict=False)
    assert (0, [0, 0], "alike", [0, 1, 2, 3]) == _told(live)


def test_a_rank_that_was_not_there_is_told_what_it_lacks(tmp_path):
    folder = _take(tmp_path / "a", 2)

    def work(rank):
        live = _live()
        if rank == 2:
            with pytest.raises(RestoreMismatchError, match=r"rank 2 was not there .* nothing was taken for it of 's/own', 's/tensor'"):
                Snapshot(folder).restore({"s": live})
        else:
            Snapshot(folder).restore({"s": live})
        Snapshot(folder).restore({"s": live}, strict=False)
        return _told(live)

    expected = [(rank, [rank] * 2, "alike", [0, 1, 2, 3]) for rank in (0, 1, -1)]
    assert expected == worlds.results(3, work)


def test_what_one_process_has_taken_comes_back_on_every_rank(tmp_path):
    Snapshot.take(tmp_path / "a", {"s": StateDict(own=7, tensor=torch.full((2,), 7), alike="alike", whole=torch.arange(4))})

    def work(rank):
        live = _live()
        Snapshot(tmp_path / "a").restore({"s": live})
        return _told(live)

    assert [(7, [7, 7], "alike", [0, 1, 2, 3])] * 2 == worlds.results(2, work)


def _numbers():
    return random.random(), float(torch.rand(()))


def _take_generators(folder, size, seed_of):
    def work(rank):
        random.seed(seed_of(rank))
        torch.manual_seed(seed_of(rank))
        Snapshot.take(folder, {"rng": RNGState()})
        return _numbers()

    return worlds.results(size, work)


def _restore_generators(folder, size):
    def work(rank):
        random.seed(99)
        torch.manual_seed(99)
        report = Snapshot(folder).restore({"rng": RNGState()})
        assert report.keys == ("rng",)
        return _numbers()

    return worlds.results(size, work)


def test_each_rank_goes_on_with_its_own_random_numbers(tmp_path):
    expected = _take_generators(tmp_path / "a", 3, lambda rank: rank)
    assert expected == _restore_generators(tmp_path / "a", 3)
    # Those of ranks that are gone are dropped, without an error.
    assert expected[:2] == _restore_generators(tmp_path / "a", 2)
    assert expected[:1] == _restore_generators(tmp_path / "a", 1)


def test_new_ranks_get_random_numbers_of_their_own_that_are_always_the_same(tmp_path):
    expected = _take_generators(tmp_path / "a", 2, lambda rank: rank)
    once, again = _restore_generators(tmp_path / "a", 4), _restore_generators(tmp_path / "a", 4)
    assert expected == once[:2]
    assert once == again
    assert 4 == len(set(once))
    other = _take_generators(tmp_path / "b", 2, lambda rank: rank)
    assert expected == other
    assert not set(once[2:]) & set(_restore_generators(tmp_path / "b", 4)[2:])


def test_where_all_ranks_had_the_same_random_numbers_all_get_them(tmp_path):
    expected = _take_generators(tmp_path / "a", 2, lambda rank: 5)
    assert expected[:1] * 3 == _restore_generators(tmp_path / "a", 3)


@pytest.mark.parametrize("size", [1, 3])
def test_what_only_some_ranks_have_is_gone_or_lacking(tmp_path, size):
    def take(rank):
        Snapshot.take(tmp_path / "a", {"s": StateDict({"a": 1, "extra": 2} if rank else {"a": 1})})

    worlds.results(2, take)

    def restore(rank):
        live = StateDict(a=0)
        is_lacking = size == 1 or rank == 2
        with pytest.raises(RestoreMismatchError, match="'s/extra'") if is_lacking else contextlib.nullcontext():
            Snapshot(tmp_path / "a").restore({"s": live})
        Snapshot(tmp_path / "a").restore({"s": live}, strict=False)
        return sorted(live)

    assert [["a"], ["a", "extra"], ["a"]][:size] == worlds.results(size, restore)
