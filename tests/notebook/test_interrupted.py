"""The button with the square at any moment, and restarts: what was begun is whole or not there, nothing goes on, nothing appears later."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from expstate import Snapshot, gc
from expstate.errors import SnapshotNotFoundError
from tests.campaign import Campaign

from .kernels import Kernel

pytestmark = pytest.mark.slow

SETUP = """
import os, threading, time
import torch
from expstate import Snapshot, StateDict, errors

def state(value):
    model = StateDict(**{f"w{n}": torch.full((200_000,), float(value)) for n in range(8)})
    return {"model": model, "frozen": StateDict(table=torch.arange(500_000))}

def found(place):
    try:
        assert Snapshot(place).verify().ok
    except errors.SnapshotNotFoundError:
        return None
    live = state(-1)
    Snapshot(place).restore(live)
    (value,) = {float(each) for tensor in live["model"].values() for each in tensor.unique()}
    return value

def left(place):
    try:
        named = {"snapshot.json", *(record.name for record in Snapshot(place).manifest.files)}
    except errors.SnapshotNotFoundError:
        named = set()
    there = {os.path.relpath(os.path.join(folder, name), place) for folder, _, files in os.walk(place) for name in files}
    return sorted(there - named)

def workers():
    until = time.monotonic() + 5
    while (names := [each.name for each in threading.enumerate() if each.name.startswith("expstate")]) and time.monotonic() < until:
        time.sleep(0.01)
    return names

live, pending, told = state(3), None, None
Snapshot.take("earlier", state(1))
"""
VERBS = {
    "take": "Snapshot.take(place, live)",
    "async take": "pending = Snapshot.async_take(place, live)",
    "incremental take": "Snapshot.take(place, live, base='earlier')",
    "restore": "Snapshot('earlier').restore(live)",
    "copy": "Snapshot('earlier').copy(place)",
    "verify": "assert Snapshot('earlier').verify().ok",
    "delete": "Snapshot(place).delete()",
}
PREPARE = "place, live, pending, told, over = f'run-{%d}', state(3), None, None, False"
# It waits for the interrupt, which must not meet the kernel itself: what answers a cell may lose the answer by that, or end.
RUN = """
print("begun", flush=True)
try:
    {}
    over = True
    print("over", flush=True)
    while True:
        time.sleep(0.001)
except errors.RestoreInterruptedError as error:
    told = error
    raise
"""
AFTER = {"take": 3.0, "async take": 3.0, "incremental take": 3.0, "restore": None, "copy": 1.0, "verify": None, "delete": None}


def begun(kernel: Kernel, verb: str, number: int) -> str:
    """Start a cell that does it; what is to be asked for its end."""
    kernel.do(PREPARE % number + ("\nSnapshot.take(place, state(2))" if verb == "delete" else ""))
    cell = kernel.start(RUN.format(VERBS[verb]))
    kernel.until(lambda: "begun" in kernel.seen(cell).stdout)
    return cell


def check_live(kernel: Kernel) -> None:
    """What was put back is there, or nothing of it, or the error has named what is."""
    assert kernel.value(
        "all(float(live['model'][path.partition('/')[2]][0]) == 1 for path in told.applied if path.startswith('model/w'))"
        " if told else len({float(each) for tensor in live['model'].values() for each in tensor.unique()}) == 1"
    )


@pytest.mark.campaign("In place, and said what was changed", "Ctrl-C at random moments in a real kernel")
@pytest.mark.parametrize("verb", VERBS)
def test_a_cell_that_is_interrupted_leaves_all_or_nothing(shared_kernel: Kernel, verb: str, campaign: Campaign) -> None:
    kernel, dice = shared_kernel, random.Random(verb)
    campaign.count("visible halves", 0)
    kernel.do(f"import os\nos.makedirs({verb!r}, exist_ok=True)\nos.chdir({verb!r})\n{SETUP}")
    cell = begun(kernel, verb, 0)
    started = time.monotonic()
    kernel.until(lambda: "over" in kernel.seen(cell).stdout)
    seconds = max(0.03, time.monotonic() - started)
    kernel.interrupt()
    kernel.wait(cell)
    kernel.do("pending and pending.wait()")
    before = 2.0 if verb == "delete" else None
    for number in range(1, 1 + campaign.choose(1, 100)):
        cell = begun(kernel, verb, number)
        time.sleep(dice.uniform(0, seconds))
        kernel.interrupt()
        ended = kernel.wait(cell)
        assert "error" == ended.status
        if ended.error is not None:  # IPython cannot show each
            assert ended.error.name in {"KeyboardInterrupt", "RestoreInterruptedError"}, ended.text
        is_over = kernel.value("over")
        campaign.count("interrupted", not is_over)
        in_hand = kernel.value("pending is not None")
        if in_hand:
            kernel.do("pending.wait()")
        assert [] == kernel.value("workers()")
        seen = kernel.value("found(place)")
        allowed = {AFTER[verb]} if is_over or in_hand else {before, AFTER[verb]}
        assert seen in allowed if verb != "async take" or in_hand or is_over else seen is None
        assert [] == kernel.value("left(place)")
        assert 1.0 == kernel.value("found('earlier')")
        if verb == "restore":
            check_live(kernel)
        time.sleep(0.02)
        assert seen == kernel.value("found(place)")
        campaign.tried()
    kernel.do("os.chdir('..')")


@pytest.mark.campaign("All or nothing", "restarts of a kernel during takes in the background")
def test_a_kernel_that_is_restarted_during_takes_leaves_whole_ones(start_kernel: Callable[..., Kernel], campaign: Campaign) -> None:
    kernel, dice = start_kernel(), random.Random(0)
    campaign.count("visible halves", 0)
    campaign.count("leftovers after gc", 0)
    for number in range(campaign.choose(1, 25)):
        folder = kernel.folder / f"{number}"
        folder.mkdir()
        kernel.do(f"import os\nos.chdir({str(folder)!r})\n{SETUP}")
        kernel.do("for n in range(3):\n    pending = Snapshot.async_take(f'run-{n}', state(n), base='earlier')")
        time.sleep(dice.uniform(0, 0.2))
        kernel.restart(now=dice.random() < 0.8)
        gc(folder)
        assert Snapshot(folder / "earlier").verify().ok
        for place in folder.iterdir():
            check_whole(place)
        campaign.tried()


def check_whole(place: Path) -> None:
    """Nothing is at the place but a snapshot, all of it."""
    try:
        named = {"snapshot.json", *(record.name for record in Snapshot(place).manifest.files)}
    except SnapshotNotFoundError:
        named = set()
    assert not named or Snapshot(place).verify().ok
    assert named == {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
