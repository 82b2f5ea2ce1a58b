"""Whole runs of the catalog's benchmark, small: every step does what it says, is checked, and leaves nothing behind."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from expstate.bench import catalog, run
from expstate.bench.child import perform
from expstate.bench.options import add_arguments, options_from
from expstate.bench.plan import CATALOG, DISK, OPERATIONS, Task, Workload, operation_names
from expstate.cli import main

SMALL = ["--gib", "0.005", "--repeat", "1", "--records", "300", "--snapshots", "7", "--small-tensors", "25"]


def _options(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return options_from(parser.parse_args(["catalog", *SMALL, *words]))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(catalog, "TAKES", 3)
        records = run.run(_options(), execute=perform)
    assert [] == list(folder.iterdir())
    return records


def test_every_operation_is_measured_and_nothing_fails(found):
    assert {} == {(record.operation, record.system): record.error for record in found if record.error}
    assert operation_names(device=False, benchmark=CATALOG) == [record.operation for record in found if record.system == "expstate"]
    assert ["diff_stats"] == [record.operation for record in found if record.system == "limit"]


def test_operations_say_what_they_are_made_of(found):
    parts = {record.operation: record.parts for record in found if record.parts}

    assert {"record", "search", "search_any"} == parts.keys()
    assert {"first", "with", "without"} == parts["record"].keys()
    assert len(catalog.COMMON) == len(parts["search"])
    assert len(catalog.ANY) == len(parts["search_any"])
    slowest = {record.operation: record.seconds[0] for record in found if record.operation.startswith("search")}
    assert slowest == {operation: max(seconds[0] for seconds in parts[operation].values()) for operation in slowest}


def test_statistics_are_compared_with_reading(found):
    (row,) = [record for record in found if (record.operation, record.system) == ("diff_stats", "expstate")]

    assert row.ratio_to_limit > 0
    assert row.gib_per_s > 0
    assert all(record.gib_per_s is None for record in found if record.operation != "diff_stats")


@pytest.mark.parametrize("operation", ["diff", "diff_stats", "to_pandas", "scan"])
def test_a_step_that_finds_another_thing_than_was_prepared_is_no_result(tmp_path, operation):
    kept, folder = tmp_path / "kept", tmp_path / "now"
    kept.mkdir()
    folder.mkdir()
    task = Task(f"prepare_{operation}", "expstate", Workload(4 * 2**20, 5, 25, records=30, snapshots=3), str(folder), str(kept))
    assert "" == perform(task).error
    more = msgspec.structs.replace(task.workload, total_bytes=8 * 2**20, small_tensors=50, records=60, snapshots=4)

    assert "" == perform(msgspec.structs.replace(task, operation=operation)).error
    (folder / "catalog.db").unlink(missing_ok=True)
    assert "instead of" in perform(msgspec.structs.replace(task, operation=operation, workload=more)).error


def test_the_benchmark_of_a_disk_records_nothing(tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir()
    monkeypatch.setenv("EXPSTATE_CATALOG", str(tmp_path / "catalog.db"))
    task = Task("take", "expstate", Workload(4 * 2**20, 5, 1), str(tmp_path / "kept"))

    assert "" == perform(task).error
    assert "" == perform(msgspec.structs.replace(task, operation="async_stall", folder=str(tmp_path))).error
    assert not (tmp_path / "catalog.db").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--operations", "take"], "take: only with PATH"),
        (["--device", "cuda"], "measures on the host"),
        (["--records", "0"], "at least 1"),
        (["--snapshots", "0"], "at least 1"),
    ],
)
def test_options_that_cannot_be_met_are_refused(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        _options(*words)


def test_a_folder_is_not_asked_for_what_the_catalog_does(tmp_path):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(ValueError, match="search: only with `bench catalog`"):
        options_from(parser.parse_args([str(tmp_path), "--gib", "0.02", "--operations", "search"]))


def test_a_folder_that_is_named_catalog_is_a_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("catalog").mkdir()
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = options_from(parser.parse_args(["./catalog", "--gib", "0.02"]))
    of_catalog = _options()

    assert {DISK} == {OPERATIONS[name].benchmark for name in options.operations}
    assert {CATALOG} == {OPERATIONS[name].benchmark for name in of_catalog.operations}


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert 0 == main(["bench", "catalog", *SMALL, "--operations", "diff", "--json", "out.json"])
    (row,) = msgspec.json.decode(Path("out.json").read_bytes())
    assert "operation" == next(iter(row))
    assert ("diff", "expstate", "") == (row["operation"], row["system"], row["error"])
    assert capsys.readouterr().out.startswith("operation")


def test_what_the_first_record_imports_is_not_imported_before_it(tmp_path):
    code = "import sys; from expstate.bench import catalog; print('sqlalchemy' in sys.modules)"

    assert "False\n" == subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
