"""What the benchmark's meter counts, and its hold on the page cache."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
import torch

from expstate.bench.measure import Meter, cached_bytes, evict, make_durable, warm
from expstate.bench.plan import MIB


def _file_system_of(path: Path) -> str:
    best = ("", "unknown")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split()
        if os.path.commonpath([point, path]) == point and len(point) >= len(best[0]):
            best = point, kind
    return best[1]


@pytest.fixture
def folder(tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "data").write_bytes(os.urandom(8 * MIB))
    (inner / "empty").write_bytes(b"")
    make_durable(tmp_path)
    return tmp_path


def test_files_are_put_into_the_page_cache_and_out_of_it(folder):
    warm(folder)
    assert 8 * MIB == cached_bytes(folder)
    if _file_system_of(folder) in {"tmpfs", "ramfs"}:
        pytest.skip("this file system has no disk below its page cache")
    assert 0 == evict(folder)
    assert 0 == cached_bytes(folder)


@pytest.mark.parametrize("maps_files", [False, True])
def test_memory_that_is_allocated_and_freed_counts(maps_files):
    with Meter(maps_files=maps_files) as meter:
        block = torch.empty(64 * MIB, dtype=torch.uint8).fill_(1)
        for _ in range(20):
            block.max()
        del block
    assert 63 * MIB <= meter.peak_extra_bytes <= 80 * MIB
    assert 0 < meter.cpu_seconds
    assert 0 < meter.seconds


def test_pages_of_a_mapped_file_do_not_count(folder):
    with Meter(maps_files=True) as meter, (folder / "a/b/data").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert 8 * MIB == len(mapped)
        assert 0 <= mapped.find(b"\0")
        assert sum(mapped[offset] for offset in range(0, len(mapped), mmap.PAGESIZE)) > 0
    assert meter.peak_extra_bytes < 4 * MIB


def test_the_accelerator_is_awaited_before_and_after():
    calls = []
    with Meter(synchronize=lambda: calls.append("idle")):
        assert ["idle"] == calls
    assert ["idle", "idle"] == calls
