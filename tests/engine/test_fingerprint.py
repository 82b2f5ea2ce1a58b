"""Fingerprints: one value for the same bytes however they lie and whatever computes it, another for whatever differs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expstate.engine import fingerprint
from expstate.engine.fingerprint import FINGERPRINT_BYTES, KEY_BYTES, Fingerprints, fingerprint_reference, new_key
from expstate.state import tensors

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

KEY = bytes(range(KEY_BYTES))
CHUNK = 128 * 1024
ROW = 1024


def random_bytes(nbytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)


def of(*given: torch.Tensor, key: bytes = KEY) -> list[bytes]:
    """The fingerprints of tensors."""
    fingerprints = Fingerprints(key)
    numbers = [fingerprints.add(tensor) for tensor in given]
    assert list(range(len(given))) == numbers
    return fingerprints.collect()


def stored(tensor: torch.Tensor) -> bytes:
    """The elements in row-major order, gathered as groups of bytes: another way than the one under test."""
    tensor = tensor.resolve_conj().resolve_neg()
    size = tensor.element_size()
    flat = torch.empty(0, dtype=torch.uint8).set_(
        tensor.untyped_storage(), tensor.storage_offset() * size, (*tensor.shape, size), (*(stride * size for stride in tensor.stride()), 1)
    )
    return bytes(flat.reshape(-1).tolist())


@pytest.fixture
def cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is cut into the smallest parts, for as many threads as there are."""
    monkeypatch.setattr(fingerprint, "_PIECE_CHUNKS", 1)
    monkeypatch.setattr(fingerprint, "_THREAD_CHUNKS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)


@pytest.fixture
def like_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations for devices without the kernel, on the CPU."""
    monkeypatch.setattr(fingerprint, "_values_on_host", fingerprint._values_on_device)


# The definition


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "d3a7a7cf92f38f95ebc6ca60085e71b5"),
        (b"\0", "4f82b2d11a60931e5ffb07d9409b7f85"),
        (b"abc", "65c14975ce553aea3d34a22e22658a5c"),
        (bytes(range(256)) * 5, "65abbb7224ac8d36994be572ae70ba81"),
        (b"expstate" * (CHUNK // 8) + b"!", "a5bcf472e906c176f6c3cd905b4c9371"),
    ],
    ids=["empty", "zero", "short", "two rows", "two chunks"],
)
def test_the_definition_never_changes(data: bytes, expected: str) -> None:
    assert expected == fingerprint_reference(data, KEY).hex()


SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 9, ROW - 1, ROW, ROW + 1, ROW + 4, 8 * ROW, 9 * ROW + 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK - 4]


@pytest.mark.parametrize("nbytes", SIZES)
def test_every_length_is_computed_as_it_is_defined(nbytes: int) -> None:
    data = random_bytes(nbytes)

    assert [fingerprint_reference(bytes(data.tolist()), KEY)] == of(data)


@pytest.mark.parametrize("nbytes", SIZES)
def test_devices_without_the_kernel_compute_it_as_it_is_defined(like_a_device: None, nbytes: int) -> None:
    data = random_bytes(nbytes)

    assert [fingerprint_reference(bytes(data.tolist()), KEY)] == of(data)


@pytest.mark.parametrize("word", [0, 1, -1, 2**31 - 1, -(2**31)])
def test_extreme_words_are_computed_as_they_are_defined(word: int) -> None:
    data = torch.full((CHUNK // 4 + 300,), word, dtype=torch.int32)

    assert [fingerprint_reference(stored(data), KEY)] == of(data)


@given(st.binary(min_size=0, max_size=3000), st.integers(0, 9), st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES))
def test_bytes_at_any_address_are_computed_as_they_are_defined(data: bytes, offset: int, key: bytes) -> None:
    memory = torch.frombuffer(bytearray(bytes(offset) + data + b"\xff" * 9), dtype=torch.uint8)
    elsewhere = torch.frombuffer(bytearray(b"\xff" * 9 + data + b"\xff"), dtype=torch.uint8, offset=9, count=len(data) + 1)

    assert [fingerprint_reference(data, key)] * 2 == of(memory[offset : offset + len(data)], elsewhere[: len(data)], key=key)


@pytest.mark.parametrize("base", range(4))
@pytest.mark.parametrize("offset", range(8))
def test_only_whole_words_are_read_where_they_lie(base: int, offset: int) -> None:
    """The address and the place in the storage may be odd, each by itself; the kernel cannot read words at odd addresses."""
    memory = random_bytes(3000).tolist()
    storage = torch.frombuffer(bytearray(bytes(64) + bytes(memory)), dtype=torch.uint8)
    storage = torch.frombuffer(memoryview(storage.numpy())[-storage.data_ptr() % 4 + base :], dtype=torch.uint8)
    data = storage[offset : offset + 2000]

    assert (base + offset) % 4 == data.data_ptr() % 4
    assert [fingerprint_reference(bytes(data.tolist()), KEY)] == of(data)
    assert {0} == {words.data_ptr() % 4 for words in fingerprint._words(data)}


# How a tensor lies


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "permuted": lambda tensor: tensor.permute(2, 0, 1),
    "stepped": lambda tensor: tensor[::2, 1:, ::2],
    "narrow": lambda tensor: tensor[1:, 2:],
    "from an odd element on": lambda tensor: tensor.view(-1)[1:],
    "column": lambda tensor: tensor[:, 0, 1],
    "repeated": lambda tensor: tensor[:, :1].expand(-1, 4, -1),
    "scalar": lambda tensor: tensor[1, 1, 1],
    "empty": lambda tensor: tensor[:0],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("name", sorted(tensors.DTYPES))
def test_every_dtype_and_view_is_taken_for_its_bytes(name: str, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    dtype = tensors.DTYPES[name]
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (4 * 5 * 7 * dtype.itemsize,), dtype=torch.uint8)
    whole = torch.empty(0, dtype=dtype).set_(raw.untyped_storage(), 0, (4, 5, 7), (35, 7, 1))

    assert [fingerprint_reference(stored(view(whole)), KEY)] == of(view(whole))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_conjugated_and_negated_views_are_taken_for_what_they_show(dtype: torch.dtype) -> None:
    values = torch.randn(30, 20, dtype=dtype)
    conjugated = values.conj()
    negated = conjugated.imag

    assert conjugated.is_conj()
    assert negated.is_neg()
    assert of(conjugated.resolve_conj(), negated.resolve_neg().contiguous()) == of(conjugated, negated)
    assert of(values) != of(conjugated)


LARGE: dict[str, Callable[[], torch.Tensor]] = {
    "contiguous": lambda: torch.randn(700, 300),
    "transposed": lambda: torch.randn(700, 300).t(),
    "channels last": lambda: torch.randn(5, 3, 100, 90).to(memory_format=torch.channels_last),
    "at an odd address": lambda: random_bytes(5 * CHUNK + 77)[3:],
    "of an odd length": lambda: random_bytes(5 * CHUNK + 77),
    "of wide elements": lambda: torch.randn(90, 300, dtype=torch.complex128).t(),
}


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_the_cut_of_the_work_does_not_matter(request: pytest.FixtureRequest, make: Callable[[], torch.Tensor]) -> None:
    tensor = make()
    whole = of(tensor)
    request.getfixturevalue("cut_small")

    assert whole == of(tensor)
    request.getfixturevalue("like_a_device")
    assert whole == of(tensor)
    assert whole == of(tensor.contiguous().clone())
    assert whole == [fingerprint_reference(stored(tensor), KEY)]


def test_threads_share_a_large_tensor(monkeypatch: pytest.MonkeyPatch, cut_small: None) -> None:
    """Else the test of the cut would not have seen them."""
    seen = set()
    sums = fingerprint._sums

    def noted(*arguments: Any) -> torch.Tensor:
        seen.add(threading.current_thread())
        barrier.wait(60)
        return sums(*arguments)

    barrier = threading.Barrier(4)
    monkeypatch.setattr(fingerprint, "_sums", noted)
    of(random_bytes(8 * CHUNK))

    assert len(seen) == 4


def test_shape_and_dtype_are_not_part_of_it() -> None:
    values = torch.randn(12, 10)

    assert 1 == len(set(of(values, values.view(-1), values.view(5, 24), values.view(torch.int64), values.view(torch.uint8))))


def test_parameters_and_inference_tensors_have_one() -> None:
    values = torch.randn(3 * CHUNK // 4)
    with torch.inference_mode():
        inside = of(values.clone(), values.clone().view(torch.uint8)[1:])

    assert inside == of(torch.nn.Parameter(values), values.view(torch.uint8)[1:])


def test_a_tensor_may_change_once_it_is_added() -> None:
    values = torch.randn(100)
    before = of(values)
    fingerprints = Fingerprints(KEY)
    fingerprints.add(values)
    values.zero_()

    assert before == fingerprints.collect()


def test_many_come_in_the_order_of_add() -> None:
    given = [random_bytes(size) for size in (5, 0, CHUNK + 1, 4, 2 * CHUNK, 0, 1000)]

    assert [of(tensor)[0] for tensor in given] == of(*given)
    assert [] == of()


def test_one_that_fails_leaves_the_others_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory ran out between its pieces."""
    monkeypatch.setattr(fingerprint, "_PIECE_CHUNKS", 1)
    given = random_bytes(3 * CHUNK)[1:]
    fingerprints = Fingerprints(KEY)
    fingerprints.add(given)
    sums, left = fingerprint._sums, [1]

    def failing(*arguments: Any) -> torch.Tensor:
        if not left:
            msg = "no memory"
            raise torch.OutOfMemoryError(msg)
        left.pop()
        return sums(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "_sums", failing)
        with pytest.raises(torch.OutOfMemoryError):
            fingerprints.add(given)

    assert 1 == fingerprints.add(given[1:])
    assert of(given, given[1:]) == fingerprints.collect()


# What differs


def test_each_bit_matters() -> None:
    data = random_bytes(600)
    flipped = [data.clone() for _ in range(8 * len(data))]
    for bit, tensor in enumerate(flipped):
        tensor[bit // 8] ^= 1 << bit % 8

    assert len(flipped) + 1 == len(set(of(data, *flipped)))


def test_bits_all_over_a_large_tensor_matter() -> None:
    data = random_bytes(3 * CHUNK + 5)
    found = set(of(data))
    positions = [*range(0, len(data), 2999), CHUNK - 1, CHUNK, len(data) - 1]
    for number, position in enumerate(positions):
        data[position] ^= 1 << number % 8
        found.update(of(data))
        data[position] ^= 1 << number % 8

    assert len(positions) + 1 == len(found)


def test_the_length_matters() -> None:
    """Zeros that are there are other than those that only fill the last word or chunk up."""
    zeros = torch.zeros(2 * CHUNK, dtype=torch.uint8)
    lengths = [*range(50), ROW - 1, ROW, ROW + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK]

    assert len(lengths) == len(set(of(*(zeros[:length] for length in lengths))))


@pytest.mark.parametrize("nbytes", [1, 4, ROW, CHUNK], ids=["bytes", "words", "rows", "chunks"])
def test_places_matter(nbytes: int) -> None:
    data = random_bytes(4 * nbytes).view(4, nbytes)
    data[:, 0] = torch.arange(4)  # no two are the same by chance

    assert 6 == len(set(of(data, data[[1, 0, 2, 3]], data[[2, 1, 0, 3]], data[[3, 1, 2, 0]], data[[0, 2, 1, 3]], data.flip(0))))


def test_the_key_matters() -> None:
    data = random_bytes(100)
    keys = [bytes(KEY_BYTES), *((1 << bit).to_bytes(KEY_BYTES, "little") for bit in range(8 * KEY_BYTES))]

    assert len(keys) == len({of(data, key=key)[0] for key in keys})
    assert len(keys) == len({of(data[:0], key=key)[0] for key in keys})


def test_keys_are_random_and_of_their_length() -> None:
    keys = {new_key() for _ in range(100)}

    assert 100 == len(keys)
    assert {KEY_BYTES} == {len(key) for key in keys}
    assert FINGERPRINT_BYTES == len(of(torch.zeros(1))[0])


@pytest.mark.parametrize("key", [b"", bytes(15), bytes(17), bytes(32)])
def test_a_key_of_another_length_is_refused(key: bytes) -> None:
    with pytest.raises(ValueError, match=f"has 16 bytes, not {len(key)}"):
        Fingerprints(key)
    with pytest.raises(ValueError, match=f"has 16 bytes, not {len(key)}"):
        fingerprint_reference(b"", key)


DIFFERENCES: dict[str, list[tuple[int, int]]] = {
    "the least": [(0, 1)],
    "the highest bit": [(0, -(2**31))],
    "the highest bits of a lane": [(row * 256, -(2**31)) for row in range(128)],
    "half of the bits": [(77, 0xFFFF)],
    "two words that swap": [(5, 1), (6, -1)],
    "two rows that swap": [(5, 1), (5 + 256, -1)],
    "a whole chunk": [(word, -(2**31)) for word in range(CHUNK // 4)],
}


@pytest.mark.parametrize("difference", DIFFERENCES.values(), ids=DIFFERENCES)
def test_each_column_tells_apart_by_itself(difference: list[tuple[int, int]]) -> None:
    """A column's bound is 2**-31 for every difference: a hundred keys show no collision, where half a step left out would show many."""
    one = torch.zeros(CHUNK // 4, dtype=torch.int32)
    other = one.clone()
    for word, change in difference:
        other[word] = change
    for _ in range(100):
        fingerprints = Fingerprints(new_key())
        fingerprints.add(one)
        fingerprints.add(other)
        (queue,) = fingerprints._queues.values()

        assert not (queue.sums[0] == queue.sums[1]).any()


def test_the_bound_holds_where_all_keys_can_be_tried() -> None:
    """The step of which the bound is made, in numbers of 4 bits instead of 32: every difference times every key."""
    bits = 4
    for difference in range(1 - 2**bits, 2**bits):
        products = {key * difference % 2 ** (2 * bits) for key in range(-(2 ** (bits - 1)), 2 ** (bits - 1))}

        assert (2**bits if difference else 1) == len(products)


# The kernel


def run_python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, check=False)


def test_triton_is_not_imported_for_tensors_in_host_memory() -> None:
    done = run_python(
        "import sys, torch, expstate\n"
        "from expstate.engine.fingerprint import Fingerprints\n"
        "before = set(sys.modules)\n"
        "fingerprints = Fingerprints(bytes(16))\n"
        "fingerprints.add(torch.zeros(100_000))\n"
        "fingerprints.collect()\n"
        "print([name for name in set(sys.modules) if name.partition('.')[0] == 'triton' or name.endswith('fingerprint_triton')])"
    )

    assert ("[]\n", 0) == (done.stdout, done.returncode), done.stderr


INTERPRETED = """
import contextlib, types, torch
from expstate.engine import fingerprint, fingerprint_triton

# The CPU takes the part of a device that Triton serves.
fingerprint._TRITON_TYPES = frozenset({"cpu"})
torch.get_device_module = lambda device: types.SimpleNamespace(device=lambda device: contextlib.nullcontext())
torch.manual_seed(0)
data = torch.randint(0, 256, (3 * 131072 + 16,), dtype=torch.uint8)
key = fingerprint.new_key()
lowest = torch.full((40000,), -(2**31), dtype=torch.int32)
for words in (data[:-16].view(torch.int32), lowest, lowest - 1):
    for count in (1, 2, 3, 255, 256, 257, 2047, 2048, 2049, 3000, 32767, 32768, 32769, 40000, len(words)):
        used = words[:count]
        fingerprints = fingerprint.Fingerprints(key)
        fingerprints.add(used)
        expected = fingerprint.fingerprint_reference(used.numpy().tobytes(), key)
        assert fingerprints.collect() == [expected], count
for start, stop in ((4, 5000), (1, 5000), (0, 131077), (131072, 2 * 131072 + 3)):
    fingerprints = fingerprint.Fingerprints(key)
    fingerprints.add(data[start:stop])
    assert fingerprints.collect() == [fingerprint.fingerprint_reference(data[start:stop].numpy().tobytes(), key)], (start, stop)
assert fingerprint.refusals == {}, fingerprint.refusals
print("done")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, to interpret the kernel")
def test_the_kernel_computes_it_as_it_is_defined() -> None:
    done = run_python(INTERPRETED, TRITON_INTERPRET="1")
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of this triton takes arrays for numbers, which this NumPy refuses")

    assert ("done\n", 0) == (done.stdout, done.returncode), done.stderr


class _Refusing:
    """The kernel's module, of a Triton that cannot compile."""

    def __init__(self, error: Exception) -> None:
        self.calls = 0
        self.error = error

    def chunk_sums(self, *_: Any) -> torch.Tensor:
        self.calls += 1
        raise self.error


def refuse(monkeypatch: pytest.MonkeyPatch, error: Exception) -> _Refusing:
    """Let the CPU take the part of a device that Triton serves, or should."""
    module = _Refusing(error)
    monkeypatch.setattr(fingerprint, "_TRITON_TYPES", frozenset({"cpu"}))
    monkeypatch.setattr(fingerprint, "refusals", {})
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(device=lambda _: threading.Lock()))
    monkeypatch.setitem(sys.modules, "expstate.engine.fingerprint_triton", module)
    monkeypatch.setattr("expstate.engine.fingerprint_triton", module, raising=False)
    return module


def test_a_kernel_that_cannot_be_compiled_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = of(torch.arange(1000), torch.arange(70_000))
    module = refuse(monkeypatch, RuntimeError("Failed to find C compiler"))

    assert expected == of(torch.arange(1000), torch.arange(70_000))
    assert expected[:1] == of(torch.arange(1000))
    assert 1 == module.calls
    assert {torch.device("cpu"): module.error} == fingerprint.refusals


def test_a_full_device_is_no_reason_to_do_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    module = refuse(monkeypatch, torch.OutOfMemoryError("full"))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            of(torch.arange(1000))

    assert 2 == module.calls
    assert {} == fingerprint.refusals


def test_a_missing_triton_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = of(torch.arange(1000))
    refuse(monkeypatch, RuntimeError())
    monkeypatch.delattr("expstate.engine.fingerprint_triton")
    monkeypatch.delitem(sys.modules, "expstate.engine.fingerprint_triton")
    monkeypatch.setitem(sys.modules, "triton", None)

    assert expected == of(torch.arange(1000))
    assert [ModuleNotFoundError] == [type(error) for error in fingerprint.refusals.values()]
