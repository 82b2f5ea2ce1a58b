"""A comparison that reads stays within its memory budget, as the operating system counts it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.settings import MIB
from tests.snapshot.test_memory import _BUDGET_MIB, _peak

_SETTING = """
old, new = (Snapshot(f"{TAKEN}/{number}") for number in (0, 1))
live = StateDict(**{f"t{number}": torch.zeros(MIB) for number in range(20)}, wide=torch.zeros(2048, 6144).t())
Snapshot(sys.argv[1] + "/warm").diff({"state": StateDict(x=torch.ones(MIB))}, stats=True)
with Peak():
    found = """


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two snapshots are that differ in every tensor; taken by this process, so that the one that is measured has freed nothing."""
    taken = tmp_path_factory.mktemp("memory")
    for number in range(2):
        values = {f"t{part}": torch.full((MIB,), float(number + part)) for part in range(20)}
        Snapshot.take(taken / str(number), {"state": StateDict(**values, wide=torch.full((2048, 6144), float(number + 5)).t())})
    return taken


@pytest.mark.parametrize(
    ("compared", "is_within"),
    [
        ("old.diff(new, stats=True, memory_budget_bytes=BUDGET)", True),
        ("old.diff({'state': live}, stats=True, memory_budget_bytes=BUDGET)", True),
        ("[side.read_object('state') for side in (old, new)]", False),
    ],
)
def test_statistics_stay_within_the_budget(tmp_path: Path, taken: Path, compared: str, is_within: bool) -> None:
    """Of two snapshots, and of live state, contiguous or not; to read both of them whole would not."""
    assert is_within == (_peak(tmp_path, f"TAKEN = {str(taken)!r}{_SETTING}{compared}") <= _BUDGET_MIB)
