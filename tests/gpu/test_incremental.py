"""Incremental and asynchronous takes of state on an accelerator: what has not changed is not even copied, and the training hardly stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.engine import capture as captures
from expstate.engine import inplace, write
from expstate.format.manifest import TensorEntry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Failed to initialize NumPy"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support"),
]

MIB = 2**20
DEVICE = (torch.accelerator.is_available() and torch.accelerator.current_accelerator()) or torch.device("cpu")
MODULE: Any = torch.get_device_module(DEVICE)
IS_HOST = DEVICE.type == "cpu"
SIZE = MIB if IS_HOST else 8 * MIB


def values() -> dict[str, torch.Tensor]:
    """Tensors of several kinds on the device, one of more than 64 blocks, and one on the host."""
    return {
        **{f"w{number}": torch.randn(SIZE // 4, device=DEVICE) for number in range(4)},
        "large": torch.randn(66 * MIB // 4 + 3, device=DEVICE),
        "strided": torch.randn(300, 200, device=DEVICE).t(),
        "conjugate": torch.randn(50, dtype=torch.complex64, device=DEVICE).conj(),
        "boolean": torch.randn(77, device=DEVICE) > 0,
        "half": torch.randn(1001, device=DEVICE).to(torch.bfloat16),
        "scalar": torch.tensor(3, device=DEVICE),
        "empty": torch.zeros(0, 3, device=DEVICE),
        "host": torch.randn(1000),
    }


def written(snapshot: Snapshot) -> set[str]:
    """Entries whose bytes lie in files beside the manifest."""
    files = {number for number, record in enumerate(snapshot.manifest.files) if not record.name.startswith("base/")}
    return {
        entry.path.removeprefix("state/")
        for entry in snapshot.manifest.entries
        if isinstance(entry, TensorEntry) and entry.nbytes and any(box.file in files for box in entry.boxes)
    }


def check(snapshot: Snapshot, expected: dict[str, torch.Tensor]) -> None:
    """The snapshot is whole and has these values."""
    assert snapshot.verify().ok
    live = {"state": StateDict({name: torch.zeros_like(tensor) for name, tensor in expected.items()})}
    snapshot.restore(live)
    for name, tensor in expected.items():
        assert torch.equal(tensor, live["state"][name]), name


def cloned(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that are copied from the device to the host."""
    found: list[int] = []
    stage, piece = write.FilesWriter._copy, inplace.Piece.stage

    def note(tensor: torch.Tensor, start: int, stop: int, *rest: Any) -> None:
        if not tensor.is_cpu:
            found.append(stop - start)
        stage(tensor, start, stop, *rest)

    def note_piece(self: inplace.Piece, *rest: Any) -> None:
        if not self.view.is_cpu:
            found.append(self.nbytes)
        piece(self, *rest)

    monkeypatch.setattr(write.FilesWriter, "_copy", staticmethod(note))
    monkeypatch.setattr(inplace.Piece, "stage", note_piece)
    return found


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("device_staging_bytes", [None, 0])
def test_what_has_not_changed_is_not_copied(tmp_path: Path, copied: list[int], device_staging_bytes: int | None, *, is_async: bool) -> None:
    state = values()
    first = Snapshot.take(tmp_path / "a", {"state": StateDict(state)})
    del copied[:]
    state["w1"][7] += 1
    expected = cloned(state)
    if is_async:
        options: dict[str, Any] = {"device_staging_bytes": device_staging_bytes}
        pending = Snapshot.async_take(tmp_path / "b", {"state": StateDict(state)}, base=first, **options)
        for tensor in state.values():
            tensor.zero_()
        second = pending.wait()
    else:
        second = Snapshot.take(tmp_path / "b", {"state": StateDict(state)}, base=first)

    assert {"w1"} == written(second)
    assert (0 if IS_HOST else SIZE) == sum(copied)
    first.delete()
    check(second, expected)


