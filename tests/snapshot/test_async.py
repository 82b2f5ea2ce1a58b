"""A take in the background holds the state of the moment when ``async_take`` returned, and never fails in silence."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expstate import PendingSnapshot, ProgressUpdate, Snapshot, StateDict, pending
from expstate.errors import (
    SnapshotExistsError,
    SnapshotNotFoundError,
    StorageError,
    TakeCancelledError,
    TakePendingError,
    UnsupportedValueError,
)
from expstate.storage.registry import open_storage
from expstate.testing import FaultyStorage

from .conftest import TiedModel, is_equal, mlp, train

MIB = 2**20


class _Gate:
    """Holds the writes of a storage until it is opened."""

    def __init__(self, place: Path) -> None:
        self.storage = FaultyStorage(open_storage(place))
        self.open = threading.Event()
        self.reached = threading.Event()
        self.storage.run("write", None, function=self._wait)

    def _wait(self) -> None:
        self.reached.set()
        assert self.open.wait(60)


@pytest.fixture
def gate(place: Path) -> Iterator[_Gate]:
    """A place whose writes wait."""
    gate = _Gate(place)
    yield gate
    gate.open.set()


@pytest.fixture
def faulty(place: Path) -> FaultyStorage:
    """A place that can be made to fail."""
    return FaultyStorage(open_storage(place))


# Consistency


@pytest.mark.parametrize("budget", [None, 2 * MIB, 5 * MIB, 20 * MIB])
def test_the_state_is_that_of_the_return(place: Path, budget: int | None) -> None:
    """Tensors, views, arrays and values that are changed over and over while the take goes on are stored as they were."""
    state: dict[str, Any] = {
        "large": torch.full((6 * MIB,), 7.0),
        "column": torch.full((500, 40), 7.0)[:, ::3],
        "small": [torch.full((5,), 7.0) for _ in range(50)],
        "array": np.full(MIB, 7.0),
        "sparse": torch.full((3, 3), 7.0).to_sparse(),
        "plain": {"seven": [7]},
        "generator": torch.Generator().manual_seed(7),
    }
    expected = torch.Generator().manual_seed(7).get_state()
    taken = Snapshot.async_take(place, {"state": StateDict(state)}, memory_budget_bytes=budget)
    rounds = 0
    while not taken.done() or rounds == 0:
        rounds += 1
        for tensor in (state["large"], state["column"], *state["small"], state["sparse"]._values()):
            tensor.fill_(-rounds)
        state["array"][:] = -rounds
        state["plain"]["seven"][0] = -rounds
        state["generator"].manual_seed(rounds)
    snapshot = taken.wait()
    found = snapshot.get_state_dict_for_key("state")

    assert snapshot.verify().ok
    tensors = [found["large"], found["column"], *found["small"], found["sparse"].to_dense(), torch.from_numpy(found["array"])]
    assert {7.0} == {value for tensor in tensors for value in tensor.unique().tolist()}
    assert {"seven": [7]} == found["plain"]
    assert torch.equal(expected, found["generator"].get_state())


def test_a_training_loop_in_place(tmp_path: Path) -> None:
    """A snapshot per step of a model that goes on training: each holds the weights of its step."""
    model = mlp(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    expected, taken = [], []
    for step in range(5):
        train(model, optimizer, 1, seed=step)
        taken.append(Snapshot.async_take(tmp_path / f"step-{step}", {"model": model, "optimizer": optimizer}, step=step))
        expected.append({name: value.clone() for name, value in model.state_dict().items()})
    for step, one in enumerate(taken):
        live = mlp(2)
        one.wait().restore({"model": live})
        assert all(torch.equal(value, live.state_dict()[name]) for name, value in expected[step].items())
        assert step == one.wait().metadata.step


def test_equal_to_a_take_that_waits(tmp_path: Path) -> None:
    """The same state has the same digests either way."""
    model = mlp(1)
    one = Snapshot.take(tmp_path / "one", {"model": model})
    other = Snapshot.async_take(tmp_path / "other", {"model": model}).wait()

    assert [entry.boxes[0].digest for entry in one.entries("model/*")] == [entry.boxes[0].digest for entry in other.entries("model/*")]  # type: ignore[union-attr]


def test_a_state_beyond_the_budget_is_written_before_the_return(gate: _Gate) -> None:
    """Never more memory: what does not fit is on storage when ``async_take`` returns, and the rest is not yet."""
    threading.Timer(0.3, gate.open.set).start()
    taken = Snapshot.async_take(gate.storage.url, {"state": StateDict(x=torch.zeros(4 * MIB))}, memory_budget_bytes=4 * MIB)

    assert gate.open.is_set()
    assert 10 * MIB <= taken.done_bytes <= 16 * MIB
    assert taken.wait().verify().ok


# Waiting


def test_wait_gives_the_snapshot_and_again(place: Path) -> None:
    """Once it is committed every ``wait`` gives it at once."""
    taken = Snapshot.async_take(place, {"state": StateDict(a=1)})

    assert isinstance(taken, PendingSnapshot)
    assert taken.id == taken.wait().id
    assert taken.wait() is taken.wait(0)
    assert taken.exception() is None
    assert taken.done()
    assert str(place) == taken.path


def test_nothing_is_visible_before_the_commit(gate: _Gate, place: Path) -> None:
    """While bytes are on their way there is no snapshot; ``wait`` with a timeout says how far it is and goes on."""
    taken = Snapshot.async_take(gate.storage.url, {"state": StateDict(x=torch.zeros(MIB))})
    assert gate.reached.wait(60)
    with pytest.raises(TakePendingError, match=r"not done after 0.01 s \(0 of 4,194,304 bytes written\)"):
        taken.wait(0.01)
    with pytest.raises(TimeoutError):
        taken.exception(timeout=0)
    with pytest.raises(SnapshotNotFoundError):
        Snapshot(place).keys()

    assert not taken.done()
    assert "0 of 4,194,304 bytes written" in repr(taken)
    assert f"taking {taken.id[:8]} of state: 0 B of 4 MiB written" == str(taken)
    gate.open.set()
    assert taken.wait().id == Snapshot(place).id
    assert "committed" in repr(taken)
    assert re.fullmatch(rf"took {taken.id[:8]} of state: 4 MiB in [0-9.e-]+ s", str(taken))


def test_a_line_for_people_names_what_is_taken(place: Path) -> None:
    """Of many keys the first; what might act on a terminal is shown as what it is."""
    taken = Snapshot.async_take(place, {f"key {number}\x1b": StateDict() for number in range(20)}, name="first")
    taken.wait()

    keys = ", ".join(f"key {number}%1B" for number in range(12))
    assert str(taken).startswith(f"took first ({taken.id[:8]}) of {keys}, 8 more: 0 B in ")


def test_progress_counts_bytes(place: Path) -> None:
    """Up to the last byte, by the pending take and by a function."""
    told: list[ProgressUpdate] = []
    taken = Snapshot.async_take(place, {"state": StateDict(x=torch.zeros(5 * MIB), y=torch.zeros(3))}, progress=told.append)
    taken.wait()

    assert 20 * MIB + 12 == taken.total_bytes == taken.done_bytes == told[-1].done_bytes
    assert {("take", taken.total_bytes)} == {(update.operation, update.total_bytes) for update in told}


# Awaiting


def test_it_can_be_awaited(tmp_path: Path) -> None:
    """In asyncio, several at once, and when they are done already."""

    async def main() -> list[Snapshot]:
        taken = [Snapshot.async_take(tmp_path / str(number), {"state": StateDict(n=number)}) for number in range(4)]
        snapshots = await asyncio.gather(*taken)
        return [*snapshots, await taken[0]]

    assert [0, 1, 2, 3, 0] == [snapshot.read_object("state/n") for snapshot in asyncio.run(main())]


def test_the_loop_runs_on_while_it_is_awaited(gate: _Gate) -> None:
    """Another task opens the gate that the take waits at."""

    async def main() -> Snapshot:
        taken = Snapshot.async_take(gate.storage.url, {"state": StateDict(x=torch.zeros(9))})
        asyncio.get_running_loop().call_later(0.05, gate.open.set)
        return await taken

    assert asyncio.run(main()).verify().ok


def test_one_take_is_awaited_in_several_loops(gate: _Gate) -> None:
    """A loop that gave up, and two in threads of their own."""

    async def impatient() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_awaited(taken), 0.01)

    async def _awaited(one: PendingSnapshot) -> str:
        return (await one).id

    taken = Snapshot.async_take(gate.storage.url, {"state": StateDict(x=torch.zeros(9))})
    asyncio.run(impatient())
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(asyncio.run(_awaited(taken)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    gate.open.set()
    for thread in threads:
        thread.join()

    assert [taken.id, taken.id] == found
    assert taken.id == asyncio.run(_awaited(taken))


def test_a_failure_is_raised_where_it_is_awaited(faulty: FaultyStorage) -> None:
    """As by ``wait``."""
    faulty.fail("finish", error=StorageError("the disk is broken"))

    async def main() -> None:
        await Snapshot.async_take(faulty.url, {"state": StateDict(x=torch.zeros(9))})

    with pytest.raises(StorageError, match="the disk is broken"):
        asyncio.run(main())


# Cancelling


def test_a_cancelled_take_leaves_nothing(gate: _Gate, place: Path) -> None:
    """``cancel`` comes back when nothing of it remains; waiting for it says that it was cancelled, and nothing is logged or warned of."""
    taken = Snapshot.async_take(gate.storage.url, {"state": StateDict(x=torch.zeros(MIB))})
    assert gate.reached.wait(60)
    threading.Timer(0.1, gate.open.set).start()

    assert taken.cancel()
    assert f"cancelled the take {taken.id[:8]} of state; nothing of it remains" == str(taken)
    assert not place.exists()
    with pytest.raises(TakeCancelledError, match="was cancelled, and nothing of it remains"):
        taken.wait()
    assert taken.done()
    assert taken.cancel()
    assert taken.id not in pending._unreported


def test_cancelling_leaves_the_older_snapshot(gate: _Gate, place: Path) -> None:
    """A take that would have replaced it."""
    old = Snapshot.take(place, {"state": StateDict(x=1)})
    files = sorted(os.listdir(place))
    taken = Snapshot.async_take(gate.storage.url, {"state": StateDict(x=torch.zeros(MIB))}, overwrite=True)
    threading.Timer(0.1, gate.open.set).start()

    assert taken.cancel()
    assert old.id == Snapshot(place).id
    assert files == sorted(os.listdir(place))


def test_a_committed_take_cannot_be_cancelled(place: Path) -> None:
    """It says so, and the snapshot stays."""
    taken = Snapshot.async_take(place, {"state": StateDict(x=1)})
    taken.wait()

    assert not taken.cancel()
    assert Snapshot(place).verify().ok


# Failing


@pytest.mark.parametrize(
    ("operation", "names"), [("create_file", "*"), ("write", "*"), ("finish", "*"), ("create", "snapshot.json"), ("stat", "*")]
)
def test_a_failure_in_the_background_is_raised_and_logged(
    faulty: FaultyStorage, place: Path, caplog: pytest.LogCaptureFixture, operation: str, names: str
) -> None:
    """The storage's error, each time that it is waited for; nothing remains."""
    faulty.fail(operation, error=StorageError("the disk is broken"), names=names)
    with caplog.at_level(logging.ERROR, logger="expstate"):
        taken = Snapshot.async_take(faulty.url, {"state": StateDict(x=torch.zeros(MIB))})
        error = taken.exception()
    for _ in range(2):
        with pytest.raises(StorageError, match="the disk is broken"):
            taken.wait()

    assert isinstance(error, StorageError)
    assert [f"the take to {faulty.url!r} failed: StorageError: the disk is broken"] == [record.getMessage() for record in caplog.records]
    assert "failed: StorageError: the disk is broken" in repr(taken)
    assert f"FAILED: the take {taken.id[:8]} of state: StorageError: the disk is broken" == str(taken)
    assert not taken.cancel()
    assert not place.exists()


