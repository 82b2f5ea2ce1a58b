"""Copies are the same snapshot, byte for byte, or there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from expstate import Snapshot, StateDict, settings
from expstate.errors import SnapshotCorruptError, SnapshotExistsError, SnapshotWriteError, UnsafeFileError
from expstate.settings import MIB
from expstate.storage.local import LocalStorage
from expstate.testing import FaultyStorage

from .crashes import EARLIER, PLACE, assert_clean, found_at, prepare


def contents(folder: Path) -> dict[str, bytes]:
    """What is in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    prepare(tmp_path, "copy")
    return tmp_path


def damage(path: Path, offset: int) -> None:
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("budget", [2 * MIB, 64 * MIB])
def test_every_byte_is_copied(tmp_path: Path, direct: bool, budget: int) -> None:
    """Tensors in several windows, several data files, digests in a file of their own, objects, notes that came later."""
    state = {
        "large": StateDict(table=torch.arange(66 * MIB, dtype=torch.uint8), bias=torch.ones(3)),
        "empty": StateDict(nothing=torch.empty(0), step=3),
        "cut": StateDict(rows=torch.arange(3 * MIB // 4, dtype=torch.float32).view(-1, 16)),
    }
    with settings.override(data_file_bytes=2 * MIB if budget > 2 * MIB else 128 * MIB, direct_io=direct):
        source = Snapshot.take(tmp_path / "source", state)
        (tmp_path / "source" / "annotations.json").write_text('{"tags": ["best"]}')
        (tmp_path / "source" / "notes.txt").write_text("not of the snapshot")
        copied = source.copy(tmp_path / "copy", memory_budget_bytes=budget)

    expected = contents(tmp_path / "source")
    del expected["notes.txt"]
    assert expected == contents(tmp_path / "copy")
    assert copied.id == source.id
    assert copied.verify().ok


@pytest.mark.parametrize("where", ["header", "tensor"])
def test_a_damaged_snapshot_is_not_copied(root: Path, where: str) -> None:
    """Neither where the damage is in a tensor, nor in a header, which only other tools read."""
    record = Snapshot(root / EARLIER).manifest.files[0]
    damage(root / EARLIER / record.name, 20 if where == "header" else record.size - 1)
    with pytest.raises(SnapshotCorruptError, match=record.name):
        Snapshot(root / EARLIER).copy(root / PLACE)

    assert not (root / PLACE).exists()


def test_files_that_are_in_the_way_are_left_alone(root: Path) -> None:
    """They may be a copy that someone else makes, by other means."""
    record = Snapshot(root / EARLIER).manifest.files[1]
    (root / PLACE).mkdir()
    (root / PLACE / record.name).write_bytes(b"theirs")
    with pytest.raises(SnapshotExistsError, match=record.name):
        Snapshot(root / EARLIER).copy(root / PLACE)

    assert {record.name: b"theirs"} == contents(root / PLACE)


def test_a_copy_over_itself_is_refused_and_harmless(root: Path) -> None:
    snapshot = Snapshot(root / EARLIER)
    with pytest.raises(SnapshotExistsError):
        snapshot.copy(root / EARLIER)
    with pytest.raises(SnapshotExistsError):
        snapshot.copy(snapshot.copy(root / PLACE).path)

    assert [1, 1] == [found_at(root / EARLIER), found_at(root / PLACE)]
    assert_clean(root)


def test_annotations_that_are_no_file_are_not_followed(root: Path) -> None:
    """They are read before anything is committed."""
    os.mkfifo(root / EARLIER / "annotations.json")
    with pytest.raises(UnsafeFileError, match="annotations"):
        Snapshot(root / EARLIER).copy(root / PLACE)
    (root / EARLIER / "annotations.json").unlink()

    assert found_at(root / PLACE) is None
    assert_clean(root)


@pytest.mark.parametrize("number", [1, 2])
def test_a_write_that_was_lost_is_noticed(root: Path, number: int) -> None:
    storage = FaultyStorage(LocalStorage(str(root / PLACE)))
    storage.lose("write", number)
    with pytest.raises(SnapshotWriteError, match="lost a write"):
        Snapshot(root / EARLIER).copy(storage.url)

    assert found_at(root / PLACE) is None
    assert_clean(root)
