"""A call ends when its coroutine has ended, whatever comes between."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from expstate.errors import StorageError
from expstate.storage.objects.loop import Loop

from .client_tests import interrupted


@pytest.fixture
def loop() -> Iterator[Loop]:
    with contextlib.closing(Loop("test-loop")) as loop:
        yield loop


async def answer(value: object = 42) -> object:
    await asyncio.sleep(0)
    return value


async def fail() -> None:
    await asyncio.sleep(0)
    msg = "text"
    raise KeyError(msg)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "test-loop"]


def test_what_a_coroutine_returns_or_raises_is_handed_on(loop: Loop) -> None:
    assert loop.run(answer) == 42
    with pytest.raises(LookupError):
        loop.run(fail)


def test_a_function_that_raises_before_its_coroutine_begins_is_heard(loop: Loop) -> None:
    with pytest.raises(TypeError):
        loop.run(lambda: answer(1, 2))  # type: ignore[call-arg]


def test_an_exception_keeps_what_it_came_from(loop: Loop) -> None:
    async def fail_twice() -> None:
        try:
            await fail()
        except LookupError:
            raise TypeError  # noqa: B904 - as libraries do

    try:
        int("no number")
    except ValueError:
        with pytest.raises(TypeError) as caught:
            loop.run(fail_twice)
    assert type(caught.value.__cause__) is KeyError
    assert caught.value.__cause__.__cause__ is None


def test_many_threads_share_one_loop(loop: Loop) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(range(2000)) == list(pool.map(lambda number: loop.run(lambda: answer(number)), range(2000)))
    assert threads() == ["test-loop"]


def test_the_thread_starts_with_the_first_call() -> None:
    loop = Loop("test-loop")
    assert threads() == []
    loop.close()
    assert threads() == []


def test_an_interrupt_is_raised_when_the_coroutine_has_ended(loop: Loop) -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.3)  # it has something to put away
            ended.append(True)

    interrupted(lambda: loop.run(work), 0.2)
    assert ended == [True]
    assert loop.run(answer) == 42


def test_a_second_interrupt_does_not_leave_the_coroutine_running(loop: Loop) -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.6)
            ended.append(True)

    second = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    second.start()
    interrupted(lambda: loop.run(work), 0.2)
    second.join()
    assert ended == [True]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt that hits a destructor
def test_interrupts_at_any_moment_leave_nothing_behind(loop: Loop, alarm: list[bool]) -> None:
    running = []

    async def work() -> None:
        running.append(True)
        try:
            await asyncio.sleep(0.002)
        finally:
            running.pop()

    loop.run(work)
    until = time.monotonic() + 3
    hits = 0
    while time.monotonic() < until:
        try:
            alarm.append(True)
            signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.003 * (hits % 10) / 10)
            last = time.monotonic() + 0.1  # where it hits a destructor, Python drops it
            while time.monotonic() < last:
                loop.run(work)
            alarm.clear()
        except KeyboardInterrupt:
            hits += 1
        assert not running
    assert loop.run(answer) == 42
    assert hits > 20


@pytest.fixture
def alarm() -> Iterator[list[bool]]:
    """Raises ``KeyboardInterrupt`` when the timer rings, once for each entry of this list: one that comes late hits nothing else."""
    armed: list[bool] = []

    def ring(*_: object) -> None:
        if armed:
            armed.clear()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, ring)
    yield armed
    armed.clear()
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_coroutine_that_was_cancelled_never_looks_like_success(loop: Loop) -> None:
    async def give_up() -> None:
        raise asyncio.CancelledError

    with pytest.raises(StorageError, match="cancelled"):
        loop.run(give_up)


@pytest.mark.parametrize("end", [Loop.close, Loop.cancel])
def test_calls_that_wait_are_ended_by_close(loop: Loop, end: object) -> None:
    begun = threading.Barrier(4)

    async def work() -> None:
        await asyncio.to_thread(begun.wait, 30)
        await asyncio.sleep(60)

    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(loop.run, work) for _ in range(3)]
        begun.wait(30)
        end(loop)  # type: ignore[operator]
        assert {type(future.exception(30)) for future in futures} == {StorageError}


def test_nothing_runs_after_the_end(loop: Loop) -> None:
    loop.run(answer)
    put_away = []

    async def finish() -> None:
        put_away.append(True)

    loop.close(finish)
    loop.close(finish)
    assert put_away == [True]
    assert threads() == []
    with pytest.raises(StorageError, match="closed"):
        loop.run(answer)
    gc.collect()  # warns of what was not closed


def test_an_end_that_fails_is_one(loop: Loop) -> None:
    loop.run(answer)
    loop.close(fail)
    assert threads() == []


def test_a_forked_child_is_told(loop: Loop) -> None:
    loop.run(answer)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            try:
                loop.run(answer)
            except StorageError:
                loop.cancel()
                loop.close()
                os._exit(0)
        os._exit(1)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0), sys.platform