def test_a_failure_while_staging_is_raised_at_once(faulty: FaultyStorage, place: Path) -> None:
    """When the budget is small the disk may break before the return: then ``async_take`` raises."""
    faulty.fail("write", error=StorageError("the disk is broken"))
    with pytest.raises(StorageError, match="the disk is broken"):
        Snapshot.async_take(faulty.url, {"state": StateDict(x=torch.zeros(8 * MIB))}, memory_budget_bytes=2 * MIB)

    assert not place.exists()


def test_what_is_wrong_with_the_state_is_raised_at_once(place: Path) -> None:
    """And so is a snapshot that is there already."""
    with pytest.raises(UnsupportedValueError):
        Snapshot.async_take(place, {"state": StateDict(x=torch.empty(1, device="meta"))})
    assert not place.exists()
    Snapshot.take(place, {})
    with pytest.raises(SnapshotExistsError):
        Snapshot.async_take(place, {})


def test_two_takes_to_one_path_have_one_winner(place: Path) -> None:
    """The other is refused, at once or when it is waited for, and the winner is whole."""
    taken, refused = [], 0
    for number in range(4):
        try:
            taken.append(Snapshot.async_take(place, {"state": StateDict(n=number, x=torch.zeros(MIB))}))
        except SnapshotExistsError:
            refused += 1
    errors = [one.exception() for one in taken]

    assert 1 == errors.count(None)
    assert all(isinstance(error, SnapshotExistsError) for error in errors if error is not None)
    assert Snapshot(place).verify().ok
    assert taken[errors.index(None)].id == Snapshot(place).id
    assert [] == list(Snapshot(place).verify().unknown_files)


