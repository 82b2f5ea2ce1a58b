"""What the steps of several benchmarks have in common: a meter, an outcome made of it, and the look at what came back.

Gets a ``Task``, a ``Meter`` or digests; hands on a ``Meter``, an ``Outcome`` or what is wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from expstate.bench.measure import Meter
from expstate.bench.plan import Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping

    from expstate.bench.plan import Task


def meter_for(task: Task, *, maps_files: bool = False) -> Meter:
    """A meter that waits for the device of the task's workload."""
    device = task.workload.device
    if device == "cpu":
        return Meter(maps_files=maps_files)
    module: Any = torch.get_device_module(device)
    return Meter(maps_files=maps_files, synchronize=module.synchronize)


def measured(meter: Meter, nbytes: int, **more: Any) -> Outcome:
    """What a meter has measured while so many bytes were moved."""
    return Outcome(meter.seconds, meter.cpu_seconds, meter.peak_extra_bytes, nbytes, **more)


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    """Which tensors have other digests than expected, as a sentence; empty if none.

    Examples
    --------
    >>> differences({"a": "1", "b": "2"}, {"a": "1", "b": "3"})
    "1 of 2 tensors differ after the restore, the first is 'b'"
    """
    wrong = [name for name, digest in expected.items() if found.get(name) != digest]
    return f"{len(wrong)} of {len(expected)} tensors differ after the restore, the first is {wrong[0]!r}" if wrong else ""


def expected_digests(task: Task) -> dict[str, str]:
    """The digests that a restore must reach."""
    return msgspec.json.decode(Path(task.expected).read_bytes(), type=dict[str, str])
