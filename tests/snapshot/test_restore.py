"""A restore puts back what was taken, into the objects that live, and leaves alone what it is not asked for."""

from __future__ import annotations

import enum
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from expstate import RNGState, Snapshot, StateDict
from tests.state.conftest import assert_same

from .conftest import Watched, digest_of, is_equal, mlp, train


class Phase(enum.Enum):
    """An enum of this module."""

    WARM = "warm"
    COLD = "cold"


class Batch(NamedTuple):
    """A namedtuple of this module."""

    inputs: Any
    size: int


def test_model_and_optimizer_come_back(place: Path) -> None:
    """Into fresh objects: the same values, and the optimizer's state that they did not have yet."""
    model = mlp(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer)
    Snapshot.take(place, {"model": model, "optimizer": optimizer})
    other = mlp(2)
    fresh = torch.optim.AdamW(other.parameters())
    report = Snapshot(place).restore({"model": other, "optimizer": fresh})

    assert is_equal(model, other)
    assert_same(optimizer.state_dict(), fresh.state_dict())
    assert ("model", "optimizer") == report.keys
    assert 0.01 == fresh.param_groups[0]["lr"]
    assert Snapshot(place).nbytes == report.nbytes


def test_some_of_the_keys_are_enough(place: Path) -> None:
    """Keys that are not in the app state are not read; the order does not matter."""
    Snapshot.take(place, {"a": StateDict(x=1), "model": mlp(1), "b": StateDict(x=torch.ones(2))})
    model, b = mlp(2), StateDict()
    report = Snapshot(place).restore({"b": b, "model": model})

    assert is_equal(mlp(1), model)
    assert_same({"x": torch.ones(2)}, b.state_dict())
    assert ("b", "model") == report.keys


def test_files_of_other_keys_may_be_missing(place: Path) -> None:
    """Only the files that a restore needs are opened."""
    Snapshot.take(place, {"a": mlp(1), "b": mlp(2)})
    next(place.glob("b-*.safetensors")).unlink()
    model = mlp(3)
    Snapshot(place).restore({"a": model})

    assert is_equal(mlp(1), model)


def test_restored_is_a_list_of_entry_paths(place: Path) -> None:
    """Every leaf is named, by the names that ``entries`` has; containers are not."""
    snapshot = Snapshot.take(place, {"state": StateDict(a=[1, torch.ones(1)], b={"c": np.ones(2)})})

    assert ("state/a/0", "state/a/1", "state/b/c") == snapshot.restore({"state": StateDict()}).restored


# Structure


def test_the_structure_of_the_snapshot_is_rebuilt(taken: Any) -> None:
    """What is live and not in the snapshot goes, what is missing comes, whatever was there before."""
    kept = torch.zeros(3)
    live = StateDict(gone=1, tensor=kept, other=[1, 2, 3], nested={"x": torch.zeros(2), "y": 0})
    taken(new={"deep": [torch.ones(2)]}, tensor=torch.ones(3), other={"a": 1}, nested=[torch.ones(2)]).restore({"state": live})

    assert_same(
        {"new": {"deep": [torch.ones(2)]}, "tensor": torch.ones(3), "other": {"a": 1}, "nested": [torch.ones(2)]}, live.state_dict()
    )
    assert kept is live["tensor"]


def test_tensors_of_another_shape_are_replaced_outside_modules(taken: Any) -> None:
    """A history that has grown since is not a problem in a ``StateDict``."""
    live = StateDict(history=torch.zeros(7))
    taken(history=torch.arange(3.0)).restore({"state": live})

    assert_same(torch.arange(3.0), live["history"])


KEYS = {
    "plain": 1,
    "a/b": torch.ones(1),
    "100%": [1],
    "%2F": 2,
    "": 3,
    1: torch.zeros(1),
    "1": 4,
    (1, "x"): {"deep": torch.ones(2)},
    None: 6,
    2.5: 7,
    b"raw": 8,
    Phase.WARM: 9,
    frozenset({1}): 10,
}


def test_keys_of_every_kind_come_back(place: Path) -> None:
    """Ints, bools, tuples and keys with ``/`` and ``%`` keep type, order and value."""
    keys = {**KEYS, False: 5, "False": 6}
    Snapshot.take(place, {"state": Watched(of=keys), "a/b%": StateDict(x=1)})
    live, other = Watched(), StateDict()
    Snapshot(place).restore({"state": live, "a/b%": other})

    assert_same(keys, live.state["of"])
    assert 1 == other["x"]


def test_containers_keep_their_classes(taken: Any) -> None:
    """Enums and namedtuples of this process, ordered and default dicts, sets, tuples."""
    values = {
        "phase": Phase.COLD,
        "batch": Batch(torch.ones(2), 3),
        "ordered": OrderedDict(b=1, a=torch.ones(1)),
        "members": {1, "a"},
        "pair": (torch.ones(1), 2),
    }
    live = StateDict(phase=Phase.WARM, batch=Batch(torch.zeros(2), 0))
    kept = live["batch"].inputs
    taken(**values).restore({"state": live})

    assert_same(values, live.state_dict())
    assert kept is live["batch"].inputs


