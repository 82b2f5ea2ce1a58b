"""Fingerprints on an accelerator: the kernel and torch's operations compute what is defined, in order, and the host does not wait.

Needs nothing but torch, what expstate itself needs, and pytest, so that it runs on a machine with a PyTorch of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from expstate.engine import fingerprint
from expstate.engine.fingerprint import KEY_BYTES, Fingerprints, fingerprint_reference, new_key
from expstate.state import tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Failed to initialize NumPy"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support"),
]

DEVICE = (torch.accelerator.is_available() and torch.accelerator.current_accelerator()) or torch.device("cpu")
MODULE: Any = torch.get_device_module(DEVICE)
KEY = bytes(range(KEY_BYTES))
CHUNK = 128 * 1024
DTYPES = [
    getattr(torch, name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn_x2"),
    )
    if hasattr(torch, name)
]


@pytest.fixture(params=["kernel", "operations"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who computes: the kernel, where there is one for this kind of device, or torch's own operations."""
    if request.param == "operations":
        monkeypatch.setattr(fingerprint, "_TRITON_TYPES", frozenset())
    elif DEVICE.type not in fingerprint._TRITON_TYPES:
        pytest.skip(f"Triton does not serve {DEVICE.type}")
    else:
        pytest.importorskip("triton")
    return str(request.param)


@pytest.fixture(autouse=True)
def _no_refusal() -> Iterator[None]:
    """A kernel that does not compile is noticed here, though nowhere else."""
    fingerprint.refusals.clear()
    yield
    assert fingerprint.refusals == {}


def random_bytes(nbytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)


def of(*given: torch.Tensor) -> list[bytes]:
    """The fingerprints of tensors."""
    fingerprints = Fingerprints(KEY)
    for tensor in given:
        fingerprints.add(tensor)
    return fingerprints.collect()


def busy() -> None:
    """Queue work for some tenths of a second on the current stream."""
    size = 64 if DEVICE.type == "cpu" else 4096
    work = torch.ones(size, size, device=DEVICE)
    for _ in range(100):
        work = (work @ work) / size


@contextlib.contextmanager
def errors_when_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device is an error, where torch can tell."""
    if DEVICE.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "nbytes", [0, 1, 3, 4, 5, 1024, 1025, 1028, 8192, 8196, 60_000, CHUNK - 4, CHUNK, CHUNK + 1, CHUNK + 4, 5 * CHUNK, 9 * CHUNK + 6]
)
@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8, 16])
def test_every_length_and_address_is_computed_as_it_is_defined(way: str, nbytes: int, offset: int) -> None:
    data = random_bytes(offset + nbytes)[offset:]
    there = torch.zeros(offset + nbytes + 9, dtype=torch.uint8, device=DEVICE).fill_(255)[offset : offset + nbytes]
    there.copy_(data)

    assert [fingerprint_reference(bytes(data.tolist()), KEY)] == of(there)


@pytest.mark.parametrize("word", [0, 1, -1, 2**31 - 1, -(2**31)])
def test_extreme_words_are_computed_as_they_are_defined(way: str, word: int) -> None:
    data = torch.full((CHUNK // 4 + 3000,), word, dtype=torch.int32)

    assert of(data) == of(data.to(DEVICE))


Layout = Callable[[torch.Tensor], torch.Tensor]
LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda tensor: tensor,
    "permuted": lambda tensor: tensor.permute(2, 0, 1),
    "stepped": lambda tensor: tensor[::2, 1:, ::2],
    "from an odd element on": lambda tensor: tensor.view(-1)[1:],
    "scalar": lambda tensor: tensor[1, 1, 1],
    "empty": lambda tensor: tensor[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_layout_has_the_value_of_the_host(
    way: str, dtype: torch.dtype, layout: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (40 * 50 * 7 * dtype.itemsize,), dtype=torch.uint8)
    here = raw.view(dtype).view(40, 50, 7)
    there = raw.to(DEVICE).view(dtype).view(40, 50, 7)

    assert of(layout(here)) == of(layout(there))


def test_conjugated_and_negated_views_have_the_value_of_the_host(way: str) -> None:
    values = torch.randn(300, 200, dtype=torch.complex64)
    there = values.to(DEVICE)

    assert of(values.conj(), values.conj().imag, values.conj().t()) == of(there.conj(), there.conj().imag, there.conj().t())


LARGE: dict[str, Layout] = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.t(),
    "at an odd address": lambda tensor: tensor.view(torch.uint8).view(-1)[3:],
}


@pytest.mark.parametrize("layout", LARGE.values(), ids=LARGE)
def test_large_tensors_have_the_value_of_the_host(way: str, layout: Layout) -> None:
    here = torch.randn(3000, 4000)

    assert of(layout(here)) == of(layout(here.to(DEVICE)))


def test_words_beyond_the_reach_of_32_bits_count(way: str) -> None:
    """The kernel's addresses are those of the last bytes too."""
    nbytes = 9 * 2**30
    if way == "operations":
        pytest.skip("takes the kernel's speed")
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < nbytes + 2**30:
        pytest.skip("needs 10 GiB")
    data = torch.zeros(nbytes, dtype=torch.uint8, device=DEVICE)
    found = of(data)
    for position in (5 * 2**30, 2**33 + 7, nbytes - 1):
        data[position] = 1
        found += of(data)
        data[position] = 0

    assert 4 == len(set(found))
    assert found[:1] == of(data)


