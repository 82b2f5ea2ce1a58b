"""Saving by DCP writes ordinary snapshots: the same keys, paths and values as a take, committed or not there."""

from __future__ import annotations

import datetime as dt
import gc as python_gc
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from expstate import Catalog, Snapshot, StateDict, gc, settings
from expstate.errors import (
    InvalidArgumentError,
    InvalidMetadataError,
    InvalidNameError,
    NeedsTrustWarning,
    SnapshotExistsError,
    SnapshotPinnedError,
    StorageError,
)
from expstate.format.manifest import AliasEntry
from expstate.interop.dcp import Reader, Writer

from .states import KEEPS_PLANS, NEEDS_SAFE_MODE, STAGES, assert_equal, error_of, load, names, quiet, save, save_folder, trained

GONE = "the disk is gone"


def test_model_and_optimizer_come_back_as_from_a_take(tmp_path: Path) -> None:
    model, optimizer = trained()
    save({"model": model, "optim": optimizer}, Writer(tmp_path / "saved"))
    Snapshot.take(tmp_path / "taken", {"model": model, "optim": optimizer})
    saved, taken = Snapshot(tmp_path / "saved"), Snapshot(tmp_path / "taken")

    assert ("model", "optim") == saved.keys()
    assert {entry.path for entry in taken.entries()} == {entry.path for entry in saved.entries()}
    assert_equal(dict(model.state_dict()), dict(saved.get_state_dict_for_key("model")))
    assert_equal(optimizer.state_dict(), saved.get_state_dict_for_key("optim"))
    assert saved.verify().ok

    other, its_optimizer = trained(seed=1)
    saved.restore({"model": other, "optim": its_optimizer})

    assert_equal(model.state_dict(), other.state_dict())
    assert_equal(optimizer.state_dict(), its_optimizer.state_dict())


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model, _ = trained()
    save({"model": model}, Writer(tmp_path / "s"))

    (alias,) = [entry for entry in Snapshot(tmp_path / "s").entries() if isinstance(entry, AliasEntry)]
    assert ("model/head.weight", "model/embedding.weight") == (alias.path, alias.target)


def test_values_are_entries_of_their_own_whatever_they_are(tmp_path: Path) -> None:
    lists = {"list": [{"a": 1}, {"b": torch.arange(3)}], "plain": [1, [2, 3]], "tuple": (torch.ones(2), {"x": 1})}
    state = {
        "progress": {"epoch": 3, "loss": float("nan"), "when": dt.date(2026, 1, 2), "name": "a/b.c", "none": None, "betas": (0.9, 0.99)},
        "deep": {**lists, "o.p": {"q": b"raw"}},
        "empty": torch.zeros(0, 3),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "sparse": torch.eye(3).to_sparse(),
        "long": list(range(20_000)),
    }
    save(state, Writer(tmp_path / "s", key="rest"))
    snapshot = Snapshot(tmp_path / "s")

    assert ("progress", "deep", "rest") == snapshot.keys()
    assert snapshot.read_object("progress/loss") != snapshot.read_object("progress/loss")  # NaN
    assert 3 == snapshot.read_object("progress/epoch")
    assert dt.date(2026, 1, 2) == snapshot.read_object("progress/when")
    assert (0.9, 0.99) == snapshot.read_object("progress/betas")
    assert_equal(state["deep"], snapshot.get_state_dict_for_key("deep"))
    rest = snapshot.get_state_dict_for_key("rest")
    assert_equal(torch.eye(3), rest.pop("sparse").to_dense())
    assert_equal({name: state[name] for name in ("empty", "half", "long")}, rest)


def test_objects_that_need_pickle_are_stored_and_told_of(tmp_path: Path) -> None:
    with pytest.warns(NeedsTrustWarning, match="model/function"):
        save({"model": {"function": print}}, Writer(tmp_path / "s"))

    assert print is Snapshot(tmp_path / "s").read_object("model/function", trust=True)


def test_state_dict_at_the_top_goes_under_one_key(tmp_path: Path) -> None:
    model, _ = trained()
    save(model.state_dict(), Writer(tmp_path / "s", key="model"))
    other, _ = trained(seed=1)
    Snapshot(tmp_path / "s").restore({"model": other})

    assert_equal(model.state_dict(), other.state_dict())


def test_a_key_that_is_there_already_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException) as info:
        save({"state": {"a": 1}, "b": 2}, Writer(tmp_path / "s"))

    assert isinstance(error_of(info), InvalidArgumentError)
    assert "pass another key=" in str(error_of(info))
    assert set() == names(tmp_path / "s")


def test_planner_that_does_not_flatten(tmp_path: Path) -> None:
    tensor = torch.arange(4.0)
    save({"a.b": tensor, "c": {"d": tensor + 1, "e": 2}}, Writer(tmp_path / "s"), planner=DefaultSavePlanner(flatten_state_dict=False))

    assert_equal({"a.b": tensor, "c": {"d": tensor + 1, "e": 2}}, Snapshot(tmp_path / "s").get_state_dict_for_key("state"))


