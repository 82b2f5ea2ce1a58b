"""A training that is told to end takes a last snapshot between two steps, ends as it would have, and goes on from there."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import StateDict, autosave
from expstate.errors import ExpstateWarning, TakeFailedWarning
from expstate.integrations import signals
from tests.engine.processes import in_child

from . import trainings
from .trainings import run, steps_of, takes, wait_for

ENDLESS = """
training = Training()
saver = autosave(training.state, steps=int(sys.argv[2]), name="digits", root=root)
with saver:
    for step in range(10**9):
        training.step()
        saver.step()
        if step == 12:
            print("trained", flush=True)
        time.sleep(0.001)
"""


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """How a process ended, and what it said."""
    _, told = process.communicate(timeout=60)
    return process.returncode, told


def told_to_end(root: Path, number: int, steps: int = 10**6, code: str = ENDLESS) -> tuple[int, str]:
    """A training that gets a signal in the midst of its steps."""
    with trainings.started(code, root, steps) as process:
        assert "trained" == next(trainings.lines(process))
        process.send_signal(number)
        return ended(process)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """The handlers are those of before, whatever a test does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    assert before == {number: signal.getsignal(number) for number in before}
    assert not [thread for thread in threading.enumerate() if thread.name == "expstate-signals" and not _ends(thread)]


def _ends(thread: threading.Thread) -> bool:
    thread.join(10)
    return not thread.is_alive()


def state() -> dict[str, Any]:
    return {"model": StateDict(weight=torch.ones(3))}


# In a process of its own


def test_sigterm_in_a_loop_leaves_a_snapshot_to_go_on_from(tmp_path: Path) -> None:
    """It ends by the signal, as whoever sent it expects, and goes on to the same bits."""
    code, told = told_to_end(tmp_path, signal.SIGTERM)
    assert (-signal.SIGTERM, "") == (code, told)
    (step,) = steps_of(tmp_path)
    resumed, start, _ = run(tmp_path)
    expected = trainings.Training()
    for _ in range(max(step, trainings.STEPS)):
        expected.step()

    assert step == start >= 13
    assert torch.equal(expected.weights, resumed.weights)


def test_a_loop_that_is_killed_goes_on_from_the_last_take(tmp_path: Path) -> None:
    """Whatever it was doing then; what it left half done is removed."""
    with trainings.started(ENDLESS, tmp_path, 5) as process:
        wait_for(tmp_path, "digits/*-step-[2-9][0-9]*-*/snapshot.json")
        process.kill()
        ended(process)
    newest = steps_of(tmp_path)[-1]
    _, start, _ = run(tmp_path)

    assert newest == start >= 20
    assert all(snapshot.verify().ok for snapshot in takes(tmp_path))
    assert all(path.joinpath("snapshot.json").exists() for path in (tmp_path / "digits").iterdir())


def test_ctrl_c_in_a_loop_leaves_a_snapshot(tmp_path: Path) -> None:
    """The step is finished before ``KeyboardInterrupt`` is raised."""
    code, told = told_to_end(tmp_path, signal.SIGINT)

    assert -signal.SIGINT == code
    assert "saver.step()" in told or "KeyboardInterrupt" in told
    assert 1 == len(takes(tmp_path))
    assert steps_of(tmp_path)[0] == len(takes(tmp_path)[0].get_state_dict_for_key("progress")["losses"])


STUCK = ENDLESS.replace("time.sleep(0.001)", "time.sleep(60 if step == 12 else 0)")


def test_if_no_step_comes_the_process_ends_without(tmp_path: Path) -> None:
    """After half of the deadline, and says so."""
    code, told = told_to_end(tmp_path, signal.SIGTERM, code=STUCK.replace("root=root", "root=root, deadline_seconds=1"))

    assert -signal.SIGTERM == code
    assert "SIGTERM came, and no step within 0.5 s after it, so no last snapshot is taken" in told
    assert [] == steps_of(tmp_path)


def test_ctrl_c_twice_ends_at_once(tmp_path: Path) -> None:
    with trainings.started(STUCK, tmp_path, 10**6) as process:
        assert "trained" == next(trainings.lines(process))
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:  # as a person would
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        code, told = ended(process)

    assert -signal.SIGINT == code
    assert "KeyboardInterrupt" in told
    assert [] == steps_of(tmp_path)


def test_children_end_by_the_signal_at_once(tmp_path: Path) -> None:
    """Workers that were forked in the block inherit the handler, and have no steps."""

    def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with autosave(state(), steps=9, name="a", root=tmp_path):
        assert signal.SIGTERM == in_child(work).signal


