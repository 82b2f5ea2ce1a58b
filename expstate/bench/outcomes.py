"""What the steps of disks and of buckets have in common: an outcome made of a meter, and the look at what came back.

Gets a ``Meter`` or digests; hands on an ``Outcome`` or what is wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from expstate.bench.plan import Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping

    from expstate.bench.measure import Meter
    from expstate.bench.plan import Task


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
