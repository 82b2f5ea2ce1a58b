"""Garbage collection leaves alone what may be needed by anybody: the living, snapshots, and people who keep other files there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from expstate import gc
from expstate.engine import lease as leases
from expstate.engine.lease import LEASE_SECONDS
from expstate.format import names
from tests.engine.leftovers import DEAD, LIVING, age, data_name, lease, listing, own_lease, put, take


def test_files_that_the_manifest_names_stay_whatever_a_lease_says(tmp_path: Path) -> None:
    """A dead lease with the snapshot's own id, which a crash between commit and end leaves, takes itself away alone."""
    snapshot = take(tmp_path / "run")
    lease(tmp_path / "run", snapshot.id, named=tuple(record.name for record in snapshot.manifest.files))
    gc(tmp_path)

    assert snapshot.verify().ok
    assert not list((tmp_path / "run").glob(".attempt*"))


def test_what_is_at_work_is_left_alone(tmp_path: Path) -> None:
    """A living attempt's files stay, and its lease is reported."""
    put(tmp_path, data_name(LIVING))
    its = own_lease(tmp_path)
    age(its, 0 if leases.boot_id() is None else 2 * LEASE_SECONDS)
    report = gc(tmp_path)

    assert (str(its),) == report.alive
    assert () == report.removed
    assert [its.name, data_name(LIVING)] == listing(tmp_path)


def test_a_living_attempt_beside_a_dead_one_keeps_its_files(tmp_path: Path) -> None:
    """Each lease stands for the files of its own attempt."""
    put(tmp_path, data_name(LIVING), data_name())
    its = own_lease(tmp_path)
    lease(tmp_path)
    gc(tmp_path)

    assert [its.name, data_name(LIVING)] == listing(tmp_path)


def test_a_dead_lease_does_not_speak_for_files_that_have_a_lease_of_their_own(tmp_path: Path) -> None:
    """What a dead overwrite was to replace may be copied back to the place by somebody who lives."""
    put(tmp_path, data_name(LIVING), data_name())
    its = own_lease(tmp_path)
    lease(tmp_path, named=(data_name(LIVING),))
    gc(tmp_path)

    assert [its.name, data_name(LIVING)] == listing(tmp_path)


def test_a_lease_that_is_not_a_day_old_is_alive(tmp_path: Path) -> None:
    """Of a process elsewhere nothing else is known."""
    its = lease(tmp_path)
    age(its, LEASE_SECONDS - 600)

    assert (str(its),) == gc(tmp_path).alive


def test_where_the_manifest_is_damaged_nothing_is_touched(tmp_path: Path) -> None:
    """Which files are needed cannot be told, so all are."""
    folder = tmp_path / "run"
    snapshot = take(folder)
    path = folder / names.MANIFEST
    data = path.read_bytes()
    put(folder, data_name())
    lease(folder)
    newer = data.replace(b'{"format":1', b'{"format":2')
    for damaged in (newer, data[:-5] + b"xxxxx", data + b"\n"):
        path.unlink()
        path.write_bytes(damaged)
        before = listing(folder)
        report = gc(tmp_path)
        assert (str(folder),) == report.damaged
        assert () == report.removed
        assert before == listing(folder)
    assert snapshot is not None


def test_where_the_manifest_is_no_file_nothing_is_touched(tmp_path: Path) -> None:
    """A link, a pipe or a folder in its place is damage too."""
    put(tmp_path, data_name())
    lease(tmp_path)
    path = tmp_path / names.MANIFEST
    for make in (lambda: path.symlink_to("nowhere"), lambda: os.mkfifo(path), path.mkdir):
        make()
        before = listing(tmp_path)
        assert (str(tmp_path),) == gc(tmp_path).damaged
        assert before == listing(tmp_path)
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_folder_without_a_lease_is_not_looked_into(tmp_path: Path) -> None:
    """Data files whose take nobody knows of stay: they may come from anywhere."""
    put(tmp_path / "run", data_name(), f".snapshot.json.{DEAD[:8]}")
    before = listing(tmp_path)
    report = gc(tmp_path)

    assert ((), (), ()) == (report.removed, report.alive, report.damaged)
    assert before == listing(tmp_path)


