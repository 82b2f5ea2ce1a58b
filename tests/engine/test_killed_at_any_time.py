"""A training that takes in the background and is killed at some moment goes on from the last take that it knew of, or a later one."""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expstate import Snapshot, StateDict, autosave, gc
from expstate.errors import SnapshotNotFoundError
from tests.campaign import Campaign

from .crashes import HALVES, LEFTOVERS, LOST, point, seeing
from .processes import end_of, start_child

WIDTH = 200_000


def state(step: int) -> dict[str, StateDict]:
    """All of it tells the step."""
    return {"model": StateDict(weight=torch.full((WIDTH,), float(step)), frozen=torch.arange(WIDTH)), "progress": StateDict(step=step)}


def step_of(live: dict[str, StateDict]) -> int:
    step = int(live["progress"]["step"])
    assert torch.equal(torch.full((WIDTH,), float(step)), live["model"]["weight"])
    assert torch.equal(torch.arange(WIDTH), live["model"]["frozen"])
    return step


class Known:
    """The last step that the training knew to be taken; it lies in memory that a killed child leaves behind."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 16)

    @property
    def step(self) -> int:
        return int(struct.unpack_from("q", self._memory)[0])

    def note(self, step: int) -> None:
        struct.pack_into("q", self._memory, 0, step)


def train_with_autosave(root: Path, known: Known) -> None:
    live = state(0)
    saver = autosave(live, steps=1, keep_last=2, name="run", root=root)
    saver.resume()
    pending: list[tuple[int, object]] = []
    with saver:
        for step in range(step_of(live) + 1, 10**6):
            live["model"]["weight"] += 1
            live["progress"]["step"] = step
            saver.step()
            if saver.last is not None and (not pending or pending[-1][1] is not saver.last):
                pending.append((step, saver.last))
            for taken, last in pending:
                if last.done() and last.exception() is None:  # type: ignore[attr-defined]
                    known.note(max(taken, known.step))
            pending = pending[-2:]


def train_with_async_takes(root: Path, known: Known) -> None:
    """Each take begins while the one before is written, and goes on from it."""
    live = state(newest(root))
    for step in range(step_of(live) + 1, 10**6):
        live["model"]["weight"] += 1
        live["progress"]["step"] = step
        pending = Snapshot.async_take(root / f"{step:06}", live, base="auto", overwrite=True)
        pending.add_done_callback(lambda done, step=step: known.note(step) if done.exception() is None else None)


def newest(root: Path) -> int:
    """The last step of a root that can be restored; every snapshot in it is whole."""
    steps = [0]
    for folder in sorted(path.parent for path in root.rglob("snapshot.json")):
        try:
            assert Snapshot(folder).verify().ok
        except SnapshotNotFoundError:
            continue
        live = state(-1)
        Snapshot(folder).restore(live)
        steps.append(step_of(live))
    return max(steps)


def assert_clean(root: Path) -> None:
    """No file is there that no manifest names."""
    found = {path for path in root.rglob("*") if path.is_file()}
    manifests = {path for path in found if path.name == "snapshot.json"}
    assert found == manifests | {path.parent / record.name for path in manifests for record in Snapshot(path.parent).manifest.files}


@pytest.mark.campaign("All or nothing", "a training killed at random moments of its async takes and autosaves, again and again")
@pytest.mark.parametrize("train", [train_with_autosave, train_with_async_takes])
def test_a_training_that_is_killed_goes_on_from_what_it_knew(
    tmp_path: Path, train: Callable[[Path, Known], None], campaign: Campaign
) -> None:
    random_moments = random.Random(7)
    known = Known()
    for _ in range(campaign.choose(3, 250)):
        before = known.step
        child, result, let_begin = start_child(lambda: train(tmp_path, known))
        os.close(let_begin)
        until = time.monotonic() + 60
        while known.step == before and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(random_moments.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        ended = end_of(child, result)
        assert signal.SIGKILL == ended.signal, ended
        with point(campaign):
            with seeing(HALVES):
                found = newest(tmp_path)
            with seeing(LOST):
                assert found >= known.step > before
            gc(tmp_path)
            with seeing(LEFTOVERS):
                assert_clean(tmp_path)
            assert found == newest(tmp_path)
            remove_all_but(2, tmp_path)


def remove_all_but(count: int, root: Path) -> None:
    for path in sorted(path.parent for path in root.rglob("snapshot.json"))[:-count]:
        Snapshot(path).delete()
