"""Objects that only pickle can store: told at the take, refused at the restore, and back with ``trust=True``."""

from __future__ import annotations

import sys
import warnings
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.errors import NeedsTrustWarning, PickleNotAllowedError, SnapshotCorruptError, UnknownClassError
from expstate.state.objects import safe_mode_holds

from .conftest import Watched, is_equal, mlp


class Schedule:
    """An object with a state of its own."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and other.steps == self.steps

    __hash__ = None  # type: ignore[assignment]


@pytest.fixture
def snapshot(place: Path) -> Snapshot:
    """Two objects that need trust, and a tensor between them."""
    with pytest.warns(NeedsTrustWarning):
        Snapshot.take(place, {"state": StateDict(one=Schedule([1, 2]), tensor=torch.ones(2), two=[Schedule([3])]), "model": mlp(1)})
    return Snapshot(place)


def test_the_take_warns_with_all_names(place: Path) -> None:
    """Up to five are named with the reason, the number of the others is given."""
    with pytest.warns(NeedsTrustWarning) as found:
        Snapshot.take(place, {"state": StateDict({f"n{index}": Schedule([index]) for index in range(8)})})

    assert 1 == len(found)
    assert f"'state/n0' ({'it holds tests.snapshot.test_objects.Schedule' if safe_mode_holds() else 'torch '}" in str(found[0].message)
    assert "and 3 more" in str(found[0].message)


def test_an_async_take_warns_too(place: Path) -> None:
    """When it returns, and not from the background."""
    with pytest.warns(NeedsTrustWarning) as found:
        pending = Snapshot.async_take(place, {"state": StateDict(one=Schedule([1]))})
    pending.wait()

    assert [__file__] == [warning.filename for warning in found]


def test_the_manifest_says_which_entries_need_trust(snapshot: Snapshot) -> None:
    """So that it can be seen without reading them."""
    found = {entry.path: entry.needs_trust for entry in snapshot.entries() if hasattr(entry, "needs_trust")}

    assert {"state/one": True, "state/two/0": True} == found


def test_a_restore_refuses_all_of_them_at_once(snapshot: Snapshot) -> None:
    """Naming each; nothing else has been restored."""
    state, model = Watched(tensor=torch.zeros(2)), mlp(2)
    with pytest.raises(PickleNotAllowedError, match=r"'state/one' .*trust=True.*'state/two/0'"):
        snapshot.restore({"state": state, "model": model})

    assert [] == state.loads
    assert 0 == state.state["tensor"].count_nonzero()
    assert is_equal(mlp(2), model)


def test_trust_brings_them_back(snapshot: Snapshot) -> None:
    """By a restore, by reading the key and by reading one."""
    state = StateDict()
    snapshot.restore({"state": state}, trust=True)

    assert (Schedule([1, 2]), [Schedule([3])]) == (state["one"], state["two"])
    assert Schedule([3]) == snapshot.get_state_dict_for_key("state", trust=True)["two"][0]
    assert Schedule([1, 2]) == snapshot.read_object("state/one", trust=True)


@pytest.mark.parametrize("path", ["state", "state/one", "state/two"])
def test_reading_refuses_them(snapshot: Snapshot, path: str) -> None:
    """Alone and in what they are part of."""
    with pytest.raises(PickleNotAllowedError, match="needs trust=True"):
        snapshot.read_object(path)


def test_others_are_read_without_trust(snapshot: Snapshot) -> None:
    """An object in the same key does not keep its neighbours from being read or restored."""
    state = StateDict()
    snapshot.restore({"state": state}, include="state/tensor")

    assert torch.equal(torch.ones(2), state["tensor"])
    assert torch.equal(torch.ones(2), snapshot.read_object("state/tensor"))


def test_no_code_of_the_snapshot_runs_without_trust(place: Path, tmp_path: Path) -> None:
    """A pickle that writes a file when it is loaded writes none, on any path that reads it; with trust it would."""

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NeedsTrustWarning)
        snapshot = Snapshot.take(place, {"state": StateDict(evil=Evil())})
    for read in (
        lambda: snapshot.read_object("state/evil"),
        lambda: snapshot.get_state_dict_for_key("state"),
        lambda: snapshot.restore({"state": StateDict()}),
        lambda: snapshot.restore({"state": StateDict()}, dry_run=True),
    ):
        with pytest.raises(PickleNotAllowedError):
            read()
    assert snapshot.verify().ok
    assert not (tmp_path / "ran").exists()
    snapshot.read_object("state/evil", trust=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.skipif(not safe_mode_holds(), reason="this torch reads no pickled object without trust")
def test_objects_of_allowed_classes_need_no_trust(place: Path) -> None:
    """What torch's safe loader knows, or was told of, comes back without it and without a warning."""
    values = {"allowed": Schedule([5]), "jagged": deque([1, 2])}
    with torch.serialization.safe_globals([Schedule]):
        Snapshot.take(place, {"state": StateDict(values)})
        state = StateDict()
        Snapshot(place).restore({"state": state})
    assert values == dict(state)
    with pytest.raises(PickleNotAllowedError, match="Schedule"):
        Snapshot(place).read_object("state/allowed")


def test_an_object_of_a_class_that_is_gone(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    """With trust and without its class: an error that names the class, before anything changes."""
    monkeypatch.delattr(sys.modules[__name__], "Schedule")
    state = Watched(tensor=torch.zeros(2))
    with pytest.raises(UnknownClassError, match="Schedule"):
        snapshot.restore({"state": state}, trust=True)

    assert [] == state.loads


def test_damaged_objects_are_never_unpickled(snapshot: Snapshot, place: Path) -> None:
    """Their digest is checked even with ``verify=False``."""
    (file,) = place.glob("state.objects-*.safetensors")
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(SnapshotCorruptError, match="is damaged"):
        snapshot.restore({"state": StateDict()}, trust=True, verify=False)


def test_tensors_inside_objects_come_back(place: Path) -> None:
    """An object that holds tensors is stored by torch, and they are equal."""
    with pytest.warns(NeedsTrustWarning):
        Snapshot.take(place, {"state": StateDict(o=Schedule([torch.arange(3)]))})  # type: ignore[list-item]

    assert torch.equal(torch.arange(3), Snapshot(place).read_object("state/o", trust=True).steps[0])
