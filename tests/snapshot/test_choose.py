"""``include`` and ``exclude`` bring back parts of a state; the rest is not touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expstate import RNGState, Snapshot, StateDict
from expstate.errors import EntryNotFoundError, RestoreMismatchError
from tests.state.conftest import assert_same

from .conftest import Watched, digest_of, is_equal, mlp, train


def _differs(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "model/0.weight"}, {"0.weight"}),
        ({"include": "model/0.*"}, {"0.weight", "0.bias"}),
        ({"include": ["model/0.bias", "model/3.*"]}, {"0.bias", "3.weight", "3.bias"}),
        ({"include": ("*weight",), "exclude": "model/3.*"}, {"0.weight", "1.weight"}),
        ({"exclude": ["*running*", "*num_batches*", "model/0.*"]}, {"1.weight", "1.bias", "3.weight", "3.bias"}),
        ({"include": "model", "exclude": "model/[013].*"}, set()),
        ({"include": {"model/3.bias"}}, {"3.bias"}),
    ],
)
def test_parts_of_a_module(place: Path, options: dict[str, Any], expected: set[str]) -> None:
    """Single tensors and layers by globs, the rest stays as it is; no name is missed under ``strict``."""
    source = mlp(1)
    with torch.no_grad():
        for tensor in source.state_dict().values():
            tensor.add_(1)
    Snapshot.take(place, {"model": source})
    live = mlp(2)
    before = {name: value.clone() for name, value in live.state_dict().items()}
    report = Snapshot(place).restore({"model": live}, **options)

    assert expected == _differs(live, before)
    assert {f"model/{name}" for name in expected} == set(report.restored)
    assert all(torch.equal(source.state_dict()[name], live.state_dict()[name]) for name in expected)


@pytest.mark.parametrize("options", [{"include": "model/encoder.*"}, {"exclude": "optimizer/*"}, {"include": ["model/*", "nothing*"]}])
def test_a_glob_that_matches_nothing_is_an_error(place: Path, options: dict[str, Any]) -> None:
    """Each glob must match an entry of the keys in the app state; a typing error does not pass for a restore."""
    snapshot = Snapshot.take(place, {"model": mlp(1), "optimizer": StateDict(a=1)})
    live = mlp(2)
    with pytest.raises(EntryNotFoundError, match="matches no entry of 'model'"):
        snapshot.restore({"model": live}, **options)

    assert is_equal(mlp(2), live)


def test_statefuls_without_a_chosen_entry_are_left_alone(place: Path) -> None:
    """Their ``load_state_dict`` is not called, random generators go on, and the report does not name them."""
    Snapshot.take(place, {"model": mlp(1), "own": Watched(a=torch.ones(1)), "rng": RNGState()})
    own, expected = Watched(a=torch.zeros(1)), torch.rand(3)
    torch.manual_seed(0)
    report = Snapshot(place).restore({"own": own, "rng": RNGState(), "model": mlp(2)}, include="model/0.*")

    assert [] == own.loads
    assert torch.equal(expected, torch.rand(3))
    assert ("model",) == report.keys


def test_everything_excluded_is_nothing_restored(place: Path) -> None:
    """Excluding all is allowed, and does nothing."""
    snapshot = Snapshot.take(place, {"own": Watched(a=torch.ones(1))})
    own = Watched(a=torch.zeros(1))
    report = snapshot.restore({"own": own}, exclude="own")

    assert ((), (), []) == (report.keys, report.restored, own.loads)


def test_parts_of_nested_values(taken: Any) -> None:
    """Items of dicts and lists at any depth; what is beside them stays, the very same objects."""
    snapshot = taken(a={"x": torch.ones(2), "y": {"z": 1, "w": [1, 2]}}, b=[torch.ones(1), {"c": 1}, 3], d=4)
    beside, tensor = torch.zeros(3), torch.zeros(2)
    live = StateDict(a={"x": tensor, "y": {"z": 0, "w": "live", "new": beside}}, b=[torch.zeros(1), {"c": 0, "k": 9}, 0], d=0, e=0)
    report = snapshot.restore({"state": live}, include=["state/a/x", "state/a/y/z", "state/b/1/*", "state/b/2"])

    assert_same(
        {"a": {"x": torch.ones(2), "y": {"z": 1, "w": "live", "new": beside}}, "b": [torch.zeros(1), {"c": 1, "k": 9}, 3], "d": 0, "e": 0},
        live.state_dict(),
    )
    assert tensor is live["a"]["x"]
    assert beside is live["a"]["y"]["new"]
    assert ("state/a/x", "state/a/y/z", "state/b/1/c", "state/b/2") == report.restored


def test_a_container_brings_all_that_is_in_it(taken: Any) -> None:
    """A glob that matches a dict or a list is for its items too, and what is new below it is made."""
    live = StateDict(keep=1)
    taken(a={"x": [1, {"y": torch.ones(2)}]}, keep=2).restore({"state": live}, include="state/a")

    assert_same({"keep": 1, "a": {"x": [1, {"y": torch.ones(2)}]}}, live.state_dict())


def test_items_with_keys_that_are_no_strings(taken: Any) -> None:
    """Of a dict with int keys one item comes, to a dict that has others or none yet."""
    snapshot = taken(by_number={0: torch.zeros(1), 1: torch.ones(1), "1": "text", (2, 3): 5})
    some, none = StateDict(by_number={7: "live", 0: torch.full((1,), 4.0)}), StateDict(by_number={})
    for live in (some, none):
        snapshot.restore({"state": live}, include=["state/by_number/1%int", "state/by_number/(2, 3)"])

    assert_same({7: "live", 0: torch.full((1,), 4.0), 1: torch.ones(1), (2, 3): 5}, some["by_number"])
    assert_same({1: torch.ones(1), (2, 3): 5}, none["by_number"])


def test_ordered_and_default_dicts_in_part(taken: Any) -> None:
    """Their kind and their order stay."""
    from collections import OrderedDict, defaultdict

    snapshot = taken(ordered=OrderedDict(b=1, a=2), default=defaultdict(list, x=[1], y=[2]))
    live = StateDict(ordered=OrderedDict(a=0, c=0), default=defaultdict(list, z=[0]))
    snapshot.restore({"state": live}, include=["state/ordered/a", "state/default/y"])

    assert_same(OrderedDict(a=2, c=0), live["ordered"])
    assert_same(defaultdict(list, z=[0], y=[2]), live["default"])
    assert list is live["default"].default_factory


def test_items_are_added_at_the_end_of_a_list(taken: Any) -> None:
    """The next item of a live list that is shorter can be brought alone."""
    live = StateDict(items=["live"])
    taken(items=[1, torch.ones(1), 3]).restore({"state": live}, include="state/items/1")

    assert_same(["live", torch.ones(1)], live["items"])


IMPOSSIBLE = [
    ({"items": [1, torch.ones(1), 3]}, {"items": []}, "state/items/1", "item 0 would be missing"),
    ({"items": [1, torch.ones(1), 3]}, {}, "state/items/1", "item 0 would be missing"),
    ({"items": [1, {}, 3]}, {"items": 5}, "state/items/0", "a list and live a int, cannot be restored in part"),
    ({"items": {"a": 1, "b": torch.ones(1)}}, {"items": [torch.zeros(1)]}, "state/items/b", "a dict and live a list"),
    ({"items": {1: {}, 2: 3}}, {"items": {"1": {}}}, "state/items/1", "key '1' is of another type"),
    (
        {"items": {frozenset({b"x" * 70_000}), 1}},
        {"items": {frozenset({b"y" * 70_000}), 1}},
        "state/items/0",
        "members of a set have no places",
    ),
]


@pytest.mark.parametrize(("stored", "now", "include", "words"), IMPOSSIBLE)
def test_parts_that_have_no_place_are_refused_beforehand(
    taken: Any, stored: dict[str, Any], now: dict[str, Any], include: str, words: str
) -> None:
    """A list would have a hole, a dict is a list now: an error that names the entry, and nothing has changed."""
    live = Watched(beside=torch.zeros(2), **now)
    before = digest_of(live.state)
    with pytest.raises(RestoreMismatchError, match=words):
        taken(beside=torch.ones(2), **stored).restore({"state": live}, include=[include, "state/beside"])

    assert before == digest_of(live.state)
    assert [] == live.loads


def test_objects_of_several_parts_come_as_a_whole(taken: Any) -> None:
    """One part of a sparse tensor or a data frame brings all of it."""
    import pandas as pd

    frame = pd.DataFrame({"x": [1.0, 2.0], "y": ["a", "b"]})
    snapshot = taken(sparse=torch.eye(3).to_sparse(), frame=frame, other=1)
    live = StateDict(sparse=torch.zeros(3, 3).to_sparse(), frame=None, other=0)
    part = next(entry.path for entry in snapshot.entries("state/frame/*"))
    snapshot.restore({"state": live}, include=["state/sparse/values", part])

    assert torch.equal(torch.eye(3), live["sparse"].to_dense())
    assert_same(frame, live["frame"])
    assert 0 == live["other"]


# Optimizers


@pytest.mark.parametrize("has_state", [True, False])
def test_the_state_of_one_parameter(place: Path, has_state: bool) -> None:
    """Moments of one parameter come back alone, into an optimizer with a state and into a fresh one."""
    model, other = mlp(1), mlp(2)
    optimizer, live = torch.optim.Adam(model.parameters()), torch.optim.Adam(other.parameters(), lr=0.5)
    train(model, optimizer)
    if has_state:
        train(other, live, seed=5)
    before = {number: dict(state) for number, state in live.state_dict()["state"].items()}
    Snapshot.take(place, {"optimizer": optimizer})
    Snapshot(place).restore({"optimizer": live}, include="optimizer/state/2/*")
    found = live.state_dict()

    assert_same(optimizer.state_dict()["state"][2], found["state"][2])
    assert {*before, 2} == set(found["state"])
    assert all(digest_of(before[number]) == digest_of(found["state"][number]) for number in before if number != 2)
    assert 0.5 == found["param_groups"][0]["lr"]


def test_the_learning_rate_alone(place: Path) -> None:
    """Options of a group without the moments."""
    model = mlp(1)
    optimizer, live = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.9), torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.1)
    Snapshot.take(place, {"optimizer": optimizer})
    Snapshot(place).restore({"optimizer": live}, include="optimizer/param_groups/0/lr")

    assert (0.25, 0.1) == (live.param_groups[0]["lr"], live.param_groups[0]["momentum"])


def test_moments_without_options(place: Path) -> None:
    """``exclude`` keeps the live learning rate and brings the rest."""
    model = mlp(1)
    optimizer, live = torch.optim.Adam(model.parameters(), lr=0.25), torch.optim.Adam(model.parameters(), lr=0.5)
    train(model, optimizer)
    Snapshot.take(place, {"optimizer": optimizer})
    Snapshot(place).restore({"optimizer": live}, exclude="*/lr")

    assert 0.5 == live.param_groups[0]["lr"]
    assert_same(optimizer.state_dict()["state"], live.state_dict()["state"])


def test_arrays_beside_what_is_chosen_are_the_same_objects(taken: Any) -> None:
    """NumPy arrays that are not chosen are neither copied nor replaced."""
    array = np.zeros(3)
    live = StateDict(a=array, b=0)
    taken(a=np.ones(3), b=1).restore({"state": live}, include="state/b")

    assert array is live["a"]
    assert not array.any()
    assert 1 == live["b"]
