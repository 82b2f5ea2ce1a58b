"""The steps of the benchmark of incremental takes: those that move bytes.

Gets a ``Task``, gives an ``Outcome``; ``STEPS`` names what ``child`` performs, each in a process of its own. What a take is compared with
is measured in the same process, in turn with it: both meet the same memory, and the same moods of the machine.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from expstate.bench import limits, measure, state
from expstate.bench.measure import Meter
from expstate.bench.outcomes import differences, measured, meter_for
from expstate.bench.plan import BUDGET_BYTES, Outcome, Task
from expstate.bench.systems import KEY
from expstate.engine import crew, memory, unchanged
from expstate.engine.base import Bases
from expstate.engine.fingerprint import new_key
from expstate.engine.unchanged import Compared, LiveBox
from expstate.snapshot import Snapshot
from expstate.state.tensors import NAMES, as_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from expstate.bench.state import TensorState
    from expstate.engine.source import SnapshotSource
    from expstate.pending import PendingSnapshot

FIRST, SECOND = "first", "second"
ROUNDS = 3
"""How often each is measured, in turn, by a step that measures several."""
_WORKERS = (1, 2, 4)
_STREAMS = (1, 2)


# full, unchanged, one_percent


def _take(task: Task, name: str, live: TensorState, base: Snapshot | None = None) -> tuple[Snapshot, Meter]:
    meter = meter_for(task)
    path = Path(task.folder) / name
    with meter:
        snapshot = Snapshot.take(path, {KEY: live}, base=base, memory_budget_bytes=task.memory_budget_bytes, progress=False, catalog=False)
    return snapshot, meter


def _full(task: Task) -> Outcome:
    live = state.random_state(task.workload)
    _, meter = _take(task, FIRST, live)
    return measured(meter, live.nbytes, figures={"bytes_written": measure.bytes_of_files(Path(task.folder))})


def _again(task: Task, live: TensorState, change: Callable[[], object]) -> tuple[Meter, Meter, Outcome]:
    """Take a state, change it, take it again; the meters of both, and an outcome of the second."""
    folder = Path(task.folder)
    first, full = _take(task, FIRST, live)
    change()
    left = measure.evict(folder)
    _, meter = _take(task, SECOND, live, first)
    written = measure.bytes_of_files(folder / SECOND, folder / FIRST)
    shutil.rmtree(folder / FIRST)  # each stands alone
    found = measured(meter, live.nbytes, cached_bytes=left, parts={"full": full.seconds}, figures={"bytes_written": written})
    found.error = _restore_error(folder / SECOND, live, state.digests(live))
    return full, meter, found


def _restore_error(path: Path, live: TensorState, expected: dict[str, str]) -> str:
    """What is wrong with a snapshot that is to have tensors of these digests; their values go into the live ones."""
    state.overwrite(live)
    Snapshot(path).restore({KEY: live}, progress=False)
    return differences(expected, state.digests(live))


def _unchanged(task: Task) -> Outcome:
    full, meter, found = _again(task, state.random_state(task.workload), lambda: None)
    found.figures["times_as_fast"] = full.seconds / meter.seconds
    return found


def _one_percent(task: Task) -> Outcome:
    live, adapters = state.adapted_state(task.workload)
    full, meter, found = _again(task, live, lambda: _change(adapters))
    found.figures |= {"of_full": meter.seconds / full.seconds, "of_state": found.figures["bytes_written"] / live.nbytes}
    return found


def _change(live: TensorState) -> None:
    """Give every byte another value."""
    for tensor in live.tensors.values():
        tensor.view(torch.uint8).bitwise_not_()


# detect


def _boxes(live: TensorState) -> list[LiveBox]:
    return [
        LiveBox(
            f"{KEY}/{name}",
            NAMES[tensor.dtype],
            tuple(tensor.shape),
            tensor,
            0,
            tensor.nbytes,
            tensor.data_ptr() if tensor.is_cpu else None,
        )
        for name, tensor in live.tensors.items()
    ]


def _count_unchanged(boxes: Sequence[LiveBox], source: SnapshotSource, budget: int) -> int:
    """How many of the boxes the snapshot holds, told as a take does it: by digests on the host, by fingerprints elsewhere."""
    bases = Bases([source])
    key = bases.fingerprint_key or new_key()
    found = Compared(unchanged.fingerprints(boxes, key))
    bases.prepare({box.nbytes for box in boxes}, key)
    unchanged.compare(boxes, bases, found, dedup=True, budget=budget, stop=crew.Stop(), done=lambda _: None)
    return len(found.held)


def _detect(task: Task) -> Outcome:
    live = state.random_state(task.workload)
    first, _ = _take(task, FIRST, live)
    source = first._source  # noqa: SLF001 - a take asks it for the same
    boxes = _boxes(live)
    budget = memory.budget_bytes(task.memory_budget_bytes)
    other, measure_other, moves = "blake3", functools.partial(_seconds_of_blake3, _flat(live)), 1
    if task.workload.device != "cpu":
        # Of a copy the bytes that are read count, and those that are written.
        other, measure_other, moves = "device_copy", functools.partial(_seconds_of, task, limits.copy_device, 1), 2
    meters = [meter_for(task) for _ in range(ROUNDS)]
    of_other, counts = [], [_count_unchanged(boxes, source, budget)]  # what is made once, such as kernels, is made here
    for meter in meters:
        of_other.append(measure_other())
        with meter:
            counts.append(_count_unchanged(boxes, source, budget))
    _change(state.TensorState({"one": boxes[-1].tensor}))
    counts.append(_count_unchanged(boxes, source, budget) + 1)
    wrong = [count for count in counts if count != len(boxes)]
    seconds = [meter.seconds for meter in meters]
    return Outcome(
        statistics.median(seconds),
        statistics.median(meter.cpu_seconds for meter in meters),
        max(meter.peak_extra_bytes for meter in meters),
        live.nbytes,
        parts={other: statistics.median(of_other)},
        figures={f"of_{other}": _median_ratio(of_other, seconds) / moves},
        error=f"{wrong[0]} of {len(boxes)} tensors were told rightly" if wrong else "",
    )


def _seconds_of_blake3(sources: Sequence[torch.Tensor]) -> float:
    """Of each block of 1 MiB of what lies in host memory, on all cores."""
    meter = Meter()
    limits.digest_blocks(sources, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, meter)
    return meter.seconds


def _seconds_of(task: Task, limit: Callable[[limits.Job, Meter], None], workers: int) -> float:
    folder = Path(task.folder)
    meter = meter_for(task)
    limit(limits.Job(task.workload.total_bytes, workers, task.workload.device, folder, folder), meter)
    return meter.seconds


def _flat(live: TensorState) -> list[torch.Tensor]:
    return [as_bytes(tensor) for tensor in live.tensors.values()]


def _median_ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios of what was measured in turn."""
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