@NEEDS_SAFE_MODE
def test_planner_that_transforms(tmp_path: Path) -> None:
    class Halving(DefaultSavePlanner):
        def transform_object(self, write_item: Any, object: Any) -> Any:  # noqa: A002
            return object.half() if isinstance(object, torch.Tensor) else super().transform_object(write_item, object)

    save({"model": {"weight": torch.ones(3), "epoch": 3}}, Writer(tmp_path / "s"), planner=Halving())
    found = Snapshot(tmp_path / "s").get_state_dict_for_key("model")

    assert_equal({"weight": torch.ones(3, dtype=torch.float16), "epoch": 3}, found)


@KEEPS_PLANS
def test_planner_that_keeps_its_plans(tmp_path: Path) -> None:
    for step in range(3):
        state = {"model": {"weight": torch.full((5,), float(step))}, "step": step}
        save(state, Writer(tmp_path / str(step)), planner=DefaultSavePlanner(enable_plan_caching=True))

    for step in range(3):
        snapshot = Snapshot(tmp_path / str(step))
        assert step == snapshot.read_object("state/step")
        assert_equal(torch.full((5,), float(step)), snapshot.read_object("model/weight"))


@STAGES
def test_async_save_keeps_the_moment(tmp_path: Path) -> None:
    model, _ = trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    writer = Writer(tmp_path / "s", step=7)
    with quiet():
        future = dcp.async_save({"model": model}, storage_writer=writer)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        future.result()

    snapshot = Snapshot(tmp_path / "s")
    assert 7 == snapshot.metadata.step
    assert_equal(before, dict(snapshot.get_state_dict_for_key("model")))


def test_writer_goes_to_another_process(tmp_path: Path) -> None:
    """As ``async_checkpointer_type=PROCESS`` has it."""
    writer = Writer(tmp_path / "other", name="moved")
    save({"a": {"b": 1}}, writer, checkpoint_id=tmp_path / "one")
    again = pickle.loads(pickle.dumps(writer))  # noqa: S301 - its own
    save({"a": {"b": 2}}, again, checkpoint_id=tmp_path / "two")

    assert [1, 2] == [Snapshot(tmp_path / name).read_object("a/b") for name in ("one", "two")]
    assert "moved" == Snapshot(tmp_path / "two").metadata.name
    assert {"one", "two"} == names(tmp_path)


def test_take_is_recorded_with_all_that_is_said_of_it(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "catalog.db")
    more: dict[str, Any] = {"params": {"lr": 0.1}, "metrics": {"loss": 0.5}, "note": "by DCP", "tags": ["ablation"]}
    save({"model": {"w": torch.ones(2)}}, Writer(tmp_path / "s", name="first", step=3, catalog=catalog, **more))
    (record,) = catalog.search("tag = ablation and loss < 1")

    assert (Snapshot(tmp_path / "s").id, "first", 3, "by DCP") == (record.id, record.name, record.step, record.note)
    assert ["model"] == [key.key for key in record.keys]
    assert "first" == Snapshot.find("first", catalog=catalog).metadata.name
    catalog.close()


def test_what_was_loaded_is_the_parent_of_what_is_saved(tmp_path: Path) -> None:
    first = Snapshot.take(tmp_path / "first", {"model of a lineage": StateDict(w=torch.ones(2))})
    state = {"model of a lineage": {"w": torch.zeros(2)}}
    load(state, Reader(tmp_path / "first"))
    save(state, Writer(tmp_path / "second"))
    save(state, Writer(tmp_path / "third"))

    assert first.id == Snapshot(tmp_path / "second").manifest.parent
    assert Snapshot(tmp_path / "second").id == Snapshot(tmp_path / "third").manifest.parent


def test_what_is_there_is_overwritten_only_if_asked(tmp_path: Path) -> None:
    save({"a": {"b": 1}}, Writer(tmp_path / "s"))
    with pytest.raises(CheckpointException) as info:
        save({"a": {"b": 2}}, Writer(tmp_path / "s"))
    assert isinstance(error_of(info), SnapshotExistsError)
    assert 1 == Snapshot(tmp_path / "s").read_object("a/b")

    save({"a": {"b": torch.ones(2)}}, Writer(tmp_path / "s", overwrite=True))
    assert_equal(torch.ones(2), Snapshot(tmp_path / "s").read_object("a/b"))
    assert 2 == len(names(tmp_path / "s"))

    catalog = Catalog(tmp_path / "catalog.db")
    catalog.scan(tmp_path)
    catalog.pin(str(tmp_path / "s"))
    catalog.close()
    with pytest.raises(CheckpointException) as info:
        save({"a": {"b": 3}}, Writer(tmp_path / "s", overwrite=True))
    assert isinstance(error_of(info), SnapshotPinnedError)


