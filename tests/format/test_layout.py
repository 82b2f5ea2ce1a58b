"""Data files: valid safetensors files whose bytes are all accounted for before any is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from expstate.format import layout, names
from expstate.format.layout import BYTES, PAGE_BYTES, DataFile, Source, lay_out
from expstate.state.tensors import DTYPES, ITEM_SIZES

TOKEN = "3f9a2c71"  # noqa: S105 - no secret: the id of an attempt


def source(path: str, *shape: int, dtype: str = "float32") -> Source:
    return Source(path, dtype, shape, 1 if dtype == BYTES else ITEM_SIZES[dtype])


def laid_out(sources: list[Source], target_bytes: int = 2**40, aliases: Any = (), first: int = 0) -> list[DataFile]:
    return lay_out("model", sources, aliases, names.FileNamer(TOKEN), target_bytes, first=first)


def header(file: DataFile) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.header[8:])
    return found


def tensors(file: DataFile) -> dict[str, Any]:
    return {name: field for name, field in header(file).items() if name != "__metadata__"}


def write(folder: Path, file: DataFile, fill: bytes = b"\0") -> Path:
    path = folder / file.name
    path.write_bytes(file.header + fill * (file.size - len(file.header)))
    return path


SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)
LARGE = st.tuples(st.sampled_from([1, 3, 64, 250]), st.sampled_from([1, 7, 1024]))
SOURCES = st.lists(st.tuples(st.sampled_from([*sorted(ITEM_SIZES), BYTES]), SHAPES | LARGE), max_size=12).map(
    lambda found: [Source(f"model/{n}", dtype, shape, ITEM_SIZES.get(dtype, 1)) for n, (dtype, shape) in enumerate(found)]
)
TARGETS = st.sampled_from([1, 1000, 4096, 100_000, 2**20, 2**40])


@given(SOURCES, TARGETS)
def test_every_byte_of_every_tensor_has_one_place(sources: list[Source], target_bytes: int) -> None:
    """Boxes tile each file from the end of its header to its end, and each source from its first byte to its last."""
    files = laid_out(sources, target_bytes)
    placed: dict[int, list[tuple[int, int]]] = {number: [] for number in range(len(sources))}
    for file in files:
        position = len(file.header)
        for box in file.boxes:
            assert position == box.offset
            position += box.nbytes
            placed[box.source].append((box.first_byte, box.nbytes))
        assert position == file.size
    for number, found in placed.items():
        position = 0
        for start, nbytes in sorted(found):
            assert position == start
            position += nbytes
        assert math.prod(sources[number].shape) * sources[number].itemsize == position
        assert found


@given(SOURCES, TARGETS)
def test_headers_are_whole_pages_that_say_where_the_boxes_are(sources: list[Source], target_bytes: int) -> None:
    """The length comes first, spaces fill the last page, and offsets count from the header's end, in order and without holes."""
    for file in laid_out(sources, target_bytes):
        assert 0 == len(file.header) % PAGE_BYTES
        assert len(file.header) - 8 == int.from_bytes(file.header[:8], "little")
        assert file.header[8:].rstrip(b" ").endswith(b"}")
        fields = list(tensors(file).values())
        assert [[box.offset - len(file.header), box.offset - len(file.header) + box.nbytes] for box in file.boxes] == [
            field["data_offsets"] for field in fields
        ]


@given(SOURCES, TARGETS)
def test_files_end_before_they_grow_past_the_target(sources: list[Source], target_bytes: int) -> None:
    """A file passes the target only if it holds one box alone that cannot be cut any smaller."""
    for file in laid_out(sources, target_bytes):
        held = [box for box in file.boxes if box.nbytes]
        if file.size - len(file.header) > target_bytes:
            assert 1 == len(held)
            whole = sources[held[0].source]
            rows = held[0].rows
            assert whole.dtype == BYTES or rows is None or rows[1] - rows[0] == 1


@given(SOURCES)
def test_boxes_are_aligned_for_whoever_maps_the_file(sources: list[Source]) -> None:
    """Each tensor begins at a multiple of its item size."""
    for file in laid_out(sources):
        for box in file.boxes:
            itemsize = sources[box.source].itemsize
            assert 0 == box.offset % (itemsize & -itemsize)


@given(SOURCES, TARGETS)
def test_what_the_manifest_says_of_a_file_is_true(sources: list[Source], target_bytes: int) -> None:
    """Size, header length and number of blocks follow from the layout."""
    for file in laid_out(sources, target_bytes):
        assert (file.name, file.size, len(file.header)) == (file.record.name, file.record.size, file.record.header_bytes)
        assert 32 == len(file.record.header_digest)
        assert [math.ceil(box.nbytes / 2**20) for box in file.boxes] == [box.block_count for box in file.boxes]


