"""Every wrong argument is an error of ours that says what is wrong, before anything is written or changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import expstate
from expstate import ExpstateError, Snapshot, StateDict, settings
from expstate.errors import (
    AppStateError,
    EntryNotFoundError,
    InvalidArgumentError,
    InvalidMetadataError,
    InvalidNameError,
    InvalidSettingError,
    MemoryBudgetError,
    UnsupportedSchemeError,
)

from .conftest import Watched

APP_STATE: dict[str, Any] = {"state": StateDict(a=torch.ones(3))}


def nested(levels: int) -> Any:
    """A dict in a dict, and so on."""
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


TAKES: list[tuple[dict[str, Any], type[ExpstateError], str]] = [
    ({"app_state": None}, AppStateError, "must be a dict"),
    ({"app_state": [StateDict()]}, AppStateError, "must be a dict"),
    ({"app_state": {"model": torch.ones(1)}}, AppStateError, r"'model' is a Tensor .*wrap plain values in StateDict"),
    ({"app_state": {"model": {"a": 1}}}, AppStateError, "'model' is a dict"),
    ({"app_state": {"model": torch.nn.Linear}}, AppStateError, "'model' is a type"),
    ({"app_state": {1: StateDict()}}, AppStateError, "must be a text"),
    ({"app_state": {"": StateDict()}}, AppStateError, "not empty"),
    ({"path": ""}, InvalidArgumentError, "not empty"),
    ({"path": "a\0b"}, InvalidArgumentError, "a snapshot's path"),
    ({"path": 3}, InvalidArgumentError, "a snapshot's path"),
    ({"path": None}, InvalidArgumentError, "a snapshot's path"),
    ({"path": b"bytes"}, InvalidArgumentError, "a snapshot's path"),
    ({"path": "fs://"}, InvalidArgumentError, "no path after the scheme"),
    ({"path": "file://host/x"}, InvalidArgumentError, "absolute path"),
    ({"path": "nowhere://bucket/run"}, UnsupportedSchemeError, "nowhere://"),
    ({"path": "http://host/run"}, UnsupportedSchemeError, "http://"),
    ({"pg": "world"}, InvalidArgumentError, "process group"),
    ({"pg": 1}, InvalidArgumentError, "process group"),
    ({"replicated": 5}, InvalidArgumentError, "replicated must be globs"),
    ({"replicated": [5]}, InvalidArgumentError, "replicated must be globs"),
    ({"replicated": [""]}, InvalidArgumentError, "replicated must be globs"),
    ({"storage_options": {"key": "value"}}, InvalidArgumentError, "takes no storage options, got key"),
    ({"storage_options": 5}, InvalidArgumentError, "storage_options must be a dict"),
    ({"name": 5}, InvalidNameError, "must be text"),
    ({"name": ""}, InvalidNameError, "is empty"),
    ({"name": "a/b"}, InvalidNameError, "refs cannot carry"),
    ({"name": "latest"}, InvalidNameError, "meaning of its own"),
    ({"name": "x" * 256}, InvalidNameError, "longer than 255 bytes"),
    ({"name": "a\u202eb"}, InvalidNameError, "invisible"),
    ({"name": "\ud800"}, InvalidNameError, "invisible"),
    ({"name": "latest~1"}, InvalidNameError, "meaning of its own"),
    ({"tags": "best"}, InvalidMetadataError, "a list of texts, got the text 'best'"),
    ({"tags": 5}, InvalidMetadataError, "tags must be a list of texts"),
    ({"tags": [5]}, InvalidNameError, "tag must be text"),
    ({"tags": ["a b", "a=b"]}, InvalidNameError, "tag 'a=b'"),
    ({"tags": b"best"}, InvalidNameError, "tag must be text"),
    ({"tags": ["live"]}, InvalidNameError, "meaning of its own"),
    ({"tags": ["a\x1b[31m"]}, InvalidNameError, "control"),
    ({"params": 5}, InvalidMetadataError, "params must be a dict"),
    ({"params": {5: 1}}, InvalidMetadataError, "a param needs a name"),
    ({"params": {"f": open}}, InvalidMetadataError, "param 'f' cannot be recorded"),
    ({"params": {"t": torch.ones(2)}}, InvalidMetadataError, "param 't' cannot be recorded"),
    ({"params": {"t": [torch.tensor(1)]}}, InvalidMetadataError, "param 't' cannot be recorded"),
    ({"params": {"t": torch.ones((), device="meta")}}, InvalidMetadataError, "param 't' is a tensor on the meta device"),
    ({"params": {"a\ud800": 1}}, InvalidMetadataError, "a param needs a name"),
    ({"params": {"long": "x" * 70_000}}, InvalidMetadataError, "param 'long' cannot be recorded: str of 70,000 items"),
    ({"params": {"deep": nested(200)}}, InvalidMetadataError, "param 'deep' cannot be recorded: it is nested too deeply"),
    ({"params": {"deep": nested(100_000)}}, InvalidMetadataError, "nested too deeply"),
    ({"metrics": [("loss", 1)]}, InvalidMetadataError, "metrics must be a dict"),
    ({"metrics": {"loss": "low"}}, InvalidMetadataError, "metric 'loss' must be a number"),
    ({"metrics": {"loss": torch.ones(2)}}, InvalidMetadataError, "metric 'loss' must be a number"),
    ({"metrics": {"": 1}}, InvalidMetadataError, "a metric needs a name"),
    ({"metrics": {"loss": None}}, InvalidMetadataError, "metric 'loss' must be a number, got NoneType"),
    ({"metrics": {"loss": np.str_("1")}}, InvalidMetadataError, "metric 'loss' must be a number"),
    ({"metrics": {"loss": 1j}}, InvalidMetadataError, "must be a number, got complex"),
    ({"metrics": {"loss": torch.tensor(1j)}}, InvalidMetadataError, "must be a number, got complex"),
    ({"metrics": {"loss": np.timedelta64(1, "ns")}}, InvalidMetadataError, "must be a number, got timedelta64"),
    ({"metrics": {"loss": np.array(1, dtype=object)}}, InvalidMetadataError, "must be a number, got ndarray"),
    ({"metrics": {"loss": torch.ones((), device="meta")}}, InvalidMetadataError, "metric 'loss' is a tensor on the meta device"),
    ({"note": 5}, InvalidMetadataError, "a note must be a text"),
    ({"note": "x" * 2**21}, InvalidMetadataError, "at most 1 MiB"),
    ({"note": "\ud800"}, InvalidMetadataError, "surrogates"),
    ({"step": "3"}, InvalidMetadataError, "step must be an int"),
    ({"step": True}, InvalidMetadataError, "step must be an int"),
    ({"step": 2**63}, InvalidMetadataError, "64 bits"),
    ({"step": 10**5000}, InvalidMetadataError, "64 bits"),
    ({"step": torch.tensor([1, 2])}, InvalidMetadataError, "step must be an int"),
    ({"step": torch.tensor(1.0)}, InvalidMetadataError, "step must be an int"),
    ({"step": np.array([1, 2])}, InvalidMetadataError, "step must be an int"),
    ({"step": torch.ones((), dtype=torch.int64, device="meta")}, InvalidMetadataError, "step is a tensor on the meta device"),
    ({"step": 1.5}, InvalidMetadataError, "step must be an int"),
    ({"memory_budget_bytes": 0}, MemoryBudgetError, "2 MiB"),
    ({"memory_budget_bytes": 2**20}, MemoryBudgetError, "2 MiB"),
    ({"memory_budget_bytes": -1}, MemoryBudgetError, "2 MiB"),
    ({"memory_budget_bytes": 2.0**30}, MemoryBudgetError, "number of bytes"),
    ({"memory_budget_bytes": "1 GiB"}, MemoryBudgetError, "number of bytes"),
    ({"memory_budget_bytes": True}, MemoryBudgetError, "number of bytes"),
    ({"progress": "yes"}, InvalidArgumentError, "progress must be"),
    ({"progress": 1}, InvalidArgumentError, "progress must be"),
]


@pytest.mark.parametrize("method", ["take", "async_take"])
@pytest.mark.parametrize(
    ("given", "error", "words"), TAKES, ids=[f"{next(iter(given))}-{index}" for index, (given, _, _) in enumerate(TAKES)]
)
def test_a_take_refuses_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, given: dict[str, Any], error: type[ExpstateError], words: str
) -> None:
    """``take`` and ``async_take`` check everything that they are given; no folder is made, no state asked for."""
    monkeypatch.chdir(tmp_path)
    watched = Watched(a=1)
    arguments: dict[str, Any] = {"path": tmp_path / "runs" / "snapshot", "app_state": APP_STATE | {"watched": watched}, **given}
    with pytest.raises(error, match=words):
        getattr(Snapshot, method)(**arguments)

    assert [] == list(tmp_path.iterdir())


RESTORES: list[tuple[dict[str, Any], type[ExpstateError], str]] = [
    ({"app_state": None}, AppStateError, "must be a dict"),
    ({"app_state": {"state": {"a": 1}}}, AppStateError, "wrap plain values"),
    ({"app_state": {"other": StateDict()}}, EntryNotFoundError, r"no key 'other' in the snapshot .it has: 'state'"),
    ({"include": 5}, InvalidArgumentError, "include must be globs"),
    ({"include": [None]}, InvalidArgumentError, "include must be globs"),
    ({"include": ""}, InvalidArgumentError, "include must be globs"),
    ({"exclude": [""]}, InvalidArgumentError, "exclude must be globs"),
    ({"exclude": 5}, InvalidArgumentError, "exclude must be globs"),
    ({"include": "stat/*"}, EntryNotFoundError, r"'stat/\*' matches no entry of 'state'"),
    ({"exclude": "state/b"}, EntryNotFoundError, "'state/b' matches no entry"),
    ({"include": []}, InvalidArgumentError, "include is empty"),
    ({"rename": 5}, InvalidArgumentError, "rename must map prefixes"),
    ({"rename": {"a": 1}}, InvalidArgumentError, "rename must map prefixes"),
    ({"device": "gpu"}, InvalidArgumentError, "device 'gpu'"),
    ({"device": "meta"}, InvalidArgumentError, "holds no values"),
    ({"device": object()}, InvalidArgumentError, "device"),
    ({"device": "xpu:7"}, InvalidArgumentError, "'xpu:7' is not there"),
    ({"memory_budget_bytes": 5}, MemoryBudgetError, "2 MiB"),
    ({"progress": "yes"}, InvalidArgumentError, "progress must be"),
]


@pytest.mark.parametrize(
    ("given", "error", "words"), RESTORES, ids=[f"{next(iter(given))}-{index}" for index, (given, _, _) in enumerate(RESTORES)]
)
def test_a_restore_refuses_and_changes_nothing(place: Path, given: dict[str, Any], error: type[ExpstateError], words: str) -> None:
    """``restore`` checks everything that it is given before any state is touched."""
    snapshot = Snapshot.take(place, APP_STATE)
    live = StateDict(a=torch.zeros(3))
    with pytest.raises(error, match=words):
        snapshot.restore(**{"app_state": {"state": live}, **given})

    assert torch.equal(torch.zeros(3), live["a"])


READS: list[tuple[str, tuple[Any, ...], dict[str, Any], type[ExpstateError], str]] = [
    ("read_object", (5,), {}, EntryNotFoundError, "no entry 5"),
    ("read_object", ([],), {}, EntryNotFoundError, r"no entry \[\]"),
    ("read_object", ("",), {}, EntryNotFoundError, "no entry ''"),
    ("read_object", ("state/a",), {"device": "gpu"}, InvalidArgumentError, "device 'gpu'"),
    ("read_object", ("state/a",), {"device": "xpu"}, InvalidArgumentError, "'xpu' is not there"),
    ("read_object", ("state/a",), {"memory_budget_bytes": 1}, MemoryBudgetError, "2 MiB"),
    ("get_state_dict_for_key", (5,), {}, EntryNotFoundError, "no key 5"),
    ("get_state_dict_for_key", ("state/a",), {}, EntryNotFoundError, "no key 'state/a'"),
    ("get_state_dict_for_key", ("state",), {"device": "meta"}, InvalidArgumentError, "meta"),
    ("entries", (5,), {}, InvalidArgumentError, "globs must be globs"),
    ("entries", ("",), {}, InvalidArgumentError, "globs must be globs"),
    ("verify", (), {"memory_budget_bytes": 1}, MemoryBudgetError, "2 MiB"),
    ("verify", (), {"progress": "yes"}, InvalidArgumentError, "progress"),
    ("copy", (5,), {}, InvalidArgumentError, "a snapshot's path"),
    ("copy", ("nowhere://x",), {}, UnsupportedSchemeError, "nowhere://"),
    ("copy", ("copied",), {"memory_budget_bytes": 1}, MemoryBudgetError, "2 MiB"),
    ("copy", ("copied",), {"progress": 1}, InvalidArgumentError, "progress"),
]


@pytest.mark.parametrize(
    ("method", "arguments", "options", "error", "words"), READS, ids=[f"{read[0]}-{index}" for index, read in enumerate(READS)]
)
def test_reading_refuses_with_an_error_of_ours(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    error: type[ExpstateError],
    words: str,
) -> None:
    """The other methods check their arguments too, and make nothing."""
    monkeypatch.chdir(tmp_path)
    snapshot = Snapshot.take("snapshot", APP_STATE)
    with pytest.raises(error, match=words):
        getattr(snapshot, method)(*arguments, **options)

    assert ["snapshot"] == [found.name for found in tmp_path.iterdir()]


@pytest.mark.parametrize("path", ["", 5, None, "nowhere://x"])
def test_opening_and_collecting_refuse_what_is_no_path(path: Any) -> None:
    """``Snapshot(...)`` and ``gc(...)`` do, before they look at a disk."""
    for function in (Snapshot, expstate.gc):
        with pytest.raises((InvalidArgumentError, UnsupportedSchemeError)):
            function(path)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    """A take into a file is an error of the storage and leaves the file."""
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (file, file / "below"):
        with pytest.raises(OSError, match="Not a directory") as found:
            Snapshot.take(place, APP_STATE)
        assert isinstance(found.value, ExpstateError)
    with pytest.raises(OSError, match=r"Not a directory|no snapshot"):
        Snapshot(file).keys()

    assert "mine" == file.read_text()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("IO_THREADS", "many"),
        ("IO_THREADS", "-1"),
        ("MEMORY_BUDGET_BYTES", "1 GiB"),
        ("DIRECT_IO", "maybe"),
        ("DATA_FILE_BYTES", "3"),
        ("PROGRESS", "?"),
    ],
)
def test_variables_that_cannot_be_read_are_named(place: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    """A wrong ``EXPSTATE_...`` variable is an error at the take that names it, and not a silent default."""
    monkeypatch.setenv(f"EXPSTATE_{variable}", value)
    with pytest.raises(InvalidSettingError, match=rf"(?i){variable}"):
        Snapshot.take(place, APP_STATE)

    assert not place.exists()


def test_settings_that_do_not_exist_are_refused() -> None:
    """A misspelt setting in ``override`` is an error."""
    with pytest.raises(InvalidSettingError, match="io_thread"), settings.override(io_thread=3):
        pass


def test_a_small_budget_from_the_environment_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting is held to what the argument is held to."""
    monkeypatch.setenv("EXPSTATE_MEMORY_BUDGET_BYTES", "1000")
    with pytest.raises(MemoryBudgetError, match="2 MiB"):
        Snapshot.take(place, APP_STATE)

    assert not place.exists()