def test_module_extra_state_comes_back(place: Path) -> None:
    """What a module keeps through ``get_extra_state``, tensors in it too."""

    class Counting(torch.nn.Linear):
        calls = 0

        def get_extra_state(self) -> Any:
            return {"calls": self.calls, "seen": torch.tensor([self.calls])}

        def set_extra_state(self, state: Any) -> None:
            self.calls = state["calls"] + int(state["seen"]) * 10

    model, fresh = Counting(2, 2), Counting(2, 2)
    model.calls = 3
    Snapshot.take(place, {"model": model})
    Snapshot(place).restore({"model": fresh})

    assert 33 == fresh.calls
    assert torch.equal(model.weight, fresh.weight)


def test_versions_reach_the_hooks_of_modules(place: Path) -> None:
    """A module that upgrades old states is told which version it is given."""

    class Versioned(torch.nn.Linear):
        _version = 3
        told: Any = None

        def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *rest: Any) -> None:
            self.told = metadata.get("version")
            super()._load_from_state_dict(state_dict, prefix, metadata, *rest)

    Snapshot.take(place, {"model": Versioned(2, 2)})

    class Newer(Versioned):
        _version = 4

    model = Newer(2, 2)
    Snapshot(place).restore({"model": model})

    assert 3 == model.told


# Reports and dry runs


def test_a_dry_run_says_what_would_be_done_and_does_nothing(place: Path) -> None:
    """The report is that of the restore; no byte and no ``load_state_dict`` is touched."""
    Snapshot.take(place, {"model": mlp(1), "own": Watched(a=torch.ones(2)), "rng": RNGState()})
    model, own = mlp(2), Watched(a=torch.zeros(2))
    before = digest_of(model.state_dict(), own.state, torch.get_rng_state())
    plan = Snapshot(place).restore({"model": model, "own": own, "rng": RNGState()}, dry_run=True)

    assert before == digest_of(model.state_dict(), own.state, torch.get_rng_state())
    assert [] == own.loads
    assert plan.dry_run
    done = Snapshot(place).restore({"model": model, "own": own, "rng": RNGState()})
    assert not done.dry_run
    assert (plan.keys, plan.restored, plan.nbytes) == (done.keys, done.restored, done.nbytes)


def test_progress_of_a_restore_is_told_in_bytes(place: Path) -> None:
    """A function is told of every piece, up to the last byte."""
    told: list[Any] = []
    snapshot = Snapshot.take(place, {"state": StateDict(a=torch.zeros(2, 1024, 1024), b=torch.zeros(7))})
    snapshot.restore({"state": StateDict(a=torch.ones(2, 1024, 1024))}, progress=told.append)

    assert {("restore", snapshot.nbytes)} == {(update.operation, update.total_bytes) for update in told}
    assert snapshot.nbytes == told[-1].done_bytes


# Random generators


class DrawingOnLoad(Watched):
    """A stateful that draws random numbers when its state is put back, and when it is asked for it."""

    def state_dict(self) -> dict[str, Any]:
        torch.rand(3)
        return super().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        random.random(), np.random.rand(), torch.rand(2)
        super().load_state_dict(state)


@pytest.mark.parametrize("order", [["rng", "drawing"], ["drawing", "rng"]])
def test_random_generators_are_restored_last(place: Path, order: list[str]) -> None:
    """Whatever a ``load_state_dict`` draws, the next numbers are those that followed the take."""
    app_state: dict[str, Any] = {"rng": RNGState(), "drawing": DrawingOnLoad(a=1)}
    Snapshot.take(place, {key: app_state[key] for key in order})
    expected = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.rand(2).tolist(), *torch.randn(3).tolist()]
    Snapshot(place).restore({key: app_state[key] for key in order})

    assert expected == [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        *torch.rand(2).tolist(),
        *torch.randn(3).tolist(),
    ]


def test_a_restore_without_rng_state_changes_no_generator(place: Path) -> None:
    """``state_dict()`` is asked of what lives, and what it draws is put back."""
    Snapshot.take(place, {"drawing": DrawingOnLoad(a=1), "state": StateDict()})
    torch.manual_seed(8)
    expected = torch.rand(2)
    torch.manual_seed(8)
    Snapshot(place).restore({"drawing": DrawingOnLoad(a=1)}, dry_run=True)

    assert torch.equal(expected, torch.rand(2))


def test_generators_of_absent_devices_are_skipped_and_reported(place: Path) -> None:
    """A state from a machine with an accelerator restores here; the report names what had no place."""
    Snapshot.take(place, {"rng": Watched(**RNGState().state_dict(), **{"xpu:3": b"0" * 16})})
    expected = torch.rand(2)
    report = Snapshot(place).restore({"rng": RNGState()})

    assert ("xpu:3",) == report.skipped
    assert torch.equal(expected, torch.rand(2))


def test_generator_objects_are_refilled(taken: Any) -> None:
    """A ``torch.Generator`` and a ``numpy.random.Generator`` in use keep their identity and go on where they were."""
    one, two = torch.Generator().manual_seed(3), np.random.default_rng(3)
    snapshot = taken(torch=one, numpy=two)
    expected = torch.rand(3, generator=one), two.random(3)
    snapshot.restore({"state": StateDict(torch=one, numpy=two)})

    assert_same(expected, (torch.rand(3, generator=one), two.random(3)))
