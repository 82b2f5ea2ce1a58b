"""``atomic=True`` changes nothing live before everything has been read and verified, whatever the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.errors import RestoreInterruptedError, SnapshotCorruptError
from expstate.format.manifest import TensorEntry
from tests.state.conftest import assert_same

from .conftest import Refusing, Watched, digest_of, is_equal, mlp, train

MIB = 2**20
BUDGETS = [2 * MIB, 256 * MIB]


def _values(fill: float) -> dict[str, Any]:
    return {
        "a": torch.full((MIB,), fill),
        "b": torch.full((100, 100), fill).t(),
        "array": np.full(300_000, fill),
        "last": torch.full((3,), fill),
        "plain": fill,
    }


def _damage(place: Path, snapshot: Snapshot, path: str) -> None:
    (entry,) = snapshot.entries(path)
    assert isinstance(entry, TensorEntry)
    file = place / snapshot.manifest.files[entry.boxes[0].file].name
    file.chmod(0o644)
    with file.open("r+b") as handle:
        handle.seek(entry.boxes[0].offset + entry.nbytes - 1)
        byte = handle.read(1)
        handle.seek(-1, 1)
        handle.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("budget", BUDGETS)
def test_everything_comes_back(place: Path, budget: int) -> None:
    """Held in memory or read twice, in place, models and optimizers and values."""
    model, live = mlp(1), mlp(2)
    optimizer, fresh = torch.optim.Adam(model.parameters()), torch.optim.Adam(live.parameters())
    train(model, optimizer)
    Snapshot.take(place, {"state": StateDict(_values(2.0)), "model": model, "optimizer": optimizer})
    state = StateDict(_values(0.0))
    kept = dict(state)
    Snapshot(place).restore({"state": state, "model": live, "optimizer": fresh}, atomic=True, memory_budget_bytes=budget)

    assert_same(_values(2.0)["array"], state["array"])
    assert digest_of(_values(2.0)) == digest_of(state.state_dict())
    assert all(kept[name] is state[name] for name in ("a", "b", "array", "last"))
    assert is_equal(model, live)
    assert_same(optimizer.state_dict(), fresh.state_dict())


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("damaged", ["state/a", "state/b", "state/array", "state/last", "optimizer/state/0/exp_avg", "model/0.weight"])
def test_damage_anywhere_changes_nothing(place: Path, damaged: str, budget: int) -> None:
    """Also where the damaged entry has no live counterpart yet. The error is of damage, not of an interruption."""
    model, live = mlp(1), mlp(2)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    snapshot = Snapshot.take(place, {"optimizer": optimizer, "model": model, "state": StateDict(_values(2.0))})
    _damage(place, snapshot, damaged)
    state, fresh = Watched(**_values(0.0)), torch.optim.Adam(live.parameters())
    before = digest_of(live.state_dict(), state.state, fresh.state_dict())
    with pytest.raises(SnapshotCorruptError, match=f"entry '{damaged}' is damaged"):
        snapshot.restore({"model": live, "state": state, "optimizer": fresh}, atomic=True, memory_budget_bytes=budget)

    assert before == digest_of(live.state_dict(), state.state, fresh.state_dict())
    assert [] == state.loads


def test_the_same_damage_without_atomic_is_an_interruption(place: Path) -> None:
    """What the tests above would see if nothing were read first."""
    snapshot = Snapshot.take(place, {"state": StateDict(_values(2.0))})
    _damage(place, snapshot, "state/last")
    state = StateDict(_values(0.0))
    before = digest_of(state.state_dict())
    with pytest.raises(RestoreInterruptedError, match="entry 'state/last' is damaged"):
        snapshot.restore({"state": state})

    assert before != digest_of(state.state_dict())


def test_damage_leaves_a_module_on_meta_there(place: Path) -> None:
    """No tensor of it is replaced before all have been verified."""
    snapshot = Snapshot.take(place, {"model": mlp(1)})
    _damage(place, snapshot, "model/3.bias")
    with torch.device("meta"):
        model = mlp(2)
    with pytest.raises(SnapshotCorruptError):
        snapshot.restore({"model": model}, atomic=True)

    assert {"meta"} == {tensor.device.type for tensor in model.state_dict().values()}


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_was_copied_is_reported_as_applied(place: Path, budget: int) -> None:
    """When a ``load_state_dict`` fails afterwards, tensors in place hold the snapshot's values, and the error says so."""
    snapshot = Snapshot.take(place, {"bad": Watched(x=torch.ones(2), y=1), "model": mlp(1)})
    bad, model = Refusing(x=torch.zeros(2), y=0), mlp(2)
    with pytest.raises(RestoreInterruptedError) as found:
        snapshot.restore({"bad": bad, "model": model}, atomic=True, memory_budget_bytes=budget)

    assert {"bad/x", *(f"model/{name}" for name in model.state_dict())} == set(found.value.applied)
    assert ("bad/y",) == found.value.unapplied
    assert is_equal(mlp(1), model)


def test_a_device_without_memory_left_changes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is asked for before anything live changes; what the allocator says is what the caller gets."""
    snapshot = Snapshot.take(place, {"model": mlp(1), "state": StateDict(x=torch.ones(8))})
    model, state = mlp(2), Watched()

    def full(*_: Any, **__: Any) -> Any:
        msg = "no memory left"
        raise torch.OutOfMemoryError(msg)

    monkeypatch.setattr("expstate.engine.restore.allocate", full)
    with pytest.raises(torch.OutOfMemoryError):
        snapshot.restore({"model": model, "state": state})

    assert is_equal(mlp(2), model)
    assert [] == state.loads


@pytest.mark.parametrize("atomic", [False, True])
def test_a_default_device_does_not_matter(place: Path, atomic: bool) -> None:
    """``torch.set_default_device`` decides where users' tensors are made, not what is read into host memory first."""
    taken, live = _values(1.0), _values(2.0)
    expected = digest_of(taken)
    state = StateDict(live, converted=torch.zeros(3, dtype=torch.float64), empty=np.zeros(0))
    with torch.device("meta"):
        Snapshot.take(place, {"state": StateDict(taken, converted=torch.ones(3, device="cpu"), empty=np.zeros(0))})
        Snapshot(place).restore({"state": state}, atomic=atomic, cast=True)

    assert [1.0] * 3 == state.pop("converted").tolist()
    assert 0 == len(state.pop("empty"))
    assert expected == digest_of(dict(state))