# stall


def _stall(task: Task) -> Outcome:
    live = state.random_state(task.workload)
    expected = state.digests(live)
    first, _ = _take(task, FIRST, live)
    found = Outcome(bytes=live.nbytes)
    for other, staging_bytes, measure_other in _ways(task, live):
        for base in (first, None):
            without = "" if base else "_without_base"
            begin = functools.partial(_begin, task, live, base, staging_bytes)
            _end(begin())  # staging memory is warm from here on
            seconds, of_other = [], []
            for _ in range(ROUNDS):
                of_other.append(measure_other())
                meter = _stall_meter(task)
                with meter:
                    pending = begin()
                _end(pending)
                seconds.append(meter.seconds)
                found.cpu_seconds = max(found.cpu_seconds, meter.cpu_seconds)
                found.peak_extra_bytes = max(found.peak_extra_bytes, meter.peak_extra_bytes)
            pending = begin()
            # The snapshot must hold what was there when the call returned, whatever happens next.
            state.overwrite(live)
            found.error = found.error or _restore_error(Path(pending.wait().path), live, expected)
            _end(pending)
            found.parts |= {f"beside_{other}{without}": statistics.median(seconds), other: statistics.median(of_other)}
            found.figures[f"of_{other}{without}"] = _median_ratio(seconds, of_other)
            found.seconds = found.seconds or statistics.median(seconds)
    return found


def _ways(task: Task, live: TensorState) -> list[tuple[str, int | None, Callable[[], float]]]:
    """How the state may be kept from the return on: what that is compared with, how much memory it has on the device, what measures it."""
    if task.workload.device == "cpu":
        return [("copy", None, _copying(_flat(live)))]
    return [
        ("device_copy", None, lambda: _seconds_of(task, limits.copy_device, 1)),
        ("transfer", 0, lambda: min(_seconds_of(task, limits.to_host, streams) for streams in _STREAMS)),
    ]


def _copying(sources: Sequence[torch.Tensor]) -> Callable[[], float]:
    """What measures a copy of these into warm memory, by the best number of threads."""
    pairs = [(source, torch.full_like(source, 2)) for source in sources]

    def seconds() -> float:
        threads = torch.get_num_threads()
        meters = [Meter() for _ in _WORKERS]
        for workers, meter in zip(_WORKERS, meters, strict=True):
            limits.copy_memory(pairs, workers, meter)
        torch.set_num_threads(threads)
        return min(meter.seconds for meter in meters)

    return seconds


def _stall_meter(task: Task) -> Meter:
    """A meter that waits for what the training waits for: its own stream, and not the transfers in the background."""
    if task.workload.device == "cpu":
        return Meter()
    module: Any = torch.get_device_module(task.workload.device)
    return Meter(synchronize=lambda: module.current_stream().synchronize())


_paths = itertools.count()


def _begin(task: Task, live: TensorState, base: Snapshot | None, staging_bytes: int | None) -> PendingSnapshot:
    return Snapshot.async_take(
        Path(task.folder) / f"again-{next(_paths)}",
        {KEY: live},
        base=base,
        memory_budget_bytes=max(task.memory_budget_bytes or 0, live.nbytes + live.nbytes // 4 + BUDGET_BYTES),
        device_staging_bytes=staging_bytes,
        progress=False,
        catalog=False,
    )


def _end(pending: PendingSnapshot) -> None:
    shutil.rmtree(pending.wait().path)


STEPS: dict[str, Callable[[Task], Outcome]] = {
    "full": _full,
    "unchanged": _unchanged,
    "one_percent": _one_percent,
    "detect": _detect,
    "stall": _stall,
}
