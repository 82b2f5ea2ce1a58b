"""``autosave`` takes when it is due, goes on from the last whole take, and does not get in the training's way."""

from __future__ import annotations

import datetime as dt
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Catalog, Snapshot, StateDict, autosave, settings
from expstate.engine import ancestry
from expstate.errors import (
    AppStateError,
    ExpstateWarning,
    InvalidArgumentError,
    InvalidMetadataError,
    InvalidNameError,
    MemoryBudgetError,
    RestoreMismatchError,
    SnapshotCorruptError,
    StorageError,
    TakeFailedWarning,
    UnsupportedSchemeError,
)
from expstate.integrations import rhythm
from expstate.integrations.rhythm import seconds_of
from expstate.storage import registry
from expstate.testing import FaultyStorage

from . import trainings
from .trainings import Training, run, steps_of, takes


class Gate:
    """What writes to ``gated://`` paths wait for, or fail of."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.fails = False

    def storage(self, path: str, _: Any) -> FaultyStorage:
        storage = FaultyStorage(registry.open_storage(path))
        storage.run("write", None, function=self._write)
        # Folders are listed as on the disk that it stands for.
        storage.walk = registry.open_storage(path).walk  # type: ignore[method-assign]
        return storage

    def _write(self) -> None:
        assert self.open.wait(60)
        if self.fails:
            msg = "the disk is broken"
            raise StorageError(msg)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setitem(registry._factories, "gated", gate.storage)
    yield gate
    gate.open.set()


def state() -> dict[str, Any]:
    return {"model": StateDict(weight=torch.ones(3))}


# When


def test_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    """At multiples of them, and once more at the end if steps went by; each take says its step."""
    with autosave(state(), steps=4, name="a", root=tmp_path, keep_last=None, on_busy="wait") as saver:
        for _ in range(10):
            saver.step()

    assert [4, 8, 10] == steps_of(tmp_path, "a")
    assert (3, 0, 0) == (saver.taken, saver.skipped, saver.failed)
    assert f"Autosave({str(tmp_path / 'a')!r}, step 10, 3 taken)" == repr(saver)


def test_no_last_take_of_a_step_that_is_taken(tmp_path: Path) -> None:
    with autosave(state(), steps=5, name="a", root=tmp_path) as saver:
        for _ in range(5):
            saver.step()

    assert [5] == steps_of(tmp_path, "a")


def test_nothing_is_taken_without_a_step(tmp_path: Path) -> None:
    with autosave(state(), steps=5, name="a", root=tmp_path):
        pass

    assert [] == os.listdir(tmp_path)


def test_steps_may_have_numbers_of_their_own(tmp_path: Path) -> None:
    """Samples for instance: a take whenever a multiple is passed."""
    with autosave(state(), steps=100, name="a", root=tmp_path, keep_last=None, on_busy="wait") as saver:
        begun = [saver.step(number, metrics={"loss": number / 2}) is not None for number in (64, 128, 192, 256, 320)]

    assert [False, True, False, True, True] == begun
    assert [128, 256, 320] == steps_of(tmp_path, "a")
    assert [64.0, 128.0, 160.0] == [snapshot.metadata.metrics["loss"] for snapshot in takes(tmp_path, "a")]


def test_every_so_much_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from the beginning, and from take to take."""
    now = 1000.0
    monkeypatch.setattr(rhythm.time, "monotonic", lambda: now)
    begun = []
    with autosave(state(), every="10m", name="a", root=tmp_path, keep_last=None, signal=False) as saver:
        for seconds in (0, 599, 1, 599, 1, 10_000):
            now += seconds
            pending = saver.step()
            begun.append(pending is not None)
            if pending is not None:
                pending.wait()

    assert [False, False, True, False, True, True] == begun
    assert [3, 5, 6] == steps_of(tmp_path, "a")


def test_a_take_may_be_asked_for(tmp_path: Path) -> None:
    with autosave(state(), every="1h", name="a", root=tmp_path) as saver:
        saver.step()
        pending = saver.take()
        assert pending is not None
        assert pending is saver.last
        assert 1 == pending.wait().metadata.step


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("10m", 600.0), ("90s", 90.0), ("1h", 3600.0), (" 1.5 h ", 5400.0), (7, 7.0), (0.5, 0.5), (dt.timedelta(minutes=2), 120.0)],
)
def test_times_are_understood(given: Any, seconds: float) -> None:
    assert seconds == seconds_of(given)


