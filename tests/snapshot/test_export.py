"""Exports are plain safetensors files: other tools read them, everything is in them or named as left out, and nothing half is left."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, load_model

from expstate import ExportReport, RNGState, Snapshot, StateDict, settings
from expstate.errors import (
    EntryNotFoundError,
    ExportExistsError,
    InvalidArgumentError,
    MemoryBudgetError,
    NoSpaceError,
    SnapshotCorruptError,
    SnapshotWriteError,
    UnsupportedValueError,
)
from expstate.settings import MIB
from expstate.storage.local import LocalStorage
from expstate.testing import FaultyStorage

from .boxes import write_boxes
from .conftest import TiedModel, mlp, of_every_layout, train


def take(tmp_path: Path, **app_state: Any) -> Snapshot:
    return Snapshot.take(tmp_path / "snapshot", app_state)


def metadata_of(path: str | Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()


def assert_same(expected: dict[str, torch.Tensor], path: str | Path) -> None:
    found = load_file(path)
    assert sorted(expected) == sorted(found)
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor, found[name])


def test_a_model_is_read_by_safetensors_under_the_names_of_its_state_dict(tmp_path: Path) -> None:
    model = mlp()
    report = take(tmp_path, model=model).export(tmp_path / "out" / "model.safetensors")

    assert (str(tmp_path / "out" / "model.safetensors"),) == report.files
    assert_same(model.state_dict(), report.files[0])
    assert {"format": "pt"} == metadata_of(report.files[0])


def test_a_folder_gets_one_file_for_each_key_with_tensors(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    snapshot = take(tmp_path, model=model, optimizer=optimizer, progress=StateDict(epoch=3))
    report = snapshot.export(tmp_path / "out")

    assert ["model.safetensors", "optimizer.safetensors"] == sorted(os.listdir(tmp_path / "out"))
    assert_same(model.state_dict(), tmp_path / "out" / "model.safetensors")
    moments = {f"state/{n}/{k}": v for n, state in optimizer.state_dict()["state"].items() for k, v in state.items()}
    assert_same(moments, tmp_path / "out" / "optimizer.safetensors")
    assert "progress/epoch" in report.left_out
    assert "optimizer/param_groups/0/lr" in report.left_out
    assert len(model.state_dict()) + len(moments) == report.tensors
    assert "left out, as no tensors" in str(report)


def test_keys_whose_files_would_have_one_name_get_distinct_ones(tmp_path: Path) -> None:
    state = {key: StateDict(w=torch.full((2,), float(number))) for number, key in enumerate(["a/b", "a_b", "A_B", ".."])}
    report = take(tmp_path, **state).export(tmp_path / "out")

    assert [0.0, 1.0, 2.0, 3.0] == [float(load_file(path)["w"][0]) for path in report.files]
    assert 4 == len({path.casefold() for path in report.files})
    assert {str(tmp_path / "out")} == {str(Path(path).parent) for path in report.files}


def test_nothing_but_tensors_and_their_names_is_in_the_file(tmp_path: Path) -> None:
    """No provenance, no params, no id: what the take was told stays behind."""
    snapshot = Snapshot.take(tmp_path / "snapshot", {"model": mlp()}, name="secretname", note="secretnote", params={"secretparam": 1})
    (path,) = snapshot.export(tmp_path / "model.safetensors").files
    data = Path(path).read_bytes()

    assert b"secret" not in data
    assert snapshot.id.encode() not in data
    assert b"expstate" not in data


def test_tied_weights_are_stored_once_and_load_model_ties_them(tmp_path: Path) -> None:
    model = TiedModel()
    report = take(tmp_path, model=model).export(tmp_path / "tied.safetensors")

    (kept,) = load_file(report.files[0])
    assert (1, 1) == (report.tensors, report.tied)
    alias = ({"embedding.weight", "head.weight"} - {kept}).pop()
    assert {"format": "pt", alias: kept} == metadata_of(report.files[0])
    fresh = TiedModel()
    missing, unexpected = load_model(fresh, report.files[0])
    assert ([], []) == ([*missing], [*unexpected])
    assert torch.equal(model.head.weight, fresh.head.weight)
    assert fresh.head.weight is fresh.embedding.weight


def test_tensors_tied_across_keys_are_whole_in_each_file(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    snapshot = take(tmp_path, one=StateDict(w=shared, v=shared), other=StateDict(w=shared))
    report = snapshot.export(tmp_path / "out")

    assert [True, True] == [torch.equal(shared, load_file(path)["w"]) for path in report.files]
    assert (2, 1) == (report.tensors, report.tied)


def test_the_name_of_a_tied_tensor_is_enough_to_export_it(tmp_path: Path) -> None:
    snapshot = take(tmp_path, model=TiedModel())
    aliases = [entry.path for entry in snapshot.entries() if type(entry).__name__ == "AliasEntry"]
    report = snapshot.export(tmp_path / "out", include=aliases)

    assert [path.removeprefix("model/") for path in aliases] == list(load_file(report.files[0]))


def test_globs_choose(tmp_path: Path) -> None:
    snapshot = take(tmp_path, model=mlp(), other=mlp(1))
    report = snapshot.export(tmp_path / "model.safetensors", include="model/*", exclude=["*num_batches*", "model/0.*"])

    assert [name for name in mlp().state_dict() if name[0] != "0" and "num" not in name] == sorted(
        load_file(report.files[0]), key=list(mlp().state_dict()).index
    )
    with pytest.raises(EntryNotFoundError, match="nothing"):
        snapshot.export(tmp_path / "x", exclude="nothing*")
    with pytest.raises(InvalidArgumentError, match="no tensor"):
        snapshot.export(tmp_path / "x", exclude="*")
    assert not (tmp_path / "x").exists()


def test_one_file_for_several_keys_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="'model', 'other'"):
        take(tmp_path, model=mlp(), other=mlp()).export(tmp_path / "out" / "all.safetensors")

    assert ["snapshot"] == os.listdir(tmp_path)


def test_a_snapshot_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="no tensors"):
        take(tmp_path, progress=StateDict(epoch=1)).export(tmp_path / "out")

    assert ["snapshot"] == os.listdir(tmp_path)


@pytest.mark.parametrize("dtype", ["complex128", "float8_e4m3fnuz"])
def test_a_dtype_that_safetensors_lacks_is_an_error_naming_the_entry(tmp_path: Path, dtype: str) -> None:
    odd = torch.zeros(3, dtype=getattr(torch, dtype))
    snapshot = take(tmp_path, state=StateDict(odd=odd, plain=torch.ones(2)))
    with pytest.raises(UnsupportedValueError, match=rf"'state/odd' \(dtype {dtype}\)"):
        snapshot.export(tmp_path / "out")

    assert ["snapshot"] == os.listdir(tmp_path)
    assert ["plain"] == list(load_file(snapshot.export(tmp_path / "out", exclude="state/odd").files[0]))


@pytest.mark.parametrize("layout", sorted(of_every_layout()))
def test_a_layout_that_safetensors_lacks_is_an_error_naming_the_entry(tmp_path: Path, layout: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as announced by torch
        snapshot = take(tmp_path, state=StateDict(odd=of_every_layout()[layout], plain=torch.ones(2)))
    with pytest.raises(UnsupportedValueError, match="'state/odd'"):
        snapshot.export(tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_arrays_are_exported_as_tensors(tmp_path: Path) -> None:
    arrays = {kind: np.arange(6).astype(kind).reshape(2, 3) for kind in ("?", "i1", "u2", "i4", "u8", "f2", "f4", "f8", "c8")}
    report = take(tmp_path, state=StateDict(**arrays)).export(tmp_path / "arrays.safetensors")

    assert_same({kind: torch.from_numpy(array) for kind, array in arrays.items()}, report.files[0])


def test_arrays_of_numbers_that_would_be_misread_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedValueError, match="'state/big'"):
        take(tmp_path, state=StateDict(big=np.arange(3, dtype=">f4"))).export(tmp_path / "out")


def test_what_is_taken_apart_into_tensors_is_left_out_as_a_whole(tmp_path: Path) -> None:
    values = {"long": list(range(20_000)), "masked": np.ma.masked_array([1.0, 2.0], [0, 1]), "text": np.array(["a"]), "w": torch.ones(1)}
    report = take(tmp_path, state=StateDict(**values, inner={"list": [torch.zeros(2), 5]}), rng=RNGState()).export(tmp_path / "out")

    assert ["inner/list/0", "w"] == sorted(load_file(tmp_path / "out" / "state.safetensors"))
    assert ["state/inner/list/1", "state/long", "state/masked", "state/text"] == sorted(
        path for path in report.left_out if path < "t" and path > "s"
    )


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("budget", [2 * MIB, 64 * MIB])
def test_every_byte_is_there_whatever_the_memory_and_the_cut(tmp_path: Path, direct: bool, budget: int) -> None:
    """Tensors larger than a window, cut into several data files, of odd sizes, and without elements."""
    state = {
        "large": torch.randint(0, 256, (18 * MIB + 77,), dtype=torch.uint8),
        "rows": torch.randn(700_001, 3),
        "odd": torch.randn(333),
        "none": torch.empty(0, 4),
        "number": torch.tensor(7),
        "zeros": torch.zeros(3 * MIB, dtype=torch.uint8),
    }
    with settings.override(direct_io=direct, data_file_bytes=2 * MIB):
        snapshot = take(tmp_path, state=StateDict(state))
        report = snapshot.export(tmp_path / "state.safetensors", memory_budget_bytes=budget)

    assert_same(state, report.files[0])


@given(st.data())
@hypothesis_settings(max_examples=25)
def test_shards_are_put_together(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever boxes tile a tensor, the file has it in one piece."""
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5)))
    cuts = [sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=2)) if size > 1 else []) for size in shape]
    spans = [list(zip([0, *cut], [*cut, size], strict=True)) for cut, size in zip(cuts, shape, strict=True)]
    shards = [((a[0], b[0], c[0]), (a[1] - a[0], b[1] - b[0], c[1] - c[0])) for a in spans[0] for b in spans[1] for c in spans[2]]
    value: Any = torch.arange(shape[0] * shape[1] * shape[2], dtype=torch.int32).view(shape)
    if data.draw(st.booleans()):
        value = value.numpy()
    folder = tmp_path_factory.mktemp("shards")
    write_boxes(folder / "snapshot", "state/w", value, shards)
    (path,) = Snapshot(folder / "snapshot").export(folder / "w.safetensors").files

    assert torch.equal(torch.as_tensor(value), load_file(path)["w"])


