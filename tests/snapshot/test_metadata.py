"""What is said of a snapshot at its take is what is read of it later."""

from __future__ import annotations

import datetime as dt
import math
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import expstate
from expstate import Snapshot, StateDict
from expstate.cli import main
from expstate.errors import EntryNotFoundError, SnapshotCorruptError, SnapshotNotFoundError
from expstate.format.names import is_id
from tests.state.conftest import assert_same

from .conftest import mlp


class Kind(Enum):
    """An enum of this module."""

    SMALL = 1


class Level(IntEnum):
    """Numbers with names."""

    HIGH = 2


def test_everything_given_is_read_again(place: Path) -> None:
    """Name, tags, params, metrics, note and step, with their types."""
    params = {"lr": 1e-3, "layers": [16, (2, None)], "kind": Kind.SMALL, "nested": {"a": True, 3: "b"}, "huge": 2**80}
    metrics = {"loss": 0.25, "steps": 7, "tensor": torch.tensor(0.5), "numpy": np.float32(1.5), "best": True}
    Snapshot.take(
        place,
        {"state": StateDict()},
        name="baseline",
        tags=["a", "b", "a"],
        params=params,
        metrics=metrics,
        note="line\n<b>ü",
        step=np.int64(12),
    )
    found = Snapshot(place).metadata

    assert ("baseline", ("a", "b"), "line\n<b>ü", 12) == (found.name, found.tags, found.note, found.step)
    assert_same(params, found.params)
    assert_same({"loss": 0.25, "steps": 7, "tensor": 0.5, "numpy": 1.5, "best": 1}, found.metrics)
    assert int is type(found.step)


def test_numbers_that_json_has_not_are_kept(place: Path) -> None:
    """NaN, infinities and numbers of more than 64 bits in params and metrics."""
    Snapshot.take(place, {}, params={"nan": math.nan}, metrics={"inf": -math.inf, "zero": -0.0, "huge": -(2**70)})
    found = Snapshot(place).metadata

    assert math.isnan(found.params["nan"])
    assert [-math.inf, -1.0, -(2**70)] == [found.metrics["inf"], math.copysign(1, found.metrics["zero"]), found.metrics["huge"]]


def test_a_note_is_as_long_as_is_promised(place: Path) -> None:
    """A mebibyte, in characters of any length."""
    Snapshot.take(place, {}, note="é" * 2**19)

    assert "é" * 2**19 == Snapshot(place).metadata.note


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(3), 3),
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
        (torch.tensor([1]).any(), 1),
        (np.float64(0.1), 0.1),
        (np.float16(0.5), 0.5),
        (np.longdouble(0.5), 0.5),
        (np.uint64(2**64 - 1), 2**64 - 1),
        (np.bool_(0), 0),
        (np.array(7), 7),
        (True, 1),
        (Level.HIGH, 2),
        (-(10**4000), -(10**4000)),
        (float("-inf"), -math.inf),
    ],
)
def test_a_metric_is_a_number_of_python(place: Path, value: Any, expected: float) -> None:
    """Whatever kind of number it was."""
    Snapshot.take(place, {}, metrics={"m": value})
    found = Snapshot(place).metadata.metrics["m"]

    assert (type(expected), expected) == (type(found), found)


@pytest.mark.parametrize("step", [7, np.int32(7), np.array(7), torch.tensor(7), torch.tensor(7, dtype=torch.uint8), Level.HIGH + 5])
def test_a_step_is_an_int(place: Path, step: Any) -> None:
    """Whatever kind of int it was."""
    Snapshot.take(place, {}, step=step)
    found = Snapshot(place).metadata.step

    assert (int, 7) == (type(found), found)


class Words(str):
    """A text of a class of its own."""

    __slots__ = ()


def test_texts_are_plain(place: Path) -> None:
    """Names, tags, notes, and names of params and metrics, whatever kind of text they were."""
    given = Words("a")
    Snapshot.take(place, {}, name=np.str_("n"), tags=[given], note=given, params={given: 1}, metrics={np.str_("m"): 2})
    found = Snapshot(place).metadata

    assert ("n", ("a",), "a", {"a": 1}, {"m": 2}) == (found.name, found.tags, found.note, found.params, found.metrics)


def test_params_are_kept_with_their_types_at_every_depth(place: Path) -> None:
    """Halves of characters, huge numbers, and dicts in lists in dicts; long names too."""
    deep: Any = 1
    for _ in range(90):
        deep = {"a": deep}
    params = {
        "text": "\ud800",
        "keys": {"\ud800": ["\udfff"], 2**100: (1.5, None), (1, 2): {True}, None: {}},
        "huge": [10**5000, -(2**64)],
        "numpy": [np.float32(0.1), np.int8(-1), np.bool_(1), np.str_("x")],
        "deep": deep,
        "x" * 70_000: "x" * 60_000,
        "größe \x00\n": "",
    }
    Snapshot.take(place, {}, params=params)

    assert_same(params, Snapshot(place).metadata.params)


def test_nothing_given_is_nothing_said(place: Path) -> None:
    """Defaults are empty, and tell absent from empty where that matters."""
    Snapshot.take(place, {})
    found = Snapshot(place).metadata

    assert (None, (), {}, {}, None, None) == (found.name, found.tags, found.params, found.metrics, found.note, found.step)