@pytest.mark.parametrize("given", ["", "soon", "10", "-3m", "0s", 0, -1.0, float("nan"), float("inf"), True, dt.timedelta(0), ["10m"]])
def test_what_is_no_time_is_refused_at_once(tmp_path: Path, given: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="every must be a time such as"):
        autosave(state(), every=given, root=tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, InvalidArgumentError, "say when to take"),
        ({"steps": 0}, InvalidArgumentError, "steps must be a whole number from 1 on, got 0"),
        ({"steps": 2.0}, InvalidArgumentError, "steps must be a whole number"),
        ({"steps": 1, "keep_last": 0}, InvalidArgumentError, "keep_last must be a whole number from 1 on"),
        ({"steps": 1, "deadline_seconds": 0}, InvalidArgumentError, "deadline_seconds must be a positive number"),
        ({"steps": 1, "on_busy": "later"}, InvalidArgumentError, "on_busy must be one of"),
        ({"steps": 1, "base": "latest"}, InvalidArgumentError, "base must be 'auto'"),
        ({"steps": 1, "params": {"autosave": 1}}, InvalidArgumentError, "give it by name="),
        ({"steps": 1, "params": {"a": object()}}, InvalidMetadataError, "param"),
        ({"steps": 1, "memory_budget_bytes": 1}, MemoryBudgetError, "memory budget"),
        ({"steps": 1, "timeout": -1}, InvalidArgumentError, "timeout must be a positive number"),
        ({"steps": 1, "catalog": True}, InvalidArgumentError, "catalog must be"),
        ({"steps": 1, "replicated": [3]}, InvalidArgumentError, "replicated must be globs"),
        ({"steps": 1, "pg": 3}, InvalidArgumentError, "pg must be a process group"),
        ({"steps": 1, "name": "a/b"}, InvalidNameError, "name"),
        ({"steps": 1, "name": "ghp_" + "a1B2" * 9}, InvalidNameError, "must not look like a secret"),
        ({"steps": 1, "root": "nowhere://x"}, UnsupportedSchemeError, "nowhere"),
    ],
)
def test_bad_arguments_are_refused_at_once(tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        autosave(state(), **{"root": tmp_path, **options})

    assert [] == os.listdir(tmp_path)


def test_bad_states_and_steps_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(AppStateError):
        autosave({"model": 3}, steps=1, root=tmp_path)  # type: ignore[dict-item]
    saver = autosave(state(), steps=1, root=tmp_path)
    with pytest.raises(InvalidArgumentError, match="inside of the with block"):
        saver.step()
    with saver:
        for step in (-1, 1.5, True):
            with pytest.raises(InvalidArgumentError, match="step must be a whole number"):
                saver.step(step)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError, match="already"):
            saver.__enter__()


# Where


def test_takes_go_to_the_folder_of_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else to one in the working folder, out of git's sight; the series is named after the script."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["/somewhere/finetune.py"])
    for root in ("set", ""):
        with settings.override(root=root), autosave(state(), steps=1) as saver:
            saver.step()

    assert [1] == steps_of(tmp_path / "set", "finetune")
    assert [1] == steps_of(tmp_path / "expstate-snapshots", "finetune")
    assert "*\n" == (tmp_path / "expstate-snapshots" / ".gitignore").read_text()


def test_a_later_chdir_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    with autosave(state(), steps=1, name="a", root="runs") as saver:
        monkeypatch.chdir(tmp_path / "there")
        saver.step()

    assert [1] == steps_of(tmp_path / "runs", "a")


def test_names_sort_as_the_takes_came(tmp_path: Path) -> None:
    """Also when a training goes on in another process, and from an earlier step."""
    for _ in range(3):
        with autosave(state(), steps=1, name="a", root=tmp_path, keep_last=None, on_busy="wait") as saver:
            saver.step(100), saver.step(7)
    found = takes(tmp_path, "a")

    assert [100, 7] * 3 == [snapshot.metadata.step for snapshot in found]
    assert sorted(found, key=lambda snapshot: snapshot.created_at) == found
    assert {"a"} == {snapshot.metadata.params["autosave"] for snapshot in found}