@pytest.mark.parametrize("target_bytes", [64, 1000, 2**40])
def test_the_safetensors_library_reads_what_is_laid_out(tmp_path: Path, target_bytes: int) -> None:
    """Names, dtypes, shapes and values are those of the tensors, for every dtype that the library has."""
    shapes = [(), (3,), (0, 4), (5, 2), (2, 3, 4)]
    known = sorted(layout.SAFETENSORS_DTYPES)
    sources = [source(f"model/{dtype}{number}", *shape, dtype=dtype) for dtype in known for number, shape in enumerate(shapes)]
    found: dict[str, torch.Tensor] = {}
    for file in laid_out(sources, target_bytes):
        with safe_open(write(tmp_path, file), "pt") as opened:
            assert {"format": "pt"} == opened.metadata()
            found |= {name: opened.get_tensor(name) for name in opened.keys()}
    for item in sources:
        name = item.path.removeprefix("model/")
        parts = sorted((key for key in found if key.partition("#")[0] == name), key=lambda key: int(key.partition("#")[2] or 0))
        whole = found[parts[0]] if parts == [name] else torch.cat([found[part].view(torch.uint8) for part in parts])
        assert {DTYPES[item.dtype]} == {found[part].dtype for part in parts}
        assert math.prod(item.shape) * item.itemsize == whole.nbytes
        if parts == [name]:
            assert item.shape == tuple(whole.shape)


@pytest.mark.parametrize("dtype", sorted(set(ITEM_SIZES) - set(layout.SAFETENSORS_DTYPES)))
def test_a_dtype_that_safetensors_has_not_is_stored_as_bytes(tmp_path: Path, dtype: str) -> None:
    """Its bytes are a row of U8; the manifest holds the real dtype and shape."""
    (file,) = laid_out([source("model/x", 2, 3, dtype=dtype)])

    assert {"x": {"dtype": "U8", "shape": [6 * ITEM_SIZES[dtype]], "data_offsets": [0, 6 * ITEM_SIZES[dtype]]}} == tensors(file)
    with safe_open(write(tmp_path, file), "pt") as opened:
        assert (6 * ITEM_SIZES[dtype],) == tuple(opened.get_tensor("x").shape)


def test_bytes_without_meaning_are_never_cut() -> None:
    """Nothing is known of their rows."""
    files = laid_out([source("model/x", 100_000, dtype=BYTES)], 1000)

    assert [100_000] == [box.nbytes for file in files for box in file.boxes]


def test_a_large_tensor_is_cut_by_rows() -> None:
    """Its parts are named after their first rows, each in a file of its own, none larger than the target."""
    files = laid_out([source("model/x", 10, 25), source("model/y", 3)], 350)

    names_found = [name for file in files for name in tensors(file)]
    assert ["x#0", "x#3", "x#6", "x#9", "y"] == names_found
    assert [[3, 25], [3, 25], [3, 25], [1, 25], [3]] == [field["shape"] for file in files for field in tensors(file).values()]
    assert [(0, 3), (3, 6), (6, 9), (9, 10)] == [box.rows for file in files for box in file.boxes if box.source == 0]


def test_a_row_that_is_larger_than_the_target_stays_whole() -> None:
    """A cut is made between rows and nowhere else."""
    files = laid_out([source("model/x", 3, 1000)], 10)

    assert [4000, 4000, 4000] == [box.nbytes for file in files for box in file.boxes]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1000), (0, 5), (5, 0)])
def test_what_cannot_be_cut_is_not(shape: tuple[int, ...]) -> None:
    """A single row, a number and an empty tensor keep their names."""
    files = laid_out([source("model/x", *shape)], 1)

    assert ["x"] == [name for file in files for name in tensors(file)]
    assert [None] == [box.rows for file in files for box in file.boxes]


def test_there_is_a_file_even_without_tensors(tmp_path: Path) -> None:
    """A header and nothing else is a valid file."""
    (file,) = laid_out([])

    assert file.size == len(file.header) == PAGE_BYTES
    with safe_open(write(tmp_path, file), "pt") as opened:
        assert [] == list(opened.keys())


def test_whole_pages_come_first_then_large_items() -> None:
    """Boxes of whole pages keep those behind them aligned to pages, and large items those behind them to their size."""
    sources = [
        source("model/a", 3, dtype="uint8"),
        source("model/b", 1024),
        source("model/c", 3, dtype="float64"),
        source("model/d", 5, dtype="int16"),
    ]
    (file,) = laid_out(sources)

    assert ["b", "c", "d", "a"] == list(tensors(file))


def test_sources_are_counted_from_where_the_caller_is() -> None:
    """Several keys share one numbering."""
    (file,) = laid_out([source("model/a", 1), source("model/b", 1)], first=40)

    assert [40, 41] == sorted(box.source for box in file.boxes)


# Names inside the files


def test_names_are_those_of_the_state_dict() -> None:
    """What is below the key, as the module calls it; a key that is a tensor itself is called by the key."""
    (file,) = laid_out([source("model/encoder.0.weight", 1), source("model/state/0/step", 1), source("number", 1)])

    assert {"encoder.0.weight", "state/0/step", "number"} == set(tensors(file))


