"""Trainings on an accelerator go on in fresh objects bit for bit, and what a take has copied is not held on the device any longer.

Needs nothing but torch, what expstate itself needs, and pytest, so that it runs on a machine with a PyTorch of its own.
"""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import RNGState, Snapshot, StateDict
from expstate.errors import RestoreMismatchError
from expstate.storage.registry import open_storage
from expstate.testing import FaultyStorage

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Failed to initialize NumPy")]

MIB = 2**20


@pytest.fixture
def device() -> torch.device:
    """The accelerator, with its number."""
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.empty(0, device=accelerator).device


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where a snapshot can be taken to."""
    return tmp_path / "snapshot"


class Training:
    """A loop with dropout, batch normalisation and random inputs on the device."""

    def __init__(self, device: torch.device, make: Any, *, scale: bool = False) -> None:
        layers = torch.nn.Linear(16, 32), torch.nn.BatchNorm1d(32), torch.nn.Dropout(0.3), torch.nn.Linear(32, 4)
        self.device = device
        self.model = torch.nn.Sequential(*layers).to(device)
        self.optimizer = make(self.model.parameters())
        self.scaler = torch.amp.GradScaler(device.type, init_scale=64.0, growth_interval=2, enabled=scale)
        self.losses: list[float] = []

    @property
    def app_state(self) -> dict[str, Any]:
        """All of it."""
        return {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler, "rng": RNGState()}

    def run(self, steps: int) -> None:
        """Some steps."""
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = self.model(torch.randn(8, 16, device=self.device)).square().mean()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.losses.append(float(loss.detach()))

    def devices(self) -> dict[str, torch.device]:
        """Where the state of the first parameter is."""
        state = self.optimizer.state_dict()["state"].get(0, {})
        return {name: value.device for name, value in state.items() if isinstance(value, torch.Tensor)}

    def tensors(self) -> list[torch.Tensor]:
        """Parameters, buffers and moments."""
        moments = [value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
        return [*self.model.state_dict().values(), *moments]


OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "foreach": lambda parameters: torch.optim.Adam(parameters, lr=0.01, foreach=True),
    "capturable": lambda parameters: torch.optim.Adam(parameters, lr=0.01, capturable=True),
    "Adafactor": torch.optim.Adafactor,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_training_goes_on_in_fresh_objects(place: Path, device: torch.device, name: str, asynchronous: bool) -> None:
    """Model, optimizer whose state the restore makes where it was, loss scale and random numbers: the same losses and weights."""
    training = Training(device, OPTIMIZERS[name], scale=name == "SGD")
    training.run(3)
    taken = (Snapshot.async_take if asynchronous else Snapshot.take)(place, training.app_state)
    devices = training.devices()
    training.run(3)
    if asynchronous:
        taken.wait()  # type: ignore[union-attr]

    torch.manual_seed(99)
    fresh = Training(device, OPTIMIZERS[name], scale=name == "SGD")
    Snapshot(place).restore(fresh.app_state)
    assert devices == fresh.devices()
    fresh.run(3)

    assert training.losses[3:] == fresh.losses
    assert all(torch.equal(one, two) for one, two in zip(training.tensors(), fresh.tensors(), strict=True))
    assert training.scaler.state_dict() == fresh.scaler.state_dict()


def test_a_training_is_rewound_in_place(place: Path, device: torch.device) -> None:
    """Restored over itself every parameter and moment lies where it lay, and the numbers come again."""
    training = Training(device, OPTIMIZERS["Adam"])
    training.run(2)
    Snapshot.take(place, training.app_state)
    places = [value.data_ptr() for value in training.tensors()]
    training.run(2)
    Snapshot(place).restore(training.app_state)
    training.run(2)

    assert training.losses[2:4] == training.losses[4:6]
    assert places == [value.data_ptr() for value in training.tensors()]


def test_state_of_an_optimizer_follows_its_parameters(place: Path, device: torch.device) -> None:
    """Moments taken on the host are made on the device of a model that lives there; step counts stay on the host."""
    host = Training(torch.device("cpu"), OPTIMIZERS["Adam"])
    host.run(2)
    Snapshot.take(place, {"model": host.model, "optimizer": host.optimizer})
    moved = Training(device, OPTIMIZERS["Adam"])
    Snapshot(place).restore({"model": moved.model, "optimizer": moved.optimizer})

    assert {"exp_avg": device, "exp_avg_sq": device, "step": torch.device("cpu")} == moved.devices()
    assert all(torch.equal(one, two.cpu()) for one, two in zip(host.tensors(), moved.tensors(), strict=True))
    moved.run(1)


def test_reading_into_a_tensor_of_the_callers(place: Path, device: torch.device) -> None:
    """``obj_out`` on the device, contiguous or not, whole and by rows; what does not fit is refused."""
    tensor = torch.randn(700, 900, device=device)
    snapshot = Snapshot.take(place, {"state": StateDict(x=tensor)})
    for out in (torch.zeros_like(tensor), torch.zeros(900, 700, device=device).t(), torch.zeros(700, 900)):
        assert out is snapshot.read_object("state/x", obj_out=out)
        assert torch.equal(tensor.cpu(), out.cpu())
    part = torch.zeros(900, 90, device=device).t()
    snapshot.read_object("state/x", obj_out=part, rows=slice(-100, -10))

    assert torch.equal(tensor[-100:-10], part)
    with pytest.raises(RestoreMismatchError):
        snapshot.read_object("state/x", obj_out=torch.zeros(9, device=device))


@pytest.mark.parametrize("budget", [None, 4 * MIB])
def test_a_stream_that_waits_for_nothing_changes_nothing_that_is_taken(place: Path, device: torch.device, budget: int | None) -> None:
    """Once ``async_take`` has returned every copy has been made, whatever stream the next kernels are on."""
    module = torch.get_device_module(device)
    if not hasattr(module, "Stream") or not hasattr(module, "current_stream"):
        pytest.skip("this accelerator has no streams")
    values = {f"x{number}": torch.full((6 * MIB,), 7.0, device=device) for number in range(3)}
    values["transposed"] = torch.full((300, 400), 7.0, device=device).t()
    module.synchronize()
    taken = Snapshot.async_take(place, {"state": StateDict(values)}, memory_budget_bytes=budget)
    with module.stream(module.Stream(device=device)):
        for value in values.values():
            value.fill_(-1)
    found = taken.wait().get_state_dict_for_key("state", device="cpu")
    module.synchronize()

    assert {7.0} == {number for value in found.values() for number in value.unique().tolist()}
    assert {-1.0} == {number for value in values.values() for number in value.unique().tolist()}


def test_memory_of_the_device_is_free_while_the_take_is_written(place: Path, device: torch.device) -> None:
    """Neither a module nor its parameters are kept alive by a take in the background."""
    storage = FaultyStorage(open_storage(place))
    opened = threading.Event()
    storage.run("write", None, function=lambda: opened.wait(60))
    model = torch.nn.Linear(300, 300, device=device)
    watched = [weakref.ref(thing) for thing in (model, *model.parameters())]
    taken = Snapshot.async_take(storage.url, {"model": model})
    del model
    gc.collect()
    alive = [thing() for thing in watched if thing() is not None]
    opened.set()
    taken.wait()

    assert [] == alive


@pytest.mark.parametrize("how", ["contiguous", "transposed"])
def test_no_second_copy_on_the_device(place: Path, device: torch.device, how: str) -> None:
    """Neither a take nor a restore in place asks the device for more than a few MiB."""
    module = torch.get_device_module(device)
    if not hasattr(module, "max_memory_allocated"):
        pytest.skip("this accelerator does not say how much memory is in use")
    tensor = torch.ones(8192, 8192, device=device)
    state = StateDict(x=tensor.t() if how == "transposed" else tensor)
    module.reset_peak_memory_stats(device)
    before = module.memory_allocated(device)
    snapshot = Snapshot.take(place, {"state": state}, memory_budget_bytes=64 * MIB)
    tensor.zero_()
    snapshot.restore({"state": state}, memory_budget_bytes=64 * MIB)

    assert module.max_memory_allocated(device) - before <= 64 * MIB
    assert 1.0 == float(tensor.min())
