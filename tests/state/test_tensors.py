"""Bytes in and out of tensors of every dtype and shape in memory."""

from __future__ import annotations

import ctypes

import pytest
import torch

from expstate.state import tensors

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")  # torch says so of each new one

DTYPES = sorted(tensors.DTYPES)


def _random(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of random bits, of any dtype."""
    size = dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (max(1, torch.Size(shape).numel() * size),), dtype=torch.uint8)
    tensor = torch.empty(0, dtype=dtype)
    return tensor.set_(raw.untyped_storage(), 0, shape, torch.empty(shape, device="meta").stride())


def _expected(tensor: torch.Tensor) -> bytes:
    """The elements in row-major order, gathered as groups of bytes: another way than the one under test."""
    size = tensor.element_size()
    flat = torch.empty(0, dtype=torch.uint8).set_(
        tensor.untyped_storage(), tensor.storage_offset() * size, (*tensor.shape, size), (*(stride * size for stride in tensor.stride()), 1)
    )
    return bytes(flat.reshape(-1).tolist())


def _copy_out(tensor: torch.Tensor, start: int = 0, stop: int | None = None, shift: int = 0) -> bytes:
    stop = tensor.numel() * tensor.element_size() if stop is None else stop
    memory = (ctypes.c_char * (stop - start + shift + 1))()
    tensors.copy_out(tensor, start, stop, ctypes.addressof(memory) + shift)
    return bytes(memory)[shift:-1]


def _copy_in(tensor: torch.Tensor, data: bytes, start: int = 0, shift: int = 0, dtype: torch.dtype | None = None) -> None:
    memory = ctypes.create_string_buffer(b"\0" * shift + data, shift + len(data))
    tensors.copy_in(tensor, start, start + len(data), ctypes.addressof(memory) + shift, dtype=dtype)


def _views(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "contiguous": tensor,
        "permuted": tensor.permute(2, 0, 1),
        "stepped": tensor[::2, 1:, ::2],
        "offset": tensor[1:, 2:],
        "column": tensor[:, 0, 1],
        "scalar": tensor[1, 1, 1],
        "empty": tensor[:0],
        "no columns": tensor[..., :0],
    }


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_view_goes_out_and_in(name: str) -> None:
    """The bytes of any view come out in row-major order and go into another view of that form."""
    for label, view in _views(_random(tensors.DTYPES[name], (5, 6, 4))).items():
        data = _copy_out(view)
        assert _expected(view) == data, label
        other = _views(_random(tensors.DTYPES[name], (5, 6, 4)))[label]
        _copy_in(other, data)
        assert data == _copy_out(other), label


@pytest.mark.parametrize("name", DTYPES)
def test_expanded_tensors_are_written_out_in_full(name: str) -> None:
    """An expanded tensor gives each of its elements, though they share memory; it cannot be read into."""
    tensor = _random(tensors.DTYPES[name], (4, 1)).expand(4, 7)
    assert _expected(tensor) == _copy_out(tensor)
    assert not tensors.is_writable_in_place(tensor)
    assert tensors.is_writable_in_place(tensor[:, :1])


@pytest.mark.parametrize("view", ["contiguous", "permuted", "stepped"])
def test_any_range_of_elements(view: str) -> None:
    """Ranges that begin and end anywhere fit together again."""
    tensor = _views(_random(torch.float32, (5, 6, 4)))[view]
    whole = _copy_out(tensor)
    for start in range(0, len(whole), 28):
        for stop in (start + 4, start + 100, len(whole)):
            if start < stop <= len(whole):
                assert whole[start:stop] == _copy_out(tensor, start, stop)
                other = torch.zeros_like(tensor)
                _copy_in(other, whole[start:stop], start)
                assert whole[start:stop] == _copy_out(other, start, stop)
                assert not any(_copy_out(other, 0, start))
                assert not any(_copy_out(other, stop, len(whole)))


@pytest.mark.parametrize("shift", [1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.bfloat16, torch.bool])
def test_addresses_need_no_alignment(dtype: torch.dtype, shift: int) -> None:
    """Bytes may begin at any address of staging memory."""
    for view in _views(_random(dtype, (3, 6, 5))).values():
        data = _copy_out(view, shift=shift)
        assert _expected(view) == data
        other = torch.zeros_like(view)
        _copy_in(other, data, shift=shift)
        assert data == _copy_out(other)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_conjugates_are_written_as_what_they_stand_for(dtype: torch.dtype) -> None:
    """A lazy conjugate or negative gives its values, not those of the memory below, and takes values likewise."""
    base = torch.randn(3, 4, dtype=dtype)
    for lazy in (base.conj(), base.conj().t(), base.conj().imag, base.conj()[1, 2], base.conj()[1, 2].imag):
        assert lazy.is_conj() or lazy.is_neg()
        real = lazy.clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
        assert _expected(real) == _copy_out(lazy)
        _copy_in(lazy, _copy_out(real + 1))
        assert torch.equal(real + 1, lazy)


def test_rows_longer_than_a_run_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is gathered at a time is bounded, whatever the shape."""
    monkeypatch.setattr(tensors, "_RUN_BYTES", 64)
    tensor = torch.randn(7, 5, 40).permute(2, 1, 0)
    views = list(tensors.runs(tensor, 3, tensor.numel() - 2))
    assert all(view.numel() * view.element_size() <= 64 for view, _ in views)
    assert [3, tensor.numel() - 2] == [views[0][1], views[-1][1] + views[-1][0].numel()]
    assert _expected(tensor) == _copy_out(tensor)
    other = torch.zeros(7, 5, 40).permute(2, 1, 0)
    _copy_in(other, _copy_out(tensor))
    assert torch.equal(tensor, other)


def test_values_are_converted_on_the_way_in() -> None:
    """Stored float64 values read into a float16 tensor are rounded to it, for each form of the tensor."""
    values = torch.randn(4, 6, dtype=torch.float64)
    for target in (torch.zeros(4, 6, dtype=torch.float16), torch.zeros(6, 4, dtype=torch.float16).t()):
        _copy_in(target, _expected(values), dtype=torch.float64)
        assert torch.equal(values.half(), target)


def test_a_default_device_does_not_matter() -> None:
    """``torch.set_default_device`` decides where users' tensors are made, not where bytes are staged."""
    tensor, other = torch.randn(4, 5).t(), torch.zeros(4, 5).t()
    with torch.device("meta"):
        _copy_in(other, _copy_out(tensor))
        halves = torch.zeros(5, 4, dtype=torch.float16, device="cpu")
        _copy_in(halves, _copy_out(tensor), dtype=torch.float32)
    assert torch.equal(tensor, other)
    assert torch.equal(tensor.half(), halves)


def test_memory_is_writable_and_may_be_empty() -> None:
    """``memory`` views bytes that someone else owns, none included."""
    data = bytearray(b"abcd")
    tensors.memory(ctypes.addressof(ctypes.c_char.from_buffer(data)) + 1, 2)[:] = b"XY"
    assert bytearray(b"aXYd") == data
    assert 0 == len(tensors.memory(0, 0))


def test_sizes_are_exact() -> None:
    """Sizes are computed as integers of any size, and dtypes that there are not have none."""
    assert 16 == tensors.ITEM_SIZES["complex128"]
    with pytest.raises(KeyError):
        tensors.ITEM_SIZES["load"]