@pytest.mark.parametrize("where", ["a value", "the planner", "the commit"])
def test_failure_leaves_nothing(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            if where == "a value" and write_item.index.fqn == "model.last":
                raise StorageError(GONE)
            return super().resolve_data(write_item)

        def finish_plan(self, new_plan: Any) -> Any:
            if where == "the planner":
                raise StorageError(GONE)
            return super().finish_plan(new_plan)

    def gone(*_: Any) -> Any:
        raise StorageError(GONE)

    if where == "the commit":
        monkeypatch.setattr("expstate.interop.commit.validate", gone)
    state = {"model": {"first": torch.ones(100), "last": torch.ones(3)}}
    writer = Writer(tmp_path / "s")
    with pytest.raises(CheckpointException, match=GONE):
        save(state, writer, planner=Failing())
    del writer
    python_gc.collect()  # the error holds frames that hold the writer

    assert set() == names(tmp_path)

    monkeypatch.undo()
    save(state, Writer(tmp_path / "s"))
    assert_equal(state["model"], Snapshot(tmp_path / "s").get_state_dict_for_key("model"))


def test_writer_that_is_used_again_removes_what_it_has_left(tmp_path: Path) -> None:
    class Failing(DefaultSavePlanner):
        def finish_plan(self, new_plan: Any) -> Any:
            raise StorageError(GONE)

    writer = Writer(tmp_path / "s")
    with pytest.raises(CheckpointException):
        save({"a": {"b": 1}}, writer, planner=Failing())
    assert any(name.startswith(".attempt-") for name in names(tmp_path / "s"))
    save({"a": {"b": 1}}, writer)

    assert {"snapshot.json"} == names(tmp_path / "s")


def test_process_that_is_killed_leaves_what_gc_removes(tmp_path: Path) -> None:
    code = f"""
import os, torch, warnings
warnings.simplefilter("ignore")
import torch.distributed.checkpoint as dcp
from expstate.interop.dcp import Writer
class Killed(Writer):
    def finish(self, metadata, results):
        os.kill(os.getpid(), 9)
dcp.save({{"a": {{"b": torch.ones(1000)}}}}, storage_writer=Killed({str(tmp_path / "s")!r}))
"""
    assert -9 == subprocess.run([sys.executable, "-c", code], check=False).returncode
    assert 2 == len(names(tmp_path / "s"))

    gc(tmp_path / "s")
    assert set() == names(tmp_path)


def test_bad_arguments_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    for error, more in (
        (InvalidNameError, {"name": "a:b"}),
        (InvalidMetadataError, {"tags": "one"}),
        (InvalidArgumentError, {"key": ""}),
        (MemoryError, {"memory_budget_bytes": 1}),
    ):
        with pytest.raises(error):
            Writer(tmp_path / "s", **more)  # type: ignore[arg-type]
    with pytest.raises(CheckpointException, match="no path"):
        save({"a": 1}, Writer())

    assert set() == names(tmp_path)
    assert Writer.validate_checkpoint_id(tmp_path)
    assert not Writer.validate_checkpoint_id("")


def test_large_tensors_are_cut_and_stay_within_the_budget(tmp_path: Path) -> None:
    tensor = torch.arange(3_000_000, dtype=torch.float32).reshape(1000, 3000)
    with settings.override(data_file_bytes=1 << 20):
        save({"model": {"w": tensor, "column": tensor[:, 3]}}, Writer(tmp_path / "s", memory_budget_bytes=4 << 20))

    snapshot = Snapshot(tmp_path / "s")
    assert_equal(tensor, snapshot.read_object("model/w"))
    assert_equal(tensor[:, 3].clone(), snapshot.read_object("model/column"))
    assert len(names(tmp_path / "s")) > 10


def test_package_is_not_imported_with_the_library() -> None:
    code = """
import sys, expstate
assert "expstate.interop" not in sys.modules and "torch.distributed.checkpoint" not in sys.modules
import expstate.interop
assert "torch.distributed.checkpoint" not in sys.modules
import expstate.interop.dcp
import torch.distributed as dist
assert not dist.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_model_of_dcp_itself_is_the_same(tmp_path: Path) -> None:
    """A control: what DCP's own files bring back is what ours do."""
    model, optimizer = trained()
    save_folder({"model": model, "optim": optimizer}, tmp_path / "dcp")
    save({"model": model, "optim": optimizer}, Writer(tmp_path / "ours"))
    found = []
    for reader in (dcp.FileSystemReader(tmp_path / "dcp"), Reader(tmp_path / "ours")):
        other, its_optimizer = trained(seed=1)
        state: dict[str, Any] = {"model": other, "optim": its_optimizer}
        load(state, reader)
        found.append((other.state_dict(), its_optimizer.state_dict()))

    assert_equal(found[0], found[1])
    assert_equal(model.state_dict(), found[1][0])
