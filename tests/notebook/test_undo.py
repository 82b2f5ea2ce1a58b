"""What is kept before it is overwritten comes back bit by bit, costs what it says, and is gone when it is not needed any more."""

from __future__ import annotations

import gc
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import RNGState, Snapshot, StateDict, Stateful, settings
from expstate.engine import ancestry
from expstate.engine.lease import LEASE_SECONDS, encode_lease
from expstate.errors import AppStateError, NoUndoRoomError, RestoreInterruptedError, RestoreMismatchError, UnsupportedValueError
from expstate.notebook import undo
from expstate.notebook.undo import Kept, clean_leftovers, keep, leftovers
from expstate.storage import memory
from tests.engine.processes import in_child


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's cache folder for what is kept; nothing may be left in memory at the end."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ancestry.forget()
    for name in tuple(memory._folders):  # of tests of other modules
        memory.forget(name)
    yield tmp_path / "cache" / "expstate" / "undo"
    gc.collect()
    ancestry.forget()
    assert {} == {name: files for name, files in memory._folders.items() if name.startswith("undo/")}


def perceptron() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.BatchNorm1d(30), torch.nn.Linear(30, 2))


class Training:
    """A model, its optimizer, plain values and random generators, and a way to change all of them."""

    def __init__(self) -> None:
        self.model = perceptron()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.progress = StateDict(step=0, losses=[], seen=torch.zeros(3))
        self.app_state: dict[str, Stateful] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "progress": self.progress,
            "rng_state": RNGState(),
        }
        self.train()

    def train(self) -> None:
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(8, 20)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.progress["step"] += 1
        self.progress["losses"].append(loss.item())
        self.progress["seen"] += random.random()

    def state(self) -> dict[str, Any]:
        """Every bit of it, in memory of its own."""
        found: dict[str, Any] = {f"model/{name}": tensor.clone() for name, tensor in self.model.state_dict().items()}
        for number, state in enumerate(self.optimizer.state.values()):
            found |= {f"optimizer/{number}/{name}": torch.as_tensor(value).clone() for name, value in state.items()}
        found |= {"progress": (self.progress["step"], list(self.progress["losses"])), "seen": self.progress["seen"].clone()}
        found |= {"python": random.getstate(), "torch": torch.get_rng_state()}
        return found


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    assert one.keys() == other.keys()
    return [
        name
        for name, value in one.items()
        if not (torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name])
    ]


def bytes_kept() -> int:
    return sum(memory.nbytes(name) for name in list(memory._folders) if name.startswith("undo/"))


# What is kept comes back


def test_everything_comes_back_bit_by_bit_and_the_next_random_numbers_are_the_same() -> None:
    training = Training()
    before = training.state()
    kept = keep(training.app_state, None)
    training.train()

    assert len(before) - 2 <= len(differing(before, training.state()))
    report = kept.put_back(training.app_state)
    assert [] == differing(before, training.state())
    assert ("model", "optimizer", "progress", "rng_state") == report.keys == kept.keys
    training.train()
    after = training.state()
    kept.put_back(training.app_state)
    training.train()
    assert [] == differing(after, training.state())


def test_keeping_changes_nothing() -> None:
    training = Training()
    before = training.state()
    keep(training.app_state, None)

    assert [] == differing(before, training.state())


def test_modules_parameters_and_tensors_stay_the_objects_that_they_were() -> None:
    training = Training()
    objects = [training.model[0], *training.model.parameters(), *training.model.buffers(), training.progress["seen"]]
    kept = keep(training.app_state, None)
    training.train()
    kept.put_back(training.app_state)
    now = [training.model[0], *training.model.parameters(), *training.model.buffers(), training.progress["seen"]]

    assert list(map(id, objects)) == list(map(id, now))
    assert [id(one) for one in training.model.parameters()] == [id(one) for one in training.optimizer.param_groups[0]["params"]]