def test_what_the_take_knows_is_recorded(place: Path) -> None:
    """Id, time, version, classes of the statefuls, world size and the manifest's digest."""
    before = dt.datetime.now(dt.timezone.utc)
    model = mlp()
    taken = Snapshot.take(place, {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "state": StateDict()})
    found = Snapshot(place).metadata

    assert is_id(found.id)
    assert found.id == taken.id
    assert before - dt.timedelta(milliseconds=1) <= found.created_at <= dt.datetime.now(dt.timezone.utc)
    assert dt.timedelta(0) == found.created_at.utcoffset()
    assert taken.created_at == found.created_at
    assert f"expstate {expstate.__version__}" == found.writer
    assert 1 == found.world_size
    assert {
        "model": "torch.nn.modules.container.Sequential",
        "optimizer": "torch.optim.sgd.SGD",
        "state": "expstate.state.stateful.StateDict",
    } == found.keys
    assert found.digest == taken.metadata.digest
    assert f'"blake3":"{found.digest}"'.encode() in (place / "snapshot.json").read_bytes()


def test_replicated_globs_are_recorded(place: Path) -> None:
    """For one process they change nothing and are kept."""
    Snapshot.take(place, {"model": mlp()}, replicated=["model/*"])

    assert ["model/*"] == Snapshot(place).metadata.provenance["replicated"]


def test_ids_are_unique(tmp_path: Path) -> None:
    """Two takes of one state are two snapshots."""
    assert 3 == len({Snapshot.take(tmp_path / str(number), {}).id for number in range(3)})


def test_nothing_is_read_until_it_is_asked_for(tmp_path: Path) -> None:
    """Opening needs no snapshot to be there; asking does."""
    snapshot = Snapshot(tmp_path / "missing")

    assert str(tmp_path / "missing") == snapshot.path
    with pytest.raises(SnapshotNotFoundError, match="no snapshot at"):
        snapshot.id  # noqa: B018 - asking is the point
    Snapshot.take(tmp_path / "missing", {})
    assert () == snapshot.keys()


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("model/0.*", ["model/0.weight", "model/0.bias"]),
        ("*bias", ["model/0.bias", "model/1.bias", "model/3.bias"]),
        ("state/nested", ["state/nested", "state/nested/a", "state/nested/b"]),
        ("state/nested/[b-c]", ["state/nested/b"]),
        ("*/a", ["state/nested/a"]),
        ("state/odd%2Fname", ["state/odd%2Fname"]),
    ],
)
def test_entries_are_chosen_by_globs(place: Path, glob: str, expected: list[str]) -> None:
    """A ``*`` crosses ``/``; what matches a container brings what is in it."""
    Snapshot.take(place, {"model": mlp(), "state": StateDict({"nested": {"a": 1, "b": torch.ones(1)}, "odd/name": 2})})

    assert expected == [entry.path for entry in Snapshot(place).entries(glob)]


def test_a_glob_that_matches_nothing_is_an_error(place: Path) -> None:
    """Rather than an empty answer that looks like one."""
    snapshot = Snapshot.take(place, {"state": StateDict(a=1)})
    with pytest.raises(EntryNotFoundError, match=r"'b\*' matches no entry"):
        snapshot.entries("b*")


def test_a_damaged_manifest_is_told_from_a_missing_snapshot(place: Path) -> None:
    """One altered byte anywhere is damage, with the path in the message; a manifest cut short is no snapshot."""
    Snapshot.take(place, {"state": StateDict(a=1)}, note="an unlikely note")
    manifest = place / "snapshot.json"
    data = manifest.read_bytes()
    manifest.unlink()
    manifest.write_bytes(data.replace(b"unlikely", b"unlikexy"))
    with pytest.raises(SnapshotCorruptError, match=r"snapshot.*the manifest is damaged"):
        Snapshot(place).keys()
    manifest.write_bytes(data[:-100])
    with pytest.raises(SnapshotNotFoundError, match="interrupted"):
        Snapshot(place).keys()


def test_verify_reads_again_what_is_on_the_disk(place: Path) -> None:
    """A manifest that was read before does not hide that it is damaged now."""
    snapshot = Snapshot.take(place, {"state": StateDict(a=torch.ones(5))})
    assert snapshot.verify().ok
    (place / "snapshot.json").unlink()
    with pytest.raises(SnapshotNotFoundError):
        snapshot.verify()


def test_copies_keep_id_and_metadata(tmp_path: Path) -> None:
    """A copy is the same snapshot at another place."""
    first = Snapshot.take(tmp_path / "one", {"state": StateDict(a=torch.ones(5))}, name="x", metrics={"loss": 1})
    copied = first.copy(tmp_path / "two")

    def facts(snapshot: Snapshot) -> Any:
        return snapshot.metadata

    assert facts(first) == facts(copied)


def test_params_of_an_enum_that_is_not_here_are_read_as_text(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks at a snapshot need not have the classes of whoever took it."""
    Snapshot.take(place, {"state": StateDict()}, params={"kind": Kind.SMALL, "levels": [Level.HIGH, 1]})
    monkeypatch.delitem(globals(), "Kind")
    monkeypatch.delitem(globals(), "Level")

    assert {"kind": "Kind.SMALL", "levels": ["Level.HIGH", 1]} == Snapshot(place).metadata.params
    assert 0 == main(["show", str(place), "--json"])
