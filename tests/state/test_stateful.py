"""``StateDict``, ``RNGState`` and the protocol, and that a take leaves random generators alone."""

from __future__ import annotations

import random
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from expstate.errors import ManifestError
from expstate.state import stateful, tree
from expstate.state.stateful import RNGState, StateDict, Stateful, preserved_rng


def _draw() -> tuple[Any, ...]:
    legacy = np.random.rand(), np.random.normal()
    return random.random(), random.gauss(0, 1), *legacy, torch.rand(2).tolist(), torch.randn(17).tolist()


def _draw_and_fail() -> None:
    _draw()
    raise ZeroDivisionError


# The protocol


@pytest.mark.parametrize(
    "value",
    [torch.nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)]), StateDict(), RNGState(), torch.amp.GradScaler("cpu")],
    ids=lambda value: type(value).__name__,
)
def test_what_has_a_state_is_stateful(value) -> None:
    """Modules, optimizers, scalers and our own classes are."""
    assert isinstance(value, Stateful)


@pytest.mark.parametrize("value", [{}, torch.zeros(1), 3])
def test_plain_values_are_not_stateful(value) -> None:
    """They have to be wrapped in a ``StateDict``."""
    assert not isinstance(value, Stateful)


# StateDict


def test_a_state_dict_is_a_dict() -> None:
    """It is made of keywords or of a dict, and reads and writes like one."""
    state = StateDict(step=0, best=None)
    state["step"] += 1
    del state["best"]
    assert {"step": 1} == state.state_dict() == dict(StateDict({"step": 1}))
    assert {1: 2, "a": 3} == StateDict({1: 2}, a=3).state_dict()
    assert ("step" in state, len(state), list(state)) == (True, 1, ["step"])


def test_loading_replaces_the_contents_in_place() -> None:
    """Keys that the loaded state has not are gone, and who holds the object sees the new values."""
    state = StateDict(a=1, b=2)
    state.load_state_dict({"b": 3, "c": 4})
    assert {"b": 3, "c": 4} == state.state_dict()


def test_loading_its_own_state_changes_nothing() -> None:
    """What was given out may be handed back."""
    state = StateDict(a=1)
    state.load_state_dict(state.state_dict())
    state.load_state_dict(state.data)
    assert {"a": 1} == state.state_dict()


def test_what_was_given_out_does_not_change() -> None:
    """A state dict is a copy: adding a key afterwards does not show in it."""
    state = StateDict(a=1)
    given = state.state_dict()
    state["b"] = 2
    assert {"a": 1} == given


# RNGState


@pytest.mark.parametrize("drawn", [0, 1, 5, 700])
def test_restored_generators_draw_the_same_numbers(drawn, roundtrip) -> None:
    """Python, NumPy and PyTorch go on where they were, however many numbers had been drawn, pairs of normal ones included."""
    for _ in range(drawn):
        _draw()
    random.gauss(0, 1)
    state = RNGState().state_dict()
    expected = _draw()
    _draw()
    rng = RNGState()
    rng.load_state_dict(roundtrip(state))
    assert expected == _draw()
    assert () == rng.skipped


def test_the_state_is_plain_and_short() -> None:
    """It is inline JSON, and little of it."""
    leaves = tree.flatten("rng", RNGState().state_dict())
    assert all(isinstance(leaf, (tree.Value, tree.Container)) for leaf in leaves)
    assert len(leaves) < 20
    assert sum(len(msgspec.json.encode(leaf.encoded)) for leaf in leaves if isinstance(leaf, tree.Value)) < 20_000


def test_taking_does_not_draw() -> None:
    """Asking for the state changes no generator."""
    before = RNGState().state_dict()
    assert before == RNGState().state_dict()


def test_numpy_of_another_bit_generator_comes_back() -> None:
    """The kind of NumPy's global generator is part of its state."""
    if not hasattr(np.random, "set_bit_generator"):
        pytest.skip("NumPy >= 1.24 has it")
    default = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(5))
        state = RNGState().state_dict()
        expected = np.random.rand(3).tolist()
        np.random.set_bit_generator(default)
        RNGState().load_state_dict(state)
        assert expected == np.random.rand(3).tolist()
        assert isinstance(np.random.get_bit_generator(), np.random.PCG64)
    finally:
        np.random.set_bit_generator(default)


