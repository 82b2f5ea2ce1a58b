"""Sizes that few states have: more than the memory, one tensor of gibibytes, very many entries, very long names."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.engine.memory import available_bytes
from expstate.settings import GIB, MIB
from tests.campaign import Campaign


@pytest.mark.campaign("Kept as it is", "very many entries, and entries and keys with very long names")
def test_very_many_entries(place: Path, campaign: Campaign) -> None:
    count = campaign.choose(20_000, 1_000_000)
    numbers = torch.arange(count)
    live = {"state": StateDict({f"layer.{number}": numbers[number] for number in range(count)})}
    snapshot = Snapshot.take(place, live)
    back = {"state": StateDict({f"layer.{number}": torch.tensor(-1) for number in range(count)})}
    Snapshot(place).restore(back)

    assert count + 1 == len(snapshot.entries())  # and the dict that they are in
    assert torch.equal(numbers, torch.stack(list(back["state"].values())))
    campaign.tried(count)


@pytest.mark.campaign("Kept as it is", "very many entries, and entries and keys with very long names")
@pytest.mark.parametrize("letter", ["n", "ä", "名", "/", "."])
def test_very_long_names(place: Path, letter: str, campaign: Campaign) -> None:
    """Names that differ only at their ends, where a file's name must be cut."""
    name = letter * 999
    keys = [f"{name}{end}" for end in "aAb"]
    live = {key: StateDict({f"{name}{end}": torch.full((3,), float(number)) for end in "xyX"}) for number, key in enumerate(keys)}
    Snapshot.take(place, live)
    back = {key: StateDict({f"{name}{end}": torch.zeros(3) for end in "xyX"}) for key in keys}
    Snapshot(place).restore(back)

    for key in keys:
        for path in live[key]:
            assert torch.equal(live[key][path], back[key][path])
            campaign.tried()
    assert Snapshot(place).verify().ok


@pytest.mark.slow
@pytest.mark.campaign("Kept as it is", "a single tensor of 3 GiB, cut into files")
def test_a_tensor_of_gibibytes(place: Path, campaign: Campaign) -> None:
    """In the short form it is small, and so are the files."""
    from expstate import settings

    rows = campaign.choose(48, 3072)
    if shutil.disk_usage(place.parent).free < 2 * rows * MIB or available_bytes() < 3 * rows * MIB:
        campaign.note("there is no room for a tensor of 3 GiB")
        pytest.skip("there is no room for such a tensor")
    weight = torch.arange(rows, dtype=torch.int32)[:, None].expand(rows, MIB // 4).contiguous()
    with settings.override(data_file_bytes=campaign.choose(16, 1024) * MIB):
        snapshot = Snapshot.take(place, {"model": StateDict(weight=weight)}, memory_budget_bytes=64 * MIB)
    back = torch.zeros_like(weight)
    snapshot.restore({"model": StateDict(weight=back)}, memory_budget_bytes=64 * MIB)

    assert torch.equal(weight, back)
    assert torch.equal(weight[rows - 2 :], snapshot.read_object("model/weight", rows=slice(rows - 2, rows)))
    assert len(snapshot.manifest.files) >= 3
    campaign.tried(len(snapshot.manifest.files))


LARGE = """
import resource, sys, torch
from expstate import Snapshot, StateDict

place, count, size, room = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
BUDGET = 64 * 2**20


def mapped(name):
    # Memory that is a file, which the system may write out at any time.
    whole = torch.from_file(place + name, shared=True, size=count * size // 4, dtype=torch.float32)
    return StateDict({f"t{number}": part for number, part in enumerate(whole.chunk(count))})


live, back = mapped("-live"), mapped("-back")
for number in range(count):
    live[f"t{number}"][::1024] = number + 1
Snapshot.take(place + "-warm", {"state": StateDict(x=torch.ones(3))}, memory_budget_bytes=BUDGET)
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData:"))
resource.setrlimit(resource.RLIMIT_DATA, (used + room, used + room))
snapshot = Snapshot.take(place, {"state": live}, memory_budget_bytes=BUDGET)
snapshot.restore({"state": back}, memory_budget_bytes=BUDGET)
for number in range(count):
    found = back[f"t{number}"]
    assert bool((found[::1024] == number + 1).all()) and bool((found[1::1024] == 0).all())
assert snapshot.verify(memory_budget_bytes=BUDGET).ok
"""


@pytest.mark.slow
@pytest.mark.campaign("Within the budget", "a state several times as large as what the process may use, taken and restored in place")
def test_a_state_larger_than_the_memory(place: Path, campaign: Campaign) -> None:
    """State and what is restored are mapped files; beyond them the process gets the budget, and threads."""
    size = campaign.choose(64, 512) * MIB
    wanted = campaign.choose(GIB // 2, 16 * GIB)
    nbytes = min(wanted, shutil.disk_usage(place.parent).free // 4 // size * size)
    if nbytes < wanted:
        campaign.note(f"there is room for a state of {nbytes // GIB} GiB, not of {wanted // GIB} GiB")
    given = [str(place), str(nbytes // size), str(size), str(256 * MIB)]
    try:
        ended = subprocess.run([sys.executable, "-c", LARGE, *given], capture_output=True, text=True, check=False)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        for path in place.parent.glob("snapshot-[lb]*"):
            path.unlink()
    assert 0 == ended.returncode, ended.stderr
    campaign.tried(nbytes // size)