# Several takes


def test_takes_go_on_side_by_side(tmp_path: Path) -> None:
    """Two in the background and one that waits, of different states."""
    states = [StateDict(x=torch.full((3 * MIB,), float(number))) for number in range(3)]
    first = Snapshot.async_take(tmp_path / "0", {"state": states[0]}, memory_budget_bytes=8 * MIB)
    second = Snapshot.async_take(tmp_path / "1", {"state": states[1]}, memory_budget_bytes=8 * MIB)
    third = Snapshot.take(tmp_path / "2", {"state": states[2]})

    assert [0.0, 1.0, 2.0] == [float(one.read_object("state/x")[-1]) for one in (first.wait(), second.wait(), third)]
    assert all(one.verify().ok for one in (first.wait(), second.wait(), third))


def test_many_takes_one_after_the_other(tmp_path: Path) -> None:
    """Threads and staging memory do not pile up."""
    state = StateDict(x=torch.zeros(MIB))
    before = threading.active_count()
    for number in range(30):
        state["x"].fill_(number)
        Snapshot.async_take(tmp_path / str(number), {"state": state}).wait()

    assert list(range(30)) == [int(Snapshot(tmp_path / str(number)).read_object("state/x")[0]) for number in range(30)]
    assert threading.active_count() <= before + 2


