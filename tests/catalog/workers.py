"""Processes that take into one catalog, acknowledge what they have taken, and are killed at random."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from expstate import Catalog, Snapshot, StateDict
from expstate.errors import SnapshotNotFoundError
from tests.engine.processes import end_of, start_child

WORKERS = 8
_LINE = 33
"""Bytes of an acknowledgement: an id and the end of the line."""


class Workers:
    """Processes that take one snapshot after the other, and acknowledge each; one that is killed is started again."""

    def __init__(self, catalog: Catalog, folder: Path, takes: int, *, prepare: Callable[[], Any] = lambda: None) -> None:
        self.runs = folder / "runs"
        self.killed = 0
        self._catalog = catalog
        self._folder = folder
        self._takes = takes
        self._prepare = prepare
        self._starts = 0
        self._running: dict[int, tuple[int, int]] = {}  # by the end of the pipe that tells how they end

    def _acknowledgements(self, worker: int) -> Path:
        return self._folder / f"acknowledged-{worker}"

    def acknowledged(self) -> list[str]:
        """The ids of the snapshots whose takes have returned."""
        return [line for worker in range(WORKERS) for line in self._acknowledgements(worker).read_text().split()]

    def committed(self) -> dict[str, str]:
        """The snapshots that are in the folders: where, by id."""
        found = {}
        for path in self.runs.glob("*/*"):
            with contextlib.suppress(SnapshotNotFoundError):  # of takes that were killed before
                found[Snapshot(path).id] = str(path)
        return found

    def _count(self) -> int:
        return sum(self._acknowledgements(worker).stat().st_size // _LINE for worker in range(WORKERS))

    def _start(self, worker: int) -> None:
        self._starts += 1
        child, result, let_begin = start_child(functools.partial(self._work, worker, self._starts))
        os.close(let_begin)
        self._running[result] = (worker, child)

    def _work(self, worker: int, start: int) -> None:
        self._prepare()
        acknowledgements = os.open(self._acknowledgements(worker), os.O_WRONLY | os.O_APPEND)
        for number in range(os.fstat(acknowledgements).st_size // _LINE, self._takes):
            state = {"model": StateDict(weight=torch.full((500,), float(number)))}
            taken = Snapshot.take(
                self.runs / str(worker) / f"{number}-{start}", state, step=number, metrics={"loss": 1 / (number + 1)}, catalog=self._catalog
            )
            os.write(acknowledgements, f"{taken.id}\n".encode())
            os.fsync(acknowledgements)

    def run(self, kills: int = 0) -> None:
        """Let all of them do their takes; so many times one of them is killed."""
        chance = random.Random(0)
        kill_at = sorted(chance.sample(range((WORKERS - 1) * self._takes), kills))
        for worker in range(WORKERS):
            self._acknowledgements(worker).touch()
            self._start(worker)
        try:
            while self._running:
                ended, _, _ = select.select(list(self._running), [], [], chance.uniform(0, 0.01))
                for result in ended:
                    self._has_ended(result)
                if kill_at and self._running and self._count() >= kill_at[0]:
                    kill_at.pop(0)
                    os.kill(chance.choice(list(self._running.values()))[1], signal.SIGKILL)
        finally:
            for result, (_, child) in self._running.items():  # after an error
                os.kill(child, signal.SIGKILL)
                end_of(child, result)

    def _has_ended(self, result: int) -> None:
        worker, child = self._running.pop(result)
        ended = end_of(child, result)
        if ended.signal == signal.SIGKILL:
            self.killed += 1
            self._start(worker)
        else:
            assert ended.result is None
