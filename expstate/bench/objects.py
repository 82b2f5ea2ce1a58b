"""The steps of the benchmark of a bucket.

Gets a ``Task`` whose folders are URLs, gives an ``Outcome``; ``step`` is what ``child`` performs, each in a process of its own. Packages
are imported and the bucket is reached by one small request outside the timed part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from expstate.bench import object_limits, object_systems, state
from expstate.bench.measure import Meter
from expstate.bench.outcomes import differences, expected_digests, measured
from expstate.bench.plan import LIMIT, Outcome, Task

if TYPE_CHECKING:
    from collections.abc import Callable

_PREPARING_REQUESTS = 4


def _opened(task: Task, folder: str) -> object_systems.ObjectSystem:
    system = object_systems.CLASSES[task.system](task)
    system.open(folder)
    return system


def _prepare(task: Task) -> Outcome:
    if task.system == LIMIT:
        client = object_limits.FsspecClient(task.kept)
        object_limits.put(client, task.workload.total_bytes, _PREPARING_REQUESTS, Meter())
    else:
        _opened(task, task.kept).take(task.kept, state.random_state(task.workload))
    return Outcome()


def _limit(task: Task) -> Outcome:
    name, requests, _ = task.setting.split(" ")
    client = object_limits.CLIENTS[name](task.folder if task.component == "put" else task.kept)
    total_bytes = task.workload.total_bytes
    meter = Meter()
    object_limits.COMPONENTS[task.component](client, total_bytes, int(requests), meter)
    return measured(meter, state.PROBE_BYTES if task.component == "get_one" else total_bytes)


def _take(task: Task) -> Outcome:
    live = state.random_state(task.workload)
    system = _opened(task, task.folder)
    meter = Meter()
    with meter:
        system.take(task.folder, live)
    return measured(meter, live.nbytes)


def _restore(task: Task) -> Outcome:
    live = state.touched_state(task.workload)
    system = _opened(task, task.kept)
    meter = Meter(maps_files=system.maps_files)
    with meter:
        system.restore(task.kept, live)
    return measured(meter, live.nbytes, error=differences(expected_digests(task), state.digests(live)))


def _read_one(task: Task) -> Outcome:
    probe = state.touched_probe(task.workload)
    system = _opened(task, task.kept)
    meter = Meter()
    with meter:
        system.read_one(task.kept, probe)
    name = state.PROBE
    error = differences({name: expected_digests(task)[name]}, state.digests(state.TensorState({name: probe})))
    return measured(meter, probe.nbytes, error=error)


_STEPS: dict[str, Callable[[Task], Outcome]] = {
    "prepare": _prepare,
    "take": _take,
    "take_budget": _take,
    "restore_cold": _restore,
    "restore_budget": _restore,
    "read_one": _read_one,
}


def step(task: Task) -> Callable[[Task], Outcome]:
    """What measures a task."""
    return _limit if task.system == LIMIT and task.component else _STEPS[task.operation]
