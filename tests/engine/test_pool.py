"""A snapshot of more files than a process may have open is read as every other."""

from __future__ import annotations

import random
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.engine.pool import FilePool
from expstate.errors import StorageError
from expstate.storage.base import FileReader
from expstate.storage.local import LocalStorage
from tests.snapshot.boxes import write_boxes

FILES = 300
FULL = torch.arange(2 * FILES)


@pytest.fixture
def few_handles() -> Iterator[None]:
    """Let this process open only some files more than it has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 450, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def snapshot(tmp_path) -> Snapshot:
    """One tensor, two elements of it in each file."""
    write_boxes(tmp_path / "a", "s/x", FULL, [((2 * number,), (2,)) for number in range(FILES)])
    return Snapshot(tmp_path / "a")


@pytest.mark.usefixtures("few_handles")
def test_all_files_are_read(snapshot):
    assert torch.equal(FULL, snapshot.read_object("s/x"))
    assert torch.equal(FULL[5:590], snapshot.read_object("s/x", rows=slice(5, 590)))
    live = StateDict(x=torch.zeros_like(FULL))
    snapshot.restore({"s": live}, atomic=True)
    assert torch.equal(FULL, live["x"])
    assert snapshot.verify().ok


def test_files_that_are_missing_or_cut_short_are_named(snapshot):
    names = [record.name for record in snapshot.manifest.files]
    (Path(snapshot.path) / names[250]).unlink()
    with (Path(snapshot.path) / names[260]).open("r+b") as file:
        file.truncate(file.seek(0, 2) - 1)
    assert {names[250], names[260]} == {damage.file for damage in snapshot.verify().damages}


@pytest.fixture
def pooled(tmp_path) -> tuple[Path, list[FileReader], FilePool]:
    """Twenty small files, of which two may be open."""
    storage, pool = LocalStorage(str(tmp_path)), FilePool(most=2)
    readers = []
    for number in range(20):
        name = f"x-{number:05d}-01234567.safetensors"
        (tmp_path / name).write_bytes(bytes([number]) * 4096)
        readers.append(pool.add(storage.open_file(name), lambda name=name: storage.open_file(name)))
    return tmp_path, readers, pool


def _first_byte(reader: FileReader) -> int:
    target = memoryview(bytearray(1))
    reader.read_cached_into(0, target) if reader.is_cached(0, 1) else reader.read_into(0, target)
    return target[0]


def test_threads_get_the_bytes_of_the_file_that_they_ask_for(pooled):
    _, readers, pool = pooled
    numbers = [random.randrange(20) for _ in range(500)]
    with ThreadPoolExecutor(8) as threads:
        assert numbers == list(threads.map(lambda number: _first_byte(readers[number]), numbers))
    assert len(pool._open) <= 2 + 8
    pool.close()
    assert not pool._open


def test_a_file_that_is_gone_when_it_is_read_again_is_named(pooled):
    folder, readers, pool = pooled
    (folder / readers[0].name).unlink()
    with pytest.raises(StorageError, match=f"file '{readers[0].name}' is gone: the snapshot was deleted or replaced"):
        _first_byte(readers[0])
    assert 19 == _first_byte(readers[19])
    pool.close()
