"""A take puts a whole snapshot in its place, or nothing, and changes nothing that lives."""

from __future__ import annotations

import os
import random
import stat
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expstate import ProgressUpdate, RNGState, Snapshot, StateDict, progress, settings
from expstate.errors import NeedsTrustWarning, SnapshotExistsError, UnsupportedValueError
from expstate.format.manifest import AliasEntry, TensorEntry
from expstate.state.objects import safe_mode_holds

from .conftest import TiedModel, Watched, digest_of, is_equal, mlp, train


class Drawing(Watched):
    """A stateful that draws random numbers when it is asked for its state."""

    def state_dict(self) -> dict[str, Any]:
        return {"noise": [random.random(), np.random.rand(), torch.rand(1).item()]}


class Opaque:
    """An object that only pickle can store."""

    def __init__(self) -> None:
        self.value = 3


def test_take_gives_a_snapshot_that_can_be_opened_again(place: Path) -> None:
    """What ``take`` returns and what is opened at its path later are the same snapshot."""
    model = mlp()
    snapshot = Snapshot.take(place, {"model": model, "progress": StateDict(epoch=3)})
    again = Snapshot(place)

    assert snapshot.id == again.id
    assert ("model", "progress") == again.keys()
    assert snapshot.manifest == again.manifest
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) == again.nbytes
    assert 3 == again.read_object("progress/epoch")


def test_entries_are_those_of_the_state_dict_in_order(place: Path) -> None:
    """Containers come before what is in them, names as the state dict has them."""
    snapshot = Snapshot.take(place, {"model": mlp(), "state": StateDict(a=[1, torch.zeros(2)], b={})})

    found = [entry.path for entry in snapshot.entries()]
    assert ["model", *(f"model/{name}" for name in mlp().state_dict()), "state", "state/a", "state/a/0", "state/a/1", "state/b"] == found


def test_files_carry_the_attempt_and_cannot_be_written(place: Path) -> None:
    """In the folder are data files of each key, read-only, and the manifest; no lease is left."""
    snapshot = Snapshot.take(place, {"model": mlp(), "state": StateDict(x=torch.ones(3))})
    attempt = snapshot.id[:8]

    assert {"snapshot.json", f"model-00001-{attempt}.safetensors", f"state-00001-{attempt}.safetensors"} == set(os.listdir(place))
    assert {0o444} == {stat.S_IMODE(file.stat().st_mode) for file in place.iterdir()}


