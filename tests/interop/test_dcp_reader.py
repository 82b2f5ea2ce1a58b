"""Loading by DCP reads any snapshot: in place, checked, whatever took it."""

from __future__ import annotations

import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from expstate import RNGState, Snapshot, StateDict, settings
from expstate.errors import (
    EntryNotFoundError,
    InvalidArgumentError,
    NeedsTrustWarning,
    PickleNotAllowedError,
    RestoreMismatchError,
    SnapshotCorruptError,
)
from expstate.interop.dcp import Reader, Writer
from expstate.interop.names import Names

from .states import assert_equal, error_of, load, save, train, trained


def test_what_was_taken_is_loaded_into_statefuls(tmp_path: Path) -> None:
    model, optimizer = trained()
    progress, rng = StateDict(epoch=3, history=[0.5, 0.25], best={"loss": 0.25}), RNGState()
    Snapshot.take(tmp_path / "s", {"model": model, "optim": optimizer, "progress": progress, "rng": rng})
    expected = random.random()
    other, its_optimizer = trained(seed=1)
    its_progress = StateDict(epoch=0, history=[], best={"loss": 1.0})
    at = {name: tensor.data_ptr() for name, tensor in other.state_dict().items()}
    load({"model": other, "optim": its_optimizer, "progress": its_progress, "rng": RNGState()}, Reader(tmp_path / "s"))

    assert expected == random.random()
    assert_equal(model.state_dict(), other.state_dict())
    assert at == {name: tensor.data_ptr() for name, tensor in other.state_dict().items()}
    assert_equal(dict(progress), dict(its_progress))
    assert train(model, optimizer) == train(other, its_optimizer)


def test_key_at_the_top(tmp_path: Path) -> None:
    model, _ = trained()
    Snapshot.take(tmp_path / "taken", {"net": model})
    save(model.state_dict(), Writer(tmp_path / "saved"))
    for reader in (Reader(tmp_path / "taken", key="net"), Reader(tmp_path / "saved")):
        other, _ = trained(seed=1)
        load(other.state_dict(), reader)
        assert_equal(model.state_dict(), other.state_dict())


def test_a_part_of_it_is_enough(tmp_path: Path) -> None:
    model, optimizer = trained()
    Snapshot.take(tmp_path / "s", {"model": model, "optim": optimizer})
    bias = torch.zeros(8)
    load({"model": {"inner.0.bias": bias}}, Reader(), checkpoint_id=tmp_path / "s")

    assert_equal(model.inner[0].bias.detach(), bias)


def test_values_of_all_kinds(tmp_path: Path) -> None:
    kinds = {
        "none": None,
        "betas": (0.9, 0.99),
        "ordered": OrderedDict(x=torch.ones(2)),
        "list": [torch.zeros(2), {"a": 1}],
        "long": list(range(20_000)),
        "empty": torch.zeros(0, 2),
    }
    odd = {"sparse": torch.eye(3).to_sparse(), "numbers": {1: "a", 2: "b"}}
    Snapshot.take(tmp_path / "s", {"kinds": StateDict(kinds | odd)})
    found: dict[str, Any] = {
        "none": 0,
        "betas": (0.0,),
        "ordered": OrderedDict(x=torch.zeros(2)),
        "list": [torch.ones(2), {"a": 0}],
        "long": [],
        "empty": torch.ones(0, 2),
        "sparse": 0,
        "numbers": {"1": "", "2": ""},
    }
    load({"kinds": found}, Reader(tmp_path / "s"))

    assert {"1": "a", "2": "b"} == found.pop("numbers")
    assert_equal(torch.eye(3), found.pop("sparse").to_dense())
    assert_equal(kinds, found)


def test_metadata_rebuilds_the_state(tmp_path: Path) -> None:
    model, optimizer = trained()
    save({"model": model, "optim": optimizer, "step": 3}, Writer(tmp_path / "s"))
    found: dict[str, Any] = {}
    _load_state_dict(found, Reader(tmp_path / "s"), planner=_EmptyStateDictLoadPlanner(), no_dist=True)

    assert 3 == found["step"]
    assert_equal(dict(model.state_dict()), found["model"])
    assert_equal(list(optimizer.state_dict()["param_groups"]), found["optim"]["param_groups"])


def test_values_are_converted_into_the_dtype_of_the_target(tmp_path: Path) -> None:
    save({"w": torch.tensor([1.5, 2.5])}, Writer(tmp_path / "s"))
    found = {"w": torch.zeros(2, dtype=torch.float64)}
    load(found, Reader(tmp_path / "s"))

    assert_equal(torch.tensor([1.5, 2.5], dtype=torch.float64), found["w"])


def test_memory_that_is_not_contiguous(tmp_path: Path) -> None:
    whole = torch.zeros(4, 6)
    save({"w": torch.arange(8.0).reshape(4, 2)}, Writer(tmp_path / "s"))
    load({"w": whole[:, ::3]}, Reader(tmp_path / "s"))

    assert_equal(torch.arange(8.0).reshape(4, 2), whole[:, ::3].clone())
    assert 0 == whole[:, 1].abs().sum()


