"""A take that goes on from an earlier snapshot writes what has changed, and is as complete as any."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from expstate import Snapshot, StateDict, settings
from expstate.engine import ancestry, memory
from expstate.errors import InvalidArgumentError, RefNotFoundError, SnapshotCorruptError, StorageError, TakeCancelledError
from expstate.format.manifest import TensorEntry
from expstate.storage.registry import open_storage
from expstate.testing import FaultyStorage

MIB = 2**20


class Thing:
    """Stored by pickle."""

    def __init__(self, value: Any) -> None:
        self.value = value


def tensors(count: int = 6, size: int = 40_000) -> dict[str, Any]:
    """Named tensors of different values."""
    generator = torch.Generator().manual_seed(count)
    return {f"w{number}": torch.randn(size, generator=generator) for number in range(count)}


def variety() -> dict[str, Any]:
    """One value of each kind that has bytes."""
    return tensors() | {
        "strided": torch.randn(300, 500).t(),
        "conjugate": torch.randn(40, dtype=torch.complex64).conj(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3),
        "boolean": torch.rand(77) > 0.5,
        "double": torch.randn(40, dtype=torch.complex128),
        "array": np.arange(1000, dtype=">f8"),
        "object": Thing(1),
        "blocks": torch.randn(70 * MIB // 4 + 5),
    }


def take(place: Path, values: dict[str, Any], base: Any = None, **options: Any) -> Snapshot:
    """Take values under the key ``state``; objects that need trust are expected."""
    Snapshot.take(place, {"state": StateDict(values)}, base=base, **options)
    return Snapshot(place)


def written(snapshot: Snapshot) -> set[str]:
    """Names of the tensors in the files beside the manifest, each of which is of this snapshot alone."""
    found: set[str] = set()
    for file in Path(snapshot.path).glob("state-*.safetensors"):
        found |= set(load_file(file))
    return found


def links(snapshot: Snapshot) -> dict[str, int]:
    """The files under ``base``, and in how many places each is."""
    return {file.name: file.stat().st_nlink for file in Path(snapshot.path).glob("base/*")}


def check(snapshot: Snapshot, values: dict[str, Any]) -> None:
    """The snapshot is whole and has these values; what lies beside its manifest is of these values too."""
    assert snapshot.verify().ok
    found = snapshot.read_object("state")
    assert set(values) == set(found)
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, found[name]), name
        elif isinstance(value, np.ndarray):
            assert np.array_equal(value, found[name]), name
        else:
            assert value == found[name], name
    for file in Path(snapshot.path).glob("state-*.safetensors"):
        for name, tensor in load_file(file).items():
            if isinstance(values.get(name), torch.Tensor) and values[name].dtype == tensor.dtype:
                assert torch.equal(values[name], tensor), name


# What is written


@pytest.mark.filterwarnings("ignore::expstate.errors.NeedsTrustWarning")
def test_nothing_unchanged_is_written(tmp_path: Path) -> None:
    """Of a state that has not changed, of whatever kind, only digests and the manifest are."""
    values = variety()
    first = take(tmp_path / "a", values)
    second = take(tmp_path / "b", values, first)

    assert set() == written(second)
    assert {2} == set(links(second).values())
    beside = [file for file in Path(second.path).iterdir() if file.is_file() and file.name != "snapshot.json"]
    assert [True] == [file.name.startswith("digests-") for file in beside]
    shutil.rmtree(first.path)
    assert second.verify().ok
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second.read_object(f"state/{name}"))
    assert np.array_equal(values["array"], second.read_object("state/array"))
    assert 1 == second.read_object("state/object", trust=True).value


def test_what_has_changed_is_written_and_nothing_else(tmp_path: Path) -> None:
    values = tensors()
    first = take(tmp_path / "a", values)
    values["w3"][-1] += 1
    second = take(tmp_path / "b", values, first)

    assert {"w3"} == written(second)
    check(second, values)
    shutil.rmtree(first.path)
    check(second, values)


@pytest.mark.parametrize("at", [0, MIB // 4, -1])
def test_one_element_of_a_large_tensor_is_noticed(tmp_path: Path, at: int) -> None:
    """In its first block, in another, in its last, which is a short one."""
    values = {"large": torch.randn(70 * MIB // 4 + 5), "small": torch.randn(9)}
    first = take(tmp_path / "a", values)
    values["large"][at] += 1
    second = take(tmp_path / "b", values, first)

    assert {"large"} <= written(second)
    check(second, values)


def test_what_is_renamed_or_moved_is_found(tmp_path: Path) -> None:
    """Under another name, another key, in another order: the digest tells."""
    values = tensors() | {"large": torch.randn(3 * MIB)}
    first = take(tmp_path / "a", values)
    moved = {"y": values["w1"], "x": values["w0"], "big": values["large"], "w5": values["w5"]}
    app_state = {"state": StateDict(moved), "other": StateDict(inner={"z": values["w2"]}, new=torch.ones(3))}
    second = Snapshot.take(tmp_path / "b", app_state, base=first)

    assert [["new"]] == [sorted(load_file(file)) for file in Path(second.path).glob("*.safetensors")]
    check(second, moved)
    assert torch.equal(values["w2"], second.read_object("other/inner/z"))


def test_rows_of_a_tensor_that_is_cut_are_told_apart(tmp_path: Path) -> None:
    """Where files are small, a large tensor lies in several, and only those rows are written that have changed."""
    with settings.override(data_file_bytes=MIB):
        values = {"rows": torch.randn(5000, 100), "other": torch.randn(10)}
        first = take(tmp_path / "a", values)
        values["rows"][4999] += 1
        second = take(tmp_path / "b", values, first)
        third = take(tmp_path / "c", values, second)

    (name,) = [name for name in written(second) if name != "other"]
    assert name.startswith("rows#")
    check(second, values)
    assert not written(third)
    check(third, values)
    assert [0, *sorted(box.starts[0] for box in third.manifest.entries[1].boxes[1:])] == [
        box.starts[0] for box in third.manifest.entries[1].boxes
    ]


def test_a_file_goes_along_while_at_least_half_of_it_is_used(tmp_path: Path) -> None:
    """What has not changed of others is written again, in a file of its own, which the next take can link."""
    values = tensors(10)
    snapshots = [take(tmp_path / "0", values)]
    for name in ("w0", "w1", "w2", "w3", "w4"):
        values[name] += 1
    snapshots.append(take(tmp_path / "1", values, snapshots[-1]))
    assert {"w0", "w1", "w2", "w3", "w4"} == written(snapshots[1])
    assert 1 == len(links(snapshots[1]))
    values["w5"] += 1  # of the first file not even half is used any more
    snapshots.append(take(tmp_path / "2", values, snapshots[-1]))
    files = [sorted(load_file(file)) for file in sorted(Path(snapshots[2].path).glob("state-*"))]
    assert [["w5"], ["w6", "w7", "w8", "w9"]] == files
    values["w5"] += 1
    snapshots.append(take(tmp_path / "3", values, snapshots[-1]))
    assert {"w5"} == written(snapshots[3])
    assert 2 == len(links(snapshots[3]))
    check(snapshots[3], values)


@pytest.mark.parametrize("frozen", [2, 8])
def test_a_frozen_part_and_a_changing_one_are_in_different_files_by_the_second_take(tmp_path: Path, frozen: int) -> None:
    """Whichever is the larger: each take after it writes what changes and nothing else."""
    values = tensors(10)
    changing = list(values)[frozen:]
    base: Any = None
    for number in range(4):
        snapshot = take(tmp_path / str(number), values, base)
        if number >= 2:
            assert set(changing) == written(snapshot)
        for name in changing:
            values[name] += 1
        base = snapshot


def test_another_dtype_of_equal_bytes_is_read_back_as_it_was(tmp_path: Path) -> None:
    first = take(tmp_path / "a", {"x": torch.arange(4000, dtype=torch.int32)})
    second = take(tmp_path / "b", {"x": torch.arange(4000, dtype=torch.int32).view(torch.float32)}, first)
    assert torch.float32 == second.read_object("state/x").dtype
    assert second.verify().ok


# Where it may come from


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EMLINK, errno.EPERM])
def test_a_disk_that_cannot_link_gets_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    values = tensors()
    first = take(tmp_path / "a", values)

    def link(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    second = take(tmp_path / "b", values, first)
    monkeypatch.undo()

    for file in Path(first.path).iterdir():
        file.unlink()
    check(second, values)


def test_a_base_that_is_deleted_meanwhile_is_none(tmp_path: Path) -> None:
    values = variety()
    del values["object"]
    first = take(tmp_path / "a", values)
    assert first.manifest.entries
    shutil.rmtree(first.path)
    second = take(tmp_path / "b", values, first)
    assert not links(second)
    assert second.verify().ok


def test_a_base_whose_file_is_cut_short_is_not_linked(tmp_path: Path) -> None:
    values = tensors()
    first = take(tmp_path / "a", values)
    (file,) = Path(first.path).glob("state-*")
    os.truncate(file, file.stat().st_size - 1)
    second = take(tmp_path / "b", values, first)
    check(second, values)


def test_a_storage_that_fails_to_link_gets_the_bytes(tmp_path: Path) -> None:
    """And one that fails for good fails as any take does: nothing of it remains."""
    values = tensors()
    first = take(tmp_path / "a", values)
    storage = FaultyStorage(open_storage(tmp_path / "b"))
    storage.fail("link_file", None, error=StorageError("no"))
    Snapshot.take(storage.url, {"state": StateDict(values)}, base=first)
    check(Snapshot(tmp_path / "b"), values)

    storage = FaultyStorage(open_storage(tmp_path / "c"))
    values["w0"] += 1
    storage.fail("write", error=StorageError("no"))
    with pytest.raises(StorageError, match="no"):
        Snapshot.take(storage.url, {"state": StateDict(values)}, base=first)
    assert not (tmp_path / "c").exists()
    assert {1} == {file.stat().st_nlink for file in Path(first.path).iterdir()}


def test_a_damaged_file_is_reported_for_each_snapshot_that_has_it(tmp_path: Path) -> None:
    values = tensors()
    first = take(tmp_path / "a", values)
    values["w0"] += 1
    second = take(tmp_path / "b", values, first)
    (file,) = Path(first.path).glob("state-*")
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    with file.open("r+b") as open_file:  # in place: a file of its own would be damaged for one of them alone
        open_file.write(data)

    for snapshot in (first, second):
        report = snapshot.verify()
        assert not report.ok
        assert {"state/w5"} == {damage.entry for damage in report.damages}
        with pytest.raises(SnapshotCorruptError, match="w5"):
            snapshot.read_object("state/w5")
        assert torch.equal(values["w1"], snapshot.read_object("state/w1"))


def test_the_snapshot_that_is_replaced_may_be_the_base(tmp_path: Path) -> None:
    """Its files go on under another name."""
    values = tensors()
    first = take(tmp_path / "a", values)
    values["w0"] += 1
    second = take(tmp_path / "a", values, first, overwrite=True)

    assert {1} == set(links(second).values())
    assert {"w0"} == written(second)
    check(second, values)


# The parameter


def test_auto_goes_on_from_the_last_snapshots_of_the_same_keys(tmp_path: Path) -> None:
    """For each key from the last that had it, which need not be one; without any it is a full take."""
    ancestry.forget()
    model, data = tensors(3), tensors(4)
    first = Snapshot.take(tmp_path / "a", {"model": StateDict(model)}, base="auto")
    assert not links(first)
    Snapshot.take(tmp_path / "b", {"data": StateDict(data)}, base="auto")
    third = Snapshot.take(tmp_path / "c", {"model": StateDict(model), "data": StateDict(data)}, base="auto")
    assert 2 == len(links(third))
    shutil.rmtree(tmp_path / "c")
    fourth = Snapshot.take(tmp_path / "d", {"model": StateDict(model), "data": StateDict(data)}, base="auto")
    assert not links(fourth)
    assert fourth.verify().ok


def test_auto_asks_no_place_whose_files_cannot_be_shared(tmp_path: Path) -> None:
    """Another kind of storage might not even answer."""
    ancestry.forget()
    values = tensors()
    elsewhere = FaultyStorage(open_storage(tmp_path / "a"))
    Snapshot.take(elsewhere.url, {"state": StateDict(values)})
    elsewhere.calls.clear()
    second = Snapshot.take(tmp_path / "b", {"state": StateDict(values)}, base="auto")
    assert not links(second)
    assert not elsewhere.calls


def test_auto_goes_on_from_what_was_restored(tmp_path: Path) -> None:
    values = tensors()
    first = take(tmp_path / "a", values)
    ancestry.forget()
    state = {"state": StateDict({name: torch.zeros_like(tensor) for name, tensor in values.items()})}
    first.restore(state)
    assert 1 == len(links(Snapshot.take(tmp_path / "b", state, base="auto")))


def test_a_base_is_a_snapshot_or_a_ref_or_a_take_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPSTATE_CATALOG", str(tmp_path / "catalog.db"))
    values = tensors()
    pending = Snapshot.async_take(tmp_path / "a", {"state": StateDict(values)}, name="first")
    for number, base in enumerate((pending, "first", tmp_path / "a", str(tmp_path / "a"), pending.wait().id)):
        assert 1 == len(links(take(tmp_path / f"b{number}", values, base)))


@pytest.mark.parametrize("base", [3, b"x", ["auto"]])
def test_a_base_of_another_type_is_refused(tmp_path: Path, base: Any) -> None:
    for begin in (Snapshot.take, Snapshot.async_take):
        with pytest.raises(InvalidArgumentError, match="base must be a snapshot"):
            begin(tmp_path / "a", {"state": StateDict(x=1)}, base=base)
    assert not (tmp_path / "a").exists()


def test_a_ref_that_names_nothing_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for begin in (Snapshot.take, Snapshot.async_take):
        with pytest.raises(RefNotFoundError):
            begin(tmp_path / "a", {"state": StateDict(x=1)}, base="nobody", catalog=tmp_path / "catalog.db")
    assert not (tmp_path / "a").exists()


# In the background


@pytest.mark.parametrize("budget", [None, 2 * MIB, 20 * MIB])
def test_an_async_take_has_the_state_of_its_return(tmp_path: Path, budget: int | None) -> None:
    """What is compared behind it are copies, or what was compared before it came back."""
    values = tensors() | {"strided": torch.randn(300, 500).t(), "large": torch.randn(9 * MIB // 4)}
    first = take(tmp_path / "a", values)
    values["w1"] += 1
    expected = {name: tensor.clone() for name, tensor in values.items()}
    pending = Snapshot.async_take(tmp_path / "b", {"state": StateDict(values)}, base=first, memory_budget_bytes=budget)
    for tensor in values.values():
        tensor.add_(1)
    second = pending.wait()

    assert {"w1"} == written(second)
    assert 2 in links(second).values()
    check(second, expected)


def test_an_async_take_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    values = tensors()
    first = take(tmp_path / "a", values)
    values["w1"] += 1
    storage = FaultyStorage(open_storage(tmp_path / "b"))
    reached, open_gate = threading.Event(), threading.Event()

    def wait() -> None:
        reached.set()
        assert open_gate.wait(60)

    storage.run("write", None, function=wait)
    pending = Snapshot.async_take(storage.url, {"state": StateDict(values)}, base=first)
    assert reached.wait(60)
    assert {2} == {file.stat().st_nlink for file in Path(first.path).glob("state-*")}
    threading.Timer(0.1, open_gate.set).start()
    assert pending.cancel()
    with pytest.raises(TakeCancelledError):
        pending.wait()
    assert not (tmp_path / "b").exists()
    assert {1} == {file.stat().st_nlink for file in Path(first.path).iterdir()}


def test_an_async_take_keeps_nothing_alive(tmp_path: Path) -> None:
    """Not the state while it is written, which is copied; not its base when it is done; and no memory that nobody needs."""
    storage = FaultyStorage(open_storage(tmp_path / "b"))
    open_gate = threading.Event()
    storage.run("write", None, function=lambda: open_gate.wait(60))
    values = tensors(3, size=2**20)
    first = take(tmp_path / "a", values)
    values["w1"] += 1
    with settings.override(staging_idle_seconds=0):
        state = StateDict(values)
        watched = [weakref.ref(thing) for thing in (state, *values.values())]
        pending = Snapshot.async_take(storage.url, {"state": state}, base=first)
        del state, values
        gc.collect()
        assert [] == [thing() for thing in watched if thing() is not None]
        source = weakref.ref(first._source)
        del first
        open_gate.set()
        pending.wait()
        gc.collect()
        assert source() is None
        assert 0 == memory._pool.idle_bytes


def test_many_async_takes_one_after_the_other(tmp_path: Path) -> None:
    values = tensors()
    base: Any = None
    for number in range(6):
        pending = Snapshot.async_take(tmp_path / str(number), {"state": StateDict(values)}, base=base)
        expected = {name: tensor.clone() for name, tensor in values.items()}
        values[f"w{number}"] += 1
        base = pending
    check(base.wait(), expected)


# What it is good for


def test_a_copy_of_an_incremental_snapshot_is_complete(tmp_path: Path) -> None:
    values = tensors()
    first = take(tmp_path / "a", values)
    values["w0"] += 1
    second = take(tmp_path / "b", values, first)
    second.copy(tmp_path / "c")
    shutil.copytree(tmp_path / "b", tmp_path / "d")
    shutil.rmtree(first.path)
    shutil.rmtree(second.path)
    for place in ("c", "d"):
        check(Snapshot(tmp_path / place), values)
        assert {1} == set(links(Snapshot(tmp_path / place)).values())


def test_an_export_of_an_incremental_snapshot_is_plain(tmp_path: Path) -> None:
    values = tensors()
    first = take(tmp_path / "a", values)
    values["w0"] += 1
    take(tmp_path / "b", values, first).export(tmp_path / "plain.safetensors")
    found = load_file(tmp_path / "plain.safetensors")
    assert set(values) == set(found)
    assert all(torch.equal(values[name], found[name]) for name in values)


def test_a_training_that_goes_on_from_any_of_its_snapshots_ends_alike(tmp_path: Path) -> None:
    """Model, optimizer and generators, taken incrementally in the background after each step."""

    def run(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, after: Callable[[int], object]) -> torch.Tensor:
        for step in range(first, 5):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(8, 10)).square().mean().backward()
            optimizer.step()
            after(step)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(10, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
        for parameter in model[0].parameters():
            parameter.requires_grad_(requires_grad=False)
        return model, torch.optim.AdamW(model[2].parameters())

    model, optimizer = made()
    pending = []

    def taken(step: int) -> None:
        pending.append(Snapshot.async_take(tmp_path / str(step), {"model": model, "optimizer": optimizer}, base="auto"))

    expected = run(model, optimizer, 0, taken)
    for step in (3, 0, 4, 2, 1):
        snapshot = pending[step].wait()
        model, optimizer = made()
        snapshot.restore({"model": model, "optimizer": optimizer})
        assert torch.equal(expected, run(model, optimizer, step + 1, lambda _: None))
        snapshot.delete()


def test_entries_of_incremental_snapshots_are_those_of_full_ones(tmp_path: Path) -> None:
    """But for where their boxes lie."""
    values = variety()
    del values["object"]
    full = take(tmp_path / "a", values)
    second = take(tmp_path / "b", values, full)
    for one, other in zip(full.manifest.entries, second.manifest.entries, strict=True):
        assert one.path == other.path
        if isinstance(one, TensorEntry):
            assert isinstance(other, TensorEntry)
            assert (one.dtype, one.shape, one.kind) == (other.dtype, other.shape, other.kind)
            assert [(box.digest, box.starts, box.sizes) for box in one.boxes] == [
                (box.digest, box.starts, box.sizes) for box in other.boxes
            ]
