"""What differs between two snapshots, by their digests alone."""

from __future__ import annotations

import collections
import enum
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.diff.report import SnapshotDiff
from expstate.errors import EntryNotFoundError, InvalidArgumentError

from .conftest import Take, Thing, TiedModel


def all_paths(diff: SnapshotDiff) -> dict[str, tuple[str, ...]]:
    return {"added": diff.added, "removed": diff.removed, "changed": diff.changed, "same": diff.same}


def test_entries_are_added_removed_changed_or_the_same(take: Take) -> None:
    old = take(kept=torch.ones(3), gone=torch.ones(4), other=torch.zeros(2), epoch=1)
    new = take(kept=torch.ones(3), come=torch.ones(5), other=torch.ones(2), epoch=1)
    diff = old.diff(new)

    assert ("state/come",) == diff.added
    assert ("state/gone",) == diff.removed
    assert ("state/other",) == diff.changed
    assert ("state/kept", "state/epoch") == diff.same
    assert {"added": 1, "removed": 1, "changed": 1, "same": 2} == diff.counts
    assert ("content",) == diff["state/other"].differs
    assert bool(diff)
    assert not diff.is_same


def test_no_tensor_is_read(take: Take, tmp_path: Path) -> None:
    """The data files may be gone, and large ones of many blocks too."""
    large = torch.zeros(70 * 2**20, dtype=torch.uint8)
    old = take(large=large, x=torch.ones(3))
    large[-1] = 1
    new = take(large=large, x=torch.ones(3))
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    diff = old.diff(new)

    assert ("state/large",) == diff.changed
    assert ("state/x",) == diff.same


def test_a_snapshot_is_the_same_as_itself_and_as_one_of_the_same_state(take: Take) -> None:
    values = {"w": torch.ones(3), "epoch": 1, "thing": {"a": [1, torch.zeros(2)]}}
    old, new = take(**values), take(**values)

    assert not old.diff(old)
    assert old.diff(new).is_same
    assert ("state/w", "state/epoch", "state/thing/a/0", "state/thing/a/1") == old.diff(new).same


def test_containers_are_no_entries_of_their_own_unless_empty(take: Take) -> None:
    """What is in them says enough; an empty one would be lost otherwise."""
    diff = take(x=1).diff(take(x=1, full={"a": torch.ones(1)}, empty={}, nested={"inner": {}}))

    assert ("state/full/a", "state/empty", "state/nested/inner") == diff.added
    assert "container" == diff["state/empty"].kind


@pytest.mark.parametrize(
    ("old", "new", "differs"),
    [
        (torch.zeros(4), torch.zeros(4, dtype=torch.int32), ("dtype",)),
        (torch.zeros(4), torch.zeros(2, 2), ("shape",)),
        (torch.zeros(4), torch.zeros(5, dtype=torch.float16), ("dtype", "shape")),
        (torch.zeros(4), torch.nn.Parameter(torch.zeros(4)), ("kind", "requires_grad")),
        (torch.zeros(4), np.zeros(4, np.float32), ("dtype", "kind")),
        (torch.zeros(4), torch.zeros(4, requires_grad=True), ("requires_grad",)),
        (torch.zeros(4), 0.0, ("kind",)),
        (torch.zeros(()), [torch.zeros(())], ("kind",)),
        (np.array(["a", "b"]), np.array(["a", "c"]), ("content",)),
        (torch.zeros(0, 3), torch.zeros(3, 0), ("shape",)),
    ],
)
def test_in_what_a_tensor_differs(take: Take, old: Any, new: Any, differs: tuple[str, ...]) -> None:
    assert differs == take(x=old).diff(take(x=new))["state/x"].differs


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (1, 2),
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        ("1", 1),
        ((1,), [1]),
        ([1, [2, True]], [1, [2, 1]]),
        (float("nan"), float("inf")),
        (2**70, 2**70 + 1),
        (b"a", bytearray(b"a")),
        (None, False),
    ],
)
def test_values_that_are_not_the_same(take: Take, old: Any, new: Any) -> None:
    """Of other types too, which Python holds for equal."""
    row = take(x=old).diff(take(x=new))["state/x"]

    assert ("changed", ("value",)) == (row.change, row.differs)
    assert (repr(old), repr(new)) == (repr(row.old.value), repr(row.new.value))


@pytest.mark.parametrize("value", [float("nan"), -0.0, 2**70, "a", b"a", (1, [2.5, None]), {1, 2}, torch.float16, 1 + 2j])
def test_values_that_are_the_same(take: Take, value: Any) -> None:
    assert take(x=value).diff(take(x=value)).is_same


def test_a_value_whose_class_is_not_here_is_shown_as_it_is_stored(take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("elsewhere")
    module.Mode = enum.Enum("Mode", ["A", "B"], module="elsewhere")
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    old, new = take(mode=module.Mode.A), take(mode=module.Mode.B)
    monkeypatch.delitem(sys.modules, "elsewhere")
    diff = old.diff(new)

    assert ("state/mode",) == diff.changed
    assert "'elsewhere', 'Mode', 'B'" in diff.summary()


def test_containers_whose_codec_or_metadata_changed(take: Take) -> None:
    x = torch.zeros(2)
    sparse = torch.eye(3).to_sparse()
    loose = torch.sparse_coo_tensor(sparse.indices(), sparse.values(), (3, 3), is_coalesced=False, check_invariants=True)
    old = take(codec=[x], limit=collections.deque([x], 4), key={1: x}, sparse=sparse)
    new = take(codec=(x,), limit=collections.deque([x], 5), key={"1": x}, sparse=loose)
    diff = old.diff(new)

    assert {"state/codec": ("codec",), "state/limit": ("metadata",), "state/key": ("metadata",), "state/sparse": ("metadata",)} == {
        row.entry: row.differs for row in diff.entries("changed")
    }
    assert "codec list -> tuple" in str(diff["state/codec"])


def test_items_that_come_and_go_do_not_change_their_container(take: Take) -> None:
    """A dict names keys that are no strings, and a module its parts: what is added says so itself."""
    old = take(steps={0: torch.zeros(1)}, none={})
    new = take(steps={0: torch.zeros(1), 1: torch.zeros(2)}, none={0: torch.zeros(3)})
    diff = old.diff(new)

    assert () == diff.changed
    assert ("state/steps/1", "state/none/0") == diff.added


def test_modules_that_grow_do_not_change_their_container(tmp_path: Path) -> None:
    one, two = torch.nn.Sequential(torch.nn.BatchNorm1d(3)), torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(4))
    old = Snapshot.take(tmp_path / "old", {"model": one})
    diff = old.diff(Snapshot.take(tmp_path / "new", {"model": two}))

    assert () == diff.changed
    assert 5 == len(diff.added) == len(diff.same)