def test_cut_tensors_are_read_whole(tmp_path: Path) -> None:
    tensor = torch.arange(3_000_000, dtype=torch.float32).reshape(1000, 3000)
    with settings.override(data_file_bytes=1 << 20):
        Snapshot.take(tmp_path / "s", {"model": StateDict(w=tensor)})
    found = {"model": {"w": torch.zeros_like(tensor)}}
    load(found, Reader(tmp_path / "s", memory_budget_bytes=4 << 20))

    assert_equal(tensor, found["model"]["w"])


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    save({"model": {"w": torch.ones(2, 3)}}, Writer(tmp_path / "s"))
    found = torch.zeros(3, 2)
    with pytest.raises(CheckpointException, match=r"Size mismatch|has shape"):
        load({"model": {"w": found}}, Reader(tmp_path / "s"))

    assert 0 == found.sum()


def test_what_a_planner_gives_is_checked_too(tmp_path: Path) -> None:
    class Wrong(DefaultLoadPlanner):
        def resolve_tensor(self, read_item: Any) -> torch.Tensor:
            return torch.zeros(5)

    class Shared(DefaultLoadPlanner):
        def resolve_tensor(self, read_item: Any) -> torch.Tensor:
            return torch.zeros(1).expand(4)

    save({"w": torch.ones(4)}, Writer(tmp_path / "s"))
    for planner, match in ((Wrong(), r"'state/w' has shape \(4,\)"), (Shared(), "share memory")):
        with pytest.raises(CheckpointException, match=match) as info:
            load({"w": torch.zeros(4)}, Reader(tmp_path / "s"), planner=planner)
        assert isinstance(error_of(info), RestoreMismatchError)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    save({"model": {"w": torch.ones(2)}}, Writer(tmp_path / "s"))
    with pytest.raises(CheckpointException, match=r"model\.other"):
        load({"model": {"other": torch.ones(2)}}, Reader(tmp_path / "s"))
    with pytest.raises(CheckpointException, match="no snapshot at"):
        load({"model": {"w": torch.ones(2)}}, Reader(tmp_path / "nowhere"))
    with pytest.raises(CheckpointException, match="no key 'net'"):
        load({"w": torch.ones(2)}, Reader(tmp_path / "s", key="net"))
    with pytest.raises(CheckpointException, match="rank must be one of the 1"):
        load({"w": torch.ones(2)}, Reader(tmp_path / "s", rank=3))
    with pytest.raises(EntryNotFoundError):
        Reader(tmp_path / "s", key="net").read_metadata()
    with pytest.raises(InvalidArgumentError, match="no path"):
        Reader().read_metadata()


def test_names_that_stand_for_two_things_are_refused(tmp_path: Path) -> None:
    Snapshot.take(tmp_path / "s", {"a": StateDict({"b.c": torch.ones(1), "b": {"c": torch.zeros(1)}, "d": 1})})
    found = {"a": {"d": 0}}
    load(found, Reader(tmp_path / "s"))
    assert 1 == found["a"]["d"]

    with pytest.raises(CheckpointException, match=r"several entries .* 'a\.b\.c'"):
        load({"a": {"b.c": torch.zeros(1)}}, Reader(tmp_path / "s"))


def test_damage_is_found(tmp_path: Path) -> None:
    save({"model": {"w": torch.ones(1000)}}, Writer(tmp_path / "s"))
    (file,) = (tmp_path / "s").glob("*.safetensors")
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointException, match="'model/w' is damaged") as info:
        load({"model": {"w": torch.zeros(1000)}}, Reader(tmp_path / "s"))

    assert isinstance(error_of(info), SnapshotCorruptError)
    load({"model": {"w": torch.zeros(1000)}}, Reader(tmp_path / "s", verify=False))


def test_objects_are_loaded_only_if_trusted(tmp_path: Path) -> None:
    with pytest.warns(NeedsTrustWarning):
        Snapshot.take(tmp_path / "s", {"a": StateDict(f=print, w=torch.ones(2))})
    found = {"a": {"f": None, "w": torch.zeros(2)}}
    with pytest.raises(CheckpointException, match="trust=True") as info:
        load(found, Reader(tmp_path / "s"))
    assert isinstance(error_of(info), PickleNotAllowedError)
    assert_equal(torch.zeros(2), found["a"]["w"])

    load(found, Reader(tmp_path / "s", trust=True))
    assert print is found["a"]["f"]


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    save({"one": {"w": torch.ones(1000)}, "two": {"w": torch.ones(1000)}}, Writer(tmp_path / "s"))
    (file,) = (tmp_path / "s").glob("two-*.safetensors")
    file.unlink()
    found = {"one": {"w": torch.zeros(1000)}}
    load(found, Reader(tmp_path / "s"))

    assert_equal(torch.ones(1000), found["one"]["w"])


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_names_are_those_that_dcp_gives(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = {"model": model, "optim": optimizer, "odd": StateDict({"a.b": {"c/d": 1}, "%": [1, [2]], "": [{"x": 1}, [torch.ones(1)]]})}
    snapshot = Snapshot.take(tmp_path / "s", state)
    with pytest.warns(UserWarning, match=r"torch.distributed is (disabled|unavailable)"):
        metadata = dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "dcp"))

    assert set(metadata.state_dict_metadata) == set(Names(snapshot.entries(), None).found)
    assert metadata.planner_data == {name: named.place for name, named in Names(snapshot.entries(), None).found.items()}
