"""Copies of a state that stand for it from the moment on when it may change: on the host in one warm buffer, on an accelerator beside it.

``capture`` copies everything or nothing: what it cannot hold within the budgets, a take stages window by window instead.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from expstate import settings
from expstate.engine import crew, memory
from expstate.errors import MemoryBudgetError
from expstate.settings import GIB, MIB
from expstate.state import tensors as forms

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_ALIGNMENT = 64
_JOB_BYTES = 4 * MIB
_JOB_ARRAYS = 256
_SMALL_BYTES = MIB
"""Copies on a device below this are queued together: to begin each takes longer than to make it."""
_RESERVE_BYTES = GIB
_RESERVE_SHARE = 0.1
"""What is left of a device's free memory is the larger of these: so many bytes, or this share of all that it has."""


class Copies:
    """Copies of arrays.

    Attributes
    ----------
    tensors : list of torch.Tensor
        Flat bytes, in the order of the arrays.
    addresses : list of int or None
        Where those on the host lie.
    host_bytes : int
        Bytes of the host's memory that they take.
    """

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.addresses: list[int | None] = []
        self.host_bytes = 0
        self._buffer: memory.Buffer | None = None
        self._events: list[Any] = []

    def copy(self, arrays: Sequence[torch.Tensor], addresses: Sequence[int | None], buffer: memory.Buffer | None, stop: crew.Stop) -> None:
        """Copy arrays; those on the host into ``buffer``, which belongs to this from here on."""
        self._buffer = buffer
        # Those on devices first: they are only queued here, and go on while the host copies.
        on_devices = self._copy_on_devices(arrays)
        at = 0
        jobs: list[list[tuple[torch.Tensor, int | None, int, int, int]]] = [[]]
        room, count = _JOB_BYTES, _JOB_ARRAYS
        for number, (tensor, address) in enumerate(zip(arrays, addresses, strict=True)):
            if number in on_devices:
                self.tensors.append(on_devices[number])
                self.addresses.append(None)
                continue
            nbytes = tensor.numel() * tensor.element_size()
            target = 0 if buffer is None else buffer.address + at
            for start in range(0, nbytes, _JOB_BYTES):
                stop_at = min(nbytes, start + _JOB_BYTES)
                if stop_at - start > room or not count:
                    jobs.append([])
                    room, count = _JOB_BYTES, _JOB_ARRAYS
                jobs[-1].append((tensor, address, start, stop_at, target + start))
                room -= stop_at - start
                count -= 1
            self.tensors.append(_NOTHING if buffer is None or not nbytes else buffer.tensor[at : at + nbytes])
            self.addresses.append(target)
            at += _rounded(nbytes, _ALIGNMENT)
        if buffer is not None:
            self.host_bytes = buffer.size
            crew.run(jobs, _copy_on_host, max(1, min(settings.current().thread_count, len(jobs))), stop)

    def _copy_on_devices(self, arrays: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        copies: dict[int, torch.Tensor] = {}
        for device, numbers in _by_device(arrays).items():
            with _current(device) as module:
                copies |= zip(numbers, _clones([arrays[number] for number in numbers], device), strict=True)
                if hasattr(module, "Event") and hasattr(module, "current_stream"):
                    event = module.Event()
                    event.record(module.current_stream(device))
                    self._events.append(event)
                else:
                    module.synchronize()
        return copies

    def wait(self) -> None:
        """Wait until what is copied on devices is there."""
        for event in self._events:
            event.synchronize()

    def close(self) -> None:
        """Let go of the copies, once nothing reads them."""
        with contextlib.suppress(RuntimeError):  # a device that has failed moves nothing
            self.wait()
        self.tensors, self.addresses, self._events = [], [], []
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            memory.give_back(buffer)


_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")


def capture(
    arrays: Sequence[torch.Tensor], addresses: Sequence[int | None], budget: int, device_bytes: int | None, stop: crew.Stop
) -> Copies | None:
    """Copy a whole state; None if it does not fit.

    Parameters
    ----------
    arrays : sequence of torch.Tensor
        The state.
    addresses : sequence of int or None
        Where those lie in host memory that can be copied as they are.
    budget : int
        Most host memory, in bytes, of which half a gibibyte or a quarter is left for writing.
    device_bytes : int or None
        Most memory of each accelerator; None for what is free but for a reserve.
    stop : crew.Stop
        Ends the work.

    Returns
    -------
    Copies
        Those on devices are ordered before what the caller's streams do next.
    """
    on_host = sum(_rounded(tensor.numel() * tensor.element_size(), _ALIGNMENT) for tensor in arrays if tensor.is_cpu)
    size = _rounded(on_host, memory.WINDOW_BYTES)
    if size > budget - min(budget // 4, GIB // 2) or not _fits_on_devices(arrays, device_bytes):
        return None
    copies = Copies()
    try:
        copies.copy(arrays, addresses, memory.whole(size, budget) if size else None, stop)
    except (torch.OutOfMemoryError, MemoryBudgetError):
        copies.close()
        return None
    except BaseException:
        copies.close()
        raise
    return copies


def _copy_on_host(job: Iterable[tuple[torch.Tensor, int | None, int, int, int]]) -> None:
    for tensor, address, start, stop, target in job:
        if address is None:
            forms.copy_out(tensor, start, stop, target)
        else:
            move = forms.move_small if stop - start <= forms.SMALL_BYTES else forms.move_memory
            move(target, address + start, stop - start)


# Devices


def _by_device(arrays: Sequence[torch.Tensor]) -> dict[torch.device, list[int]]:
    found: dict[torch.device, list[int]] = {}
    for number, tensor in enumerate(arrays):
        if not tensor.is_cpu:
            found.setdefault(tensor.device, []).append(number)
    return found


@contextlib.contextmanager
def _current(device: torch.device) -> Iterator[Any]:
    module: Any = torch.get_device_module(device)
    with module.device(device) if hasattr(module, "device") else contextlib.nullcontext():
        yield module


def _fits_on_devices(arrays: Sequence[torch.Tensor], most: int | None) -> bool:
    for device, numbers in _by_device(arrays).items():
        wanted = sum(_rounded(arrays[number].numel() * arrays[number].element_size(), _ALIGNMENT) for number in numbers)
        if wanted > (_free_bytes(device) if most is None else most):
            return False
    return True


def _free_bytes(device: torch.device) -> int:
    """What copies may take of a device's memory: what is free, and what PyTorch has and does not use, but for a reserve."""
    with _current(device) as module:
        if not hasattr(module, "mem_get_info"):
            return 0  # what cannot be told is not there
        free, total = module.mem_get_info(device)
        if hasattr(module, "memory_reserved") and hasattr(module, "memory_allocated"):
            free += module.memory_reserved(device) - module.memory_allocated(device)
    return max(0, int(free) - max(_RESERVE_BYTES, int(total * _RESERVE_SHARE)))


def _clones(arrays: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """The bytes of arrays in one new piece of a device's memory, copied on its current stream."""
    dense = [_as_flat_bytes(tensor) for tensor in arrays]
    starts = [0]
    for tensor in dense:
        starts.append(starts[-1] + _rounded(tensor.numel(), _ALIGNMENT))
    whole = torch.empty(starts[-1], dtype=torch.uint8, device=device)
    copies = [whole[start : start + tensor.numel()] for start, tensor in zip(starts, dense, strict=False)]
    small: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for copy, tensor in zip(copies, dense, strict=True):
        if tensor.numel() >= _SMALL_BYTES:
            copy.copy_(tensor, non_blocking=True)
        elif tensor.numel():
            # As items of eight bytes where they lie so.
            is_even = tensor.numel() % 8 == 0 and tensor.data_ptr() % 8 == 0 and tensor.storage_offset() % 8 == 0
            kind = torch.int64 if is_even else torch.uint8
            targets, sources = small.setdefault(kind, ([], []))
            targets.append(copy.view(kind))
            sources.append(tensor.view(kind))
    for targets, sources in small.values():
        torch._foreach_copy_(targets, sources, non_blocking=True)
    return copies


def _as_flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        tensor = forms.dense(tensor)
    return forms.as_bytes(tensor)


def _rounded(nbytes: int, step: int) -> int:
    return -(-nbytes // step) * step