def test_fingerprints_go_from_take_to_take(tmp_path: Path) -> None:
    """With the key of the first, for tensors on the device alone."""
    state = values()
    first = Snapshot.take(tmp_path / "a", {"state": StateDict(state)})
    second = Snapshot.take(tmp_path / "b", {"state": StateDict(state)}, base=first)
    assert (first.manifest.fingerprint_key is None) == IS_HOST
    assert first.manifest.fingerprint_key == second.manifest.fingerprint_key
    for snapshot in (first, second):
        for entry in snapshot.manifest.entries:
            if isinstance(entry, TensorEntry):
                on_device = not IS_HOST and entry.path != "state/host" and entry.nbytes > 0
                assert on_device == all(box.fingerprint is not None for box in entry.boxes)


def test_digests_decide_where_fingerprints_are_not_trusted(tmp_path: Path, copied: list[int]) -> None:
    """And where the base has none: then what is on the device is copied to be digested."""
    state = values()
    on_host = {"state": StateDict({name: tensor.cpu() for name, tensor in state.items()})}
    bases = {
        "untrusted": Snapshot.take(tmp_path / "a", {"state": StateDict(state)}),
        "none": Snapshot.take(tmp_path / "b", {"state": StateDict(state)}, trust_fingerprint=False),
        "host": Snapshot.take(tmp_path / "c", on_host),
    }
    assert bases["none"].manifest.fingerprint_key is None
    for name, base in bases.items():
        del copied[:]
        second = Snapshot.take(tmp_path / name, {"state": StateDict(state)}, base=base, trust_fingerprint=name == "host")
        assert set() == written(second)
        assert (not IS_HOST) == (sum(copied) > 4 * SIZE)
        check(second, state)


@pytest.mark.parametrize("device_staging_bytes", [None, 0, MIB])
def test_an_async_take_has_the_state_of_its_return(tmp_path: Path, device_staging_bytes: int | None) -> None:
    """In order with what the caller has queued, on whatever stream, and with what it queues next."""
    state = values()
    for number in range(3):
        for tensor in state.values():
            if tensor.is_floating_point():
                tensor.mul_(1.5)
        expected = cloned(state)
        pending = Snapshot.async_take(
            tmp_path / str(number), {"state": StateDict(state)}, base="auto" if number else None, device_staging_bytes=device_staging_bytes
        )
        for tensor in state.values():
            tensor.zero_()
        snapshot = pending.wait()
        check(snapshot, expected)
        state = expected


@pytest.mark.skipif(IS_HOST, reason="the host has no streams")
def test_a_take_on_another_stream_sees_what_was_queued_there(tmp_path: Path) -> None:
    state = {"x": torch.zeros(32 * MIB // 4, device=DEVICE)}
    stream = MODULE.Stream()
    with MODULE.stream(stream):
        for _ in range(200):
            state["x"].add_(1)
        pending = Snapshot.async_take(tmp_path / "a", {"state": StateDict(state)})
        state["x"].zero_()
    assert 200 == float(pending.wait().read_object("state/x", device="cpu").min())


@pytest.mark.skipif(IS_HOST, reason="the host has no memory of a device")
def test_a_device_without_room_is_staged_by_way_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether that is known before or turns out; and nothing of the device's memory is kept."""
    state = values()
    expected = cloned(state)

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(captures, "_clones", full)
    pending = Snapshot.async_take(tmp_path / "a", {"state": StateDict(state)})
    state["w0"].zero_()
    check(pending.wait(), expected)
    monkeypatch.undo()

    MODULE.synchronize()
    before = MODULE.memory_allocated()
    Snapshot.async_take(tmp_path / "b", {"state": StateDict(state)}).wait()
    assert before == MODULE.memory_allocated()


def test_equal_tensors_on_a_device_are_stored_once(tmp_path: Path) -> None:
    one = torch.randn(SIZE // 4, device=DEVICE)
    state = {"state": StateDict(a=one, b=one.clone(), c=one.clone().view(2, -1), d=one + 1)}
    snapshot = Snapshot.take(tmp_path / "a", state, dedup=True)
    assert snapshot.verify().ok
    assert sum(record.size for record in snapshot.manifest.files) < 4 * SIZE
    assert torch.equal(one, snapshot.read_object("state/b"))
