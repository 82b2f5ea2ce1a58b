"""Tied weights are stored once and are tied again, and find their way to and from models that do not tie them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.errors import RestoreMismatchError

from .conftest import TiedModel


def _filled(model: TiedModel, value: float, other: float | None = None) -> TiedModel:
    with torch.no_grad():
        model.embedding.weight.fill_(value)
        model.head.weight.fill_(value if other is None else other)
    return model


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("live_tied", [True, False])
@pytest.mark.parametrize("taken_tied", [True, False])
def test_tied_and_untied_models_take_from_each_other(place: Path, taken_tied: bool, live_tied: bool, device: str) -> None:
    """Equal weights come back whichever side ties them, and the live model is tied afterwards exactly if it was before."""
    Snapshot.take(place, {"model": _filled(TiedModel(tied=taken_tied), 3.0)})
    live = TiedModel(tied=live_tied, device=device)
    Snapshot(place).restore({"model": live})

    assert torch.equal(torch.full((12, 6), 3.0), live.embedding.weight)
    assert torch.equal(torch.full((12, 6), 3.0), live.head.weight)
    assert live_tied == (live.head.weight is live.embedding.weight)
    assert live_tied == (live.head.weight.data_ptr() == live.embedding.weight.data_ptr())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_different_weights_do_not_fit_a_tied_model(place: Path, device: str) -> None:
    """One of them would be lost: an error that names both entries."""
    Snapshot.take(place, {"model": _filled(TiedModel(tied=False), 3.0, 4.0)})
    live = TiedModel(device=device)
    with pytest.raises(RestoreMismatchError, match=r"'model/embedding.weight' and 'model/head.weight' differ"):
        Snapshot(place).restore({"model": live})

    assert device == live.head.weight.device.type
    report = Snapshot(place).restore({"model": live}, exclude="model/head.weight")
    assert ("model/embedding.weight",) == report.restored
    assert 3.0 == live.head.weight[0, 0].item()


def test_training_goes_on_tied(place: Path) -> None:
    """After a restore one step changes both names of the weight alike."""
    Snapshot.take(place, {"model": _filled(TiedModel(), 0.5)})
    live = TiedModel()
    Snapshot(place).restore({"model": live})
    optimizer = torch.optim.SGD(live.parameters(), lr=0.1)
    live(torch.tensor([1, 2, 3])).square().sum().backward()
    optimizer.step()

    assert 1 == len(list(live.parameters()))
    assert torch.equal(live.embedding.weight, live.head.weight)
    assert 0.5 != live.head.weight[0, 0].item()


def test_a_tie_inside_a_statedict_is_one_tensor_again(taken: Any) -> None:
    """Under two names, in containers, and over something else."""
    weight = torch.randn(3, 2)
    snapshot = taken(a=weight, b=[weight, {"c": weight}], d=1)
    for live in (StateDict(), StateDict(a=torch.zeros(4), b=5)):
        snapshot.restore({"state": live})
        assert torch.equal(weight, live["a"])
        assert live["a"] is live["b"][0]
        assert live["a"] is live["b"][1]["c"]


def test_tied_entries_over_live_tensors_that_are_not(taken: Any) -> None:
    """Each live tensor keeps its own memory and gets the values."""
    weight = torch.randn(3, 2)
    live = StateDict(a=torch.zeros(3, 2), b=torch.zeros(3, 2))
    memory = live["a"].data_ptr(), live["b"].data_ptr()
    report = taken(a=weight, b=weight).restore({"state": live})

    assert torch.equal(weight, live["a"])
    assert torch.equal(weight, live["b"])
    assert memory == (live["a"].data_ptr(), live["b"].data_ptr())
    assert ("state/a", "state/b") == report.restored


def test_an_alias_alone_is_restored(taken: Any) -> None:
    """The name that holds no bytes of its own, by ``include``."""
    weight = torch.randn(3, 2)
    live = StateDict(a=torch.zeros(3, 2), b=torch.zeros(3, 2))
    taken(a=weight, b=weight).restore({"state": live}, include="state/b")

    assert torch.equal(weight, live["b"])
    assert 0 == live["a"].count_nonzero()


def test_half_a_tie_is_fresh(taken: Any) -> None:
    """With one name live and of another shape, the other gets a tensor of its own."""
    weight = torch.randn(3, 2)
    live = StateDict(a=torch.zeros(3, 2), b=torch.zeros(7))
    kept = live["a"]
    taken(a=weight, b=weight).restore({"state": live})

    assert kept is live["a"]
    assert torch.equal(weight, kept)
    assert torch.equal(weight, live["b"])