@pytest.mark.parametrize("form", ["text", "PathLike", "fs", "file", "relative"])
def test_paths_of_every_form_name_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Plain paths, ``os.PathLike`` and URLs of the local disk; a later ``chdir`` does not move a snapshot."""
    folder = tmp_path / "runs" / "step 1"
    monkeypatch.chdir(tmp_path)
    forms = {"text": str(folder), "PathLike": folder, "fs": f"fs://{folder}", "file": f"file://{folder}", "relative": "runs/step 1"}
    snapshot = Snapshot.take(forms[form], {"state": StateDict(a=1)})
    monkeypatch.chdir("/")

    assert 1 == snapshot.read_object("state/a")
    assert 1 == Snapshot(folder).read_object("state/a")
    assert str(folder) == snapshot.path


def test_a_snapshot_is_not_overwritten_unasked(place: Path) -> None:
    """A second take to the same path fails and leaves the first whole."""
    first = Snapshot.take(place, {"state": StateDict(a=torch.ones(3))})
    files = sorted(os.listdir(place))
    with pytest.raises(SnapshotExistsError, match="overwrite=True"):
        Snapshot.take(place, {"state": StateDict(a=torch.zeros(3))})

    assert files == sorted(os.listdir(place))
    assert Snapshot(place).verify().ok
    assert first.id == Snapshot(place).id


def test_overwrite_replaces_and_leaves_nothing_of_the_old(place: Path) -> None:
    """With ``overwrite=True`` the new snapshot takes the place of the old one, files and all."""
    old = Snapshot.take(place, {"state": StateDict(a=torch.ones(3)), "gone": StateDict(b=torch.ones(2))})
    (place / "notes.txt").write_text("not ours")
    new = Snapshot.take(place, {"state": StateDict(a=torch.zeros(3))}, overwrite=True)

    assert old.id != new.id
    assert torch.equal(torch.zeros(3), Snapshot(place).read_object("state/a"))
    assert {"notes.txt", "snapshot.json", f"state-00001-{new.id[:8]}.safetensors"} == set(os.listdir(place))


def test_overwrite_of_nothing_is_a_take(place: Path) -> None:
    """``overwrite=True`` does not ask for something to be there."""
    assert 1 == Snapshot.take(place, {"state": StateDict(a=1)}, overwrite=True).read_object("state/a")


def test_snapshots_may_lie_inside_one_another(place: Path) -> None:
    """A snapshot in a folder of another snapshot is not seen by it, and outlives it."""
    outer = Snapshot.take(place, {"state": StateDict(a=torch.ones(3))})
    inner = Snapshot.take(place / "inner", {"state": StateDict(a=torch.zeros(3))})
    outer.delete()

    assert inner.verify().ok
    assert ["inner"] == os.listdir(place)


def test_keys_that_look_alike_as_file_names_stay_apart(place: Path) -> None:
    """Keys with characters that no file name has, or equal but for case, get files of their own."""
    keys = ["a/b", "a_b", "A_B", "100%", ".hidden", "ключ", "x" * 300]
    Snapshot.take(place, {key: StateDict(n=torch.tensor(number)) for number, key in enumerate(keys)})
    opened = Snapshot(place)

    assert tuple(keys) == opened.keys()
    assert [{"n": torch.tensor(number)} for number in range(len(keys))] == [opened.get_state_dict_for_key(key) for key in keys]
    assert len(keys) == len({name.casefold() for name in os.listdir(place) if name.endswith(".safetensors")})


@pytest.mark.parametrize("state", [{}, {"a": {}, "b": []}, {"a": torch.empty(0, 3)}, {"a": 1}])
def test_states_without_bytes_are_snapshots_too(place: Path, state: dict[str, Any]) -> None:
    """Empty states, empty tensors and plain values alone can be taken and come back."""
    Snapshot.take(place, {"state": StateDict(state)})
    found = Snapshot(place).get_state_dict_for_key("state")

    assert digest_of(state) == digest_of(found)
    assert [getattr(value, "shape", None) for value in state.values()] == [getattr(value, "shape", None) for value in found.values()]


def test_an_empty_app_state_is_a_snapshot_of_nothing(place: Path) -> None:
    """No key at all: it can be taken, opened, restored and verified."""
    Snapshot.take(place, {})

    assert () == Snapshot(place).keys()
    assert () == Snapshot(place).restore({}).restored
    assert Snapshot(place).verify().ok


def test_only_the_bytes_of_a_view_are_stored(place: Path) -> None:
    """A row of a large tensor costs a row."""
    large = torch.randn(1000, 64)
    snapshot = Snapshot.take(place, {"state": StateDict(row=large[10], every=large[:, ::32])})

    assert (64 + 2000) * 4 == snapshot.nbytes
    assert sum(file.stat().st_size for file in place.glob("*.safetensors")) < 64 * 1024
    assert torch.equal(large[:, ::32], snapshot.read_object("state/every"))


def test_tied_weights_are_stored_once(place: Path) -> None:
    """An embedding that is also the output layer is one tensor and an alias of it."""
    model = TiedModel()
    snapshot = Snapshot.take(place, {"model": model})

    assert [TensorEntry, AliasEntry] == [type(entry) for entry in snapshot.entries("model/*.weight")]
    assert model.embedding.weight.nbytes == snapshot.nbytes


def test_large_tensors_are_cut_into_files_of_the_target_size(place: Path) -> None:
    """With a small target several files hold one tensor, in boxes of whole rows, and it comes back."""
    tensor, other = torch.randn(4100, 300), torch.randn(50)
    with settings.override(data_file_bytes=1024 * 1024):
        Snapshot.take(place, {"state": StateDict(tensor=tensor, other=other)})
    opened = Snapshot(place)
    (entry,) = opened.entries("state/tensor")

    assert isinstance(entry, TensorEntry)
    assert 5 == len(entry.boxes)
    assert all(file.stat().st_size <= 1024 * 1024 + 4096 for file in place.glob("*.safetensors"))
    assert torch.equal(tensor, opened.read_object("state/tensor"))
    assert torch.equal(tensor[870:1800], opened.read_object("state/tensor", rows=slice(870, 1800)))
    assert torch.equal(other, opened.get_state_dict_for_key("state")["other"])


def test_a_take_changes_no_random_generator(place: Path) -> None:
    """Even where a ``state_dict()`` draws numbers, the next ones are as if no take had been."""
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = [random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(1).item()]
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    Snapshot.take(place, {"drawing": Drawing(), "rng": RNGState()})

    assert expected == [random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(1).item()]


def test_random_generators_are_taken_as_they_were_before_the_first_state_dict(place: Path) -> None:
    """The order of the keys does not matter: what a ``state_dict()`` draws is not in the state that is taken."""
    torch.manual_seed(3)
    Snapshot.take(place, {"drawing": Drawing(), "rng": RNGState()})
    expected = torch.rand(4)
    torch.manual_seed(4)
    Snapshot(place).restore({"rng": RNGState()})

    assert torch.equal(expected, torch.rand(4))


def test_a_take_changes_no_state(place: Path) -> None:
    """Not a byte of model and optimizer, and neither whether they train."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    before = digest_of(model.state_dict(), optimizer.state_dict())
    Snapshot.take(place, {"model": model, "optimizer": optimizer})

    assert before == digest_of(model.state_dict(), optimizer.state_dict())
    assert model.training
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_progress_is_told_in_bytes(place: Path) -> None:
    """A function is told of every piece; the last tells of all bytes."""
    told: list[ProgressUpdate] = []
    snapshot = Snapshot.take(place, {"state": StateDict(a=torch.zeros(3, 1024, 1024), b=torch.zeros(7))}, progress=told.append)

    assert {("take", snapshot.nbytes)} == {(update.operation, update.total_bytes) for update in told}
    assert sorted(update.done_bytes for update in told) == [update.done_bytes for update in told]
    assert snapshot.nbytes == told[-1].done_bytes


