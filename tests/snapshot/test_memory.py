"""Takes and restores of a large state stay within their memory budget, as the operating system counts it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

MIB = 2**20
_STATE_MIB, _BUDGET_MIB, _SLACK_MIB = 512, 32, 32

_HEAD = """
import sys, threading, time, torch
from expstate import Snapshot, StateDict

BUDGET = int(sys.argv[2])
MIB = 2**20


def status(field):
    for line in open("/proc/self/status", encoding="ascii"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024


class Peak:
    '''The most memory beyond what was there before: by the kernel's own mark, or where that cannot be reset by looking all the time.'''

    def __enter__(self):
        try:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("5")
            self.fields = "VmRSS", "VmHWM"
        except OSError:
            self.fields = "RssAnon", "RssAnon"
        self.before = self.most = status(self.fields[0])
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.01 if self.fields[1] == "VmHWM" else 0.002):
            self.most = max(self.most, status(self.fields[1]))

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        print(max(self.most, status(self.fields[1])) - self.before)


def state(fill):
    names = {f"t{number}": torch.full((16 * MIB // 4,), float(fill)) for number in range(30)}
    return StateDict(**names, small=[torch.full((256,), float(fill)) for _ in range(4000)], wide=torch.full((2048, 7168), fill / 1.0).t())


# Threads, code and buffers that come with the first operation are there before anything is measured.
Snapshot.take(sys.argv[1] + "/warm", {"state": StateDict(x=torch.zeros(MIB))}).restore({"state": StateDict(x=torch.zeros(MIB))})
"""


def _peak(place: Path, script: str) -> float:
    """Extra memory of what a script does inside ``with Peak():``, in MiB."""
    command = [sys.executable, "-c", _HEAD + textwrap.dedent(script), str(place), str(_BUDGET_MIB * MIB)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
    return float(ended.stdout.splitlines()[-1]) / MIB


@pytest.mark.slow
def test_a_take_stays_within_its_budget(place: Path) -> None:
    """Contiguous, transposed and very many small tensors."""
    extra = _peak(
        place,
        """
        live = state(1)
        with Peak():
            Snapshot.take(sys.argv[1] + "/s", {"state": live}, memory_budget_bytes=BUDGET)
        """,
    )

    assert extra <= _BUDGET_MIB + _SLACK_MIB


@pytest.mark.slow
def test_a_take_in_the_background_stays_within_its_budget(place: Path) -> None:
    """It stops the training longer rather than take more."""
    extra = _peak(
        place,
        """
        live = state(1)
        with Peak():
            Snapshot.async_take(sys.argv[1] + "/s", {"state": live}, memory_budget_bytes=BUDGET).wait()
        """,
    )

    assert extra <= _BUDGET_MIB + _SLACK_MIB


@pytest.mark.slow
@pytest.mark.parametrize("budget_mib", [_BUDGET_MIB, 700])
@pytest.mark.parametrize("verb", ["take", "async_take"])
def test_an_incremental_take_stays_within_its_budget(place: Path, verb: str, budget_mib: int) -> None:
    """Whether it compares the state where it lies, or copies of all of it."""
    extra = _peak(
        place,
        f"""
        live = state(1)
        base = Snapshot.take(sys.argv[1] + "/base", {{"state": live}}, memory_budget_bytes=BUDGET)
        for number in range(0, 30, 3):
            live[f"t{{number}}"] += 1
        live["wide"] += 1
        with Peak():
            taken = Snapshot.{verb}(sys.argv[1] + "/s", {{"state": live}}, base=base, memory_budget_bytes={budget_mib} * MIB)
            taken = taken.wait() if hasattr(taken, "wait") else taken
        assert taken.manifest.files[0].name.startswith("state-") and any(file.name.startswith("base/") for file in taken.manifest.files)
        """,
    )

    assert extra <= budget_mib + _SLACK_MIB


@pytest.mark.slow
@pytest.mark.parametrize("atomic", [False, True])
def test_a_restore_in_place_stays_within_its_budget(place: Path, atomic: bool) -> None:
    """No second copy of the state; an atomic one reads twice."""
    extra = _peak(
        place,
        f"""
        live = state(1)
        snapshot = Snapshot.take(sys.argv[1] + "/s", {{"state": live}}, memory_budget_bytes=BUDGET)
        for tensor in (live["t3"], live["wide"], live["small"][7]):
            tensor.zero_()
        with Peak():
            snapshot.restore({{"state": live}}, memory_budget_bytes=BUDGET, atomic={atomic})
        assert 1.0 == float(live["t3"].min()) == float(live["wide"].min()) == float(live["small"][7].min())
        """,
    )

    assert extra <= _BUDGET_MIB + _SLACK_MIB


@pytest.mark.slow
def test_a_restore_into_nothing_takes_the_state_and_its_budget(place: Path) -> None:
    """New tensors are made where they stay."""
    extra = _peak(
        place,
        """
        snapshot = Snapshot.take(sys.argv[1] + "/s", {"state": state(1)}, memory_budget_bytes=BUDGET)
        live = StateDict()
        with Peak():
            snapshot.restore({"state": live}, memory_budget_bytes=BUDGET)
        assert 1.0 == float(live["t3"].min()) == float(live["wide"].min())
        """,
    )

    assert _STATE_MIB <= extra <= 30 * 16 + 56 + 4 + _BUDGET_MIB + _SLACK_MIB


@pytest.mark.slow
def test_reading_verifying_and_copying_stay_within_their_budget(place: Path) -> None:
    """One tensor costs itself, and what only passes through costs nothing more."""
    extra = _peak(
        place,
        """
        snapshot = Snapshot.take(sys.argv[1] + "/s", {"state": state(1)}, memory_budget_bytes=BUDGET)
        with Peak():
            assert snapshot.verify(memory_budget_bytes=BUDGET).ok
            snapshot.copy(sys.argv[1] + "/copy", memory_budget_bytes=BUDGET)
            snapshot.read_object("state/t3", memory_budget_bytes=BUDGET)
            snapshot.read_object("state/wide", rows=slice(100, 200), memory_budget_bytes=BUDGET)
        """,
    )

    assert extra <= 16 + _BUDGET_MIB + _SLACK_MIB


@pytest.mark.slow
def test_a_copy_of_the_state_would_be_noticed(place: Path) -> None:
    """What the tests above would measure if the state were copied."""
    extra = _peak(
        place,
        """
        live = state(1)
        with Peak():
            copies = [tensor.clone() for tensor in live.values() if isinstance(tensor, torch.Tensor)]
        """,
    )

    assert extra >= _STATE_MIB
