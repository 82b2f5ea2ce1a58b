"""Reading single entries: every kind, rows, into memory of the caller's, and no more bytes than are needed."""

from __future__ import annotations

import datetime as dt
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.errors import EntryNotFoundError, InvalidArgumentError, RestoreMismatchError, SnapshotCorruptError, UnsupportedValueError
from expstate.format.manifest import BLOCK_BYTES, TensorEntry
from expstate.storage.base import FileReader
from expstate.storage.local import LocalStorage
from tests.state.conftest import assert_same

from .conftest import TiedModel, mlp, of_every_layout

KINDS: dict[str, Any] = {
    "tensor": torch.arange(12.0).view(3, 4),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    "complex": torch.tensor([1 + 2j]),
    **of_every_layout(),
    "array": np.arange(6, dtype=">i2").reshape(2, 3),
    "strings": np.array(["a", "bcd"]),
    "frame": pd.DataFrame({"x": [1.5, None], "y": ["a", "b"]}, index=[3, 4]),
    "generator": torch.Generator().manual_seed(5),
    "int": 2**100,
    "float": float("-inf"),
    "none": None,
    "time": dt.datetime(2026, 11, 1, 12, tzinfo=dt.timezone.utc),
    "dict": {1: torch.ones(2), "1": [torch.zeros(1), (True, {})]},
    "long": list(range(20_000)),
}


class _CountingReader(FileReader):
    """Counts what is read of a file."""

    def __init__(self, inner: FileReader, ranges: list[tuple[int, int]], cached_ranges: list[tuple[int, int]]) -> None:
        self._inner = inner
        self._ranges = ranges
        self.name, self.size, self.alignment = inner.name, inner.size, inner.alignment
        self.cached_ranges = cached_ranges

    def read_into(self, offset: int, target: memoryview) -> None:
        self._ranges.append((offset, min(self.size, offset + len(target))))
        self._inner.read_into(offset, target)

    def read_cached_into(self, offset: int, target: memoryview) -> None:
        self._ranges.append((offset, min(self.size, offset + len(target))))
        self.cached_ranges.append(self._ranges[-1])
        self._inner.read_cached_into(offset, target)

    def is_cached(self, offset: int, length: int) -> bool:
        return self._inner.is_cached(offset, length)

    def close(self) -> None:
        self._inner.close()


