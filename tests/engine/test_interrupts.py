"""Ctrl-C at any moment: the error reaches the user, nothing goes on behind their back, and nothing appears later."""

from __future__ import annotations

import functools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.errors import ExpstateError, RestoreInterruptedError, StorageError, TakeCancelledError
from expstate.pending import PendingSnapshot
from expstate.storage.local import LocalStorage
from expstate.testing import FaultyStorage
from tests.campaign import Campaign

from .crashes import AFTER, BEFORE, EARLIER, PLACE, act, assert_clean, check, crew_threads, found_at, point, prepare, state
from .processes import Changes, changes_of, in_child, watched


def interrupt(*_: object) -> None:
    """What the user does, or the kernel of a notebook."""
    os.kill(os.getpid(), signal.SIGINT)


def settle() -> None:
    """Let a thread end that has said that it is done, or was just being started and finds that there is nothing to do."""
    until = time.monotonic() + 5
    while any(name.startswith("expstate-take") for name in crew_threads()) and time.monotonic() < until:
        time.sleep(0.001)


def begin_async(root: Path) -> PendingSnapshot:
    return Snapshot.async_take(root / PLACE, state(3))


def ended_by(function: Callable[[], Any]) -> BaseException | None:
    """The error by which it ended, if it is one that an interrupt leads to."""
    try:
        ended = function()
        if isinstance(ended, PendingSnapshot):
            # The interrupt came when the caller had it in hand already, or not at all.
            ended.wait()
    except (KeyboardInterrupt, ExpstateError) as error:
        return error
    return None


def assert_quiet(root: Path) -> int | None:
    """Nobody is at work, nothing is left, and it stays so; what is visible."""
    settle()
    assert [] == crew_threads()
    assert_clean(root)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    time.sleep(0.02)
    settle()
    assert [] == crew_threads()
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert 1 == found_at(root / EARLIER)
    return found_at(root / PLACE)


INTERRUPTED = pytest.mark.campaign("All or nothing", "Ctrl-C before each change of the disk, and at random moments")


@INTERRUPTED
@pytest.mark.parametrize("action", ["take", "overwrite", "copy", "delete"])
def test_interrupted_at_any_change(tmp_path: Path, action: str, campaign: Campaign) -> None:
    prepare(tmp_path / "counted", action)
    count = len(changes_of(functools.partial(act, tmp_path / "counted", action)))
    outcomes = set()
    for number in campaign.some(range(1, count + 1), short=10):
        root = tmp_path / str(number)
        prepare(root, action)

        def run(number: int = number, root: Path = root) -> tuple[str | None, int | None]:
            with watched(Changes(number, interrupt)):
                error = ended_by(functools.partial(act, root, action))
            return error and type(error).__name__, assert_quiet(root)

        error, seen = in_child(run).result
        with point(campaign):
            assert seen == check(root, action)
        outcomes.add((error, seen))

    assert ("KeyboardInterrupt", BEFORE[action]) in outcomes or action == "delete"
    assert ("KeyboardInterrupt", AFTER[action]) in outcomes  # it was done before the interrupt could be told
    assert {("KeyboardInterrupt", BEFORE[action]), ("KeyboardInterrupt", AFTER[action]), (None, AFTER[action])} >= outcomes


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StorageError("the reply was lost")])
def test_a_deletion_that_is_interrupted_when_the_manifest_is_gone_removes_the_rest(tmp_path: Path, error: BaseException) -> None:
    prepare(tmp_path, "delete")
    storage = FaultyStorage(LocalStorage(str(tmp_path / PLACE)))
    storage.fail("delete", error=error, names="snapshot.json", done=True)
    with pytest.raises(type(error)):
        Snapshot(storage.url).delete()

    assert_clean(tmp_path)
    assert AFTER["delete"] == found_at(tmp_path / PLACE)


def test_an_async_take_that_is_interrupted_does_not_appear_later(tmp_path: Path) -> None:
    """Whoever gets no handle gets no snapshot."""
    outcomes = set()
    for number in range(1, 60):
        root = tmp_path / str(number)
        prepare(root, "take")

        def run(number: int = number, root: Path = root) -> tuple[str, int | None]:
            handle = None
            with watched(Changes(number, interrupt)) as changes:
                try:
                    handle = begin_async(root)
                except KeyboardInterrupt:
                    return "interrupted", assert_quiet(root)
                made = len(changes.log)
                try:
                    handle.wait()
                except KeyboardInterrupt:  # of the wait: the take goes on
                    handle.wait()
            return ("too late" if made < number else "in hand"), assert_quiet(root)

        outcome, seen = in_child(run).result
        assert (None if outcome == "interrupted" else 3) == seen
        outcomes.add(outcome)
        if outcome == "too late":
            break

    assert {"interrupted", "too late"} <= outcomes