FOREIGN = [
    "notes.txt",
    "model.safetensors",
    data_name(LIVING),
    f"notes-{DEAD[:8]}.txt",
    f"model-00001-{DEAD[:8]}.safetensors.bak",
    f"model-00001-{DEAD[:8]}.ckpt",
    f"{DEAD[:8]}.safetensors",
    f".hidden-{DEAD[:8]}.safetensors",
    f"notes.{DEAD[:8]}",
    "." + DEAD[:8],
    f"sub/model-00001-{DEAD[:8]}.safetensors",
    f"base/notes-{DEAD[:8]}.txt",
    f"base/{data_name(LIVING)}",
    ".gitignore",
    "attempt.json",
]


def test_files_of_others_stay(tmp_path: Path) -> None:
    """Whatever else lies in the folder, or below it, has another name and is kept."""
    put(tmp_path, *FOREIGN, data_name())
    lease(tmp_path)
    gc(tmp_path)

    assert sorted([*FOREIGN, "sub", "base"]) == listing(tmp_path)


def test_a_forged_lease_names_no_files_of_others(tmp_path: Path) -> None:
    """A lease can name data files of snapshots in its own folder, and nothing else."""
    outside = tmp_path / data_name(LIVING)
    put(tmp_path, outside.name)
    folder = tmp_path / "run"
    put(folder, "notes.txt", names.ANNOTATIONS, "sub/" + data_name(LIVING))
    forged = ("notes.txt", f"../{outside.name}", str(outside), f"sub/{data_name(LIVING)}", names.ANNOTATIONS, names.MANIFEST, ".", "..", "")
    lease(folder, named=forged)
    before = listing(folder)
    gc(tmp_path)

    assert outside.exists()
    assert sorted(set(before) - {names.lease_name(DEAD[:8])}) == listing(folder)


@pytest.mark.parametrize("its_id", [LIVING, "", "x", DEAD[:7]])
def test_a_lease_under_the_name_of_another_tells_nothing(tmp_path: Path, its_id: str) -> None:
    """The id inside and the name of the file must agree."""
    put(tmp_path, data_name())
    path = lease(tmp_path, id=its_id)

    assert (str(path),) == gc(tmp_path).alive
    assert [path.name, data_name()] == listing(tmp_path)


def test_links_are_not_followed(tmp_path: Path) -> None:
    """Neither a lease, nor a folder, nor the folder of shared files is looked for behind a link."""
    outside = tmp_path / "outside"
    put(outside / "real", data_name())
    lease(outside / "real")
    root = tmp_path / "root"
    put(root / "run", data_name())
    (root / "run" / names.lease_name(DEAD[:8])).symlink_to(outside / "real" / names.lease_name(DEAD[:8]))
    (root / "linked").symlink_to(outside / "real")
    put(root / "other")
    lease(root / "other")
    (root / "other" / "base").symlink_to(outside / "real")
    before = listing(outside), listing(root / "run")
    gc(root)

    assert before == (listing(outside), listing(root / "run"))
    assert ["base"] == listing(root / "other")


def test_a_link_under_a_name_of_the_attempt_is_left_alone(tmp_path: Path) -> None:
    """No take makes links, so this one is somebody's."""
    target = tmp_path / "target"
    target.touch()
    put(tmp_path / "run")
    (tmp_path / "run" / data_name()).symlink_to(target)
    lease(tmp_path / "run")
    gc(tmp_path)

    assert target.exists()
    assert [data_name()] == listing(tmp_path / "run")


def test_snapshots_in_one_another_are_told_apart(tmp_path: Path) -> None:
    """An inner folder's leftovers go, the outer snapshot stays, and the other way round."""
    outer = take(tmp_path / "run")
    put(tmp_path / "run" / "inner", data_name())
    lease(tmp_path / "run" / "inner")
    gc(tmp_path)
    assert not (tmp_path / "run" / "inner").exists()
    assert outer.verify().ok

    inner = take(tmp_path / "died" / "inner")
    put(tmp_path / "died", data_name())
    lease(tmp_path / "died")
    gc(tmp_path)
    assert ["inner"] == [path.name for path in (tmp_path / "died").iterdir()]
    assert inner.verify().ok


def test_an_inner_snapshots_files_are_not_the_outer_attempts(tmp_path: Path) -> None:
    """The same id below, where a copy has it, is another folder's."""
    put(tmp_path, data_name())
    put(tmp_path / "inner", data_name())
    lease(tmp_path)
    gc(tmp_path)

    assert ["inner", f"inner/{data_name()}"] == listing(tmp_path)
