"""The workload: the sizes of its tensors, states made of them, and the digests that show whether a restore brought back every byte.

Gets a ``Workload``; hands on a ``TensorState``, the one stateful that every system takes and restores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import torch
from blake3 import blake3

from expstate.bench.plan import KIB, MIB
from expstate.state.tensors import memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from expstate.bench.plan import Workload

PROBE = "probe"
PROBE_BYTES = MIB
SMALL_BYTES = KIB
_SMALLEST_BYTES = KIB
_STEP_BYTES = 8

# With the probe these are 100 tensors and 2 GiB: how many of what size, in KiB.
_COUNTS = {
    128 * KIB: 4,
    64 * KIB: 8,
    32 * KIB: 16,
    16 * KIB: 20,
    8 * KIB: 16,
    4 * KIB: 12,
    2 * KIB: 6,
    256: 8,
    496: 2,
    16: 1,
    8: 1,
    4: 1,
    1: 4,
}
_WEIGHTS = [size for size, count in _COUNTS.items() for _ in range(count)]
_STRIDE = 37
_ADAPTED = 100
"""Bytes of a state of which its adapters make one."""


class TensorState:
    """A stateful that holds tensors by name and takes new values in place.

    Parameters
    ----------
    tensors : dict of str to torch.Tensor
        The live tensors.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The live tensors by name."""
        return dict(self.tensors)

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Copy what is not in the live memory already."""
        if state_dict.keys() != self.tensors.keys():
            msg = f"expected the tensors {sorted(self.tensors)[:3]}..., found {sorted(state_dict)[:3]}..."
            raise KeyError(msg)
        for name, live in self.tensors.items():
            value = state_dict[name]
            if value is not live and (value.device != live.device or value.data_ptr() != live.data_ptr()):
                live.copy_(value)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def tensor_sizes(total_bytes: int, tensors: int) -> list[int]:
    """Sizes of the tensors of a state, large and small ones mixed; the first is the probe.

    Parameters
    ----------
    total_bytes : int
        Their sum, a multiple of 8.
    tensors : int
        How many, at least 2.

    Returns
    -------
    list of int
        Bytes: exactly 1 MiB first, then the fixed list (1 KiB to 128 MiB, for 2 GiB) scaled to the total.

    Raises
    ------
    ValueError
        If the total is too small for that many tensors.

    Examples
    --------
    >>> sizes = tensor_sizes(2 * 1024**3, 100)
    >>> len(sizes), sum(sizes) == 2 * 1024**3, min(sizes), max(sizes) // 1024**2, sizes[0]
    (100, True, 1024, 128, 1048576)
    """
    others = tensors - 1
    rest = total_bytes - PROBE_BYTES
    if tensors < 2 or total_bytes % _STEP_BYTES or rest < others * _SMALLEST_BYTES:  # noqa: PLR2004 - the probe and one more
        msg = f"{total_bytes} bytes in {tensors} tensors: expected a multiple of 8, one tensor of 1 MiB, 1 KiB for each other"
        raise ValueError(msg)
    # 1 KiB each, and what is left by weight: no size falls below it, however small the total is.
    weights = [_WEIGHTS[index * len(_WEIGHTS) // others] - 1 for index in range(others)]
    spare = rest - others * _SMALLEST_BYTES
    sizes = [_SMALLEST_BYTES + spare * weight // sum(weights) // _STEP_BYTES * _STEP_BYTES for weight in weights]
    sizes[0] += rest - sum(sizes)
    stride = _STRIDE if others % _STRIDE else 1
    return [PROBE_BYTES, *(sizes[index * stride % others] for index in range(others))]


def _names(workload: Workload) -> dict[str, int]:
    probe, *others = tensor_sizes(workload.total_bytes, workload.tensors)
    sizes = {f"layers.{index}.weight": size for index, size in enumerate(others)}
    # In the middle, so that reading it cannot profit from being first.
    names = list(sizes)
    half = len(names) // 2
    return {**{name: sizes[name] for name in names[:half]}, PROBE: probe, **{name: sizes[name] for name in names[half:]}}


def _as_tensor(words: torch.Tensor, index: int) -> torch.Tensor:
    flat = words.view(torch.bfloat16 if index % 2 else torch.float32)
    columns = 64
    return flat.view(-1, columns) if flat.numel() % columns == 0 else flat


def _random(nbytes: int, seed: int) -> torch.Tensor:
    return torch.empty(nbytes // _STEP_BYTES, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(seed))


def _touched(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes // _STEP_BYTES, dtype=torch.int64).fill_(1)


def random_tensors(workload: Workload) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of random bytes, the same in every process, one after the other; each has memory of its own."""
    for seed, (name, size) in enumerate(_names(workload).items()):
        yield name, _as_tensor(_random(size, seed), seed).to(workload.device)


def random_state(workload: Workload) -> TensorState:
    """A state of these tensors."""
    return TensorState(dict(random_tensors(workload)))


def touched_tensors(workload: Workload) -> Iterator[tuple[str, torch.Tensor]]:
    """The same names and shapes with other values, every page of them in memory."""
    for index, (name, size) in enumerate(_names(workload).items()):
        yield name, _as_tensor(_touched(size), index).to(workload.device)


def touched_state(workload: Workload) -> TensorState:
    """A state of these tensors."""
    return TensorState(dict(touched_tensors(workload)))


def touched_probe(workload: Workload) -> torch.Tensor:
    """A live tensor for the probe, with other values."""
    index = list(_names(workload)).index(PROBE)
    return _as_tensor(_touched(PROBE_BYTES), index).to(workload.device)


def random_small_state(workload: Workload) -> TensorState:
    """Many tensors of 1 KiB, of random bytes."""
    count = workload.small_tensors
    return TensorState({f"small.{index}": _random(SMALL_BYTES, index).view(torch.float32).to(workload.device) for index in range(count)})


def touched_small_state(workload: Workload) -> TensorState:
    """The same names and shapes as ``random_small_state`` with other values."""
    count = workload.small_tensors
    return TensorState({f"small.{index}": _touched(SMALL_BYTES).view(torch.float32).to(workload.device) for index in range(count)})


def adapted_state(workload: Workload) -> tuple[TensorState, TensorState]:
    """A state of the workload's size like that of a model with adapters of low rank, two for each tensor; and those, 1 % of it."""
    size = workload.total_bytes // _ADAPTED // (2 * workload.tensors) // _STEP_BYTES * _STEP_BYTES
    sizes = {f"adapters.{index}.{side}": max(size, _STEP_BYTES) for index in range(workload.tensors) for side in ("down", "up")}
    adapters = {name: _random(size, -1 - seed).view(torch.float32).to(workload.device) for seed, (name, size) in enumerate(sizes.items())}
    rest = msgspec.structs.replace(workload, total_bytes=workload.total_bytes - sum(sizes.values()))
    return TensorState({**dict(random_tensors(rest)), **adapters}), TensorState(adapters)


def overwrite(state: TensorState) -> None:
    """Give every tensor other values, as a training loop would."""
    for tensor in state.tensors.values():
        tensor.fill_(1)


def bytes_of(host: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, which the caller keeps alive."""
    return memory(host.data_ptr(), host.nbytes)


def digests(state: TensorState) -> dict[str, str]:
    """The BLAKE3 of each tensor's bytes."""
    found = {}
    for name, tensor in state.tensors.items():
        host = tensor.cpu().contiguous()
        found[name] = blake3(bytes_of(host)).hexdigest()
    return found
