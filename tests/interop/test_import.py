"""Checkpoints of DCP become snapshots, and those of a stranger run nothing."""

from __future__ import annotations

import inspect
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from expstate import Catalog, Snapshot
from expstate.cli import main
from expstate.errors import (
    CheckpointFormatError,
    ExpstateError,
    InvalidArgumentError,
    MemoryBudgetError,
    PickleNotAllowedError,
    SnapshotExistsError,
    SnapshotNotFoundError,
)
from expstate.interop import import_dcp
from expstate.interop.dcp import Writer
from tests.ranks import worlds

from .states import NEEDS_SAFE_MODE, assert_equal, names, quiet, save, save_folder, trained

OPENED: list[object] = []


def opened() -> None:
    OPENED.append(True)


class Odd:
    """Loading this one is noticed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return opened, ()


def test_imported_is_what_the_writer_would_have_written(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = {"model": model, "optim": optimizer, "epoch": 3, "when": (1, 2.5, None), "ordered": OrderedDict(a=1)}
    save_folder(state, tmp_path / "dcp")
    save(state, Writer(tmp_path / "saved"))
    imported = import_dcp(tmp_path / "dcp", tmp_path / "imported", name="run-7", step=7)

    assert {"model", "optim", "state", "ordered"} == set(imported.keys())
    assert ("run-7", 7) == (imported.metadata.name, imported.metadata.step)
    for key in imported.keys():
        assert_equal(Snapshot(tmp_path / "saved").get_state_dict_for_key(key), imported.get_state_dict_for_key(key))
    assert_equal(optimizer.state_dict(), imported.get_state_dict_for_key("optim"))
    assert imported.verify().ok


@pytest.mark.parametrize("dtype", ["uint16", "float8_e4m3fn", "bfloat16", "bool", "complex64", "float64", "int8", "uint64"])
def test_every_dtype(tmp_path: Path, dtype: str) -> None:
    tensor = torch.tensor([0, 1, 3]).to(getattr(torch, dtype))
    state = {
        "t": {
            "x": tensor,
            "column": torch.stack([tensor, tensor], dim=1)[:, 1],
            "zero": tensor[1],
            "none": tensor[:0],
            "t": torch.ones(2, 3).T,
        }
    }
    save_folder(state, tmp_path / "dcp")

    found = import_dcp(tmp_path / "dcp", tmp_path / "s").get_state_dict_for_key("t")
    assert {name: value.tolist() if dtype != "float8_e4m3fn" else value.float().tolist() for name, value in state["t"].items()} == {
        name: value.tolist() if dtype != "float8_e4m3fn" else value.float().tolist() for name, value in found.items()
    }
    assert {tensor.dtype, torch.float32} == {value.dtype for value in found.values()}


@NEEDS_SAFE_MODE
def test_other_layouts_are_loaded_as_safely_as_torch_can(tmp_path: Path) -> None:
    save_folder(
        {"t": {"parameter": torch.nn.Parameter(torch.ones(3)), "set": {1, 2}, "nested": ([torch.ones(2)], {"a": 1})}}, tmp_path / "dcp"
    )
    found = import_dcp(tmp_path / "dcp", tmp_path / "s").get_state_dict_for_key("t")

    assert_equal(torch.ones(3), found["parameter"])
    assert_equal(({1, 2}, ([torch.ones(2)], {"a": 1})), (found["set"], found["nested"]))


def test_checkpoint_of_ranks(tmp_path: Path) -> None:
    values = {"square": torch.arange(35.0).reshape(5, 7), "row": torch.arange(7.0)}

    def work(_: int) -> None:
        mesh = init_device_mesh("cpu", (2,))
        state = {"t": {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in values.items()}, "rank": dist.get_rank()}
        with quiet():
            dcp.save(state, checkpoint_id=tmp_path / "dcp")

    worlds.results(2, work)
    imported = import_dcp(tmp_path / "dcp", tmp_path / "s", memory_budget_bytes=4 << 20)

    assert_equal(values, imported.get_state_dict_for_key("t"))
    assert 2 == len(imported.manifest.entries[1].boxes)  # type: ignore[union-attr]


def test_objects_need_trust(tmp_path: Path) -> None:
    save_folder({"a": {"b": Odd(), "c": 1}}, tmp_path / "dcp")
    with pytest.raises(PickleNotAllowedError, match=r"'a\.b' of the checkpoint: .* trust=True"):
        import_dcp(tmp_path / "dcp", tmp_path / "s")
    assert [] == OPENED
    assert {"dcp"} == names(tmp_path)

    import_dcp(tmp_path / "dcp", tmp_path / "s", trust=True)
    assert [True] == OPENED
    OPENED.clear()


def write_metadata(folder: Path, metadata: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / ".metadata").write_bytes(metadata if isinstance(metadata, bytes) else pickle.dumps(metadata))
    return folder


def a_tensor(file: str = "__0_0.distcp", offset: int = 0, length: int = 100, *, size: tuple[int, ...] = (2,), **more: Any) -> Metadata:
    chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), torch.Size(size))
    return Metadata(
        {"w": TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size(size), [chunk])},
        planner_data=more.pop("planner_data", {"w": ("model", "w")}),
        storage_data={MetadataIndex("w", [0] * len(size)): _StorageInfo(file, offset, length, **more)},
    )


HOSTILE: dict[str, Any] = {
    "runs code": Metadata({}, planner_data=Odd()),
    "os.system": b"cos\nsystem\n(S'true'\ntR.",
    "getattr": b"c__builtin__\ngetattr\n(c__builtin__\ndict\nS'fromkeys'\ntR.",
    "persistent": b"Ptrue\n.",
    "extension": b"\x80\x02\x82\x01.",
    "ours": b"cexpstate.interop.pickles\nRecord\n.",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_metadata_that_names_anything_else_is_refused(tmp_path: Path, what: str) -> None:
    folder = write_metadata(tmp_path / "dcp", HOSTILE[what])
    with pytest.raises((PickleNotAllowedError, CheckpointFormatError)) as info:
        import_dcp(folder, tmp_path / "s")

    assert [] == OPENED
    assert {"dcp"} == names(tmp_path)
    if what in {"runs code", "os.system", "ours"}:
        assert isinstance(info.value, PickleNotAllowedError)
        assert "trust=True" in str(info.value)


def test_metadata_is_trusted_only_if_told(tmp_path: Path) -> None:
    save_folder({"a": {"b": torch.ones(2)}}, tmp_path / "dcp")
    metadata = pickle.loads((tmp_path / "dcp" / ".metadata").read_bytes())  # noqa: S301 - its own
    metadata.storage_meta.modules = [Odd()]
    write_metadata(tmp_path / "dcp", metadata)
    with pytest.raises(PickleNotAllowedError, match="trust=True"):
        import_dcp(tmp_path / "dcp", tmp_path / "s")
    assert [] == OPENED

    assert_equal(torch.ones(2), import_dcp(tmp_path / "dcp", tmp_path / "s", trust=True).read_object("a/b"))
    assert [True] == OPENED
    OPENED.clear()


BROKEN: dict[str, Callable[[], Any]] = {
    "empty": lambda: b"",
    "no pickle": lambda: b"\x00\x01nonsense",
    "cut short": lambda: pickle.dumps(a_tensor())[:-20],
    "much memory": lambda: b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".",
    "a large index": lambda: b"\x80\x02Nr" + struct.pack("<I", 0xFFFFFFFF) + b".",
    "a list": lambda: [1, 2],
    "a class": lambda: Metadata,
    "nothing said": lambda: Metadata({"w": 3}, storage_data={}),
    "nowhere": lambda: Metadata({"w": BytesStorageMetadata()}, storage_data={}),
    "no file": a_tensor,
    "another folder": lambda: a_tensor("../secret"),
    "an absolute path": lambda: a_tensor("/etc/passwd"),
    "no name": lambda: a_tensor(""),
    "a link": lambda: a_tensor("link"),
    "a folder": lambda: a_tensor("folder"),
    "beyond the end": lambda: a_tensor("noise", offset=50, length=100),
    "a negative place": lambda: a_tensor("noise", offset=-5),
    "no archive": lambda: a_tensor("noise"),
    "transformed": lambda: a_tensor("noise", transform_descriptors=["zstd"]),
    "a negative size": lambda: a_tensor("noise", size=(2,), planner_data=None).__class__(
        {"w": TensorStorageMetadata(TensorProperties(dtype=torch.float32), (-1,), [ChunkStorageMetadata((0,), (-1,))])},
        storage_data={},  # type: ignore[arg-type]
    ),
    "a list of holes": lambda: a_tensor("good", planner_data={"w": ("model", 10**15)}),
    "a deep place": lambda: a_tensor("good", planner_data={"w": tuple("a" * 5000)}),
    "another dtype": lambda: a_tensor("double"),
    "another shape": lambda: a_tensor("good", size=(3,)),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_one_clear_error(tmp_path: Path, what: str) -> None:
    if what == "transformed" and "transform_descriptors" not in inspect.signature(_StorageInfo).parameters:
        pytest.skip("DCP of this torch transforms nothing")
    folder = tmp_path / "dcp"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"x" * 100)
    (folder / "noise").write_bytes(b"x" * 100)
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "folder").mkdir()
    torch.save(torch.ones(2), folder / "good")
    torch.save(torch.ones(2, dtype=torch.float64), folder / "double")
    metadata = BROKEN[what]()
    for info in (getattr(metadata, "storage_data", None) and metadata.storage_data.values()) or ():
        if info.relative_path in {"good", "double"}:
            info.length = (folder / info.relative_path).stat().st_size
    write_metadata(folder, metadata)
    with pytest.raises((CheckpointFormatError, PickleNotAllowedError, InvalidArgumentError)):
        import_dcp(folder, tmp_path / "s")

    assert {"dcp", "secret"} == names(tmp_path)


def archive(data: bytes, storage: bytes = b"\0" * 8, order: bytes = b"little", packing: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/byteorder", order)
        file.writestr("archive/data/0", storage)
    return buffer.getvalue()


def tensor_pickle(
    *, shape: str = "(I2\nt", strides: str = "(I1\nt", offset: int = 0, numel: int = 2, rebuild: str = "torch._utils\n_rebuild_tensor_v2"
) -> bytes:
    storage = f"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI{numel}\ntQ"
    return f"c{rebuild}\n({storage}I{offset}\n{shape}{strides}I00\nccollections\nOrderedDict\n(tRtR.".encode()


@pytest.mark.parametrize(
    ("data", "is_good"),
    [
        (archive(tensor_pickle()), True),
        (archive(tensor_pickle(offset=1)), False),
        (archive(tensor_pickle(strides="(I2\nt")), False),
        (archive(tensor_pickle(strides="(I-1\nt")), False),
        (archive(tensor_pickle(numel=3)), False),
        (archive(tensor_pickle(numel=1 << 60)), False),
        (archive(tensor_pickle(shape="(I1\nI2\nt")), False),
        (archive(tensor_pickle(), storage=b""), False),
        (archive(tensor_pickle(), packing=zipfile.ZIP_DEFLATED), False),
        (archive(tensor_pickle(rebuild="os\nsystem")), False),
        (archive(b"nonsense"), False),
        (archive(tensor_pickle())[:-30], False),
    ],
)
def test_archives_are_believed_only_as_far_as_their_bytes_go(tmp_path: Path, data: bytes, *, is_good: bool) -> None:
    folder = write_metadata(tmp_path / "dcp", a_tensor("file", length=len(data)))
    (folder / "file").write_bytes(data)
    if is_good:
        assert_equal(torch.zeros(2), import_dcp(folder, tmp_path / "s").read_object("model/w"))
        return
    with pytest.raises(ExpstateError):
        import_dcp(folder, tmp_path / "s")
    assert {"dcp"} == names(tmp_path)


def test_values_that_unpack_to_more_than_they_are_are_refused(tmp_path: Path) -> None:
    bomb: Any = [0]
    for _ in range(60):
        bomb = [bomb, bomb]
    save_folder({"a": {"b": 1}}, tmp_path / "dcp")
    metadata = pickle.loads((tmp_path / "dcp" / ".metadata").read_bytes())  # noqa: S301 - its own
    data = archive(pickle.dumps(bomb))
    (info,) = metadata.storage_data.values()
    info.relative_path, info.offset, info.length = "bomb", 0, len(data)
    (tmp_path / "dcp" / "bomb").write_bytes(data)
    write_metadata(tmp_path / "dcp", metadata)
    with pytest.raises(CheckpointFormatError, match="far more"):
        import_dcp(tmp_path / "dcp", tmp_path / "s")


@given(st.data())
def test_no_change_of_the_metadata_does_more_than_raise(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = pickle.dumps(a_tensor())
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("mutated")
    write_metadata(folder, bytes(changed))
    with pytest.raises(ExpstateError):
        import_dcp(folder, folder / "s")
    assert {".metadata"} == names(folder)
    (folder / ".metadata").unlink()
    folder.rmdir()


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(SnapshotNotFoundError, match=r"no file '\.metadata' in it"):
        import_dcp(tmp_path, tmp_path / "s")
    (tmp_path / "__0.metadata").touch()
    with pytest.raises(SnapshotNotFoundError, match="use_collectives=False"):
        import_dcp(tmp_path, tmp_path / "s")
    with pytest.raises(InvalidArgumentError, match="folder on a disk"):
        import_dcp("s3://bucket/checkpoint", tmp_path / "s")
    with pytest.raises(MemoryBudgetError):
        import_dcp(tmp_path, tmp_path / "s", memory_budget_bytes=1)

    assert {"__0.metadata"} == names(tmp_path)


def test_import_overwrites_only_if_asked_and_fails_without_a_trace(tmp_path: Path) -> None:
    save_folder({"a": {"b": 1}}, tmp_path / "dcp")
    import_dcp(tmp_path / "dcp", tmp_path / "s")
    with pytest.raises(SnapshotExistsError):
        import_dcp(tmp_path / "dcp", tmp_path / "s")
    import_dcp(tmp_path / "dcp", tmp_path / "s", overwrite=True)

    assert {"snapshot.json"} == names(tmp_path / "s")


def test_command_imports_and_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    save_folder({"w": torch.ones(2)}, tmp_path / "dcp")
    assert 0 == main(
        [
            "import",
            "dcp",
            "s",
            "--name",
            "run-7",
            "--tag",
            "old",
            "--tag",
            "paper",
            "--step",
            "3",
            "--key",
            "model",
            "--catalog",
            "catalog.db",
        ]
    )
    assert "(model; 8 B)" in capsys.readouterr().out
    catalog = Catalog("catalog.db")
    (record,) = catalog.search("tag = paper")
    assert ("run-7", 3, ("old", "paper")) == (record.name, record.step, tuple(record.tags))
    catalog.close()

    write_metadata(tmp_path / "bad", HOSTILE["runs code"])
    assert 1 == main(["import", "bad", "t"])
    error = capsys.readouterr().err
    assert "pass --trust to let it run code" in error
    assert [] == OPENED
    assert not os.path.exists("t")  # noqa: PTH110 - relative, as the command saw it
