"""Crews: the first error ends the work of all, and nobody is at work when it is told."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from expstate.engine import crew
from expstate.engine import lease as leases


def alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("expstate") and thread.is_alive()]


@pytest.mark.parametrize("threads", [1, 4])
def test_every_job_is_done_once(threads: int) -> None:
    done: list[int] = []
    crew.run(range(100), done.append, threads, crew.Stop())

    assert list(range(100)) == sorted(done)
    assert [] == alive()


def test_the_first_error_is_raised_when_nobody_works_any_more() -> None:
    done: list[int] = []

    def work(job: int) -> None:
        if job == 5:
            msg = "job 5"
            raise LookupError(msg)
        time.sleep(0.001)
        done.append(job)

    stop = crew.Stop()
    with pytest.raises(LookupError, match="job 5"):
        crew.run(range(10_000), work, 4, stop)

    assert [] == alive()
    assert stop.is_set()
    assert len(done) < 100


def test_an_error_of_who_gives_the_jobs_is_raised() -> None:
    def jobs() -> object:
        yield 1
        msg = "no more jobs"
        raise LookupError(msg)

    with pytest.raises(LookupError, match="no more jobs"):
        crew.run(jobs(), lambda _: None, 3, crew.Stop())
    assert [] == alive()


def test_who_is_told_to_stop_does_not_finish() -> None:
    stop = crew.Stop()

    def work(job: int) -> None:
        if job == 3:
            stop.set()
        stop.check()

    with pytest.raises(crew.StoppedError):
        crew.run(range(1000), work, 2, stop)
    assert [] == alive()


@pytest.mark.parametrize("available", [0, 2])
def test_where_no_threads_are_left_the_caller_does_the_work(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    really = threading.Thread.start
    started: list[threading.Thread] = []

    def start(thread: threading.Thread) -> None:
        if len(started) == available:
            msg = "can't start new thread"
            raise RuntimeError(msg)
        started.append(thread)
        really(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    done: list[int] = []
    crew.run(range(100), done.append, 4, crew.Stop())

    assert available == len(started)
    assert list(range(100)) == sorted(done)
    assert [] == alive()


def test_a_process_that_ended_and_was_not_waited_for_is_dead() -> None:
    """Its id is still taken, and nobody is at work under it."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = leases.start_time(process.pid)
    lease = leases.decode_lease(leases.encode_lease("3f9a2c71" + "0" * 24, "take", ()))
    assert lease is not None
    theirs = leases.Lease(lease.id, "take", lease.host, lease.boot, lease.namespace, process.pid, started, lease.heartbeat)
    assert started is not None
    assert not leases.is_dead(theirs, 0.0, 0.0)
    assert process.stdin is not None
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    assert leases.is_dead(theirs, 0.0, 0.0)
    process.wait()
    assert leases.is_dead(theirs, 0.0, 0.0)
