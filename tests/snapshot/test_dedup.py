"""Equal tensors are stored once where that was asked for, and come back as tensors of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from expstate import Snapshot, StateDict, settings
from expstate.engine import memory
from expstate.errors import ManifestError, MemoryBudgetError
from expstate.format.manifest import SHARED_BOXES
from expstate.format.validate import validate

MIB = 2**20


def state() -> dict[str, Any]:
    """Small and large tensors, each of which there are several of."""
    large = torch.randn(3 * MIB // 4 + 1)
    small = torch.randn(10)
    return {
        "model": StateDict(large=large, small=small, tied=small, other=torch.randn(10)),
        "ema": StateDict(large=large.clone(), small=small.clone(), as_bytes=small.view(torch.uint8).clone(), empty=torch.zeros(0)),
        "zeros": StateDict({str(number): torch.zeros(2 * MIB // 4) for number in range(20)}),
    }


def stored_bytes(snapshot: Snapshot) -> int:
    """Bytes of the data files."""
    return sum(file.stat().st_size for file in Path(snapshot.path).rglob("*.safetensors"))


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    app_state = state()
    snapshot = Snapshot.take(tmp_path / "a", app_state, dedup=True)

    assert stored_bytes(snapshot) < 5 * MIB + 100_000
    assert (SHARED_BOXES,) == snapshot.manifest.requires
    assert snapshot.verify().ok
    for key, stateful in app_state.items():
        found = snapshot.read_object(key)
        for name, tensor in stateful.items():
            assert torch.equal(tensor, found[name])


def test_they_come_back_as_tensors_of_their_own(tmp_path: Path) -> None:
    """Equal is not tied: one may change without the other. What was tied is."""
    snapshot = Snapshot.take(tmp_path / "a", state(), dedup=True)
    model, zeros = snapshot.read_object("model"), snapshot.read_object("zeros")
    assert 20 == len({tensor.data_ptr() for tensor in zeros.values()})
    assert model["small"] is model["tied"]

    app_state = state()
    expected = app_state["ema"]["large"].clone()
    for stateful in app_state.values():
        for tensor in stateful.values():
            tensor.fill_(1)
    snapshot.restore(app_state)
    app_state["model"]["large"].fill_(2)
    assert not torch.equal(app_state["ema"]["large"], app_state["model"]["large"])
    assert torch.equal(snapshot.read_object("ema/large"), app_state["ema"]["large"])
    assert expected.shape == app_state["ema"]["large"].shape


def test_a_full_snapshot_is_plain_unless_it_was_asked_for(tmp_path: Path) -> None:
    """Any program finds every tensor under its name."""
    snapshot = Snapshot.take(tmp_path / "a", state())
    assert () == snapshot.manifest.requires
    (file,) = Path(snapshot.path).glob("ema-*")
    assert {"large", "small", "as_bytes", "empty"} == set(load_file(file))


def test_an_incremental_take_looks_for_equals_too(tmp_path: Path) -> None:
    """Among what has changed, and in the base; not if it was forbidden."""
    app_state = state()
    first = Snapshot.take(tmp_path / "a", app_state)
    for tensor in app_state["zeros"].values():
        tensor.fill_(1)
    app_state["more"] = StateDict(large=app_state["model"]["large"].clone(), new=torch.ones(7), same=torch.ones(7))
    second = Snapshot.take(tmp_path / "b", app_state, base=first)
    assert 2 * MIB + 100_000 > sum(file.stat().st_size for file in Path(second.path).glob("*.safetensors"))
    assert second.verify().ok
    assert torch.equal(torch.ones(7), second.read_object("more/same"))
    third = Snapshot.take(tmp_path / "c", app_state, base=first, dedup=False)
    assert 40 * MIB < sum(file.stat().st_size for file in Path(third.path).glob("*.safetensors"))
    assert third.verify().ok


def test_rows_of_tensors_that_are_cut_are_stored_once(tmp_path: Path) -> None:
    with settings.override(data_file_bytes=MIB):
        values = {name: torch.arange(10 * MIB // 4).reshape(10, -1) for name in "ab"} | {"c": torch.ones(4 * MIB // 4, 2)}
        snapshot = Snapshot.take(tmp_path / "a", {"state": StateDict(values)}, dedup=True)
    assert stored_bytes(snapshot) < 22 * MIB
    assert snapshot.verify().ok
    for name, tensor in values.items():
        assert torch.equal(tensor, snapshot.read_object(f"state/{name}"))
        assert torch.equal(tensor[3:5], snapshot.read_object(f"state/{name}", rows=slice(3, 5)))


def test_copies_and_exports_of_them_are_whole(tmp_path: Path) -> None:
    app_state = state()
    snapshot = Snapshot.take(tmp_path / "a", app_state, dedup=True)
    snapshot.copy(tmp_path / "b")
    snapshot.delete()
    copied = Snapshot(tmp_path / "b")
    assert copied.verify().ok
    copied.export(tmp_path / "ema.safetensors", include="ema/*")
    found = load_file(tmp_path / "ema.safetensors")
    assert all(torch.equal(app_state["ema"][name], tensor) for name, tensor in found.items())
    assert set(app_state["ema"]) == set(found)


def test_an_async_take_does_as_much(tmp_path: Path) -> None:
    app_state = state()
    snapshot = Snapshot.async_take(tmp_path / "a", app_state, dedup=True).wait()
    assert stored_bytes(snapshot) < 5 * MIB + 100_000
    assert snapshot.verify().ok


def test_few_bytes_that_would_be_more_than_the_memory_are_not_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file can say that a million tensors are the same mebibytes."""
    snapshot = Snapshot.take(tmp_path / "a", state(), dedup=True)
    monkeypatch.setattr(memory, "available_bytes", lambda: 10 * MIB)
    with pytest.raises(MemoryBudgetError, match="of new memory are needed"):
        snapshot.read_object("zeros")
    with pytest.raises(MemoryBudgetError, match="of new memory are needed"):
        snapshot.restore({"zeros": StateDict()}, strict=False)
    assert not snapshot.read_object("zeros/0").any()


def test_boxes_that_lie_over_each_other_without_a_word_are_refused(tmp_path: Path) -> None:
    """Of a snapshot that does not say that it shares boxes; and those that do lie there entirely."""
    snapshot = Snapshot.take(tmp_path / "a", state(), dedup=True)
    manifest = snapshot.manifest
    validate(manifest)
    with pytest.raises(ManifestError, match="two entries lie over each other"):
        validate(msgspec.structs.replace(manifest, requires=()))
    entries = list(manifest.entries)
    number = next(number for number, entry in enumerate(entries) if entry.path == "zeros/3")
    entries[number] = msgspec.structs.replace(entries[number], shape=(2 * MIB // 4 - 1,))  # type: ignore[type-var]
    with pytest.raises(ManifestError, match="two entries lie over each other"):
        validate(msgspec.structs.replace(manifest, entries=tuple(entries)))