def test_a_bar_is_there_only_when_it_is_seen(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An interrupt that comes while a bar is thrown away is lost: what takes no time has none."""
    made: list[str] = []
    really = progress._bar
    monkeypatch.setattr(progress, "_bar", lambda operation, total: made.append(operation) or really(operation, total))
    state = {"state": StateDict(a=torch.zeros(3, 1024, 1024))}

    Snapshot.take(place, state, progress=True)
    assert ([], "") == (made, capsys.readouterr().err)
    with settings.override(progress_delay_seconds=0):
        assert Snapshot(place).verify(progress=True).ok
    assert ["verify"] == made
    assert "verify:   0%" in capsys.readouterr().err


def test_a_bar_that_comes_late_shows_all_from_the_beginning(capsys: pytest.CaptureFixture[str]) -> None:
    with settings.override(progress_delay_seconds=0.05):
        shown = progress.Progress("take", 4096, option=True)
        shown.add(1024)
        time.sleep(0.1)
        assert "" == capsys.readouterr().err
        shown.add(2048)
        shown._bar.refresh()
        shown.close()
        shown.add(1024)

    assert "take:  75%" in capsys.readouterr().err
    assert shown._bar is None


def test_a_stateful_of_your_own_can_be_taken(place: Path) -> None:
    """Anything with ``state_dict()`` and ``load_state_dict()``, whatever the state is."""
    Snapshot.take(place, {"own": Watched(a=torch.arange(3), b=[{"c": 1}])})
    own = Watched()
    Snapshot(place).restore({"own": own})

    assert 1 == len(own.loads)
    assert torch.equal(torch.arange(3), own.state["a"])
    assert [{"c": 1}] == own.state["b"]


class Failing(Watched):
    """A stateful whose ``state_dict()`` fails."""

    def state_dict(self) -> dict[str, Any]:
        msg = "no state today"
        raise RuntimeError(msg)


def test_a_failing_state_dict_leaves_nothing(place: Path) -> None:
    """The error is the stateful's own; the folder is as it was."""
    with pytest.raises(RuntimeError, match="no state today"):
        Snapshot.take(place, {"model": mlp(), "failing": Failing()})

    assert not place.exists()


def test_a_failing_state_dict_leaves_the_older_snapshot(place: Path) -> None:
    """A take that would overwrite and fails has replaced nothing."""
    old = Snapshot.take(place, {"model": mlp(1)})
    files = sorted(os.listdir(place))
    with pytest.raises(RuntimeError, match="no state today"):
        Snapshot.take(place, {"failing": Failing()}, overwrite=True)
    model = mlp(2)
    old.restore({"model": model})

    assert files == sorted(os.listdir(place))
    assert is_equal(mlp(1), model)


def _holds_itself() -> list[Any]:
    values: list[Any] = [1]
    values.append(values)
    return values


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.empty(3, device="meta"), "meta device"),
        (torch.nn.LazyLinear(3).weight, "lazy parameter"),
        (_holds_itself(), "holds itself"),
        (lambda: None, "cannot be pickled"),
        ({"deep": [{"deeper": open}, (x for x in ())]}, "cannot be pickled"),
    ],
    ids=["meta", "lazy", "recursive", "lambda", "generator"],
)
def test_values_that_cannot_be_stored_are_named(place: Path, value: Any, words: str) -> None:
    """The error names the path of the value and what is wrong with it; nothing is left."""
    with pytest.raises(UnsupportedValueError, match=rf"'state/bad.*{words}"):
        Snapshot.take(place, {"state": StateDict(good=torch.ones(3), bad=value)})

    assert not place.exists()


def test_objects_that_will_need_trust_are_told_at_the_take(place: Path) -> None:
    """The warning names the entries and points to the caller's line, not to the library."""
    with pytest.warns(NeedsTrustWarning, match=rf"'state/opaque'.*{'Opaque' if safe_mode_holds() else '2.10 can'}") as found:
        Snapshot.take(place, {"state": StateDict(opaque=Opaque(), plain=1)})

    assert [__file__] == [warning.filename for warning in found]


def test_one_stateful_under_two_keys_comes_back_from_each(place: Path) -> None:
    """The same stateful under two keys is stored under both and comes back from each."""
    model = mlp(1)
    Snapshot.take(place, {"one": model, "two": model})
    fresh = mlp(2)
    Snapshot(place).restore({"two": fresh})

    assert is_equal(model, fresh)


def test_progress_ends_at_the_bytes_of_the_state(tmp_path: Path) -> None:
    """Digests of a tensor of many blocks, which are written after it, are not counted."""
    updates: list[ProgressUpdate] = []
    Snapshot.take(tmp_path / "s", {"state": StateDict(w=torch.zeros(66 * 2**18))}, progress=updates.append)
    assert (66 * 2**20, 66 * 2**20) == (updates[-1].done_bytes, updates[-1].total_bytes)