def test_a_take_that_outlasts_the_deadline_is_cancelled(tmp_path: Path) -> None:
    """The process ends before it is killed, and nothing is left of the take."""
    slow = """
from expstate.engine import take
really = take.Take.write_staged
take.Take.write_staged = lambda self: (time.sleep(9), really(self))
""" + ENDLESS.replace("root=root", "root=root, deadline_seconds=6")
    code, told = told_to_end(tmp_path, signal.SIGTERM, code=slow)

    assert -signal.SIGTERM == code
    assert "was not taken within" in told
    assert [] == steps_of(tmp_path)


# Handlers of others


def test_the_previous_handler_is_called_after_the_take(tmp_path: Path) -> None:
    """With the training going on if it returns, and again the next time."""
    seen: list[list[int]] = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(steps_of(tmp_path, "a")))
    try:
        with autosave(state(), steps=99, name="a", root=tmp_path) as saver:
            saver.step()
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                saver.step()
                saver.step()
    finally:
        signal.signal(signal.SIGTERM, before)

    assert [[2], [2, 4]] == seen
    assert [2, 4, 5] == steps_of(tmp_path, "a")


def test_a_signal_that_came_after_the_last_step_is_passed_on(tmp_path: Path) -> None:
    """With the last take of the block."""
    seen: list[list[int]] = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(steps_of(tmp_path, "a")))
    try:
        with autosave(state(), steps=99, name="a", root=tmp_path) as saver:
            saver.step()
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)

    assert [[1]] == seen


def test_a_handler_that_came_later_stays(tmp_path: Path) -> None:
    """And may call the one that it found."""
    seen: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("before"))

    def handle(number: int, frame: Any) -> None:
        seen.append("later")
        found(number, frame)  # type: ignore[operator]

    try:
        with autosave(state(), steps=99, name="a", root=tmp_path) as saver:
            found = signal.signal(signal.SIGTERM, handle)
            os.kill(os.getpid(), signal.SIGTERM)
            saver.step()
        assert handle == signal.getsignal(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)

    assert ["later", "before", "later", "before"] == seen
    assert [1] == steps_of(tmp_path, "a")


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with autosave(state(), steps=99, name="a", root=tmp_path) as saver:
            os.kill(os.getpid(), signal.SIGTERM)
            saver.step()
            assert [] == steps_of(tmp_path, "a")
    finally:
        signal.signal(signal.SIGTERM, before)


def test_no_signal_is_handled_unless_asked(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with autosave(state(), steps=99, name="a", root=tmp_path, signal=False):
        assert before == signal.getsignal(signal.SIGTERM)


def test_ctrl_c_is_raised_at_the_step(tmp_path: Path) -> None:
    saver = autosave(state(), steps=99, name="a", root=tmp_path)

    def train() -> None:
        with saver:
            saver.step()
            os.kill(os.getpid(), signal.SIGINT)
            saver.step()

    with pytest.raises(KeyboardInterrupt):
        train()
    assert [2] == steps_of(tmp_path, "a")


# Threads


def test_outside_of_the_main_thread_signals_are_off(tmp_path: Path) -> None:
    """With a warning; the takes go on."""
    warned: list[Any] = []

    def train() -> None:
        saver = autosave(state(), steps=2, name="a", root=tmp_path)
        with pytest.warns(ExpstateWarning, match="signals reach the main thread alone") as found:
            saver.__enter__()
        for _ in range(3):
            saver.step()
        saver.__exit__(None, None, None)
        warned.extend(found)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()

    assert 1 == len(warned)
    assert [2, 3] == steps_of(tmp_path, "a")


def test_steps_may_come_from_another_thread(tmp_path: Path) -> None:
    """Then the main one, which the signal came to, passes it on."""
    seen: list[list[int]] = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(steps_of(tmp_path, "a")))
    try:
        with autosave(state(), steps=99, name="a", root=tmp_path) as saver:
            os.kill(os.getpid(), signal.SIGTERM)
            thread = threading.Thread(target=saver.step)
            thread.start()
            thread.join()
            until = time.monotonic() + 30
            while not seen and time.monotonic() < until:
                time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)

    assert [[1]] == seen


def test_an_interrupt_is_not_put_off_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no step comes it is raised without a snapshot."""
    monkeypatch.setattr(signals, "_INTERRUPT_SECONDS", 0.1)

    def train() -> None:
        with autosave(state(), steps=99, name="a", root=tmp_path) as saver:
            saver.step()
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)

    with pytest.raises(KeyboardInterrupt):
        train()
    assert [] == steps_of(tmp_path, "a")


def test_a_last_take_that_fails_is_warned_of(tmp_path: Path) -> None:
    progress = StateDict(x=1)

    def train() -> None:
        with autosave({"progress": progress}, steps=99, name="a", root=tmp_path) as saver:
            progress["x"] = torch.empty(1, device="meta")
            os.kill(os.getpid(), signal.SIGINT)
            saver.step()

    with pytest.warns(TakeFailedWarning, match="step 1 was not taken"), pytest.raises(KeyboardInterrupt):
        train()
