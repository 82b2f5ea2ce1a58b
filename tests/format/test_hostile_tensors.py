"""Tensors from a stranger: shapes, boxes, digests and indices are checked before memory is asked for or anything is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate.errors import (
    ExpstateError,
    ManifestError,
    RestoreMismatchError,
    SnapshotCorruptError,
)
from expstate.format import manifest as manifests
from tests.format.forging import (
    Forged,
    app_state,
    digest_text,
    everything,
    guarded,
    little_memory,
    refused,
)

WEIGHT = "model/first.weight"
pytestmark = pytest.mark.usefixtures("imported")


# H7 to H10: shapes and boxes


@pytest.mark.parametrize("path", [WEIGHT, "extra/array", "extra/cut", "extra/table", "call/call"])
def test_a_huge_entry_of_a_small_file_is_refused(forged: Forged, path: str) -> None:
    """What is larger than its file is refused before any memory is asked for (H7)."""
    entry = forged.entry(path)
    if entry[0] == "object":
        entry[3] = 10**13
    else:
        entry[3] = [10**13]
    with little_memory():
        refused(forged, ManifestError, repr(path))


@pytest.mark.parametrize("path", [WEIGHT, "extra/array"])
@pytest.mark.parametrize("sizes", [[2**40], [10**13], [2**20, 2**20]])
def test_a_file_that_is_smaller_than_the_manifest_says_is_not_believed(forged: Forged, tmp_path: Path, path: str, sizes: list[int]) -> None:
    """Where the manifest is sound in itself, the size of the file is looked at before any memory is asked for (H7, H12)."""
    entry, box = forged.entry(path), forged.box(path)
    nbytes = math.prod(sizes) * (8 if path == "extra/array" else 4)
    record = forged.document["files"][box[0]]
    # Behind everything else in the file, with a table of digests behind that.
    box[1] = record[1]
    entry[3] = sizes
    box[3] = [box[0], box[1] + nbytes]
    record[1] += nbytes + -(-nbytes // manifests.BLOCK_BYTES) * 32
    forged.write()
    with little_memory():
        found = everything(forged.folder, tmp_path / "copies")

    assert any("bytes" in str(damage) for damage in found["verify"].damages)
    for action in ("restore", "atomic restore", "copy", "read_object" if path == WEIGHT else "key"):
        error = found[action]
        assert isinstance(error, SnapshotCorruptError | RestoreMismatchError), f"{action} gave {error!r}"
        assert forged.file(path).name in str(error) or repr(path) in str(error)


@pytest.mark.parametrize(
    "shape",
    [[-1], [3, -3], [-3, -3], [2**40, 2**40], [2**62], [2**63], [2**64], [10**4000], [0, 2**63], [0, -1], [2**62, 0, 2**62], [1] * 65],
    ids=lambda shape: str(shape)[:20],
)
def test_a_shape_that_is_not_possible_is_refused(forged: Forged, shape: list[int]) -> None:
    """Negative sizes, products that overflow and too many dimensions (H8)."""
    forged.entry(WEIGHT)[3] = shape

    refused(forged, ManifestError, "" if max(map(abs, shape)) >= 2**63 else repr(WEIGHT))


@pytest.mark.parametrize("size", [True, False, 3.5, "3", None, [3], {}, math.inf])
def test_a_size_that_is_no_integer_is_refused(forged: Forged, size: Any) -> None:
    """A size is an integer, and nothing that Python would take for one (H8)."""
    forged.entry(WEIGHT)[3] = [size, 3]

    refused(forged, ManifestError, "entries" if size != math.inf else "")


def test_there_are_no_strides_to_forge(forged: Forged, tmp_path: Path) -> None:
    """A tensor has as many bytes as it has elements: one that is expanded does not fit its file (H9)."""
    forged.entry(WEIGHT)[3] = [10**12, 9]
    with little_memory():
        refused(forged, ManifestError, repr(WEIGHT))


def _offset(value: int) -> Callable[[Forged], None]:
    def edit(forged: Forged) -> None:
        forged.box(WEIGHT)[1] = value

    return edit


def _file(value: int) -> Callable[[Forged], None]:
    def edit(forged: Forged) -> None:
        forged.box(WEIGHT)[0] = value

    return edit


def _over_another(forged: Forged) -> None:
    forged.box(WEIGHT)[1] = forged.box("model/first.bias")[1]


def _over_another_by_one(forged: Forged) -> None:
    forged.box("model/first.bias")[1] -= 1


def _over_digests(forged: Forged) -> None:
    table = forged.box("extra/table")
    forged.entry("extra/half")[4] = [[*table[3], forged.box("extra/half")[2]]]


@pytest.mark.parametrize(
    "edit",
    [
        _offset(0),
        _offset(8),
        _offset(4095),
        _offset(-4096),
        _offset(10**9),
        _offset(2**63),
        _offset(2**70),
        _file(-1),
        _file(99),
        _file(2**40),
        _over_another,
        _over_another_by_one,
        _over_digests,
    ],
)
def test_a_box_that_is_not_in_its_file_is_refused(forged: Forged, edit: Callable[[Forged], None]) -> None:
    """Boxes lie behind the header, inside the file and not over each other (H10)."""
    edit(forged)

    refused(forged, ManifestError, "")


def _starts(number: int, starts: Any, sizes: Any) -> Callable[[Forged], None]:
    def edit(forged: Forged) -> None:
        forged.box("extra/cut", number)[4:6] = [starts, sizes]

    return edit


def _without_one(forged: Forged) -> None:
    del forged.entry("extra/cut")[4][1]


def _without_any(forged: Forged) -> None:
    forged.entry("extra/cut")[4] = []


def _twice(forged: Forged) -> None:
    boxes = forged.entry("extra/cut")[4]
    boxes[1] = [*boxes[2][:4], *boxes[2][4:]]


def _one_too_many(forged: Forged) -> None:
    forged.entry("extra/cut")[4].append(forged.box(WEIGHT))


@pytest.mark.parametrize(
    "edit",
    [
        _starts(1, [0, 0], [1, 100_000]),
        _starts(1, [2, 0], [1, 100_000]),
        _starts(1, [3, 0], [1, 100_000]),
        _starts(1, [-1, 0], [1, 100_000]),
        _starts(1, [1, 1], [1, 100_000]),
        _starts(1, [1], [1]),
        _starts(1, [1, 0, 0], [1, 100_000, 1]),
        _starts(1, None, [1, 100_000]),
        _starts(1, [1, 0], None),
        _starts(1, None, None),
        _starts(1, [1, 0], [1, 99_999]),
        _starts(1, [1, 0], [-1, -100_000]),
        _starts(1, [0, 0], [0, 100_000]),
        _starts(1, [1, 0], [2**40, 2**40]),
        _starts(1, [True, 0], [1, 100_000]),
        _starts(1, [1.0, 0.5], [1, 100_000]),
        _without_one,
        _without_any,
        _twice,
        _one_too_many,
    ],
)
def test_boxes_that_do_not_tile_their_tensor_are_refused(forged: Forged, edit: Callable[[Forged], None]) -> None:
    """The boxes cover each element of the shape once (H10)."""
    edit(forged)

    refused(forged, ManifestError, "")


def test_boxes_that_tile_a_shape_in_any_way_are_believed(forged: Forged) -> None:
    """Shards need not be rows; a check that refused other tilings would lose snapshots."""
    box = forged.box(WEIGHT)
    data = forged.file(WEIGHT).read_bytes()
    pieces = [([0, 0], [1, 2]), ([0, 2], [3, 1]), ([1, 0], [2, 2]), ([0, 3], [3, 0])]
    boxes, position = [], box[1]
    for starts, sizes in pieces:
        nbytes = math.prod(sizes) * 4
        boxes.append([box[0], position, digest_text(data[position : position + nbytes]), None, starts, sizes])
        position += nbytes
    forged.entry(WEIGHT)[4] = boxes
    flat = torch.frombuffer(bytearray(data[box[1] : position]), dtype=torch.float32)
    snapshot = forged.write()

    assert snapshot.verify().ok
    expected = torch.stack([torch.cat([flat[0:2], flat[2:3]]), torch.cat([flat[5:7], flat[3:4]]), torch.cat([flat[7:9], flat[4:5]])])
    assert torch.equal(expected, snapshot.read_object(WEIGHT).detach())


@pytest.mark.timeout(60)
def test_a_tensor_in_very_many_boxes_is_checked_in_good_time(forged: Forged) -> None:
    """Columns that all share their rows make the check for overlaps no slower than the reading of the manifest."""
    count = 20_000
    digest = forged.box("extra/table")[2]
    first = forged.box("extra/table")
    forged.entry("extra/table")[3] = [1, count]
    forged.entry("extra/table")[4] = [[first[0], first[1] + 4 * n, digest, None, [0, n], [1, 1]] for n in range(count)]
    snapshot = forged.write()

    assert count == len(next(entry for entry in snapshot.entries() if entry.path == "extra/table").boxes)


# Digests


@pytest.mark.parametrize("digest", ["", "AAAA", "A" * 88, "!" * 44, 7, None, [], "é" * 44])
@pytest.mark.parametrize("where", ["box", "header"])
def test_a_digest_of_another_length_is_refused(forged: Forged, where: str, digest: Any) -> None:
    """A digest is 32 bytes: no shorter one, which would be easy to meet, is believed."""
    if where == "box":
        forged.box(WEIGHT)[2] = digest
    else:
        forged.document["files"][0][3] = digest

    refused(forged, ManifestError, "")


@pytest.mark.parametrize(
    ("path", "blocks"),
    [
        ("extra/inline", None),
        ("extra/inline", ""),
        ("extra/inline", "A" * 44),
        ("extra/inline", "A" * 128),
        ("extra/inline", [0, 0]),
        ("extra/inline", [-1, 0]),
        ("extra/inline", [0, 10**12]),
        ("extra/inline", [0]),
        ("extra/inline", 5),
        (WEIGHT, [0, 4096]),
        (WEIGHT, "A" * 44),
    ],
)
def test_digests_of_blocks_that_are_missing_are_refused(forged: Forged, path: str, blocks: Any) -> None:
    """Each block has its digest, in the manifest or where it says, and none that it does not need."""
    forged.box(path)[3] = blocks

    refused(forged, ManifestError, "")


@pytest.mark.parametrize("path", ["extra/inline", "extra/table"])
def test_digests_of_blocks_that_are_not_those_of_the_box_are_damage(forged: Forged, tmp_path: Path, path: str) -> None:
    """Digests of blocks are believed only if the digest of the box, which the manifest seals, is theirs."""
    other = "A" * 84 + "AA==" if path == "extra/inline" else [forged.box(path)[0], forged.box(path)[1]]
    forged.box(path)[3] = other
    if path == "extra/table":
        forged.box(path)[1] += 128  # so that they do not lie over each other
        forged.document["files"][forged.box(path)[0]][1] += 128
        file = forged.file(path)
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data + bytes(128))
    forged.write()
    found = everything(forged.folder, tmp_path / "copies")

    assert [path] == sorted({damage.entry for damage in found["verify"].damages})
    for action in ("restore", "atomic restore", "key", "copy"):
        assert isinstance(found[action], SnapshotCorruptError) or path in str(found[action]), f"{action} gave {found[action]!r}"
        assert path in str(found[action])


# What the bytes say


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [[3, -1], [-(2**62), 0], [0, 2**62]])
def test_indices_of_a_sparse_tensor_are_not_believed(forged: Forged, number: list[int]) -> None:
    """Indices out of range, with every digest right, are found when the tensor is built, not when it is used (H10)."""
    path = forged.file("extra/sparse/indices")
    box = forged.box("extra/sparse/indices")
    data = bytearray(path.read_bytes())
    indices = torch.tensor([[0, number[0]], [1, number[1]]])
    data[box[1] : box[1] + 32] = indices.numpy().tobytes()
    path.unlink()
    path.write_bytes(data)
    box[2] = digest_text(bytes(data[box[1] : box[1] + 32]))
    snapshot = forged.write()
    with guarded(forged.folder), pytest.raises(ManifestError, match="extra/sparse"):
        snapshot.read_object("extra/sparse")
    fresh = app_state()
    with guarded(forged.folder), pytest.raises(ExpstateError, match="extra/sparse"):
        snapshot.restore(fresh)
    fresh["extra"]["sparse"].to_dense()  # in memory or not, it can be used


@pytest.mark.parametrize("name", ["crow_indices", "col_indices"])
def test_indices_of_compressed_rows_are_not_believed(forged: Forged, name: str) -> None:
    """The same for compressed layouts, whose kernels would read where the indices point (H10)."""
    path, box = forged.file(f"extra/rows/{name}"), forged.box(f"extra/rows/{name}")
    data = bytearray(path.read_bytes())
    data[box[1] : box[1] + 24] = torch.tensor([0, 2**40, -5]).numpy().tobytes()
    path.unlink()
    path.write_bytes(data)
    box[2] = digest_text(bytes(data[box[1] : box[1] + (32 if name == "crow_indices" else 24)]))
    snapshot = forged.write()
    with guarded(forged.folder), pytest.raises(ManifestError, match="extra/rows"):
        snapshot.read_object("extra/rows")