def test_numpy_is_optional() -> None:
    """Without NumPy nothing of it is taken; where its state is restored, it is loaded to receive it."""
    code = (
        "import sys\n"
        "from expstate.state.stateful import RNGState\n"
        "loaded = {name for name in sys.modules if name == 'numpy.random'}\n"
        "state = RNGState().state_dict()\n"
        "assert ('numpy' in state) == bool(loaded), (state.keys(), loaded)\n"
        "import numpy\n"
        "numpy.random.seed(1)\n"
        "state = RNGState().state_dict()\n"
        "expected = numpy.random.rand()\n"
        "rng = RNGState()\n"
        "rng.load_state_dict(state)\n"
        "assert expected == numpy.random.rand()\n"
        "import importlib.util\n"
        "for name in [name for name in sys.modules if name.partition('.')[0] == 'numpy']:\n"
        "    sys.modules[name] = None\n"
        "rng.load_state_dict(state)\n"
        "assert rng.skipped == ('numpy',), rng.skipped\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (0, "") == (done.returncode, done.stderr)


GOOD = RNGState().state_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"python": None},
        {"python": {}},
        {"python": {**GOOD["python"], "words": b"x"}},
        {"python": {**GOOD["python"], "words": bytes(4 * 624) + b"\xff\xff\0\0"}},
        {"python": {**GOOD["python"], "version": "load"}},
        {"numpy": {}},
        {"numpy": {**GOOD["numpy"], "state": {"key": bytes(4 * 624), "pos": 9999}}},
        {"torch": b""},
        {"torch": bytes(5056)},
        {"torch": GOOD["torch"][:16] + b"\xff" * 8 + GOOD["torch"][24:]},
        {"torch": GOOD["torch"][:-1]},
        {"torch": "x"},
        {"torch": 10**8},
        {"torch": bytearray(GOOD["torch"])},
        {"cuda:0": 3.5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_hostile_states_change_no_generator(change) -> None:
    """All of a state is checked before the first generator is set."""
    before = RNGState().state_dict()
    with pytest.raises(ManifestError):
        RNGState().load_state_dict({**GOOD, **change})
    assert before == RNGState().state_dict()


# Accelerators: this machine may have none, so one is put in place of torch's own


class _Device:
    """A device module of torch, with a generator per device."""

    def __init__(self, count: int = 2, *, initialized: bool = True, indexed: bool = True) -> None:
        self.generators = [torch.Generator().manual_seed(index) for index in range(count)]
        self.initialized = initialized
        if indexed:
            self.is_initialized = lambda: self.initialized

    def device_count(self) -> int:
        return len(self.generators)

    def get_rng_state(self, index: int = 0) -> torch.Tensor:
        assert self.initialized
        return self.generators[index].get_state()

    def set_rng_state(self, state: torch.Tensor, index: int = 0) -> None:
        self.generators[index].set_state(state)

    def draw(self) -> list[float]:
        return [torch.rand(1, generator=generator).item() for generator in self.generators]


def _with_device(monkeypatch: pytest.MonkeyPatch, kind: str, device: _Device | None) -> None:
    monkeypatch.setattr(stateful, "_accelerator", lambda: None if device is None else (kind, device))


def test_every_generator_of_the_accelerator_comes_back(monkeypatch) -> None:
    """Each device's generator draws the same numbers next."""
    device = _Device(3)
    _with_device(monkeypatch, "cuda", device)
    state = RNGState().state_dict()
    assert ["cuda:0", "cuda:1", "cuda:2"] == [name for name in state if name.startswith("cuda")]
    expected = device.draw()
    device.draw()
    rng = RNGState()
    rng.load_state_dict(state)
    assert expected == device.draw()
    assert () == rng.skipped


def test_a_device_without_a_number_comes_back(monkeypatch) -> None:
    """MPS has one generator and takes no index."""
    device = _Device(1, indexed=False)
    _with_device(monkeypatch, "mps", device)
    state = RNGState().state_dict()
    assert "mps" in state
    expected = device.draw()
    RNGState().load_state_dict(state)
    assert expected == device.draw()


def test_generators_of_absent_devices_are_skipped_and_named(monkeypatch) -> None:
    """What is not here is left out; the rest comes back."""
    _with_device(monkeypatch, "cuda", _Device(3))
    state = RNGState().state_dict()
    expected = _draw()
    for device, kind, skipped in (
        (None, "", ("cuda:0", "cuda:1", "cuda:2")),
        (_Device(1), "cuda", ("cuda:1", "cuda:2")),
        (_Device(3), "xpu", ("cuda:0", "cuda:1", "cuda:2")),
    ):
        _with_device(monkeypatch, kind, device)
        rng = RNGState()
        rng.load_state_dict(state)
        assert skipped == rng.skipped
        assert expected == _draw()


def test_a_device_that_is_not_in_use_is_left_alone(monkeypatch) -> None:
    """Taking does not initialise an accelerator."""
    _with_device(monkeypatch, "cuda", _Device(2, initialized=False))
    assert not [name for name in RNGState().state_dict() if name.startswith("cuda")]


def test_the_accelerator_is_that_of_torch(monkeypatch) -> None:
    """The type and the module come from ``torch.accelerator``, whichever it is."""
    module = object()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type="npu"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert ("npu", module) == stateful._accelerator()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert stateful._accelerator() is None


@pytest.mark.gpu
def test_generators_of_a_real_accelerator_come_back() -> None:
    """On a machine that has one, random numbers on every device are the same after a restore."""
    kind = torch.accelerator.current_accelerator().type
    devices = [torch.device(kind, index) for index in range(torch.accelerator.device_count())]
    torch.rand(3, device=devices[0])
    state = RNGState().state_dict()
    expected = [torch.rand(3, device=device).tolist() for device in devices]
    rng = RNGState()
    rng.load_state_dict(state)
    assert expected == [torch.rand(3, device=device).tolist() for device in devices]
    assert () == rng.skipped


# preserved_rng


def test_numbers_drawn_inside_leave_no_trace(monkeypatch) -> None:
    """Every generator is afterwards where it was, an error inside included."""
    device = _Device(2)
    _with_device(monkeypatch, "cuda", device)
    before = RNGState().state_dict()
    with preserved_rng():
        _draw()
        device.draw()
    assert before == RNGState().state_dict()
    with pytest.raises(ZeroDivisionError), preserved_rng():
        _draw_and_fail()
    assert before == RNGState().state_dict()


def test_generators_that_were_not_used_are_not_set(monkeypatch) -> None:
    """Where nothing was drawn, nothing is done to a device."""
    device = _Device(1)
    _with_device(monkeypatch, "cuda", device)
    monkeypatch.setattr(device, "set_rng_state", None)
    with preserved_rng():
        random.random()
