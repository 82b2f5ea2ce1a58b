"""An interpreter that ends finishes what it was promised to write, or says what went wrong."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from expstate import Snapshot

_HEAD = """
import sys, threading, time, torch
from expstate import Snapshot, StateDict
from expstate.errors import StorageError
from expstate.storage.registry import open_storage
from expstate.testing import FaultyStorage

storage = FaultyStorage(open_storage(sys.argv[1]))
"""
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "EXPSTATE_CATALOG": "off"}


def _run(place: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "always", "-c", _HEAD + textwrap.dedent(script), str(place)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=_ENVIRONMENT | environment)


@pytest.mark.parametrize("ending", ["pass", "sys.exit(0)"])
def test_a_take_that_nobody_waits_for_is_finished(place: Path, ending: str) -> None:
    """The script ends at once, and the snapshot is whole afterwards."""
    ended = _run(
        place,
        f"""
        storage.run("write", None, function=lambda: time.sleep(0.2))
        state = StateDict(x=torch.full((3 * 2**20,), 7.0))
        Snapshot.async_take(storage.url, {{"state": state}})
        state["x"].zero_()
        {ending}
        """,
    )

    assert (0, "") == (ended.returncode, ended.stderr)
    assert Snapshot(place).verify().ok
    assert 7.0 == float(Snapshot(place).read_object("state/x").min())


def test_a_take_is_finished_after_an_error_of_the_script(place: Path) -> None:
    """The traceback is shown, the exit status is the script's, and what was taken is there."""
    ended = _run(
        place,
        """
        storage.run("write", None, function=lambda: time.sleep(0.2))
        Snapshot.async_take(storage.url, {"state": StateDict(x=torch.ones(2**20))})
        raise SystemError("training diverged")
        """,
    )

    assert 1 == ended.returncode
    assert ended.stderr.rstrip().endswith("SystemError: training diverged")
    assert Snapshot(place).verify().ok


def test_a_take_is_finished_where_no_thread_can_be_started_any_more(place: Path) -> None:
    """As in Python 3.12 and later, which start none once the main thread has ended; a tensor so large that its digests go to a file."""
    ended = _run(
        place,
        """
        def refuse(self):
            raise RuntimeError("can't create new thread at interpreter shutdown")

        ending = threading.Event()
        threading._register_atexit(lambda: (setattr(threading.Thread, "start", refuse), ending.set()))
        storage.run("write", None, function=lambda: ending.wait(60))
        Snapshot.async_take(storage.url, {"state": StateDict(x=torch.ones(18 * 2**20))})
        """,
    )

    assert (0, "") == (ended.returncode, ended.stderr)
    assert Snapshot(place).verify().ok
    assert any(file.name.startswith("digests-") for file in place.iterdir())


def test_a_failure_that_nobody_asked_for_is_warned_of(place: Path) -> None:
    """In the log at once, and as a warning when the interpreter ends; nothing remains."""
    ended = _run(
        place,
        """
        storage.fail("finish", error=StorageError("the disk is broken"))
        Snapshot.async_take(storage.url, {"state": StateDict(x=torch.ones(9))})
        """,
    )

    assert 0 == ended.returncode
    assert "TakeFailedWarning: the take to 'faulty://1' failed: StorageError: the disk is broken" in ended.stderr
    assert 2 == ended.stderr.count("the take to 'faulty://1' failed: StorageError: the disk is broken")
    assert not place.exists()


def test_a_failure_that_was_asked_for_is_not_warned_of(place: Path) -> None:
    """Who has seen it knows."""
    ended = _run(
        place,
        """
        storage.fail("finish", error=StorageError("the disk is broken"))
        pending = Snapshot.async_take(storage.url, {"state": StateDict(x=torch.ones(9))})
        assert isinstance(pending.exception(), StorageError)
        """,
    )

    assert 0 == ended.returncode
    assert "TakeFailedWarning" not in ended.stderr


def test_a_cancelled_take_is_not_warned_of(place: Path) -> None:
    """It did what it was told."""
    ended = _run(
        place,
        """
        storage.run("write", None, function=lambda: time.sleep(0.2))
        Snapshot.async_take(storage.url, {"state": StateDict(x=torch.ones(9))}).cancel()
        """,
    )

    assert (0, "") == (ended.returncode, ended.stderr)
    assert not place.exists()


def test_threads_of_a_finished_take_do_not_keep_the_interpreter(place: Path) -> None:
    """Nor does staging memory that is kept warm: the process ends at once, not after its minute of idleness."""
    ended = _run(place, "Snapshot.take(sys.argv[1], {'state': StateDict(x=torch.ones(9))})\nprint(threading.active_count())")

    assert (0, "") == (ended.returncode, ended.stderr)
    assert int(ended.stdout) <= 2
    assert torch.equal(torch.ones(9), Snapshot(place).read_object("state/x"))