@pytest.mark.parametrize("moment", ["while it writes", "while it commits"])
def test_an_async_take_that_is_interrupted_when_it_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """The thread is at work, and the caller will never have the handle: it is stopped, and cleans up itself if it can still be."""
    prepare(tmp_path, "take")
    storage = FaultyStorage(LocalStorage(str(tmp_path / PLACE)))
    reached = threading.Event()

    def linger() -> None:
        reached.set()
        time.sleep(0.2)

    if moment == "while it writes":
        storage.run("finish", 1, function=linger)
    else:
        storage.run("create", 1, function=linger, names="snapshot.json")
    start = threading.Thread.start

    def start_and_interrupt(thread: threading.Thread) -> None:
        start(thread)
        if thread.name.startswith("expstate-take"):
            assert reached.wait(20)
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        Snapshot.async_take(storage.url, state(3))

    assert (3 if moment == "while it commits" else None) == assert_quiet(tmp_path)


@pytest.mark.parametrize("pause", [0.0, 0.02])
def test_an_async_take_that_is_interrupted_on_its_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause: float) -> None:
    """Between the start of its thread and the return, whatever the thread does meanwhile."""
    prepare(tmp_path, "take")
    storage = FaultyStorage(LocalStorage(str(tmp_path / PLACE)))
    storage.run("create", 1, function=lambda: time.sleep(0.05), names="snapshot.json")
    begin = PendingSnapshot._begin

    def begin_and_interrupt(pending: PendingSnapshot) -> None:
        begin(pending)
        time.sleep(pause)
        raise KeyboardInterrupt

    monkeypatch.setattr(PendingSnapshot, "_begin", begin_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        Snapshot.async_take(storage.url, state(3))

    assert assert_quiet(tmp_path) in {None, 3}


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """A KeyboardInterrupt comes after so many seconds, wherever the main thread is then."""

    def raise_it(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, raise_it)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@INTERRUPTED
@pytest.mark.parametrize("action", ["take", "overwrite", "copy"])
def test_interrupted_at_any_moment(tmp_path: Path, action: str, campaign: Campaign) -> None:
    dice = random.Random(action)
    outcomes = set()
    in_time = ("KeyboardInterrupt", BEFORE[action])
    for number in range(200):
        if number >= campaign.choose(8, 200) and in_time in outcomes:
            break
        root = tmp_path / str(number)
        prepare(root, action)

        def run(root: Path = root, after: float = dice.random()) -> tuple[str | None, int | None]:
            # How long it takes is measured here and now, once it has run: this machine may be busy.
            for rehearsal in (root / "first", root / "second"):
                prepare(rehearsal, action)
                started = time.perf_counter()
                act(rehearsal, action)
                duration = time.perf_counter() - started
            error = None
            try:
                with interrupted_after(1.2 * after * duration):
                    error = ended_by(functools.partial(act, root, action))
            except KeyboardInterrupt:  # right before or after it
                pass
            return error and type(error).__name__, assert_quiet(root)

        error, seen = in_child(run).result
        with point(campaign):
            assert seen == check(root, action)
        outcomes.add((error, seen))

    assert {error for error, _ in outcomes} <= {"KeyboardInterrupt", None}
    assert in_time in outcomes


def test_without_waiting_for_the_threads_they_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the tests above would see them."""
    prepare(tmp_path, "take")
    monkeypatch.setattr("expstate.engine.crew.Crew.join", lambda self: None)
    storage = FaultyStorage(LocalStorage(str(tmp_path / PLACE)))
    storage.run("write", 1, function=lambda: (interrupt(), time.sleep(0.3)))
    try:
        with pytest.raises(KeyboardInterrupt):
            Snapshot.take(storage.url, state(3))
        assert crew_threads()
    finally:
        for thread in threading.enumerate():
            if thread.name.startswith("expstate"):
                thread.join()


def test_interrupts_while_it_cleans_up_are_put_off(tmp_path: Path) -> None:
    """The threads write into files, or into live tensors; nobody may have those before they are gone."""
    prepare(tmp_path, "take")
    storage = FaultyStorage(LocalStorage(str(tmp_path / PLACE)))

    def impatient() -> None:
        for _ in range(5):
            interrupt()
            time.sleep(0.02)

    storage.run("write", 1, function=impatient)
    with pytest.raises(KeyboardInterrupt):
        Snapshot.take(storage.url, state(3))

    assert [] == crew_threads()
    assert BEFORE["take"] == found_at(tmp_path / PLACE)


@pytest.mark.parametrize("operation", ["write", "finish", "create", "flush"])
def test_a_cancelled_take_leaves_nothing(tmp_path: Path, operation: str) -> None:
    prepare(tmp_path, "take")
    storage = FaultyStorage(LocalStorage(str(tmp_path / PLACE)))
    reached, go_on = threading.Event(), threading.Event()

    def pause() -> None:
        reached.set()
        go_on.wait(20)

    names = "snapshot.json" if operation == "create" else "*"
    storage.run(operation, 1, function=pause, names=names)
    pending = Snapshot.async_take(storage.url, state(3))
    assert reached.wait(20)
    cancelled: list[bool] = []
    thread = threading.Thread(target=lambda: cancelled.append(pending.cancel()))
    thread.start()
    while not pending._take._stop.is_set():
        time.sleep(0.001)
    go_on.set()
    thread.join()

    # Once the commit has begun it is too late.
    is_late = operation in {"create", "flush"}
    assert [not is_late] == cancelled
    if is_late:
        assert 3 == value_after(pending)
    else:
        with pytest.raises(TakeCancelledError):
            pending.wait()
    assert (3 if is_late else None) == assert_quiet(tmp_path)


def value_after(pending: PendingSnapshot) -> int | None:
    """The value of a take that was waited for."""
    return found_at(Path(pending.wait().path.replace(pending.path, pending.wait()._storage._storage.path)))


# Restore


class Layers(StateDict):
    """Many tensors, so that a restore has many reads."""


def layers(value: float) -> dict[str, Layers]:
    return {"model": Layers({f"layer-{index}": torch.full((300_000,), value) for index in range(8)})}


def test_a_restore_that_is_interrupted_says_what_holds_what(tmp_path: Path) -> None:
    Snapshot.take(tmp_path / PLACE, layers(1.0))
    storage = FaultyStorage(LocalStorage(str(tmp_path / PLACE)))
    snapshot = Snapshot(storage.url)
    counts = []
    for number in range(1, 40):
        live = layers(7.0)
        storage.heal()
        storage.run("read_into", number, function=interrupt)
        error = ended_by(functools.partial(snapshot.restore, live, memory_budget_bytes=4 * 2**20))
        assert [] == crew_threads()
        if error is None:
            break
        assert isinstance(error, RestoreInterruptedError)
        assert isinstance(error.__cause__, KeyboardInterrupt)
        check_applied(live, error)
        counts.append(len(error.applied))

    assert len(counts) >= 3
    assert max(counts) > 0
    storage.heal()
    snapshot.restore(live)
    assert all(bool((tensor == 1).all()) for tensor in live["model"].values())


@pytest.mark.parametrize("name", ["windows", "SideStreams", "crew.run"])
def test_a_restore_that_is_interrupted_before_its_first_read_says_that_nothing_was_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    Snapshot.take(tmp_path / PLACE, layers(1.0))
    snapshot, live = Snapshot(tmp_path / PLACE), layers(7.0)
    monkeypatch.setattr(f"expstate.engine.read.{name}", lambda *_, **__: interrupt())
    with pytest.raises(RestoreInterruptedError) as caught:
        snapshot.restore(live)

    assert () == caught.value.applied
    check_applied(live, caught.value)
    assert all(bool((tensor == 7).all()) for tensor in live["model"].values())


def check_applied(live: dict[str, Layers], error: RestoreInterruptedError) -> None:
    """What is said to be applied is, and what else there is may be anything."""
    assert not set(error.applied) & set(error.unapplied)
    assert {f"model/{name}" for name in live["model"]} == {*error.applied, *error.unapplied} - {"model"}
    for path in error.applied:
        assert bool((live["model"][path.removeprefix("model/")] == 1).all())


@pytest.mark.parametrize("budget", [64 * 2**20, 4 * 2**20])
def test_an_atomic_restore_that_is_interrupted_while_it_reads_changes_nothing(tmp_path: Path, budget: int) -> None:
    Snapshot.take(tmp_path / PLACE, layers(1.0))
    storage = FaultyStorage(LocalStorage(str(tmp_path / PLACE)))
    live = layers(7.0)
    storage.run("read_into", 1, function=interrupt)
    with pytest.raises(KeyboardInterrupt):
        Snapshot(storage.url).restore(live, atomic=True, memory_budget_bytes=budget)

    assert [] == crew_threads()
    assert all(bool((tensor == 7).all()) for tensor in live["model"].values())


def test_restores_interrupted_at_any_moment(tmp_path: Path) -> None:
    Snapshot.take(tmp_path / PLACE, layers(1.0))

    def run(after: float) -> str:
        snapshot = Snapshot(tmp_path / PLACE)
        for _ in range(2):  # the first is slower
            started = time.perf_counter()
            snapshot.restore(layers(3.0))
            duration = time.perf_counter() - started
        live = layers(7.0)
        outcome = "whole"
        try:
            with interrupted_after(1.1 * after * duration):
                snapshot.restore(live)
        except RestoreInterruptedError as error:
            check_applied(live, error)
            outcome = "interrupted"
        except KeyboardInterrupt:
            outcome = "outside"
        assert [] == crew_threads()
        before = [tensor.clone() for tensor in live["model"].values()]
        time.sleep(0.01)
        assert all(torch.equal(one, other) for one, other in zip(before, live["model"].values(), strict=True))
        return outcome

    dice = random.Random(0)
    outcomes: list[str] = []
    while len(outcomes) < 20 or ("interrupted" not in outcomes and len(outcomes) < 200):
        outcomes.append(in_child(functools.partial(run, dice.random())).result)

    assert "interrupted" in outcomes
