"""Leases tell a slow process from a dead one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any
from unittest.mock import patch

import pytest

from expstate.engine import lease as leases
from expstate.engine.lease import LEASE_SECONDS, decode_lease, encode_lease, is_dead
from tests.engine.places import ELSEWHERE, ID, lease

needs_proc = pytest.mark.skipif(leases.boot_id() is None, reason="this system does not tell its boots apart")


def test_a_lease_tells_the_process() -> None:
    """It is read back as it was written, with the files that it names."""
    found = decode_lease(encode_lease(ID, "delete", ["a", "b"]))

    assert found is not None
    assert (ID, "delete", os.getpid(), ("a", "b")) == (found.id, found.action, found.pid, found.files)
    assert leases.start_time(os.getpid()) == found.started


@pytest.mark.parametrize(
    "data", [b"", b"{", b"null", b"[]", b"{}", b'{"id":5}', b"[" * 100_000, b"\xff", encode_lease(ID, "take", ())[:-1]]
)
def test_what_is_no_lease_is_none(data: bytes) -> None:
    """One that was not written to its end, or by no take, tells nothing."""
    assert decode_lease(data) is None


@needs_proc
@pytest.mark.parametrize("seconds", [0, 10 * LEASE_SECONDS])
def test_a_process_that_runs_is_alive_however_old_its_lease_is(seconds: float) -> None:
    """A laptop that slept for a week wakes up with its lease."""
    assert not is_dead(lease(), 0, seconds)


@needs_proc
def test_a_process_that_ended_is_dead_at_once() -> None:
    """Nobody has to wait a day for what crashed on this machine."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    its = lease(pid=process.pid, started=leases.start_time(process.pid))
    now = time.time()

    assert not is_dead(its, now, now)
    process.communicate(b"\n")
    assert is_dead(its, now, now)


@needs_proc
def test_a_process_that_waits_to_be_reaped_is_dead() -> None:
    """What is left of a dead child until its parent looks is at work no more."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    started = lease().started
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    found = is_dead(lease(pid=child, started=started), 0, 0)
    os.waitpid(child, 0)

    assert found


@needs_proc
def test_a_process_that_got_the_number_of_a_dead_one_is_not_it() -> None:
    """Process ids are used again; the time of the start tells."""
    started = leases.start_time(os.getpid())
    assert started is not None

    assert is_dead(lease(started=started - 1), 0, 0)


@needs_proc
@pytest.mark.parametrize("changes", [ELSEWHERE, {"boot": "another boot"}, {"namespace": "pid:[1]"}, {"boot": None}, {"namespace": None}])
@pytest.mark.parametrize(("seconds", "expected"), [(0, False), (LEASE_SECONDS - 60, False), (LEASE_SECONDS + 60, True)])
def test_a_process_that_cannot_be_looked_for_lives_for_a_day(changes: dict[str, Any], seconds: float, expected: bool) -> None:
    """Of another machine, an earlier boot or another container only the age of the lease is known, by the storage's clock."""
    assert expected is is_dead(lease(pid=2**22 + 1, **changes), 1000.0, 1000.0 + seconds)


@pytest.mark.parametrize(("seconds", "expected"), [(60, False), (LEASE_SECONDS + 60, True)])
def test_a_system_that_tells_no_boots_apart_goes_by_age(seconds: float, expected: bool) -> None:
    """Two unknowns are not the same."""
    with patch.object(leases, "boot_id", return_value=None):
        assert expected is is_dead(lease(boot=None), 0, seconds)


def test_a_lease_from_the_future_is_alive() -> None:
    """A clock that was set back does not make anybody dead."""
    assert not is_dead(lease(**ELSEWHERE), 10 * LEASE_SECONDS, 0)
