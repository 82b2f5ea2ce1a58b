"""One rank of the benchmark of several ranks: a process that measures its share of a step, once, together with the others.

``main`` gets a ``Task`` and the port of the store where the ranks meet, and sends an ``Outcome``. The clock runs on every rank from the
moment in which all are ready to that in which all are done.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch.distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from expstate.bench import limits, measure, shards, simulated, state, systems
from expstate.bench.child import guarded
from expstate.bench.measure import Meter
from expstate.bench.outcomes import measured
from expstate.bench.plan import LIMIT, Outcome, Task

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

_COUNTERS = Path("/proc/self/io")
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Place:
    """Which rank this is, of how many."""

    rank: int
    size: int


class _Moved:
    """Bytes that a ``with`` block reads from files and writes to them, by what the process asks of the kernel, cached or not."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}

    @staticmethod
    def _now() -> dict[str, int]:
        with contextlib.suppress(OSError):
            words = dict(line.split(": ") for line in _COUNTERS.read_text().splitlines())
            return {"read_bytes": int(words["rchar"]), "written_bytes": int(words["wchar"])}
        return {}

    def __enter__(self) -> None:
        self._before = self._now()

    def __exit__(self, *error: object) -> None:
        now = self._now()
        self.figures = {name: now[name] - before for name, before in self._before.items()}


def kept_of(task: Task, size: int) -> Path:
    """The folder of what so many ranks have taken beforehand."""
    return Path(task.kept) / f"of-{size}"


def _meter() -> Meter:
    return Meter(synchronize=torch.distributed.barrier)


def _prepare(task: Task, place: Place) -> Outcome:
    live = shards.sharded(state.random_tensors(task.workload))
    systems.CLASSES[task.system](task).take(kept_of(task, place.size), live)
    return Outcome()


def _limit(task: Task, place: Place) -> Outcome:
    share = task.workload.total_bytes // place.size // _PAGE * _PAGE
    rest = task.workload.total_bytes - share * (place.size - 1)
    folder, kept = Path(task.folder) / str(place.rank), Path(task.kept)
    folder.mkdir()
    left = measure.evict(kept) if place.rank == 0 and task.component == "read" else 0
    workers = int(task.setting.partition(" ")[0])
    job = limits.Job(rest if place.rank == place.size - 1 else share, workers, "cpu", folder, kept, place.rank * share)
    meter = _meter()
    limits.COMPONENTS[task.component](job, meter)
    return measured(meter, job.total_bytes, cached_bytes=left)


def _take(task: Task, place: Place) -> Outcome:  # noqa: ARG001 - as all steps
    tensors = state.random_tensors(task.workload)
    live = shards.sharded(tensors) if task.operation == "take_sharded" else state.TensorState(dict(tensors))
    system = systems.CLASSES[task.system](task)
    meter, moved = _meter(), _Moved()
    with meter, moved:
        system.take(Path(task.folder), live)
    return measured(meter, 0, figures=moved.figures)


def _restore(task: Task, place: Place) -> Outcome:
    kept = kept_of(task, 1 if task.operation == "reshard_1_to_2" else 2)
    live = shards.sharded(state.touched_tensors(task.workload))
    system = systems.CLASSES[task.system](task)
    left = measure.evict(kept) if place.rank == 0 else 0
    meter, moved = _meter(), _Moved()
    with meter, moved:
        system.restore(kept, live, verify=True)
    error = shards.differences(task.workload, live)
    return measured(meter, 0, cached_bytes=left, figures=moved.figures, error=error)


_STEPS: dict[str, Callable[[Task, Place], Outcome]] = {
    "prepare_restore_sharded": _prepare,
    "prepare_reshard_2_to_1": _prepare,
    "prepare_reshard_1_to_2": _prepare,
    "take_replicated": _take,
    "take_sharded": _take,
    "restore_sharded": _restore,
    "reshard_2_to_1": _restore,
    "reshard_1_to_2": _restore,
    "plan_1024": lambda task, _place: simulated.plan(task),
}


def _join(place: Place, port: int) -> None:
    """Become a rank; without a port, one of a world in which there is nobody else."""
    if port:
        store = TCPStore("127.0.0.1", port, is_master=False)
        torch.distributed.init_process_group("gloo", store=store, rank=place.rank, world_size=place.size)
    else:
        simulated.join(place.rank, place.size)


def main(encoded: bytes, place: Place, port: int, connection: Connection) -> None:
    """Do one rank's part of a step, send what was measured, and end the process."""
    task = msgspec.json.decode(encoded, type=Task)
    told = {"RANK": place.rank, "WORLD_SIZE": place.size, "LOCAL_RANK": place.rank, "LOCAL_WORLD_SIZE": place.size if port else 1}
    os.environ.update({name: str(value) for name, value in told.items()})
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"

    def perform() -> Outcome:
        _join(place, port)
        return (_limit if task.system == LIMIT else _STEPS[task.operation])(task, place)

    outcome = guarded(perform)
    connection.send_bytes(msgspec.json.encode(outcome))
    if not outcome.error:
        with contextlib.suppress(RuntimeError):
            torch.distributed.barrier()
    # What ends threads of gloo may abort the process.
    os._exit(0)