def test_add_does_not_wait_for_the_device(way: str) -> None:
    """Not for keys, not for tensors of any layout, and not for ten thousand small ones."""
    given = [
        torch.randn(1000, 1000, device=DEVICE),
        torch.randn(1000, 1000, device=DEVICE).t(),
        torch.randn(1001, device=DEVICE).view(torch.uint8)[1:],
        torch.randn(5, dtype=torch.complex64, device=DEVICE).conj(),
        torch.tensor(1.0, device=DEVICE),
        torch.empty(0, device=DEVICE),
    ]
    small = torch.randn(10_000, 256, device=DEVICE)
    expected = of(*(tensor.cpu() for tensor in given)) + of(*small[::1000].cpu())
    of(*given)  # compiling may wait
    MODULE.synchronize()
    fingerprints = Fingerprints(KEY)
    with errors_when_waiting():
        for tensor in (*given, *small):
            fingerprints.add(tensor)
    found = fingerprints.collect()

    assert expected == found[: len(given)] + found[len(given) :: 1000]


def test_the_computation_comes_after_what_the_stream_has_queued(way: str) -> None:
    """And before what is queued next, on whatever stream is current, as long as that stands."""
    tensor = torch.zeros(2**20, device=DEVICE)
    other = torch.zeros(2**20, device=DEVICE)
    fingerprints = Fingerprints(KEY)
    stream = MODULE.Stream()
    stream.wait_stream(MODULE.current_stream())
    with MODULE.stream(stream):
        busy()
        tensor.fill_(1)
        fingerprints.add(tensor)
        fingerprints.add(tensor[1:].view(torch.uint8)[1:])
        tensor.fill_(2)
        fingerprints.add(tensor)
    busy()
    other.fill_(3)
    fingerprints.add(other)
    other.fill_(4)
    with MODULE.stream(stream):
        tensor.fill_(5)
        fingerprints.add(tensor)
        tensor.fill_(6)
    values = [torch.full((2**20,), float(value)) for value in (1, 1, 2, 3, 5)]
    values[1] = values[1][1:].view(torch.uint8)[1:]

    assert of(*values) == fingerprints.collect()


def test_collect_may_be_called_beside_another_current_stream(way: str) -> None:
    """It waits for the stream that computed, whatever is current by then."""
    tensor = torch.zeros(2**20, device=DEVICE)
    stream = MODULE.Stream()
    stream.wait_stream(MODULE.current_stream())
    fingerprints = Fingerprints(KEY)
    with MODULE.stream(stream):
        busy()
        tensor.fill_(7)
        fingerprints.add(tensor)

    assert of(torch.full((2**20,), 7.0)) == fingerprints.collect()


def test_each_device_has_its_own(way: str) -> None:
    """Tensors on several devices, whichever of them is current."""
    count = MODULE.device_count()
    if count < 2:
        pytest.skip("needs two accelerators")
    here = [torch.randn(1000 + number) for number in range(2 * count)]
    there = [tensor.to(torch.device(DEVICE.type, number % count)) for number, tensor in enumerate(here)]

    assert of(*here) == of(*there)


def test_little_memory_is_taken(way: str) -> None:
    """Nothing for a contiguous tensor by the kernel; some pieces where it has to be gathered or widened."""
    if DEVICE.type != "cuda":
        pytest.skip("needs a count of the device's memory")
    tensor = torch.randn(16_000, 16_000, device=DEVICE)
    for given, most in ((tensor, 2**20 if way == "kernel" else 200 * 2**20), (tensor.t(), 200 * 2**20)):
        MODULE.synchronize()
        MODULE.reset_peak_memory_stats()
        before = MODULE.memory_allocated()
        of(given)

        assert MODULE.max_memory_allocated() - before < most


def test_keys_differ_on_the_device_too(way: str) -> None:
    tensor = torch.randn(1000, device=DEVICE)
    found = set()
    for _ in range(10):
        fingerprints = Fingerprints(new_key())
        fingerprints.add(tensor)
        found.update(fingerprints.collect())

    assert 10 == len(found)


def test_bytes_of_host_and_device_are_read_alike(way: str) -> None:
    """Negative control: what is compared here really differs between tensors."""
    tensor = torch.randn(1000, 100)

    assert of(tensor) == of(tensor.to(DEVICE))
    assert of(tensor) != of((tensor + 1).to(DEVICE))
    assert of(tensor) == [fingerprint_reference(bytes(tensors.as_bytes(tensor).tolist()), KEY)]