# What is kept alive


def test_live_objects_are_not_kept_alive(gate: _Gate) -> None:
    """Once ``async_take`` has returned the state is copied: model, tensors and statefuls may go."""
    model, tied = mlp(1), TiedModel()
    values = {"x": torch.zeros(MIB), "nested": [torch.ones(3)], "sparse": torch.eye(3).to_sparse(), "array": np.ones(3)}
    state = StateDict(values)
    watched = [weakref.ref(thing) for thing in (model, tied, state, *model.parameters(), *tied.parameters(), values["x"], values["array"])]
    taken = Snapshot.async_take(gate.storage.url, {"model": model, "tied": tied, "state": state})
    del model, tied, state, values
    gc.collect()

    assert [] == [thing() for thing in watched if thing() is not None]
    gate.open.set()
    live = mlp(2)
    taken.wait().restore({"model": live})
    assert is_equal(mlp(1), live)


def test_staging_memory_goes_back(place: Path, no_staging_left: None) -> None:
    """A finished take holds no copy of the state, even while the pending object lives."""
    from expstate import settings

    def resident() -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    tensor = torch.zeros(24 * MIB)
    with settings.override(staging_idle_seconds=0):
        before = resident()
        taken = Snapshot.async_take(place, {"state": StateDict(x=tensor)})
        taken.wait()

    assert resident() - before < 32 * MIB
    assert taken.done()


def test_callbacks_are_called_when_it_has_ended(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From the take's thread, or at once; one that raises is logged and keeps nothing from the others."""
    ended: list[tuple[str, bool]] = []

    def fail(_: PendingSnapshot) -> None:
        raise ValueError

    begun = Snapshot.async_take(place, {"state": StateDict(weight=torch.ones(3))})
    begun.add_done_callback(fail)
    begun.add_done_callback(lambda done: ended.append((done.id, done.done())))
    begun.wait()
    begun._thread.join()
    assert [(begun.id, True)] == ended
    begun.add_done_callback(lambda done: ended.append((done.id, done.done())))

    assert 2 == len(ended)
    assert "a callback of the take" in caplog.text