def test_an_object_store_will_do(tmp_path: Path) -> None:
    """Anything that can list folders below a URL: here the memory of fsspec."""
    url = f"memory://{tmp_path.name}"
    for _ in range(2):
        with autosave(state(), steps=1, name="a", root=url, keep_last=2, on_busy="wait") as saver:
            saver.resume()
            for _ in range(3):
                saver.step()

    assert 6 == autosave(state(), steps=1, name="a", root=url).resume()


# Going on


def test_a_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Ended in between, with no word of warning."""
    training = Training()
    with autosave(training.state, steps=10, name="digits", root=tmp_path) as saver:
        for _ in range(25):
            training.step()
            saver.step()
    resumed, start, _ = run(tmp_path)
    expected = trainings.uninterrupted()

    assert 25 == start
    assert torch.equal(expected.weights, resumed.weights)
    assert expected.progress["losses"] == resumed.progress["losses"]
    assert [50, 60] == steps_of(tmp_path)[-2:]


def test_nothing_to_go_on_from_is_none(tmp_path: Path) -> None:
    training = Training()
    before = training.weights

    assert autosave(training.state, steps=1, name="digits", root=tmp_path).resume() is None
    assert torch.equal(before, training.weights)


def test_only_the_own_series_is_gone_on_from(tmp_path: Path) -> None:
    """Not from another's, nor from what someone has put into the folder."""
    run(tmp_path, name="other")
    Snapshot.take(tmp_path / "digits" / "00000099-step-99-01234567", Training().state, step=99)

    assert autosave(Training().state, steps=1, name="digits", root=tmp_path).resume() is None