def test_large_shards_are_put_together_within_the_budget(tmp_path: Path) -> None:
    value = torch.arange(5 * MIB // 4, dtype=torch.int32).view(640, 2048)
    halves = [((0, 0), (640, 1000)), ((0, 1000), (640, 1048))]
    write_boxes(tmp_path / "side", "state/w", value, halves)
    write_boxes(tmp_path / "rows", "state/w", value, [((0, 0), (600, 2048)), ((600, 0), (40, 2048))])
    for name in ("side", "rows"):
        Snapshot(tmp_path / name).export(tmp_path / f"{name}.safetensors", memory_budget_bytes=2 * MIB)
        assert torch.equal(value, load_file(tmp_path / f"{name}.safetensors")["w"])

    wide = torch.zeros(2, 3 * MIB, dtype=torch.uint8)
    write_boxes(tmp_path / "wide", "state/w", wide, [((0, 0), (2, MIB)), ((0, MIB), (2, 2 * MIB))])
    with pytest.raises(MemoryBudgetError, match="'state/w'"):
        Snapshot(tmp_path / "wide").export(tmp_path / "out" / "wide.safetensors", memory_budget_bytes=2 * MIB)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    snapshot = take(tmp_path, model=mlp(), other=mlp())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other.safetensors").write_bytes(b"theirs")
    with pytest.raises(ExportExistsError, match=r"other\.safetensors"):
        snapshot.export(tmp_path / "out")

    assert ["other.safetensors"] == os.listdir(tmp_path / "out")
    assert b"theirs" == (tmp_path / "out" / "other.safetensors").read_bytes()


def test_damage_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    snapshot = take(tmp_path, big=StateDict(w=torch.ones(4 * MIB, dtype=torch.uint8)), model=mlp())
    record = snapshot.manifest.files[-1]
    damaged = tmp_path / "snapshot" / record.name
    damaged.chmod(0o644)
    with damaged.open("r+b") as file:
        file.seek(record.size - 2)
        file.write(b"\xff\xfe")
    with pytest.raises(SnapshotCorruptError, match="damaged"):
        snapshot.export(tmp_path / "out" / "deep")

    assert ["snapshot"] == [path.name for path in tmp_path.iterdir() if any(path.iterdir())]


def test_other_files_of_the_folder_stay_after_a_failure(tmp_path: Path) -> None:
    snapshot = take(tmp_path, model=mlp())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    storage = FaultyStorage(LocalStorage(str(tmp_path / "out")))
    storage.fail("write", 1, error=NoSpaceError("the disk is full"))
    with pytest.raises(NoSpaceError, match="is full"):
        snapshot.export(storage.url)

    assert ["thesis.txt"] == os.listdir(tmp_path / "out")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_write_that_was_lost_is_noticed(tmp_path: Path, number: int) -> None:
    """Also that of the header, which is the last."""
    snapshot = take(tmp_path, state=StateDict(w=torch.ones(3 * MIB, dtype=torch.uint8)))
    storage = FaultyStorage(LocalStorage(str(tmp_path / "out")))
    storage.lose("write", number)
    with pytest.raises(SnapshotWriteError, match="lost a write"):
        snapshot.export(f"{storage.url}/w.safetensors", memory_budget_bytes=2 * MIB)

    assert not (tmp_path / "out").exists()


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take(tmp_path, model=mlp()).export(tmp_path / "out", progress=interrupt)

    assert not (tmp_path / "out").exists()


def test_an_unfinished_file_is_opened_by_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a power cut leaves it: whole in size, without its header."""
    from expstate.engine import export

    seen: list[bytes] = []

    def stop_here(header: bytes, writer: Any) -> None:
        seen.append((tmp_path / "out" / "model.safetensors").read_bytes())
        raise KeyboardInterrupt

    monkeypatch.setattr(export._Export, "_write_header", staticmethod(stop_here))
    with pytest.raises(KeyboardInterrupt):
        take(tmp_path, model=mlp()).export(tmp_path / "out")
    (tmp_path / "half.safetensors").write_bytes(seen[0])
    with pytest.raises(safetensors.SafetensorError):
        load_file(tmp_path / "half.safetensors")


def test_paths_may_be_urls_and_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = take(tmp_path, model=mlp())
    monkeypatch.chdir(tmp_path)
    places = ["a.safetensors", "fs://b.safetensors", f"file://{tmp_path}/c.safetensors", Path("sub/d.safetensors"), "fs://sub"]
    files = [snapshot.export(place).files[0].removeprefix(f"{tmp_path}/") for place in places]

    assert ["a.safetensors", "b.safetensors", "c.safetensors", "sub/d.safetensors", "sub/model.safetensors"] == files


def test_files_say_so_when_they_are_more_than_one_header_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from expstate.format import layout

    snapshot = take(tmp_path, state=StateDict({f"w{n}": torch.ones(1) for n in range(10)}))
    monkeypatch.setattr(layout, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(InvalidArgumentError, match="header"):
        snapshot.export(tmp_path / "out")


def test_a_report_shows_no_control_characters(tmp_path: Path) -> None:
    report = ExportReport(("/x/\x1b[31m.safetensors",), 1, 0, ("state/\x1b[31m",), 4, 0.1)

    assert "\x1b" not in str(report)
    header = json.dumps(str(report))
    assert "\\u001b" not in header
