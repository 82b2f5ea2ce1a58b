"""The process that measures one step, once: ``python3 -m expstate.bench.child TASK``.

Gets a ``Task`` as JSON, prints an ``Outcome`` as a line of JSON. States are built, caches set and results checked outside the timed part.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from expstate.bench import limits, measure, state, systems
from expstate.bench.outcomes import differences, expected_digests, measured, meter_for
from expstate.bench.plan import INCREMENTAL, LIMIT, RANKS, SNAPSHOT, Outcome, Task, operation_names

if TYPE_CHECKING:
    from collections.abc import Callable


def _describe(task: Task) -> Outcome:
    Path(task.expected).write_bytes(msgspec.json.encode(state.digests(state.random_state(task.workload))))
    return Outcome()


def _prepare(task: Task) -> Outcome:
    if task.system == LIMIT:
        with open(f"{task.kept}/{SNAPSHOT}", "wb") as file:
            for tensor in state.random_state(task.workload).tensors.values():
                host = tensor.cpu()
                file.write(state.bytes_of(host))
        measure.make_durable(Path(task.kept))
    else:
        systems.CLASSES[task.system](task).take(Path(task.kept), state.random_state(task.workload))
    return Outcome()


def _limit(task: Task) -> Outcome:
    kept = Path(task.kept)
    workers = int(task.setting.partition(" ")[0] or 1)
    job = limits.Job(task.workload.total_bytes, workers, task.workload.device, Path(task.folder), kept)
    left = 0
    if task.component.startswith("read_cached"):
        measure.warm(kept)
    elif task.component.startswith("read"):
        left = measure.evict(kept)
    meter = meter_for(task)
    limits.COMPONENTS[task.component](job, meter)
    return measured(meter, state.PROBE_BYTES if task.component == "read_one" else job.total_bytes, cached_bytes=left)


def _take(task: Task) -> Outcome:
    live = state.random_state(task.workload)
    system = systems.CLASSES[task.system](task)
    meter = meter_for(task)
    with meter:
        system.take(Path(task.folder), live)
    return measured(meter, live.nbytes)


def _restore(task: Task) -> Outcome:
    kept = Path(task.kept)
    live = state.touched_state(task.workload)
    system = systems.CLASSES[task.system](task)
    left = 0
    if task.operation.startswith("restore_warm"):
        measure.warm(kept)
    else:
        left = measure.evict(kept)
    meter = meter_for(task, maps_files=system.maps_files)
    with meter:
        system.restore(kept, live, verify=task.operation != "restore_warm_unverified")
    return measured(meter, live.nbytes, cached_bytes=left, error=differences(expected_digests(task), state.digests(live)))


def _read_one(task: Task) -> Outcome:
    kept = Path(task.kept)
    probe = state.touched_probe(task.workload)
    system = systems.CLASSES[task.system](task)
    left = measure.evict(kept)
    read = system.probe_reader(kept)
    meter = meter_for(task, maps_files=system.maps_files)
    with meter:
        read(probe)
    name = state.PROBE
    error = differences({name: expected_digests(task)[name]}, state.digests(state.TensorState({name: probe})))
    return measured(meter, probe.nbytes, cached_bytes=left, error=error)


def _async_stall(task: Task) -> Outcome:
    live = state.random_state(task.workload)
    expected = state.digests(live)
    system = systems.CLASSES[task.system](task)
    begin = system.async_taker(live)
    first, second = (Path(task.folder) / name for name in ("first", "second"))
    first.mkdir()
    second.mkdir()
    begin(first)()
    meter = meter_for(task)
    with meter:
        wait = begin(second)
    # The snapshot must hold what was there when the call returned, whatever happens next.
    state.overwrite(live)
    wait()
    error = ""
    if any(second.iterdir()):
        system.restore(second, live, verify=True)
        error = differences(expected, state.digests(live))
    return measured(meter, live.nbytes, error=error)


def _small_tensors(task: Task) -> Outcome:
    folder = Path(task.folder)
    live = state.random_small_state(task.workload)
    expected = state.digests(live)
    system = systems.CLASSES[task.system](task)
    taking = meter_for(task)
    with taking:
        system.take(folder, live)
    state.overwrite(live)
    left = measure.evict(folder)
    restoring = meter_for(task, maps_files=system.maps_files)
    with restoring:
        system.restore(folder, live, verify=True)
    parts = {"take": taking.seconds, "restore": restoring.seconds}
    error = differences(expected, state.digests(live))
    if isinstance(system, systems.Expstate):
        listing = meter_for(task)
        with listing:
            count = system.count_entries(folder)
        parts["entries"] = listing.seconds
        if count < len(expected):
            error = error or f"the snapshot lists {count} entries of {len(expected)}"
    return Outcome(
        seconds=taking.seconds + restoring.seconds,
        cpu_seconds=taking.cpu_seconds + restoring.cpu_seconds,
        peak_extra_bytes=max(taking.peak_extra_bytes, restoring.peak_extra_bytes),
        bytes=live.nbytes,
        cached_bytes=left,
        parts=parts,
        error=error,
    )


_STEPS: dict[str, Callable[[Task], Outcome]] = {
    "describe": _describe,
    "prepare": _prepare,
    "take": _take,
    "take_budget": _take,
    "staging": _take,
    "async_stall": _async_stall,
    "restore_cold": _restore,
    "restore_budget": _restore,
    "restore_warm": _restore,
    "restore_warm_unverified": _restore,
    "read_one": _read_one,
    "small_tensors": _small_tensors,
}


def _step(task: Task) -> Callable[[Task], Outcome]:
    if "://" in task.folder and task.operation != "describe":
        from expstate.bench import objects  # needs packages that not every machine has

        return objects.step(task)
    if task.operation.removeprefix("prepare_") in operation_names(device=False, benchmark=RANKS):
        from expstate.bench import ranks  # needs PyTorch with torch.distributed

        return ranks.step(task)
    if task.component:
        return _limit
    if task.operation in _STEPS:
        return _STEPS[task.operation]
    if task.operation in operation_names(device=True, benchmark=INCREMENTAL):
        from expstate.bench import incremental, training

        return (incremental.STEPS | training.STEPS)[task.operation]
    from expstate.bench import catalog, notebook  # need the catalog's packages, which not every machine has

    return (catalog.STEPS | notebook.STEPS)[task.operation]


def guarded(work: Callable[[], Outcome]) -> Outcome:
    """Do what measures; what goes wrong is told in ``Outcome.error``."""
    try:
        with warnings.catch_warnings():
            # Peers warn of what is meant here, such as a take without a process group.
            warnings.simplefilter("ignore")
            return work()
    except Exception as error:  # noqa: BLE001 - one system's failure is a result like others
        lines = str(error).strip().splitlines() or [""]
        return Outcome(error=f"{type(error).__name__}: {lines[0]}")


def perform(task: Task) -> Outcome:
    """Do the step; what goes wrong is told in ``Outcome.error``."""
    return guarded(lambda: _step(task)(task))


def main() -> int:
    """Do the step that the command line names."""
    task = msgspec.json.decode(sys.argv[1], type=Task)
    outcome = perform(task)
    sys.stdout.write(msgspec.json.encode(outcome).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
