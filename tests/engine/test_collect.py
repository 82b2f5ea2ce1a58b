"""Garbage collection: what dead attempts left goes, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import torch

from expstate import Snapshot, StateDict, gc
from expstate.engine import lease as leases
from expstate.engine.lease import Lease

ATTEMPT = "3f9a2c71"
ID = ATTEMPT + "0" * 24
DATA = f"model-00001-{ATTEMPT}.safetensors"


def lease_of(*, pid: int, started: int | None, boot: str | None = None, files: tuple[str, ...] = (), action: str = "take") -> bytes:
    """A lease of some process of this boot, or of another."""
    here = leases.boot_id() if boot is None else boot
    return msgspec.json.encode(Lease(ID, action, "host", here, leases.process_namespace(), pid, started, time.time(), files))


def dead_process() -> int:
    """The id of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave(folder: Path, lease: bytes, *, age: float = 0.0) -> Path:
    """What an interrupted take leaves: a lease, a data file, a temporary file; and files of other people."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".attempt-{ATTEMPT}.json"
    path.write_bytes(lease)
    os.utime(path, (time.time() - age, time.time() - age))
    (folder / DATA).write_bytes(b"x" * 100)
    (folder / f".snapshot.json.{ATTEMPT}").write_bytes(b"x")
    (folder / "notes.txt").write_text("mine")
    (folder / "model-00001-aaaaaaaa.safetensors").write_bytes(b"another attempt's")
    return path


KEPT = {"notes.txt", "model-00001-aaaaaaaa.safetensors"}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_leftovers_of_a_dead_process_go_and_other_files_stay(tmp_path: Path) -> None:
    """Files that carry the attempt's id go, the lease last; what others keep in the folder stays."""
    leave(tmp_path, lease_of(pid=dead_process(), started=1))
    report = gc(tmp_path)
    (leftover,) = report.removed
    assert (ATTEMPT, "take", f".attempt-{ATTEMPT}.json") == (leftover.attempt, leftover.action, leftover.files[-1])
    assert {DATA, f".snapshot.json.{ATTEMPT}", f".attempt-{ATTEMPT}.json"} == set(leftover.files)
    assert report.nbytes > 100
    assert KEPT == names_in(tmp_path)


def test_a_dry_run_removes_nothing(tmp_path: Path) -> None:
    """It reports the same and leaves everything."""
    leave(tmp_path, lease_of(pid=dead_process(), started=1))
    before = names_in(tmp_path)
    assert 1 == len(gc(tmp_path, dry_run=True).removed)
    assert before == names_in(tmp_path)


def test_a_process_that_lives_is_left_alone_however_old_its_lease(tmp_path: Path) -> None:
    """A laptop that slept for a week wakes up and commits."""
    leave(tmp_path, lease_of(pid=os.getpid(), started=leases.start_time(os.getpid())), age=10 * 24 * 3600)
    report = gc(tmp_path)
    assert ((), 1) == (report.removed, len(report.alive))
    assert DATA in names_in(tmp_path)


def test_a_process_id_that_was_given_out_again_is_dead(tmp_path: Path) -> None:
    """The process of this id was started at another time than the one that took the lease."""
    leave(tmp_path, lease_of(pid=os.getpid(), started=12345))
    assert 1 == len(gc(tmp_path).removed)


@pytest.mark.parametrize(("age", "removed"), [(3600.0, 0), (25 * 3600.0, 1)])
def test_another_boot_is_dead_after_a_day_without_a_sign(tmp_path: Path, age: float, removed: int) -> None:
    """Whether a process of another machine lives, only its lease can tell."""
    leave(tmp_path, lease_of(pid=1, started=1, boot="another"), age=age)
    assert removed == len(gc(tmp_path).removed)


@pytest.mark.parametrize(("age", "removed"), [(3600.0, 0), (25 * 3600.0, 1)])
def test_a_lease_that_cannot_be_read_counts_by_its_age(tmp_path: Path, age: float, removed: int) -> None:
    """A power cut can leave one without a word of whose it is: it gave no sign for as long as it is old."""
    leave(tmp_path, b"{", age=age)
    assert removed == len(gc(tmp_path).removed)


def test_a_folder_without_a_lease_is_not_touched(tmp_path: Path) -> None:
    """Files that look like leftovers may be somebody's."""
    leave(tmp_path, lease_of(pid=dead_process(), started=1)).unlink()
    before = names_in(tmp_path)
    assert () == gc(tmp_path).removed
    assert before == names_in(tmp_path)


def test_files_that_the_manifest_names_stay(tmp_path: Path) -> None:
    """A process that died between the commit and the end of its lease leaves a whole snapshot."""
    snapshot = Snapshot.take(tmp_path / "s", {"model": StateDict(w=torch.ones(3))})
    lease = msgspec.json.encode(
        Lease(snapshot.id, "take", "host", leases.boot_id(), leases.process_namespace(), dead_process(), 1, 0.0, (DATA,))
    )
    (tmp_path / "s" / f".attempt-{snapshot.id[:8]}.json").write_bytes(lease)
    (leftover,) = gc(tmp_path).removed
    assert (f".attempt-{snapshot.id[:8]}.json",) == leftover.files
    assert Snapshot(tmp_path / "s").verify().ok


def test_nothing_goes_where_the_manifest_is_damaged(tmp_path: Path) -> None:
    """What a damaged manifest needs cannot be known."""
    snapshot = Snapshot.take(tmp_path, {"model": StateDict(w=torch.ones(3))})
    manifest = tmp_path / "snapshot.json"
    data = bytearray(manifest.read_bytes())
    data[50] ^= 1
    manifest.unlink()
    manifest.write_bytes(data)
    lease = lease_of(pid=dead_process(), started=1).replace(ID.encode(), snapshot.id.encode())
    (tmp_path / f".attempt-{snapshot.id[:8]}.json").write_bytes(lease)
    before = names_in(tmp_path)
    report = gc(tmp_path)
    assert ((), (str(tmp_path),)) == (report.removed, report.damaged)
    assert before == names_in(tmp_path)


def test_an_interrupted_deletion_is_finished(tmp_path: Path) -> None:
    """The lease of a deletion names the files, whatever ids they carry."""
    leave(tmp_path, lease_of(pid=dead_process(), started=1, files=("model-00001-aaaaaaaa.safetensors", "../evil"), action="delete"))
    (tmp_path / "annotations.json").write_text("{}")
    gc(tmp_path)
    assert {"notes.txt"} == names_in(tmp_path)


def test_folders_below_are_looked_at_and_links_are_not_followed(tmp_path: Path) -> None:
    """Snapshots nest; a link may lead anywhere."""
    outside = tmp_path / "outside"
    leave(outside, lease_of(pid=dead_process(), started=1))
    root = tmp_path / "root"
    leave(root / "a" / "b", lease_of(pid=dead_process(), started=1))
    (root / "link").symlink_to(outside)
    assert [str(root / "a" / "b")] == [leftover.url for leftover in gc(root).removed]
    assert DATA in names_in(outside)


def test_a_folder_that_is_empty_afterwards_goes(tmp_path: Path) -> None:
    """Only the folder that held nothing else."""
    folder = tmp_path / "run"
    leave(folder, lease_of(pid=dead_process(), started=1))
    for name in KEPT:
        (folder / name).unlink()
    gc(tmp_path)
    assert not folder.exists()
    assert tmp_path.exists()
