"""What has not changed is found by digest or fingerprint, and no more is digested than is needed to tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.engine import inplace
from expstate.engine.fingerprint import Fingerprints
from expstate.engine.unchanged import LiveBox

MIB = 2**20


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of bytes that are digested to compare them."""
    found: list[int] = []
    digests = inplace.block_digests
    monkeypatch.setattr(inplace, "block_digests", lambda data: found.append(len(data)) or digests(data))
    return found


@pytest.fixture
def _as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies on the host is compared as if it lay on an accelerator."""
    monkeypatch.setattr(LiveBox, "is_on_device", property(lambda _: True))


def take(place: Path, values: dict[str, torch.Tensor], **options: Any) -> Snapshot:
    Snapshot.take(place, {"state": StateDict(values)}, **options)
    return Snapshot(place)


def written(snapshot: Snapshot) -> set[str]:
    """Entries whose bytes lie beside the manifest."""
    files = {number for number, record in enumerate(snapshot.manifest.files) if not record.name.startswith("base/")}
    return {
        entry.path.partition("/")[2] for entry in snapshot.entries("*") if any(box.file in files for box in getattr(entry, "boxes", ()))
    }


def test_of_what_has_changed_in_its_first_block_no_more_is_digested(tmp_path: Path, digested: list[int]) -> None:
    """As training changes tensors: all of it. What has no counterpart of its size is not digested at all."""
    values = {f"w{number}": torch.randn(5 * MIB // 4) for number in range(3)} | {"huge": torch.randn(66 * MIB // 4)}
    first = take(tmp_path / "a", values)
    assert not digested
    for tensor in values.values():
        tensor.add_(1)
    values["new"] = torch.randn(3 * MIB // 4)
    second = take(tmp_path / "b", values, base=first, dedup=False)
    assert 4 * [MIB] == digested
    assert set(values) == written(second)


def test_what_has_not_changed_is_digested_once(tmp_path: Path, digested: list[int]) -> None:
    values = {"a": torch.randn(5 * MIB // 4 + 3), "b": torch.randn(9)}
    first = take(tmp_path / "a", values)
    take(tmp_path / "b", values, base=first)
    assert 5 * MIB + 12 + 36 == sum(digested)


def test_equal_beginnings_are_no_equal_tensors(tmp_path: Path) -> None:
    """Of tensors that differ in their last element, each is found, whatever its name."""
    values = {name: torch.zeros(3 * MIB // 4) for name in "abc"}
    for number, tensor in enumerate(values.values()):
        tensor[-1] = number
    first = take(tmp_path / "a", values)
    values = {"x": values["c"], "y": values["a"], "z": torch.zeros(3 * MIB // 4)}
    values["z"][-1] = 7
    second = take(tmp_path / "b", values, base=first)
    assert {"z"} == written(second)
    for name, tensor in values.items():
        assert torch.equal(tensor, second.read_object(f"state/{name}"))


# Fingerprints


@pytest.mark.usefixtures("_as_on_a_device")
def test_equal_fingerprints_are_believed_and_nothing_is_digested(tmp_path: Path, digested: list[int]) -> None:
    values = {f"w{number}": torch.randn(3 * MIB // 4) for number in range(4)} | {
        "large": torch.randn(70 * MIB // 4),
        "cut": torch.randn(9, 9),
    }
    first = take(tmp_path / "a", values)
    key = first.manifest.fingerprint_key
    assert key is not None
    values["w2"][5] += 1
    values = {"renamed": values.pop("w1"), **values, "shape": values["w0"].view(3, -1).clone()}
    second = take(tmp_path / "b", values, base=first)

    assert not digested
    assert {"w2", "shape"} == written(second)
    first.delete()
    assert second.verify().ok
    third = take(tmp_path / "c", values, base=second)
    assert set() == written(third)
    assert key == third.manifest.fingerprint_key
    for name, tensor in values.items():
        assert torch.equal(tensor, third.read_object(f"state/{name}"))


@pytest.mark.usefixtures("_as_on_a_device")
def test_fingerprints_are_looked_at_only_if_they_are_trusted(tmp_path: Path, digested: list[int]) -> None:
    values = {"a": torch.randn(3 * MIB // 4)}
    first = take(tmp_path / "a", values)
    second = take(tmp_path / "b", values, base=first, trust_fingerprint=False)
    assert 3 * MIB == sum(digested)
    assert set() == written(second)
    assert second.manifest.fingerprint_key is None
    third = take(tmp_path / "c", values, base=second)  # it has none
    assert 6 * MIB == sum(digested)
    assert set() == written(third)
    fourth = take(tmp_path / "d", values, base=third)
    assert 6 * MIB == sum(digested)
    assert set() == written(fourth)


@pytest.mark.usefixtures("_as_on_a_device")
def test_rows_of_a_tensor_have_fingerprints_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPSTATE_DATA_FILE_BYTES", str(MIB))
    values = {"rows": torch.randn(50, 30_000), "strided": torch.randn(30_000, 50).t()}
    first = take(tmp_path / "a", values)
    values["rows"][49] += 1
    values["strided"][0] += 1
    second = take(tmp_path / "b", values, base=first)
    beside = sum(record.size for record in second.manifest.files if not record.name.startswith("base/"))
    assert 0 < beside < 3 * MIB
    for name, tensor in values.items():
        assert torch.equal(tensor, second.read_object(f"state/{name}"))


@pytest.mark.usefixtures("_as_on_a_device")
def test_equal_fingerprints_of_one_take_are_stored_once(tmp_path: Path) -> None:
    one = torch.randn(MIB)
    snapshot = take(tmp_path / "a", {"a": one, "b": one.clone(), "c": one + 1}, dedup=True)
    assert sum(record.size for record in snapshot.manifest.files) < 9 * MIB
    assert torch.equal(one, snapshot.read_object("state/b"))


@pytest.mark.usefixtures("_as_on_a_device")
def test_fingerprints_of_another_key_say_nothing(tmp_path: Path, digested: list[int]) -> None:
    """Of two bases with keys of their own, those of the second are compared by digest."""
    one, two = {"a": torch.randn(3 * MIB // 4)}, {"b": torch.randn(3 * MIB // 4)}
    Snapshot.take(tmp_path / "a", {"one": StateDict(one)})
    Snapshot.take(tmp_path / "b", {"two": StateDict(two)})
    third = Snapshot.take(tmp_path / "c", {"one": StateDict(one), "two": StateDict(two)}, base="auto")
    assert set() == written(Snapshot(third.path))
    assert 3 * MIB == sum(digested)


@pytest.mark.usefixtures("_as_on_a_device")
def test_what_a_device_has_no_room_to_compute_is_digested(tmp_path: Path, digested: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A full device is no reason to fail, and no reason to believe anything."""
    values = {name: torch.randn(2 * MIB // 4) for name in "abc"}
    first = take(tmp_path / "a", values)
    add = Fingerprints.add

    def sometimes(self: Fingerprints, tensor: torch.Tensor) -> int:
        if tensor.data_ptr() == values["b"].data_ptr():
            raise torch.OutOfMemoryError
        return add(self, tensor)

    monkeypatch.setattr(Fingerprints, "add", sometimes)
    values["c"] += 1
    second = take(tmp_path / "b", values, base=first)
    assert {"c"} == written(second)
    assert 2 * MIB == sum(digested)
    assert ("state/c",) == first.diff({"state": StateDict(values)}).changed
    assert 4 * MIB == sum(digested)
