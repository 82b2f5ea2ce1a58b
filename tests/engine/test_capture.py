"""Copies of a whole state: every byte of every kind of tensor, within the budgets or not at all, and the memory goes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from expstate.engine import capture as captures
from expstate.engine import crew, memory
from expstate.engine.capture import capture
from expstate.state import tensors

MIB = 2**20


@pytest.fixture(autouse=True)
def _nothing_idle() -> Any:
    memory.free_idle()
    yield
    memory.free_idle()


def variety() -> list[torch.Tensor]:
    """Small, large, empty, strided, odd, conjugate and scalar tensors."""
    return [
        torch.randn(3, 5),
        torch.randn(3 * MIB),
        torch.zeros(0, 7),
        torch.randn(400, 300).t(),
        torch.arange(11, dtype=torch.uint8)[3:8],
        torch.randn(9, dtype=torch.complex64).conj(),
        torch.tensor(2.5, dtype=torch.float64),
        torch.rand(33) > 0.5,
        torch.randn(100, 100)[:, ::3],
        *(torch.full((7,), number, dtype=torch.int16) for number in range(600)),
    ]


def addresses_of(arrays: list[torch.Tensor]) -> list[int | None]:
    return [tensor.data_ptr() if tensors.is_plain_memory(tensor) else None for tensor in arrays]


def bytes_of(tensor: torch.Tensor) -> bytes:
    """In row-major order."""
    dense = tensor.resolve_conj().resolve_neg().contiguous()
    return bytes(tensors.as_bytes(dense).tolist())


def test_copies_are_what_the_state_was() -> None:
    arrays = variety()
    expected = [bytes_of(tensor) for tensor in arrays]
    copies = capture(arrays, addresses_of(arrays), 64 * MIB, None, crew.Stop())
    assert copies is not None
    for tensor in arrays:
        tensor.zero_()
    assert expected == [bytes(copy.tolist()) for copy in copies.tensors]
    for copy, address, data in zip(copies.tensors, copies.addresses, expected, strict=True):
        assert address is not None
        assert data == bytes(tensors.memory(address, len(data)))
        assert not data or copy.data_ptr() == address
    copies.close()


def test_what_a_device_copies_is_what_was_there() -> None:
    """The way of an accelerator, in host memory: one new piece of memory, small ones copied together."""
    arrays = variety()
    expected = [bytes_of(tensor) for tensor in arrays]
    clones = captures._clones(arrays, torch.device("cpu"))
    for tensor in arrays:
        tensor.zero_()
    assert expected == [bytes(clone.tolist()) for clone in clones]
    assert 1 == len({clone.untyped_storage().data_ptr() for clone in clones})


def test_what_does_not_fit_is_not_copied_at_all() -> None:
    arrays = [torch.randn(20 * MIB // 4)]
    assert capture(arrays, addresses_of(arrays), 40 * MIB, None, crew.Stop()) is None
    assert capture(arrays, addresses_of(arrays), 43 * MIB, None, crew.Stop()) is not None


def test_memory_is_warm_for_the_next_take_and_never_more_than_the_budget() -> None:
    arrays = [torch.randn(20 * MIB // 4)]
    first = capture(arrays, addresses_of(arrays), 64 * MIB, None, crew.Stop())
    assert first is not None
    address = first.addresses[0]
    first.close()
    assert 32 * MIB == memory._pool.idle_bytes
    again = capture(arrays, addresses_of(arrays), 64 * MIB, None, crew.Stop())
    assert again is not None
    assert address == again.addresses[0]
    again.close()
    other = [torch.randn(34 * MIB // 4)]  # of another size: the idle buffer would not fit beside it
    third = capture(other, addresses_of(other), 64 * MIB, None, crew.Stop())
    assert third is not None
    assert 0 == memory._pool.idle_bytes
    third.close()
    third.close()
    assert 48 * MIB == memory._pool.idle_bytes


def test_memory_stays_warm_in_a_budget_that_holds_it_once() -> None:
    """Room is made by what is idle besides, and not by what is about to be used."""
    arrays = [torch.randn(20 * MIB // 4)]
    first = capture(arrays, addresses_of(arrays), 44 * MIB, None, crew.Stop())
    assert first is not None
    address = first.addresses[0]
    first.close()
    again = capture(arrays, addresses_of(arrays), 44 * MIB, None, crew.Stop())
    assert again is not None
    assert address == again.addresses[0]
    again.close()


def test_a_capture_that_is_stopped_gives_its_memory_back() -> None:
    arrays = [torch.randn(20 * MIB // 4)]
    stop = crew.Stop()
    stop.set()
    with pytest.raises(crew.StoppedError):
        capture(arrays, addresses_of(arrays), 64 * MIB, None, stop)
    assert 32 * MIB == memory._pool.idle_bytes