def test_a_module_of_another_version_changes_its_container(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    old = Snapshot.take(tmp_path / "old", {"model": model})
    model[0]._version = 1
    diff = old.diff(Snapshot.take(tmp_path / "new", {"model": model}))

    assert ("model",) == diff.changed
    assert ("metadata",) == diff["model"].differs


def test_objects_are_compared_by_their_digests(take: Take) -> None:
    with pytest.warns(match="trust=True"):
        old, new = take(same=Thing(1), other=Thing(1), kind=Thing(1)), take(same=Thing(1), other=Thing(2), kind=print)
    diff = old.diff(new)

    assert ("state/same",) == diff.same
    assert ("content",) == diff["state/other"].differs
    assert ("class", "content") == diff["state/kind"].differs


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_parts_of_sparse_and_quantised_tensors_are_compared(take: Take) -> None:
    def values(x: float) -> dict[str, Any]:
        dense = torch.tensor([[0.0, x], [2.5, 0.0]])
        return {"coo": torch.tensor([[1.0, 0.0], [0.0, x]]).to_sparse(), "quantised": torch.quantize_per_tensor(dense, 0.5, 1, torch.qint8)}

    diff = take(**values(1.5)).diff(take(**values(3.5)))

    assert ("state/coo/values", "state/quantised/data") == diff.changed
    assert "state/coo/indices" in diff.same


@pytest.mark.parametrize("tied", [(True, False), (False, True), (True, True)])
def test_tied_and_stored_apart_is_the_same(tmp_path: Path, tied: tuple[bool, bool]) -> None:
    """The tensor behind an alias counts; that it is tied on one side is said all the same."""
    old, new = (Snapshot.take(tmp_path / str(number), {"model": TiedModel(tied=one)}) for number, one in enumerate(tied))
    diff = old.diff(new)
    row = diff["model/head.weight"]

    assert ("model/embedding.weight", "model/head.weight") == diff.same
    assert tuple("model/embedding.weight" if one else None for one in tied) == (row.old.tied_to, row.new.tied_to)


def test_a_changed_tensor_has_changed_under_all_its_names(tmp_path: Path) -> None:
    old = Snapshot.take(tmp_path / "old", {"model": TiedModel(tied=True)})
    model = TiedModel(tied=True)
    torch.nn.init.ones_(model.head.weight)
    diff = old.diff(Snapshot.take(tmp_path / "new", {"model": model}), stats=True)

    assert ("model/embedding.weight", "model/head.weight") == diff.changed
    assert 1.0 == diff["model/head.weight"].statistics.max_abs == diff["model/embedding.weight"].statistics.max_abs


def test_keys_and_their_classes_differ(tmp_path: Path) -> None:
    old = Snapshot.take(tmp_path / "old", {"a": StateDict(x=1), "b": StateDict(x=1)})
    new = Snapshot.take(tmp_path / "new", {"a": torch.nn.Linear(1, 1), "c": StateDict(x=1)})
    diff = old.diff(new)

    assert ("a/weight", "a/bias", "c/x") == diff.added
    assert ("a/x", "b/x") == diff.removed
    assert "class.a" in [fact.name for fact in diff.metadata]


def test_what_it_is_compared_with_is_refused_if_it_is_nothing(take: Take) -> None:
    with pytest.raises(InvalidArgumentError, match="got str; open it by Snapshot"):
        take(x=1).diff("run/step-1")
    with pytest.raises(InvalidArgumentError, match="app state has no keys"):
        take(x=1).diff({})
    with pytest.raises(TypeError, match="wrap plain values in StateDict"):
        take(x=1).diff({"state": {"x": 1}})
    with pytest.raises(MemoryError, match="at least"):
        take(x=1).diff({"state": StateDict(x=1)}, memory_budget_bytes=1)
    with pytest.raises(InvalidArgumentError, match="progress"):
        take(x=1).diff({"state": StateDict(x=1)}, progress="yes")


def test_entries_are_listed_in_the_order_of_the_newer_side(take: Take) -> None:
    diff = take(b=1, gone=2, a=torch.zeros(1)).diff(take(a=torch.ones(1), come=3, b=1))

    assert ["state/a", "state/come", "state/b", "state/gone"] == [row.entry for row in diff]
    assert ["changed", "added", "same", "removed"] == [row.change for row in diff.entries()]
    assert ["state/gone"] == [row.entry for row in diff.entries("removed")]


def test_what_is_not_in_the_comparison_is_not_found(take: Take) -> None:
    diff = take(x=1).diff(take(x=1))

    with pytest.raises(EntryNotFoundError, match="'state/y'"):
        diff["state/y"]
    with pytest.raises(InvalidArgumentError, match="one of added, removed, changed, same"):
        diff.entries("renamed")
