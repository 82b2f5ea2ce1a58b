"""Whole runs of the benchmark, small: every system takes part, is verified, and leaves nothing behind."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util

import msgspec
import pytest
import torch
from torch.distributed.checkpoint import staging

from expstate.bench import run
from expstate.bench.child import perform
from expstate.bench.options import add_arguments, options_from
from expstate.bench.plan import GIB, MODULES, OPERATIONS, SYSTEMS, Outcome, Task, Workload, contenders, operation_names
from expstate.cli import main

FIELDS = {"operation", "system", "seconds", "gib_per_s", "ratio_to_limit", "peak_extra_bytes", "cpu_seconds"}
INSTALLED = [system for system in SYSTEMS[1:] if importlib.util.find_spec(MODULES[system])]


@pytest.fixture(autouse=True)
def _settings_of_torch():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.serialization.set_crc32_options(True)


def _options(tmp_path, *words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return options_from(parser.parse_args([str(tmp_path), "--gib", "0.02", "--repeat", "1", "--small-tensors", "200", *words]))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    records = run.run(_options(folder), execute=perform)
    assert [] == list(folder.iterdir())
    return records


def is_too_old(record):
    """Whether this PyTorch has not yet what the row measures: there its error is the result."""
    return record.system == "dcp" and bool(record.error) and not hasattr(staging, "StagingOptions")


def test_every_operation_has_a_row_of_every_system_that_can_do_it(found):
    expected = {
        (operation, system)
        for operation in operation_names(device=False)
        for system in ("limit", *INSTALLED)
        if contenders(operation, system, device=False)
    }
    assert expected == {(record.operation, record.system) for record in found}


def test_every_system_brings_back_every_byte(found):
    assert {} == {(record.operation, record.system): record.error for record in found if record.error and not is_too_old(record)}


def test_every_row_is_compared_with_its_limit(found):
    rows = msgspec.json.decode(msgspec.json.encode([record for record in found if not is_too_old(record)]))
    assert all(row.keys() >= FIELDS for row in rows)
    limited = [row for row in rows if OPERATIONS[row["operation"]].limits]
    assert {1.0} == {row["ratio_to_limit"] for row in limited if row["system"] == "limit"}
    assert all(row["ratio_to_limit"] > 0 and row["gib_per_s"] > 0 and len(row["seconds"]) == 1 for row in limited)


def test_parts_of_small_tensors_add_up(found):
    rows = {record.system: record for record in found if record.operation == "small_tensors"}
    assert {"take", "restore", "entries"} == rows["expstate"].parts.keys()
    for record in rows.values():
        assert record.seconds[0] == pytest.approx(record.parts["take"][0] + record.parts["restore"][0])


def test_a_restore_that_changes_a_byte_is_no_result(tmp_path):
    task = Task(
        "prepare", "torch", Workload(4 * 2**20, 5, 1), str(tmp_path), kept=str(tmp_path / "kept"), expected=str(tmp_path / "expected")
    )
    (tmp_path / "kept").mkdir()
    assert "" == perform(msgspec.structs.replace(task, operation="describe")).error
    assert "" == perform(task).error
    restore = msgspec.structs.replace(task, operation="restore_warm_unverified")
    assert "" == perform(restore).error
    file = tmp_path / "kept" / "snapshot"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert "1 of 5 tensors differ" in perform(restore).error


def test_a_system_that_fails_does_not_stop_the_others(tmp_path):
    def execute(task):
        return Outcome(error="OSError: no") if task.system == "torch" else Outcome(seconds=1.0, bytes=GIB)

    records = run.run(_options(tmp_path, "--systems", "torch", "dcp", "--operations", "take", "restore_cold"), execute)
    assert {"torch": "OSError: no", "dcp": ""} == {record.system: record.error for record in records}


def test_everybody_has_a_turn_before_anybody_has_a_second_one(tmp_path):
    turns = []

    def execute(task):
        turns.append((task.system, task.setting))
        return Outcome(seconds=1.0, bytes=GIB)

    run.run(_options(tmp_path, "--systems", "dcp", "safetensors", "--operations", "take", "--repeat", "3"), execute)
    everybody = {("safetensors", ""), ("dcp", "1 thread"), ("dcp", "2 threads"), ("dcp", "4 threads")}
    assert [everybody] * 3 == [set(turns[first : first + 4]) for first in (0, 4, 8)]
    assert turns[0] != turns[4] != turns[8]


def test_a_setting_far_behind_and_a_very_slow_system_are_not_repeated(tmp_path):
    turns = []
    seconds = {"1 thread": 1.0, "2 threads": 1.2, "4 threads": 2.5, "": 61.0}

    def execute(task):
        turns.append(task.setting)
        return Outcome(seconds=seconds[task.setting], bytes=GIB)

    run.run(_options(tmp_path, "--systems", "dcp", "expstate", "--operations", "take", "--repeat", "3"), execute)
    assert [3, 3, 1, 1] == [turns.count(setting) for setting in seconds]


def test_nothing_is_left_behind_when_the_benchmark_is_interrupted(tmp_path):
    def execute(task):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(_options(tmp_path, "--systems", "torch", "--operations", "take"), execute)
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gib", "0.0001"], "expected at least"),
        (["--tensors", "1"], "expected at least"),
        (["--repeat", "0"], "at least 1"),
        (["--gib", "1000000"], "GiB free"),
        (["--operations", "staging"], "only with --device"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--json", "no/such/folder/out.json"], "its folder does not exist"),
    ],
)
def test_options_that_cannot_be_met_are_refused(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        _options(tmp_path, *words)
    with pytest.raises(ValueError, match="is no folder"):
        _options(tmp_path / "missing")


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["--gib", "0.01", "--repeat", "1", "--systems", "limit", "--operations", "read_one", "--json", str(tmp_path / "out.json")]
    assert 0 == main(["bench", str(disk), *words])
    (row,) = msgspec.json.decode((tmp_path / "out.json").read_bytes())
    assert ("read_one", "limit", 1.0, "") == (row["operation"], row["system"], row["ratio_to_limit"], row["error"])
    output = capsys.readouterr()
    assert output.out.startswith("operation  system")
    assert "read_one 1/1 limit read_one 1 thread: " in output.err
    assert [] == list(disk.iterdir())


def test_a_process_that_dies_is_a_failure_and_tells_why(tmp_path, monkeypatch):
    task = Task("take", "torch", Workload(4 * 2**20, 5, 1), str(tmp_path))
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", "")
    monkeypatch.setattr(run.sys, "executable", "/bin/false")
    assert "exit status 1: no output" == run.in_child(task).error


def test_options_reach_the_task(tmp_path):
    options = _options(tmp_path, "--memory-budget-mib", "64", "--systems", "expstate", "--operations", "take")
    assert 64 * 2**20 == options.memory_budget_bytes
    tasks = []

    def execute(task):
        tasks.append(task)
        return Outcome(seconds=1.0, bytes=GIB)

    run.run(options, execute)
    assert [(options.memory_budget_bytes, options.workload)] == [(task.memory_budget_bytes, task.workload) for task in tasks]
    assert ["take"] == list(dataclasses.asdict(options)["operations"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_a_state_on_an_accelerator_is_brought_back_by_everybody(tmp_path):
    device = torch.accelerator.current_accelerator().type
    records = run.run(_options(tmp_path, "--device", device, "--systems", "limit", "expstate", "torch", "dcp"), execute=perform)
    assert {} == {(record.operation, record.system): record.error for record in records if record.error}
    assert set(operation_names(device=True)) == {record.operation for record in records}
