"""``autosave`` on several ranks: all take at the same steps, by the first rank's clock, and all learn of a signal that one has got."""

from __future__ import annotations

import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from expstate import RNGState, Snapshot, StateDict, autosave
from expstate.errors import ExpstateWarning
from expstate.integrations import rhythm

from . import worlds


def state(rank: int) -> dict[str, Any]:
    torch.manual_seed(rank)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 2))
    return {"model": model, "progress": StateDict(steps=[]), "rng": RNGState()}


def train(state: dict[str, Any], step: int) -> None:
    model, progress = state["model"], state["progress"]
    loss = model(torch.randn(4, 8)).square().mean()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad, alpha=0.1)
            parameter.grad = None
    progress["steps"].append(step)


def taken(root: Path) -> list[int | None]:
    return [Snapshot(path.parent).metadata.step for path in sorted(root.glob("a/*/snapshot.json"))]


def test_all_take_at_the_same_steps_and_go_on_together(tmp_path: Path) -> None:
    """To the same bits, each rank with its own random numbers."""

    def work(rank: int, *, steps: int, root: Path) -> Any:
        live = state(rank)
        saver = autosave(live, steps=4, name="a", root=root, keep_last=2, on_busy="wait")
        start = saver.resume() or 0
        with saver:
            for step in range(start, steps):
                train(live, step)
                saver.step()
        return start, live["model"].module.weight.tolist(), live["progress"]["steps"], saver.taken

    once = worlds.results(2, lambda rank: work(rank, steps=13, root=tmp_path / "once"))
    first = worlds.results(2, lambda rank: work(rank, steps=6, root=tmp_path / "twice"))
    second = worlds.results(2, lambda rank: work(rank, steps=13, root=tmp_path / "twice"))

    assert [(0, 2), (0, 2)] == [(start, count) for start, _, _, count in first]
    assert [6, 6] == [start for start, *_ in second]
    assert [one[1:3] for one in once] == [one[1:3] for one in second]
    assert [12, 13] == taken(tmp_path / "once") == taken(tmp_path / "twice")


def test_the_clock_of_the_first_rank_counts(tmp_path: Path) -> None:
    """Ranks whose clocks go otherwise take with it."""

    def work(rank: int) -> Any:
        if rank == 1:  # its own time stands still
            rhythm.time = type("Still", (), {"monotonic": staticmethod(lambda: 0.0)})  # type: ignore[assignment]
        live = state(rank)
        begun = []
        with autosave(live, every=0.05, name="a", root=tmp_path, keep_last=None, on_busy="wait") as saver:
            for step in range(40):
                train(live, step)
                if saver.step() is not None:
                    begun.append(step + 1)
                time.sleep(0.01)
        return begun

    first, second = worlds.results(2, work)

    assert first == second
    assert 2 <= len(first) < 40
    assert set(first) <= set(taken(tmp_path))


def test_a_signal_to_one_rank_is_one_to_all(tmp_path: Path) -> None:
    """All take a last snapshot of the same step; the one that got it ends as it would have, the others may go on."""

    def work(rank: int) -> Any:
        passed: list[int] = []
        signal.signal(signal.SIGTERM, lambda *_: passed.append(len(live["progress"]["steps"])))
        live = state(rank)
        with autosave(live, steps=10**6, name="a", root=tmp_path, deadline_seconds=20) as saver:
            for step in range(10**6):
                train(live, step)
                if step == 5 and rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                if saver.step() is not None:
                    break
        return passed, live["progress"]["steps"][-1] + 1

    (nothing, one), (passed, other) = worlds.results(2, work)

    assert [] == nothing
    assert one == other == passed[0]
    assert [one] == taken(tmp_path)


def test_all_go_on_from_what_is_whole_for_all(tmp_path: Path) -> None:
    """Damage that one rank alone would notice sends all of them to the take before."""

    def work(rank: int) -> Any:
        live = {"values": StateDict(own=torch.full((1000,), float(rank)), step=0)}
        with autosave(live, steps=1, name="a", root=tmp_path, on_busy="wait") as saver:
            for step in (1, 2):
                live["values"]["step"] = step
                live["values"]["own"] += 1
                saver.step()
        dist.barrier()
        if rank == 0:
            newest = max((tmp_path / "a").iterdir())
            path = next(newest.glob("values-r00001-*"))
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.chmod(0o644)
            path.write_bytes(data)
        dist.barrier()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step = autosave(live, steps=1, name="a", root=tmp_path).resume()
        return step, live["values"]["step"], sum(issubclass(one.category, ExpstateWarning) for one in found)

    assert [(1, 1, 1)] * 2 == worlds.results(2, work)


def test_looking_at_the_clock_costs_little(tmp_path: Path) -> None:
    """With fast steps ranks tell each other at few of them."""

    def work(rank: int) -> Any:
        count = 0
        really = rhythm.ranks.join

        def join(*args: Any) -> Any:
            nonlocal count
            count += 1
            return really(*args)

        rhythm.ranks.join = join
        with autosave({"x": StateDict(y=1)}, every="1h", name="a", root=tmp_path) as saver:
            for _ in range(20_000):
                saver.step()
            return count

    assert all(looked < 200 for looked in worlds.results(2, work))
