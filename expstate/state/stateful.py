"""The classes that users meet: what has a state (``Stateful``), plain values as one (``StateDict``), and random generators (``RNGState``).

``preserved_rng`` keeps what runs inside it from changing any random generator.
"""

from __future__ import annotations

import contextlib
import importlib
import random
import struct
import sys
from collections import UserDict
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from blake3 import blake3

from expstate.errors import ManifestError
from expstate.state.numpy_random import decode_state, encode_state, new_bit_generator
from expstate.state.tensors import memory
from expstate.state.torch_codecs import check_cpu_state
from expstate.state.values import NotPlainError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@runtime_checkable
class Stateful(Protocol):
    """Anything with a state: modules, optimizers, schedulers, ``StateDict``, ``RNGState``, and classes of your own."""

    def state_dict(self) -> dict[str, Any]:
        """The state, as it is now."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take over a state that ``state_dict`` once gave."""


class StateDict(UserDict[str, Any]):
    """A dict of plain values, tensors and arrays that can stand in an app state.

    Examples
    --------
    >>> progress = StateDict(step=0)
    >>> progress["step"] += 1
    >>> progress.state_dict()
    {'step': 1}
    """

    def state_dict(self) -> dict[str, Any]:
        """What is in it, as a plain dict."""
        return dict(self.data)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put other contents in the place of these."""
        contents = dict(state_dict)
        self.data.clear()
        self.data.update(contents)


class RNGState:
    """The random generators of Python, NumPy (if it is loaded) and PyTorch, on the CPU and on every accelerator of this process.

    A take changes none of them. A restore puts them back where they were: the next random numbers of each are the same.

    On several ranks each has generators of its own. A rank that was not there at the take gets new ones, seeded by the snapshot and its
    number, so that two restores give the same; those of ranks that are no longer there are dropped. Where all ranks had the same, all get
    them.

    Attributes
    ----------
    skipped : tuple of str
        Generators of the last state loaded that there are none of here (``"cuda:3"``).

    Examples
    --------
    >>> rng = RNGState()
    >>> state = rng.state_dict()
    >>> first = random.random()
    >>> rng.load_state_dict(state)
    >>> first == random.random()
    True
    """

    def __init__(self) -> None:
        self.skipped: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """The state of each generator, as plain values and bytes; a device that is not in use is left alone."""
        return _capture()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put the generators back.

        Raises
        ------
        ManifestError
            If it is no state of generators; then none has been changed.
        """
        try:
            self.skipped = _put_back(state_dict)
        except ManifestError:
            raise
        except Exception as error:
            msg = f"the states of random generators cannot be read: {error}"
            raise ManifestError(msg) from error


def seed_generators(text: str) -> None:
    """Seed every generator from a text: equal for equal texts, without relation for others."""
    seed = int.from_bytes(blake3(text.encode()).digest()[:8], "little")
    random.seed(seed)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)  # and those of accelerators


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Inside this ``with`` block random numbers may be drawn; afterwards every generator is where it was.

    Examples
    --------
    >>> with preserved_rng():
    ...     first = random.random()
    >>> first == random.random()
    True
    """
    before = _capture()
    try:
        yield
    finally:
        after = _capture()
        _put_back({name: state for name, state in before.items() if after.get(name) != state})


def _capture() -> dict[str, Any]:
    state: dict[str, Any] = {"python": _python_state()}
    if "numpy.random" in sys.modules:
        # Another package's bit generator may have been put there; then it is that package's to keep.
        with contextlib.suppress(NotPlainError):
            state["numpy"] = encode_state(sys.modules["numpy.random"].get_state(legacy=False))
    state["torch"] = _as_bytes(torch.get_rng_state())
    for name, get_state in _accelerator_generators().items():
        state[name] = _as_bytes(get_state())
    return state


def _put_back(state: Mapping[str, Any]) -> tuple[str, ...]:
    """Set every generator, after all states have been checked; those that are not here are named."""
    actions: list[Any] = []
    skipped: list[str] = []
    for name, value in state.items():
        action = _setter(name, value)
        if action is None:
            skipped.append(name)
        else:
            actions.append(action)
    for action in actions:
        action()
    return tuple(skipped)


def _setter(name: str, value: Any) -> Any:
    if name == "python":
        checked = _python_tuple(value)
        return lambda: random.setstate(checked)
    if name == "numpy":
        try:
            numpy_state = decode_state(value)
        except ImportError:
            return None
        return lambda: _set_numpy(numpy_state)
    if not isinstance(value, bytes):
        msg = f"the state of generator {name!r} is a {type(value).__name__}, not bytes"
        raise ManifestError(msg)
    tensor = torch.frombuffer(bytearray(value), dtype=torch.uint8)
    if name == "torch":
        torch.Generator().set_state(_checked(tensor))
        return lambda: torch.set_rng_state(tensor)
    return _accelerator_setter(name, tensor)


def _checked(state: torch.Tensor) -> torch.Tensor:
    check_cpu_state(state)
    return state


# Python: 624 words and a position, and the second of a pair of normal numbers

_PYTHON = struct.Struct("<625I")


def _python_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    return {"version": version, "words": _PYTHON.pack(*words), "gauss": gauss}


def _python_tuple(state: Any) -> tuple[Any, ...]:
    checked = (state["version"], _PYTHON.unpack(state["words"]), state["gauss"])
    random.Random().setstate(checked)  # noqa: S311 - tried out on another generator
    return checked


def _set_numpy(state: dict[str, Any]) -> None:
    module = importlib.import_module("numpy.random")
    if module.get_state(legacy=False)["bit_generator"] != state["bit_generator"]:
        module.set_bit_generator(new_bit_generator(state["bit_generator"]))
    module.set_state(state)


# Accelerators, whatever torch names: CUDA, XPU, MPS, others


def _as_bytes(state: torch.Tensor) -> bytes:
    state = state.cpu().contiguous()
    return bytes(memory(state.data_ptr(), state.numel()))


def _accelerator() -> tuple[str, Any] | None:
    """The type and the module of the accelerator of this process, if there is one."""
    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    return None if device is None else (device.type, torch.get_device_module(device))


def _accelerator_generators() -> dict[str, Any]:
    """How to get the state of each generator, by the name of its device; none of a device that has not been used."""
    found = _accelerator()
    if found is None:
        return {}
    kind, module = found
    if not hasattr(module, "is_initialized"):
        return {kind: module.get_rng_state}  # MPS has one device, without a number
    if not module.is_initialized():
        return {}
    return {f"{kind}:{index}": _getter(module, index) for index in range(module.device_count())}


def _getter(module: Any, index: int) -> Any:
    return lambda: module.get_rng_state(index)


def _accelerator_setter(name: str, state: torch.Tensor) -> Any:
    found = _accelerator()
    kind, _, number = name.partition(":")
    if found is None or found[0] != kind:
        return None
    module = found[1]
    if not number:
        return lambda: module.set_rng_state(state)
    index = int(number)
    return (lambda: module.set_rng_state(state, index)) if index < module.device_count() else None