class _CountingStorage(LocalStorage):
    """A local disk that counts what is read from it."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.ranges: list[tuple[int, int]] = []
        self.cached_ranges: list[tuple[int, int]] = []

    def open_file(self, name: str, *, size: int | None = None) -> FileReader:
        return _CountingReader(super().open_file(name), self.ranges, self.cached_ranges)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_entry_is_read_by_its_path(taken: Any, kind: str) -> None:
    """Tensors, arrays, frames, values, containers: what was taken, of the same type."""
    assert_same(KINDS[kind], taken(**KINDS).read_object(f"state/{kind}"))


def test_a_whole_key_is_read_as_its_state_dict(place: Path) -> None:
    """``get_state_dict_for_key`` gives what ``state_dict()`` gave, versions of modules included."""
    model = mlp()
    Snapshot.take(place, {"model": model, "other": StateDict(a=1)})
    found = Snapshot(place).get_state_dict_for_key("model")

    assert_same(dict(model.state_dict()), dict(found))
    assert model.state_dict()._metadata == found._metadata
    assert "All keys matched" in str(mlp(1).load_state_dict(found))


def test_reading_a_key_or_its_path_is_the_same(taken: Any) -> None:
    """The path of a key is a container like any other."""
    snapshot = taken(a=torch.ones(2), b={"c": 1})

    assert_same(snapshot.get_state_dict_for_key("state"), snapshot.read_object("state"))


def test_tied_tensors_are_one_tensor_again(place: Path) -> None:
    """An alias reads like any tensor; in a whole key it shares memory with what it is tied to."""
    model = TiedModel()
    Snapshot.take(place, {"model": model})
    snapshot = Snapshot(place)
    whole = snapshot.get_state_dict_for_key("model")

    assert torch.equal(model.head.weight, snapshot.read_object("model/head.weight"))
    assert whole["embedding.weight"].data_ptr() == whole["head.weight"].data_ptr()


def test_an_alias_of_something_outside_is_read_with_its_container(taken: Any) -> None:
    """A container whose tensor is tied to one outside of it is complete when read alone."""
    weight = torch.randn(3)

    assert_same([weight, 1], taken(first=weight, second=[weight, 1]).read_object("state/second"))


@pytest.mark.parametrize(
    ("path", "words"),
    [("state/wieght", r"did you mean 'state/weight'"), ("model/weight", "no entry 'model/weight'"), ("state/weight/0", "no entry")],
)
def test_an_entry_that_is_not_there_is_an_error_with_near_misses(taken: Any, path: str, words: str) -> None:
    """The message names what was asked for and what it may have meant."""
    with pytest.raises(EntryNotFoundError, match=words):
        taken(weight=torch.ones(1)).read_object(path)


def test_a_key_that_is_not_there_is_an_error_naming_those_there_are(taken: Any) -> None:
    """Also catchable as the ``KeyError`` that it is."""
    with pytest.raises(KeyError, match=r"no key 'model' in the snapshot \(it has: 'state'"):
        taken(a=1).get_state_dict_for_key("model")


# Rows

BIG = torch.arange(9 * 2**18, dtype=torch.int32).view(9 * 2**8, 2**10)  # rows of 4 KiB, 9 blocks
ROWS = [
    slice(None),
    slice(0, 1),
    slice(255, 257),
    slice(100, 900),
    slice(-3, None),
    slice(-300, -290),
    slice(5, 5),
    slice(9, 3),
    slice(2300, 9999),
    slice(9999, None),
    slice(None, -2300),
    slice(np.int64(3), np.int64(5)),
]


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_rows_are_those_that_slicing_gives(taken: Any, rows: slice) -> None:
    """Inside a block, across blocks, negative, empty, beyond the end: as ``tensor[rows]``."""
    snapshot = taken(big=BIG, array=BIG.numpy())

    assert torch.equal(BIG[rows], snapshot.read_object("state/big", rows=rows))
    assert_same(BIG.numpy()[rows], snapshot.read_object("state/array", rows=rows))


def test_rows_that_are_no_multiple_of_a_block(taken: Any) -> None:
    """Rows of an odd number of bytes, so that blocks end inside rows and inside elements."""
    odd = torch.randn(3000, 7, 19, dtype=torch.float64)

    assert torch.equal(odd[985:1972], taken(odd=odd).read_object("state/odd", rows=slice(985, 1972)))


@pytest.mark.parametrize("rows", [slice(0, 4, 2), slice(None, None, -1), slice("a", None), 3, (0, 2), slice(0.5, 2)], ids=str)
def test_rows_that_are_no_plain_slice_are_refused(taken: Any, rows: Any) -> None:
    """Steps, numbers and other things are errors that say what to give."""
    with pytest.raises(InvalidArgumentError, match="rows"):
        taken(big=torch.ones(8, 2)).read_object("state/big", rows=rows)


def test_rows_and_targets_are_for_tensors_alone(taken: Any) -> None:
    """A value or a container has no rows and cannot be read into something; a 0-d tensor has no rows."""
    snapshot = taken(value=1, several={"a": torch.ones(1)}, scalar=torch.tensor(1.0))

    for path, given in [("value", {"rows": slice(1)}), ("several", {"obj_out": torch.ones(1)}), ("scalar", {"rows": slice(1)})]:
        with pytest.raises(InvalidArgumentError, match="rows"):
            snapshot.read_object(f"state/{path}", **given)


# Into memory of the caller's


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(6, 4),
        torch.zeros(4, 6).t(),
        torch.zeros(6, 8)[:, ::2],
        torch.nn.Parameter(torch.zeros(6, 4)),
        torch.zeros(6, 4, requires_grad=True),
        torch.zeros(1, 6, 4, 1).squeeze(),
    ],
    ids=["contiguous", "transposed", "strided", "parameter", "gradient", "view"],
)
def test_a_tensor_is_read_into_the_callers(taken: Any, out: torch.Tensor) -> None:
    """The tensor that was given is filled and given back, whatever its strides; its flags stay."""
    expected = torch.randn(6, 4)
    flags = (out.data_ptr(), out.stride(), out.requires_grad, out.is_leaf)
    found = taken(weight=expected).read_object("state/weight", obj_out=out)

    assert out is found
    assert torch.equal(expected, out)
    assert flags == (out.data_ptr(), out.stride(), out.requires_grad, out.is_leaf)


def test_rows_are_read_into_the_callers_tensor(taken: Any) -> None:
    """What is beside the target stays."""
    whole = torch.zeros(10, 2**10, dtype=torch.int32)
    taken(big=BIG).read_object("state/big", obj_out=whole[2:5], rows=slice(254, 257))

    assert torch.equal(BIG[254:257], whole[2:5])
    assert 0 == int(whole[:2].abs().sum() + whole[5:].abs().sum())


def test_an_array_is_read_into_the_callers(taken: Any) -> None:
    """NumPy arrays of the same dtype and shape, also by rows."""
    expected, out = np.arange(12, dtype=">f8").reshape(4, 3), np.zeros((4, 3), ">f8")
    snapshot = taken(array=expected)

    assert out is snapshot.read_object("state/array", obj_out=out)
    assert_same(expected, out)
    part = np.zeros((2, 3), ">f8")
    snapshot.read_object("state/array", obj_out=part, rows=slice(1, 3))
    assert_same(expected[1:3], part)


def _read_only() -> np.ndarray:
    array = np.zeros((6, 4), np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("path", "out"),
    [
        ("tensor", torch.zeros(4, 6)),
        ("tensor", torch.zeros(6, 4, dtype=torch.float64)),
        ("tensor", torch.zeros(1, 4).expand(6, 4)),
        ("tensor", torch.zeros(30).as_strided((6, 4), (1, 1))),
        ("tensor", torch.zeros(6, 4, device="meta")),
        ("tensor", np.zeros((6, 4), np.float32)),
        ("tensor", [0.0]),
        ("array", np.zeros((4, 6), np.float32)),
        ("array", np.zeros((6, 4), np.float64)),
        ("array", np.zeros((6, 8), np.float32)[:, ::2]),
        ("array", _read_only()),
        ("array", torch.zeros(6, 4)),
    ],
)
def test_targets_that_do_not_fit_are_refused_untouched(taken: Any, path: str, out: Any) -> None:
    """Other shapes, dtypes and kinds, and memory that cannot be written element by element, are an error that names both."""
    with pytest.raises(RestoreMismatchError, match=rf"'state/{path}' needs .* of dtype .* and shape \(6, 4\)"):
        taken(tensor=torch.ones(6, 4), array=np.ones((6, 4), np.float32)).read_object(f"state/{path}", obj_out=out)
    assert not getattr(out, "is_meta", False) or out.shape == (6, 4)
    assert getattr(out, "is_meta", False) or not np.asarray(out).any()


def test_a_target_of_other_rows_is_refused(taken: Any) -> None:
    """With ``rows`` the target has their number of rows."""
    with pytest.raises(RestoreMismatchError, match=r"shape \(2, 4\)"):
        taken(tensor=torch.ones(6, 4)).read_object("state/tensor", obj_out=torch.zeros(6, 4), rows=slice(2))


# Only what is needed


def _counted(place: Path) -> tuple[Snapshot, list[tuple[int, int]]]:
    storage = _CountingStorage(str(place))
    snapshot = Snapshot(place)
    snapshot._storage = storage
    assert len(snapshot.keys()) > 0
    storage.ranges.clear()
    return snapshot, storage.ranges


def _bytes_of(ranges: list[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in ranges)


@pytest.mark.parametrize("kind", ["contiguous", "transposed", "cast"])
def test_what_the_page_cache_holds_is_read_from_it(place: Path, kind: str) -> None:
    """By whatever way the bytes go; but who verifies hears of the disk."""
    big = torch.randn(1024, 1024)
    Snapshot.take(place, {"state": StateDict(big=big)})
    live = torch.zeros(1024, 1024, dtype=torch.float64 if kind == "cast" else torch.float32)
    live = live.t() if kind == "transposed" else live
    snapshot, _ = _counted(place)
    storage = snapshot._storage
    assert isinstance(storage, _CountingStorage)
    for path in place.glob("*.safetensors"):
        path.read_bytes()

    snapshot.restore({"state": StateDict(big=live)}, cast=kind == "cast")
    assert torch.equal(big, live.to(torch.float32))
    assert _bytes_of(storage.cached_ranges) >= big.nbytes

    storage.cached_ranges.clear()
    snapshot.verify()
    assert [] == storage.cached_ranges


@pytest.mark.parametrize(
    ("rows", "blocks"), [(slice(0, 1), 1), (slice(255, 257), 2), (slice(512, 768), 1), (slice(700, 1500), 4), (slice(4, 4), 0)]
)
def test_of_a_slice_only_its_blocks_are_read(taken: Any, place: Path, rows: slice, blocks: int) -> None:
    """Each block is read once, and none that holds no wanted row."""
    taken(before=torch.zeros(5, 999), big=BIG, after=torch.zeros(2**20))
    snapshot, ranges = _counted(place)
    assert torch.equal(BIG[rows], snapshot.read_object("state/big", rows=rows))

    (entry,) = snapshot.entries("state/big")
    assert isinstance(entry, TensorEntry)
    start = entry.boxes[0].offset
    assert {(read - start) // BLOCK_BYTES for read, _ in ranges} <= set(
        range(rows.start * 4096 // BLOCK_BYTES, -(-rows.stop * 4096 // BLOCK_BYTES))
    )
    assert blocks * BLOCK_BYTES <= _bytes_of(ranges) <= blocks * BLOCK_BYTES + 2 * 4096


def test_of_one_entry_only_its_bytes_are_read(taken: Any, place: Path) -> None:
    """A small tensor between large ones costs a page, and a value of the manifest nothing."""
    taken(a=torch.zeros(2**20), small=torch.ones(10), z=torch.zeros(2**20), value=3)
    snapshot, ranges = _counted(place)
    snapshot.read_object("state/small")
    assert 40 <= _bytes_of(ranges) <= 2 * 4096
    ranges.clear()
    assert 3 == snapshot.read_object("state/value")
    assert [] == ranges


def test_damage_elsewhere_does_not_keep_an_entry_from_being_read(taken: Any, place: Path) -> None:
    """With every other block of the file damaged, the rows of a whole block are still read; those of a damaged one are not."""
    snapshot = taken(big=BIG)
    (entry,) = snapshot.entries("state/big")
    assert isinstance(entry, TensorEntry)
    (file,) = place.glob("state-*.safetensors")
    file.chmod(0o644)
    with file.open("r+b") as handle:
        for block in [0, 1, 2, 4, 5, 6, 7, 8]:
            handle.seek(entry.boxes[0].offset + block * BLOCK_BYTES + 77)
            handle.write(b"\xff")

    assert torch.equal(BIG[768:1024], snapshot.read_object("state/big", rows=slice(768, 1024)))
    with pytest.raises(SnapshotCorruptError, match=r"'state/big' is damaged.* of file 'state-00001"):
        snapshot.read_object("state/big", rows=slice(1023, 1025))
    assert 0xFF == snapshot.read_object("state/big", verify=False).view(-1).view(torch.uint8)[77]


def test_several_threads_read_one_snapshot(taken: Any) -> None:
    """Each gets what it asked for, whatever the others read and however long they take."""
    tensors = {f"x{number}": torch.full((300_000,), float(number)) for number in range(12)}
    snapshot = taken(**tensors)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda name: (name, snapshot.read_object(f"state/{name}")), [*tensors, *reversed(tensors)]))

    assert 24 == len(found)
    assert all(torch.equal(tensors[name], value) for name, value in found)


def test_reading_onto_a_device_that_holds_nothing_is_refused(taken: Any) -> None:
    """``device="meta"`` would give tensors without values."""
    with pytest.raises(InvalidArgumentError, match="meta"):
        taken(a=torch.ones(1)).read_object("state/a", device="meta")


def test_a_lone_unsupported_value_is_no_snapshot(place: Path) -> None:
    """A take that was refused leaves nothing to read."""
    with pytest.raises(UnsupportedValueError):
        Snapshot.take(place, {"state": StateDict(a=torch.ones(1, device="meta"))})
    with pytest.raises(FileNotFoundError, match="no snapshot at"):
        Snapshot(place).keys()