def _damage(snapshot: Snapshot, key: str) -> None:
    path = next(Path(snapshot.path).glob(f"{key}*"))
    data = bytearray(path.read_bytes())
    data[-5 if key == "model" else len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.mark.parametrize("key", ["model", "snapshot.json"])
def test_a_damaged_take_is_told_and_the_one_before_is_restored(tmp_path: Path, key: str) -> None:
    run(tmp_path)
    newest = takes(tmp_path)[-1]
    _damage(newest, key)
    training = Training()
    saver = autosave(training.state, steps=10, name="digits", root=tmp_path)
    with pytest.warns(ExpstateWarning, match=f"{newest.path}.*is damaged, so the take before it is restored"):
        step = saver.resume()

    assert 50 == step
    assert 50 == len(training.progress["losses"])


def test_if_all_are_damaged_that_is_an_error(tmp_path: Path) -> None:
    run(tmp_path, keep_last=1)
    _damage(takes(tmp_path)[0], "model")
    saver = autosave(Training().state, steps=10, name="digits", root=tmp_path)
    with pytest.warns(ExpstateWarning), pytest.raises(SnapshotCorruptError, match="none of the 1 takes"):
        saver.resume()


def test_a_take_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    """An older one is no answer to a model that was changed."""
    run(tmp_path)
    saver = autosave({"model": torch.nn.Linear(3, 3)}, steps=10, name="digits", root=tmp_path)
    with pytest.raises(RestoreMismatchError):
        saver.resume()


# What is written


def test_only_what_has_changed_is_written(tmp_path: Path) -> None:
    """From the second take on, also in the process that goes on; each snapshot stands alone all the same."""
    frozen, trained = torch.randn(100_000), torch.zeros(3)
    live: dict[str, Any] = {"model": StateDict(frozen=frozen, trained=trained)}
    for turn in range(2):
        saver = autosave(live, steps=1, name="a", root=tmp_path, keep_last=2, on_busy="wait")
        ancestry.forget()
        assert saver.resume() == (None if turn == 0 else 3)
        with saver:
            for _ in range(3):
                trained += 1
                saver.step()
    full = autosave(live, steps=1, name="a", root=tmp_path, keep_last=2, base=None)
    with full:
        full.step(9)
    kept = takes(tmp_path, "a")

    assert [6, 9] == [snapshot.metadata.step for snapshot in kept]
    assert [False, True] == [snapshot.nbytes_written > frozen.nbytes for snapshot in kept]
    assert all(snapshot.verify().ok for snapshot in kept)
    assert torch.equal(frozen, kept[0].read_object("model/frozen"))


# Storage that is slow or broken


def test_a_take_that_is_due_while_one_goes_on_is_skipped(tmp_path: Path, gate: Gate) -> None:
    """By default, and counted; the last one waits."""
    with autosave(state(), steps=1, name="a", root=f"gated://{tmp_path}", base=None) as saver:
        for _ in range(4):
            saver.step()
        gate.open.set()

    assert (2, 3, 0) == (saver.taken, saver.skipped, saver.failed)
    assert [1, 4] == steps_of(tmp_path, "a")
    assert {"policy": "wait", "skipped": 3} == {
        name: value for name, value in takes(tmp_path, "a")[1].metadata.provenance["busy"].items() if name != "waited_seconds"
    }


def test_a_take_may_be_replaced_by_the_next(tmp_path: Path, gate: Gate) -> None:
    with autosave(state(), steps=1, name="a", root=f"gated://{tmp_path}", base=None, on_busy="replace") as saver:
        saver.step()
        threading.Timer(0.2, gate.open.set).start()
        saver.step()

    assert [2] == steps_of(tmp_path, "a")
    assert (1, 0, 0) == (saver.taken, saver.skipped, saver.failed)


def test_a_take_that_fails_is_warned_of_and_the_training_goes_on(tmp_path: Path, gate: Gate) -> None:
    gate.open.set()
    gate.fails = True
    with autosave(state(), steps=2, name="a", root=f"gated://{tmp_path}", base=None) as saver:
        saver.step()
        pending = saver.step()
        assert pending is not None
        pending.exception()
        pending._thread.join()
        with pytest.warns(TakeFailedWarning, match="the snapshot of step 2 was not taken: StorageError: the disk is broken"):
            saver.step()
        gate.fails = False

    assert (1, 1) == (saver.taken, saver.failed)
    assert [3] == steps_of(tmp_path, "a")


def test_what_fails_at_once_is_warned_of_too(tmp_path: Path) -> None:
    """A state that cannot be stored, say."""
    progress = StateDict(x=1)
    with autosave({"progress": progress}, steps=1, name="a", root=tmp_path) as saver:
        progress["x"] = torch.empty(1, device="meta")
        assert saver.step() is None
        progress["x"] = 2
        with pytest.warns(TakeFailedWarning, match="step 1 was not taken: UnsupportedValueError"):
            saver.step()

    assert [2] == steps_of(tmp_path, "a")


def test_a_failure_at_the_end_is_warned_of(tmp_path: Path, gate: Gate) -> None:
    gate.open.set()
    gate.fails = True
    with (
        pytest.warns(TakeFailedWarning, match="step 1 was not taken"),
        autosave(state(), steps=9, name="a", root=f"gated://{tmp_path}", base=None) as saver,
    ):
        saver.step()


# Ends


@pytest.mark.parametrize(("error", "expected"), [(SystemExit, [3]), (ValueError, []), (KeyboardInterrupt, [])])
def test_after_an_exception_there_is_a_last_take_only_if_it_was_meant(
    tmp_path: Path, error: type[BaseException], expected: list[int]
) -> None:
    """``sys.exit`` is called between steps; anything else may have come out of the midst of one."""

    def train() -> None:
        with autosave(state(), steps=10, name="a", root=tmp_path) as saver:
            for _ in range(3):
                saver.step()
            raise error

    with pytest.raises(error):
        train()

    assert expected == steps_of(tmp_path, "a")


def test_takes_that_go_on_are_waited_for_after_an_exception(tmp_path: Path) -> None:
    def fail() -> None:
        with autosave(state(), steps=1, name="a", root=tmp_path) as saver:
            saver.step()
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        fail()
    assert [1] == steps_of(tmp_path, "a")


# Keeping


def test_the_last_are_kept(tmp_path: Path) -> None:
    """Those of earlier processes go too, and leave neither folder nor record."""
    catalog = Catalog(tmp_path / "catalog.db")
    for _ in range(2):
        run(tmp_path, keep_last=3, on_busy="wait", catalog=catalog)
        for path in (tmp_path / "digits").iterdir():
            assert path.joinpath("snapshot.json").exists()
    with autosave(state(), steps=1, name="digits", root=tmp_path, keep_last=2, on_busy="wait", catalog=catalog) as saver:
        saver.step(99)

    assert [60, 99] == steps_of(tmp_path)
    assert [99, 60] == [record.step for record in catalog.search(project="*")]
    assert 2 == len(list((tmp_path / "digits").iterdir()))
    catalog.close()


def test_what_somebody_has_marked_or_put_there_is_kept(tmp_path: Path) -> None:
    """A tag, an alias, a pin; a snapshot of another series, or of none; a file."""
    catalog = Catalog(tmp_path / "catalog.db")
    run(tmp_path, keep_last=None, on_busy="wait", catalog=catalog)
    first, second, third, fourth, *_ = takes(tmp_path)
    catalog.tag(first.id, "good")
    catalog.alias(second.id, "best")
    catalog.pin(third.id)
    foreign = Snapshot.take(tmp_path / "digits" / "00000000-step-0-01234567", state(), step=0, catalog=catalog)
    other = Snapshot.take(tmp_path / "digits" / "00000000-step-1-01234567", state(), params={"autosave": "other"}, step=1, catalog=catalog)
    (tmp_path / "digits" / "notes.txt").write_text("mine")
    archived = fourth.copy(tmp_path / "archive", catalog=catalog)
    run(tmp_path, keep_last=1, on_busy="wait", catalog=catalog)
    with autosave(state(), steps=1, name="digits", root=tmp_path, keep_last=1, catalog=catalog) as saver:
        saver.step(99)

    assert [0, 1, 10, 20, 30, 99] == steps_of(tmp_path)
    assert all(snapshot.verify().ok for snapshot in (first, second, third, foreign, other, archived))
    assert "mine" == (tmp_path / "digits" / "notes.txt").read_text()
    assert [str(tmp_path / "archive")] == [location.url for location in catalog[fourth.id].locations]
    catalog.close()


def test_marks_count_without_a_catalog(tmp_path: Path) -> None:
    """They lie in the snapshot's folder."""
    catalog = Catalog(tmp_path / "catalog.db")
    run(tmp_path, keep_last=None, on_busy="wait", catalog=catalog)
    catalog.tag(takes(tmp_path)[0].id, "good")
    catalog.close()
    with autosave(state(), steps=1, name="digits", root=tmp_path, keep_last=1) as saver:
        saver.step(99)

    assert [10, 99] == steps_of(tmp_path)


def test_a_take_that_fails_removes_nothing(tmp_path: Path, gate: Gate) -> None:
    """The newest committed one stays whatever becomes of later ones."""
    gate.open.set()
    options: dict[str, Any] = {"steps": 1, "name": "a", "root": f"gated://{tmp_path}", "base": None, "keep_last": 1, "on_busy": "wait"}
    with autosave(state(), **options) as saver:
        saver.step()
        saver.last.wait()  # type: ignore[union-attr]
        gate.fails = True
        saver.step()
        saver.last.exception()  # type: ignore[union-attr]
        saver.last._thread.join()  # type: ignore[union-attr]
        assert [1] == steps_of(tmp_path, "a")
        gate.fails = False
        with pytest.warns(TakeFailedWarning):
            saver.step()

    assert [3] == steps_of(tmp_path, "a")


def test_what_a_dead_process_left_is_removed(tmp_path: Path) -> None:
    """Before the first take of the next."""
    code = """
from expstate.storage import local
training = Training()
saver = autosave(training.state, steps=1, name="digits", root=root)
Snapshot.async_take(saver.series.place(1, 1, "0" * 8), training.state, params={"autosave": "digits"}, step=1).wait()
local.LocalStorage.flush = lambda self: os.kill(os.getpid(), signal.SIGKILL)
with saver:
    saver.step(2)
    time.sleep(60)
"""
    with trainings.started(code, tmp_path) as process:
        process.communicate(timeout=60)
    left = [path for path in (tmp_path / "digits").iterdir() if not (path / "snapshot.json").exists()]
    assert 1 == len(left)
    with autosave(state(), steps=1, name="digits", root=tmp_path) as saver:
        saver.step(3)

    assert [1, 3] == steps_of(tmp_path)
    assert not left[0].exists()