def test_a_restore_and_its_undo_and_its_redo_bring_back_every_bit(tmp_path: Path) -> None:
    training = Training()
    snapshot = Snapshot.take(tmp_path / "snapshot", training.app_state)
    at_snapshot = training.state()
    training.train()
    before = training.state()
    first = keep(training.app_state, snapshot.restore(training.app_state, dry_run=True).restored)
    snapshot.restore(training.app_state)
    assert [] == differing(at_snapshot, training.state())
    second = keep(training.app_state, None)
    first.put_back(training.app_state)
    assert [] == differing(before, training.state())
    second.put_back(training.app_state)
    assert [] == differing(at_snapshot, training.state())


def test_an_optimizer_without_a_state_is_without_one_again() -> None:
    model = perceptron()
    optimizer = torch.optim.Adam(model.parameters())
    kept = keep({"optimizer": optimizer}, None)
    model(torch.randn(4, 20)).sum().backward()
    optimizer.step()

    assert 6 == len(optimizer.state)
    kept.put_back({"optimizer": optimizer})
    assert 0 == len(optimizer.state)


def test_objects_come_back_without_a_word_of_trust() -> None:
    state = StateDict(point=Point(1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = keep({"state": state}, None)
    state["point"] = None
    kept.put_back({"state": state})

    assert Point(1, 2) == state["point"]


Point = namedtuple("Point", ["x", "y"])  # noqa: PYI024 - as people have them


def test_what_has_no_memory_is_not_kept() -> None:
    model = perceptron()
    model[0] = torch.nn.Linear(20, 30, device="meta")
    bias = model[2].bias.clone()
    kept = keep({"model": model}, None)
    with torch.no_grad():
        model[2].bias.zero_()
    model[0].to_empty(device="cpu")
    kept.put_back({"model": model})

    assert torch.equal(bias, model[2].bias)
    assert "model/0.weight" not in [entry.path for entry in kept.snapshot.entries()]


def test_what_cannot_be_stored_is_told_and_leaves_nothing() -> None:
    with pytest.raises(UnsupportedValueError, match="state/function"):
        keep({"state": StateDict(function=lambda: None)}, None)
    with pytest.raises(AppStateError, match="weight"):
        keep({"weight": torch.ones(2)}, None)  # type: ignore[dict-item]

    assert 0 == bytes_kept()


# Only what is going to change


def test_of_a_module_only_the_named_entries_are_kept_and_put_back() -> None:
    model = perceptron()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = keep({"model": model}, ["model/2.weight", "model/1.running_mean"])
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    report = kept.put_back({"model": model})

    assert (30 * 2 + 30) * 4 == kept.nbytes
    assert {"model/2.weight", "model/1.running_mean"} == set(report.restored)
    assert ((), ()) == (report.missing, report.unexpected)
    assert {"2.weight", "1.running_mean"} == {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}


def test_of_others_everything_is_kept_and_of_modules_without_a_name_nothing() -> None:
    training = Training()
    kept = keep(training.app_state, ["optimizer/state/0/step", "progress/step"])

    assert ("optimizer", "progress", "rng_state") == kept.keys
    assert "progress/seen" in [entry.path for entry in kept.snapshot.entries()]


def test_keys_that_are_not_there_any_more_are_left_out() -> None:
    one, two = StateDict(x=1), StateDict(x=2)
    kept = keep({"one": one, "two": two}, None)
    one["x"] = two["x"] = 3
    report = kept.put_back({"two": two, "three": StateDict()})

    assert ("two",) == report.keys
    assert (3, 2) == (one["x"], two["x"])


def test_nothing_can_be_kept() -> None:
    kept = keep({}, None)

    assert (0, (), "memory") == (kept.nbytes, kept.keys, kept.place)
    assert () == kept.put_back({}).restored


def test_names_with_odd_characters_are_kept() -> None:
    state = StateDict({"a/b": 1, "100%": torch.ones(2)})
    module = torch.nn.ParameterDict({"odd/name %": torch.nn.Parameter(torch.ones(3))})
    kept = keep({"a key/%": module, "state": state}, ["a key%2F%25/odd%2Fname %25"])
    with torch.no_grad():
        module["odd/name %"].zero_()
    kept.put_back({"a key/%": module})

    assert ("a key/%", "state") == kept.keys
    assert torch.equal(torch.ones(3), module["odd/name %"])


def test_a_module_whose_snapshot_has_other_names_is_kept_as_a_whole() -> None:
    """As where it was taken from inside a wrapper: its entries go by the wrapper's names."""
    model = perceptron()
    kept = keep({"model": model}, [f"model/module.{name}" for name in model.state_dict()])

    assert len(model.state_dict()) == len([entry for entry in kept.snapshot.entries() if entry.path != "model"])


def test_a_module_that_was_compiled_since_is_put_back() -> None:
    model = perceptron()
    weight = model[0].weight.clone()
    kept = keep({"model": model}, ["model/0.weight"])
    with torch.no_grad():
        model[0].weight.zero_()
    kept.put_back({"model": torch.compile(model, backend="eager")})

    assert torch.equal(weight, model[0].weight)


def test_what_does_not_fit_any_more_is_refused_before_anything_changes() -> None:
    model, state = perceptron(), StateDict(x=1)
    kept = keep({"model": model, "state": state}, None)
    state["x"] = 2
    other = torch.nn.Sequential(torch.nn.Linear(20, 31))
    with pytest.raises(RestoreMismatchError, match="nothing was changed"):
        kept.put_back({"model": other, "state": state})

    assert 2 == state["x"]
    kept.put_back({"model": model, "state": state})
    assert 1 == state["x"]


def test_an_interrupted_undo_can_be_done_again() -> None:
    training = Training()
    before = training.state()
    kept = keep(training.app_state, None)
    training.train()

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(RestoreInterruptedError):
        kept.put_back(training.app_state, stop)
    assert [] != differing(before, training.state())
    kept.put_back(training.app_state)
    assert [] == differing(before, training.state())


# What it costs


def test_nothing_is_kept_twice() -> None:
    """Tied tensors are one tensor, and what is dropped, or forgotten, takes no memory."""
    model = torch.nn.Sequential(torch.nn.Linear(1000, 1000, bias=False), torch.nn.Linear(1000, 1000, bias=False))
    model[1].weight = model[0].weight
    kept = keep({"model": model}, None)
    with torch.no_grad():
        model[0].weight.add_(1)
    other = keep({"model": model}, None)

    assert 4_000_000 == kept.nbytes == other.nbytes
    assert 8_000_000 <= bytes_kept() < 8_100_000
    kept.put_back({"model": model})
    assert model[0].weight is model[1].weight
    kept.drop()
    kept.drop()
    assert 4_000_000 <= bytes_kept() < 4_100_000
    assert "dropped" in repr(kept)
    del other
    gc.collect()
    assert 0 == bytes_kept()


def test_what_is_too_much_for_memory_goes_to_the_users_cache(cache: Path) -> None:
    training = Training()
    before = training.state()
    kept = keep(training.app_state, None, budget_bytes=1000)
    training.train()
    folder = Path(kept.snapshot.path)

    assert "disk" == kept.place
    assert [folder] == list(cache.iterdir())
    assert 0o700 == folder.stat().st_mode & 0o777
    assert str(os.getpid()) == folder.name.split("-")[-2]
    assert 0 == bytes_kept()
    kept.put_back(training.app_state)
    assert [] == differing(before, training.state())
    kept.drop()
    assert [] == list(cache.iterdir())


def test_the_budget_is_for_all_that_is_kept(cache: Path) -> None:
    state = {"state": StateDict(x=torch.zeros(250_000))}
    with settings.override(undo_budget_bytes=1_500_000):
        first, second = keep(state, None), keep(state, None)
        places = [first.place, second.place]
        first.drop()
        third = keep(state, None)

    assert ["memory", "disk"] == places
    assert "memory" == third.place
    assert [Path(second.snapshot.path)] == list(cache.iterdir())
    second.drop()


def test_a_tenth_of_what_is_available_is_used_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(undo, "available_bytes", lambda: 10_000_000)
    small, large = StateDict(x=torch.zeros(249_000)), StateDict(x=torch.zeros(251_000))
    found = [keep({"state": state}, None) for state in (large, small)]
    places = [kept.place for kept in found]
    found[0].drop()

    assert ["disk", "memory"] == places


def test_the_setting_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPSTATE_UNDO_BUDGET_BYTES", "10")
    kept = keep({"state": StateDict(x=torch.zeros(100))}, None)
    place = kept.place
    kept.drop()

    assert "disk" == place


def test_without_room_anywhere_nothing_is_kept_and_it_is_said_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training()
    before = training.state()
    usage = namedtuple("usage", ["total", "used", "free"])(10**9, 10**9 - 500, 500)  # noqa: PYI024 - as shutil gives it
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(NoUndoRoomError, match=r"the [0-9,]+ bytes .* \(1,000 bytes .* \(500 bytes .*undo=False \(--no-undo\)") as caught:
        keep(training.app_state, None, budget_bytes=1000)

    assert isinstance(caught.value, MemoryError)
    assert [] == differing(before, training.state())
    assert [] == list(cache.iterdir())
    assert 0 == bytes_kept()


@pytest.mark.parametrize("hindrance", ["a file", "no home"])
def test_without_a_cache_folder_there_is_no_room(cache: Path, monkeypatch: pytest.MonkeyPatch, hindrance: str) -> None:
    if hindrance == "a file":
        cache.parent.mkdir(parents=True)
        cache.write_bytes(b"")
    else:
        monkeypatch.setattr(undo.platformdirs, "user_cache_dir", lambda *_, **__: "~/.cache/expstate")
    with pytest.raises(NoUndoRoomError, match="4,000 bytes"):
        keep({"state": StateDict(x=torch.zeros(1000))}, None, budget_bytes=10)

    assert [] == leftovers()


def test_a_disk_that_fills_up_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoUndoRoomError, match="No space left"):
        keep({"state": StateDict(x=torch.zeros(1000))}, None, budget_bytes=10)

    assert [] == list(cache.iterdir())


def test_an_interrupt_while_it_is_kept_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(undo.Take, "write", interrupted)
    for budget in (10, 10**6):
        with pytest.raises(KeyboardInterrupt):
            keep({"state": StateDict(x=torch.zeros(1000))}, None, budget_bytes=budget)

    assert [] == list(cache.iterdir())
    assert 0 == bytes_kept()


# What else knows of it


def test_what_is_kept_is_nobodys_parent_and_what_is_put_back_has_its_own_again(tmp_path: Path) -> None:
    state = {"state": StateDict(x=1), "other": StateDict(x=1)}
    one = Snapshot.take(tmp_path / "1", {"state": state["state"]})
    two = Snapshot.take(tmp_path / "2", {"state": state["state"]})
    kept = keep(state, None)
    assert {"state": two.id, "other": None} == ancestry.parents_of(state)
    one.restore({"state": state["state"]})
    three = Snapshot.take(tmp_path / "3", {"other": state["other"]})
    assert {"state": one.id, "other": three.id} == ancestry.parents_of(state)
    kept.put_back(state)
    assert {"state": two.id, "other": None} == ancestry.parents_of(state)
    assert two.id == Snapshot.take(tmp_path / "4", state).manifest.parent


def test_no_catalog_and_no_provenance_hears_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPSTATE_CATALOG", str(tmp_path / "catalog.db"))
    kept = keep({"state": StateDict(x=1)}, None)

    assert {} == kept.snapshot.metadata.provenance
    assert not (tmp_path / "catalog.db").exists()


def test_what_was_kept_can_be_compared_with_what_is_live_though_it_was_dropped() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3000, 1000), torch.nn.Linear(1000, 10))
    kept = keep({"model": model}, None)
    kept.drop()
    unchanged = kept.snapshot.diff({"model": model})
    with torch.no_grad():
        model[0].weight[-1, -1] += 1

    assert not unchanged
    assert ("model/0.weight",) == tuple(kept.snapshot.diff({"model": model}).changed)