def test_names_that_clash_stay_apart(tmp_path: Path) -> None:
    """An escaped slash, the library's own field and equal names all get names of their own."""
    paths = [
        "model/a%2Fb",
        "model/a/b",
        "model/a%252Fb",
        "model/__metadata__",
        "model/__metadata__%",
        "model/%empty",
        "model",
        "model/model",
    ]
    (file,) = laid_out([source(path, number + 1, dtype="uint8") for number, path in enumerate(paths)])
    found = {field["shape"][0] - 1: name for name, field in tensors(file).items()}

    assert len(paths) == len(found) == len(set(found.values()))
    assert "a/b" == found[0]
    assert "__metadata__" not in found.values()
    with safe_open(write(tmp_path, file), "pt") as opened:
        assert set(found.values()) == set(opened.keys())


@given(st.lists(st.text(st.sampled_from("ab/%2F#_5é"), min_size=1, max_size=8).map(lambda name: f"model/{name}"), unique=True, max_size=10))
def test_names_inside_a_file_are_distinct(paths: list[str]) -> None:
    """Whatever the paths are, no two tensors of a file have one name."""
    (file,) = laid_out([source(path, 1) for path in paths])

    assert len(paths) == len(tensors(file))


def test_a_name_that_looks_like_a_part_of_another_stays_apart(tmp_path: Path) -> None:
    """A tensor called ``x#2`` beside a tensor ``x`` that is cut at row 2; the part makes way."""
    files = laid_out([source("model/x", 4), source("model/x#2", 1), source("model/x#2%", 1)], 8)

    assert ["x#0", "x#2", "x#2%", "x#2%%"] == sorted(name for file in files for name in tensors(file))


def test_escapes_that_stand_for_no_text_are_left(tmp_path: Path) -> None:
    """A lone surrogate cannot be written into a header, so its escape stays."""
    (file,) = laid_out([source("model/%ED%A0%80", 1), source("model/%FF", 1)])

    assert {"%ED%A0%80", "%FF"} == set(tensors(file))


def test_aliases_are_named_in_the_first_header(tmp_path: Path) -> None:
    """Each tied name leads to the one that was kept, where ``safetensors.torch.load_model`` looks for it."""
    sources = [source("model/first.weight", 2, 2), source("model/other", 2)]
    files = laid_out(sources, 16, [("model/second.weight", "model/first.weight"), ("model/a%2Fb", "model/other")])

    assert 2 == len(files)
    assert {"format": "pt", "second.weight": "first.weight", "a/b": "other"} == header(files[0])["__metadata__"]
    assert {"format": "pt"} == header(files[1])["__metadata__"]
    with safe_open(write(tmp_path, files[0]), "pt") as opened:
        assert "first.weight" == opened.metadata()["second.weight"]


def test_the_library_loads_a_module_with_tied_weights(tmp_path: Path) -> None:
    """A data file is what ``load_model`` wants."""
    from safetensors.torch import load_model

    module = torch.nn.ModuleDict({"first": torch.nn.Linear(2, 2, bias=False), "second": torch.nn.Linear(2, 2, bias=False)})
    module["second"].weight = module["first"].weight
    (file,) = laid_out([source("model/first.weight", 2, 2)], aliases=[("model/second.weight", "model/first.weight")])
    path = tmp_path / file.name
    path.write_bytes(file.header + torch.full((4,), 7.0).numpy().tobytes())

    assert (set(), []) == load_model(module, path)
    assert [[7.0, 7.0], [7.0, 7.0]] == module["second"].weight.tolist()


# Limits


def test_a_file_ends_before_its_header_grows_too_large() -> None:
    """Other readers refuse headers beyond a size; many small tensors are spread over files."""
    with patch.object(layout, "MAX_HEADER_BYTES", 100_000):
        files = laid_out([source(f"model/layer.{number}.weight", 1) for number in range(2000)])

    assert len(files) > 1
    assert max(len(file.header) for file in files) <= 100_000 + PAGE_BYTES
    assert 2000 == sum(len(tensors(file)) for file in files)


def test_names_of_escapes_do_not_make_a_header_too_large() -> None:
    """The bound holds for names whose JSON is several times as long as they are."""
    with patch.object(layout, "MAX_HEADER_BYTES", 100_000):
        files = laid_out([source("model/" + f'{number}"\\' * 50, 1) for number in range(500)])

    assert max(len(file.header) for file in files) <= 100_000 + PAGE_BYTES


def test_one_name_that_is_longer_than_a_header_still_has_a_file() -> None:
    """A single tensor is never left out."""
    with patch.object(layout, "MAX_HEADER_BYTES", 1000):
        files = laid_out([source("model/" + "x" * 2000, 1), source("model/y", 1)])

    assert [1, 1] == [len(tensors(file)) for file in files]
