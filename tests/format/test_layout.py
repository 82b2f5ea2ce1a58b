"""Layout: data files that any reader of safetensors takes, every byte's place known beforehand."""

from __future__ import annotations

import json
import math

import hypothesis.strategies as st
import pytest
from hypothesis import given
from safetensors import deserialize

from expstate.format import layout
from expstate.format.layout import BYTES, PAGE_BYTES, DataFile, Source, lay_out
from expstate.format.names import FileNamer
from expstate.state.tensors import ITEM_SIZES

LARGE = 2**40


def lay(sources: list[Source], *, target: int = LARGE, aliases: list[tuple[str, str]] | None = None) -> list[DataFile]:
    return lay_out("model", sources, aliases or [], FileNamer("3f9a2c71"), target)


def source(path: str, *shape: int, dtype: str = "float32") -> Source:
    return Source(path, dtype, shape, ITEM_SIZES[dtype])


def header_of(file: DataFile) -> dict[str, dict[str, object]]:
    return dict(json.loads(file.header[8:]))


SOURCES = st.lists(
    st.tuples(st.sampled_from(["bool", "uint8", "bfloat16", "float32", "float64", "complex128"]), st.lists(st.integers(0, 40), max_size=3)),
    min_size=1,
    max_size=20,
)


@given(SOURCES, st.sampled_from([64, 1000, 4096, LARGE]))
def test_files_are_tiled_and_read_by_safetensors(drawn: list[tuple[str, list[int]]], target: int) -> None:
    """Boxes follow each other without holes, the header ends on a page, and the real library accepts every file."""
    sources = [source(f"model/{number}", *shape, dtype=dtype) for number, (dtype, shape) in enumerate(drawn)]
    files = lay(sources, target=target)
    assert sum(math.prod(item.shape) * item.itemsize for item in sources) == sum(box.nbytes for file in files for box in file.boxes)
    for file in files:
        assert 0 == len(file.header) % PAGE_BYTES
        assert len(file.header) - 8 == int.from_bytes(file.header[:8], "little")
        position = len(file.header)
        for box in file.boxes:
            assert position == box.offset
            position += box.nbytes
        assert file.size == position
        assert len(file.boxes) == len(deserialize(file.header + bytes(file.size - len(file.header))))


@given(st.integers(1, 50), st.integers(1, 9), st.integers(8, 400))
def test_a_large_tensor_is_cut_into_runs_of_rows(rows: int, columns: int, target: int) -> None:
    """The parts of a cut tensor are its rows in order, each part named by its first row."""
    files = lay([source("model/w", rows, columns)], target=target)
    boxes = [box for file in files for box in file.boxes]
    if len(boxes) == 1:
        assert boxes[0].rows is None or rows == boxes[0].rows[1]
        return
    position = 0
    for file, box in zip(files, boxes, strict=True):
        assert box.rows is not None
        assert (position, position * columns * 4) == (box.rows[0], box.first_byte)
        assert f"w#{position}" in header_of(file)
        position = box.rows[1]
    assert rows == position


def test_whole_pages_come_first_then_larger_items() -> None:
    """Every tensor is aligned to its items for whoever maps the file."""
    sources = [source("model/a", 3, dtype="uint8"), source("model/b", 1024), source("model/c", 5, dtype="float64"), source("model/d", 2)]
    (file,) = lay(sources)
    assert [1, 2, 3, 0] == [box.source for box in file.boxes]
    assert all(box.offset % sources[box.source].itemsize == 0 for box in file.boxes)


def test_names_are_those_of_the_state_dict() -> None:
    """Escapes of paths are undone where the name stays distinct; reserved and repeated names are made distinct."""
    sources = [source("model/a%2Fb", 1), source("model/__metadata__", 1), source("model/x/y", 1), source("model/x%2Fy", 1)]
    (file,) = lay(sources)
    assert {"__metadata__", "a/b", "__metadata__%", "x/y", "x%2Fy"} == set(header_of(file))


def test_aliases_stand_in_the_metadata() -> None:
    """Tied tensors are named as safetensors.torch.load_model looks for them."""
    (file,) = lay([source("model/embedding", 2)], aliases=[("model/head", "model/embedding")])
    assert {"format": "pt", "head": "embedding"} == header_of(file)["__metadata__"]


def test_a_new_file_begins_before_a_header_grows_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers refuse headers beyond their limit, so many small tensors make several files."""
    monkeypatch.setattr(layout, "MAX_HEADER_BYTES", 5_000)
    files = lay([source(f"model/{number}", 1) for number in range(100)])
    assert len(files) > 5
    assert all(len(file.header) <= 8192 for file in files)


def test_what_is_bytes_to_torch_is_never_cut() -> None:
    """Arrays of other dtypes have rows that the layout knows nothing of."""
    (file,) = lay([Source("model/names", BYTES, (1000,), 1)], target=64)
    assert [(1000, None)] == [(box.nbytes, box.rows) for box in file.boxes]


def test_a_key_without_elements_has_a_file_that_says_so() -> None:
    """Empty tensors are in the header and take no bytes."""
    (file,) = lay([source("model/empty", 0, 3)])
    assert ([0, 3], len(file.header)) == (header_of(file)["empty"]["shape"], file.size)