# Processes


@pytest.mark.parametrize("budget", [10**6, 10], ids=["memory", "disk"])
def test_a_child_can_put_it_back_and_takes_nothing_from_its_parent(budget: int) -> None:
    state = StateDict(x=torch.arange(1000.0))
    kept = keep({"state": state}, None, budget_bytes=budget)

    def undo_and_drop() -> float:
        state["x"].zero_()
        kept.put_back({"state": state})
        kept.drop()
        return float(state["x"].sum())

    expected = float(state["x"].sum())
    assert expected == in_child(undo_and_drop).result
    state["x"].zero_()
    kept.put_back({"state": state})
    assert expected == float(state["x"].sum())
    kept.drop()


_KEEPER = """
import os, signal, sys, torch
from expstate import StateDict
from expstate.notebook.undo import keep
kept = keep({"state": StateDict(x=torch.zeros(1000))}, None, budget_bytes=10)
print(kept.snapshot.path, flush=True)
sys.stdin.readline()
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def keeper(end: str) -> tuple[subprocess.Popen[str], Path]:
    """A process that keeps something on disk, and where; it ends when it is written a line."""
    process = subprocess.Popen([sys.executable, "-c", _KEEPER, end], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_process_that_ends_leaves_nothing(cache: Path) -> None:
    process, folder = keeper("well")
    was_there = folder.is_dir()
    process.communicate("\n")

    assert was_there
    assert [] == list(cache.iterdir())


def test_what_a_killed_process_leaves_is_found_and_removed_and_what_others_have_is_not(cache: Path) -> None:
    own = keep({"state": StateDict(x=torch.zeros(1000))}, None, budget_bytes=10)
    process, folder = keeper("killed")
    assert [] == leftovers()
    assert [] == clean_leftovers()
    process.communicate("\n")

    assert [folder] == leftovers()
    assert [folder] == clean_leftovers()
    assert [Path(own.snapshot.path)] == list(cache.iterdir())
    own.drop()


def left(cache: Path, name: str, owner: bytes | None, hours: float) -> Path:
    folder = cache / name
    folder.mkdir(parents=True)
    then = time.time() - hours * 3600
    if owner is not None:
        (folder / "owner.json").write_bytes(owner)
        os.utime(folder / "owner.json", (then, then))
    os.utime(folder, (then, then))
    return folder


def test_only_what_is_surely_nobodys_is_a_leftover(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = encode_lease("0" * 32, "undo", ())
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("socket.gethostname", lambda: "another-host")
        of_another_host = encode_lease("1" * 32, "undo", ())
    with monkeypatch.context() as before:
        before.setattr("expstate.engine.lease.boot_id", lambda: "the boot before")
        of_another_boot = encode_lease("2" * 32, "undo", ())
    assert LEASE_SECONDS < 48 * 3600
    left(cache, "of this process", mine, 48)
    left(cache, "of another host", of_another_host, 48)
    left(cache, "just begun", None, 0)
    left(cache, "of another boot, new", of_another_boot, 1)
    expected = [left(cache, "never begun", None, 48), left(cache, "of another boot, old", of_another_boot, 48)]
    (cache / "a file").write_bytes(b"")
    (cache / "link").symlink_to(expected[0])

    assert expected == leftovers()


def test_files_of_others_in_a_leftover_are_not_followed(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_bytes(b"x")
    folder = left(cache, "left", None, 48)
    (folder / "link").symlink_to(tmp_path / "precious")

    assert [] == clean_leftovers()
    assert (tmp_path / "precious" / "file").exists()


def test_leftovers_are_found_without_what_is_heavy() -> None:
    lines = [
        "import sys",
        "from expstate.notebook.undo import leftovers",
        "leftovers()",
        "print([name for name in ('sqlalchemy', 'pandas', 'ipywidgets', 'IPython') if name in sys.modules])",
    ]
    found = subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, capture_output=True, text=True).stdout

    assert "[]" == found.strip()


def test_it_says_what_it_is() -> None:
    assert "Kept(state, 400 B, memory)" == repr(keep({"state": StateDict(x=torch.zeros(100))}, None))
    assert isinstance(keep({}, None), Kept)
